"""A hub on 127.0.0.1: as much of Hugging Face's and ModelScope's protocols as their clients need to list and download.

It can misbehave: cut a connection after some bytes, serve other bytes than it lists, refuse, list hostile names.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save

from qwenkit.hub import fetch

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class HubServer:
    """What the hub has (name of a repository -> name of a file -> bytes), how it misbehaves, and what it was asked."""

    repos: dict[str, dict[str, bytes]]
    gated: set[str] = field(default_factory=set)
    cuts: dict[str, list[int]] = field(default_factory=dict)  # file -> after how many bytes each connection is cut
    served: dict[str, bytes] = field(default_factory=dict)  # file -> what comes instead of what is listed
    status: dict[str, int] = field(default_factory=dict)  # file -> the status it is answered with
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    url: str = ""
    content_url: str = ""  # of the files themselves: another host, as in the world outside

    def ranges(self, name: str) -> list[str | None]:
        """The Range header of every GET of a file's content, in order."""
        return [range_ for method, path, range_ in self.asked if method == "GET" and path == f"/content/{name}"]


@contextmanager
def hub_server(repos: dict[str, dict[str, bytes]]) -> Iterator[HubServer]:
    hub = HubServer(repos)

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    hub.content_url = f"http://localhost:{server.server_address[1]}/content"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        self.hub.asked.append((self.command, unquote(parts.path), self.headers.get("Range")))
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        steps = unquote(parts.path).strip("/").split("/")
        if steps[0] == "content":
            self._content("/".join(steps[1:]))
        elif steps[:2] == ["api", "models"]:
            self._hugging_face("/".join(steps[2:4]), steps[4:])
        elif steps[:3] == ["api", "v1", "models"]:
            self._modelscope("/".join(steps[3:5]), steps[5:], query)
        elif len(steps) > 4 and steps[2] == "resolve":
            self._resolve("/".join(steps[:2]), steps[3], "/".join(steps[4:]))
        else:
            self._reply(404, b"no such page")

    def _hugging_face(self, repo: str, rest: list[str]) -> None:
        files = self.hub.repos.get(repo)
        if files is None:
            return self._reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if repo in self.hub.gated:
            return self._reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if len(rest) == 2 and rest[1] not in ("main", COMMIT):
            return self._reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if rest[:1] == ["tree"]:
            return self._json([self._entry(name, content) for name, content in files.items()])
        return self._json({"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})

    def _entry(self, name: str, content: bytes) -> dict[str, object]:
        entry: dict[str, object] = {"type": "file", "path": name, "size": len(content), "oid": git_sha1(content)}
        if _is_large(name):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def _resolve(self, repo: str, commit: str, name: str) -> None:
        content = self.hub.repos.get(repo, {}).get(name)
        if content is None:
            return self._reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{git_sha1(content)}"'}
        if _is_large(name):
            headers |= {
                "X-Linked-Size": str(len(content)),
                "X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "Location": f"{self.hub.content_url}/{quote(name)}",
            }
            return self._reply(302, b"", headers)
        return self._content(name, headers)

    def _modelscope(self, repo: str, rest: list[str], query: dict[str, str]) -> None:
        files = self.hub.repos.get(repo)
        if files is None:
            return self._json({"Code": 10010205001, "Message": "not found", "Success": False}, 404)
        if rest == ["repo", "files"]:
            entries = [
                {"Path": name, "Type": "blob", "Size": len(content), "Sha256": hashlib.sha256(content).hexdigest()}
                for name, content in files.items()
            ]
            return self._json({"Code": 200, "Success": True, "Data": {"Files": entries}})
        if rest == ["repo"] and query["FilePath"] in files:
            return self._reply(302, b"", {"Location": f"{self.hub.content_url}/{quote(query['FilePath'])}"})
        return self._reply(404, b"")

    def _content(self, name: str, headers: dict[str, str] | None = None) -> None:
        if name in self.hub.status:
            return self._reply(self.hub.status[name], b"no")
        content = self.hub.served.get(name) or next(files[name] for files in self.hub.repos.values() if name in files)
        headers = {"Accept-Ranges": "bytes", **(headers or {})}
        start, status = 0, 200
        if asked := self.headers.get("Range"):
            start, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if start >= len(content):
                return self._reply(416, b"")
        cuts = self.hub.cuts.get(name) if self.command == "GET" else None
        self._reply(status, content[start:], headers, keep=cuts.pop(0) if cuts else None)
        return None

    def _json(self, content: object, status: int = 200) -> None:
        self._reply(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _reply(self, status: int, body: bytes, headers: dict[str, str] | None = None, keep: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")  # so that none outlives the server
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:keep])


def _is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".gguf"))


def tiny_model() -> dict[str, bytes]:
    """A repository with two shards of some hundred kilobytes, and with files that a model does not need."""
    generator = np.random.default_rng(0)
    tensors = {f"layers.{i}.weight": generator.standard_normal((160, 256), dtype=np.float32) for i in range(4)}
    shards = {f"model-0000{n}-of-00002.safetensors": dict(list(tensors.items())[2 * n - 2 : 2 * n]) for n in (1, 2)}
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {tensor: shard for shard, content in shards.items() for tensor in content},
    }
    return {
        "README.md": b"# tiny\n",
        "config.json": b'{"model_type": "qwen2"}',
        "generation_config.json": b"{}",
        "tokenizer.json": b'{"model": {}}',
        "merges.txt": b"a b\n",
        "modeling_tiny.py": b"raise SystemExit\n",
        "original/params.json": b"{}",
        "pytorch_model.bin": b"a pickle",
        "model.safetensors.index.json": json.dumps(index).encode(),
        **{shard: save(content) for shard, content in shards.items()},
    }


WANTED = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "merges.txt",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
}


def use_hub(monkeypatch: pytest.MonkeyPatch, folder: Path, url: str) -> None:
    """Point both hubs' clients to `url` and every cache into `folder`."""
    for name in (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "MODELSCOPE_API_TOKEN",
        "XDG_CACHE_HOME",
        "ALL_PROXY",
        "all_proxy",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "HF_ENDPOINT": url,
        "MODELSCOPE_ENDPOINT": url,
        "MODELSCOPE_CACHE": str(folder / "modelscope"),
        "MODELSCOPE_HOME": str(folder / "modelscope-home"),
        "QWENKIT_CACHE": str(folder / "qwenkit"),
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "huggingface"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(fetch, "_FIRST_WAIT", 0.001)
