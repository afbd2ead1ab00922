"""Runs SGLang's API test kits, which travel in its wheel, against a qwenkit server.

    python tests/outside/sglang_kits.py [--url URL] [--only TEXT] KIT...

KIT is the name of a file of sglang/test/kits without `_kit.py`. Without a URL a scripted engine that thinks is served, for the
kit `reasoning`. The wheel is downloaded to a temporary folder (or given with --wheel) and only its kits are unpacked: SGLang is
not installed. A shim stands before the server; it gives SGLang's own routes (/generate, /abort_request, …) by means of ours,
and our answers the names that the kits look for. Needs the packages of the extra `test`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import types
import unittest
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
from llguidance.gbnf_to_lark import any_to_lark

ROOT = Path(__file__).resolve().parents[2]
WHEEL = "sglang==0.5.23"
SAMPLING = {"max_new_tokens": "max_tokens", "json_schema": "guided_json", "regex": "guided_regex"}
NOT_OURS = {
    "test_tool_result_image_content_conversion": "tests a class of SGLang, not a server",
    "test_reasoning_tokens_generate_exact_count": "counts tokens of /generate, which only the shim has",
    "test_waiting_timeout": "sets an environment variable of SGLang's server",
    "test_running_timeout_no_crash": "sets an environment variable of SGLang's server",
}


class Shim(BaseHTTPRequestHandler):
    """SGLang's routes in our words; everything else is passed on."""

    upstream = ""
    aborting = threading.Event()

    def do_GET(self) -> None:
        if self.path == "/health_generate":
            answer = httpx.post(self.upstream + "/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=60)
            return self._send(answer.status_code, {})
        if self.path in ("/get_server_info", "/get_model_info"):
            model = httpx.get(self.upstream + "/v1/models").json()["data"][0]
            return self._send(200, model | {"model_path": model["id"]})
        answer = httpx.get(self.upstream + self.path, headers=self._headers())
        return self._send(answer.status_code, answer.content)

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path == "/abort_request":
            self.aborting.set()
            return self._send(200, {})
        if self.path == "/generate":
            return self._generate(json.loads(data))
        with contextlib.suppress(ValueError):
            data = json.dumps(self._asked(json.loads(data))).encode()
        url = self.upstream + self.path
        with httpx.stream("POST", url, content=data, headers=self._headers(), timeout=600) as answer:
            self.send_response(answer.status_code)
            self.send_header("content-type", answer.headers.get("content-type", ""))
            self.end_headers()
            for line in answer.iter_lines():
                self.wfile.write(_told(line).encode() + b"\n")
                self.wfile.flush()

    def _asked(self, body: dict[str, Any]) -> dict[str, Any]:
        if body.get("separate_reasoning") is True:  # which is all that we do
            del body["separate_reasoning"]
        if body.get("model") == "default":
            del body["model"]
        return body

    def _generate(self, body: dict[str, Any]) -> None:
        sampling = body["sampling_params"]
        asked = {SAMPLING.get(name, name): value for name, value in sampling.items() if value is not None}
        asked.pop("stop_token_ids", None)  # of another model's vocabulary
        if "ebnf" in asked:
            asked["guided_grammar"] = any_to_lark(asked.pop("ebnf"))
        length = len(self._post("/tokenize", {"prompt": body["text"]})["tokens"])
        room = httpx.get(self.upstream + "/v1/models").json()["data"][0]["max_model_len"] - length
        asked |= {"prompt": body["text"], "max_tokens": min(asked.get("max_tokens", 128), room), "stream": True}
        asked |= {"return_token_ids": True}
        found = [{"text": "", "output_ids": [], "meta_info": {}} for _ in range(asked.get("n", 1))]
        if body.get("stream"):
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
        with httpx.stream("POST", self.upstream + "/v1/completions", json=asked, timeout=600) as answer:
            if answer.status_code != 200:
                return self._send(answer.status_code, answer.read())
            for line in answer.iter_lines():
                if self.aborting.is_set():  # leaving the block hangs up, which ends the generation
                    for one in found:
                        one["meta_info"]["finish_reason"] = {"type": "abort"}
                    break
                for choice in json.loads(line[6:])["choices"] if line.startswith("data: {") else ():
                    one = found[choice["index"]]
                    one["text"] += choice["text"]
                    one["output_ids"] += choice.get("token_ids") or []
                    if choice["finish_reason"]:
                        one["meta_info"]["finish_reason"] = {"type": choice["finish_reason"]}
                    if body.get("stream"):
                        self.wfile.write(f"data: {json.dumps(one)}\n\n".encode())
        if body.get("stream"):
            self.wfile.write(b"data: [DONE]\n\n")
            return None
        return self._send(200, found if len(found) > 1 else found[0])

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return httpx.post(self.upstream + path, json=body, timeout=60).json()

    def _headers(self) -> dict[str, str]:
        return {k: v for k, v in self.headers.items() if k.lower() not in ("host", "content-length", "accept-encoding")}

    def _send(self, status: int, body: Any) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    def log_message(self, *args: Any) -> None:
        pass


def _told(line: str) -> str:
    """A line of an answer, with SGLang's names beside ours."""
    head, data = ("data: ", line[6:]) if line.startswith("data: {") else ("", line)
    try:
        body = json.loads(data)
    except ValueError:
        return line
    if not isinstance(body, dict):
        return line
    for choice in body.get("choices") or ():
        choice["matched_stop"] = choice.get("stop_reason")
    details = (body.get("usage") or {}).get("completion_tokens_details")
    if details is not None:
        body["usage"]["reasoning_tokens"] = details["reasoning_tokens"]
    return head + json.dumps(body)


class Process:
    """What a kit asks of the server's process: None while it is well."""

    def __init__(self, url: str) -> None:
        self.url = url

    def poll(self) -> int | None:
        return None if httpx.get(self.url + "/health").status_code == 200 else 1


def kits(wheel: str | None, folder: Path) -> None:
    """Puts the kits where Python finds them, and stands in for what they import of SGLang itself."""
    if wheel is None:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), WHEEL]
        subprocess.run(command, check=True)
        wheel = str(next(folder.glob("*.whl")))
    with zipfile.ZipFile(wheel) as files:
        files.extractall(folder, [name for name in files.namelist() if name.startswith("sglang/test/kits/")])
    sys.path.insert(0, str(folder))
    for name, members in {
        "sglang.srt": (),
        "sglang.srt.parser.reasoning_parser": ("ReasoningParser",),
        "sglang.srt.utils.hf_transformers_utils": ("get_tokenizer",),
        "sglang.srt.entrypoints.anthropic.protocol": ("AnthropicMessagesRequest",),
        "sglang.srt.entrypoints.anthropic.serving": ("AnthropicServing",),
    }.items():
        module = types.ModuleType(name)
        for member in members:
            setattr(module, member, None)
        sys.modules[name] = module


@contextlib.contextmanager
def scripted() -> Iterator[str]:
    """A server whose engine thinks when it is not told otherwise."""
    sys.path.insert(0, str(ROOT))
    from tests.outside.thinking_server import serve

    with serve() as url:
        yield url


def case(mixin: type, url: str) -> type[unittest.TestCase]:
    """A test case of a kit's class, with what kits expect of their host."""
    model = httpx.get(url + "/v1/models").json()["data"][0]["id"]
    members: dict[str, Any] = {
        "base_url": url,
        "model": model,
        "served_model_name": model,
        "api_key": "none",
        "process": Process(url),
        "client": openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0),
        "setUp": lambda self: Shim.aborting.clear(),
    }
    for name, reason in NOT_OURS.items():
        if hasattr(mixin, name):
            members[name] = unittest.skip(reason)(getattr(mixin, name))
    return type(mixin.__name__, (mixin, unittest.TestCase), members)


def main() -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kits", nargs="+", metavar="KIT")
    parser.add_argument("--url", help="server to test, without /v1")
    parser.add_argument("--wheel", help="SGLang's wheel, when it is here already")
    parser.add_argument("--only", default="", help="tests whose name has this")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        kits(options.wheel, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        Shim.upstream = options.url or stack.enter_context(scripted())
        shim = ThreadingHTTPServer(("127.0.0.1", 0), Shim)
        shim.request_queue_size = 128
        threading.Thread(target=shim.serve_forever, daemon=True).start()
        stack.callback(shim.shutdown)
        url = f"http://127.0.0.1:{shim.server_address[1]}"
        suite = unittest.TestSuite()
        for kit in options.kits:
            module = importlib.import_module(f"sglang.test.kits.{kit}_kit")
            mixins = [
                found for found in vars(module).values() if isinstance(found, type) and found.__name__.endswith("Mixin")
            ]
            for mixin in mixins:
                for test in unittest.defaultTestLoader.loadTestsFromTestCase(case(mixin, url)):
                    if options.only in test.id():
                        suite.addTest(test)
        return 0 if unittest.TextTestRunner(verbosity=2, buffer=True).run(suite).wasSuccessful() else 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # kits leave threads behind
