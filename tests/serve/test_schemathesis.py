"""The server against its own OpenAPI document: whatever a client sends, no answer is a 5xx or one that the document lacks.

schemathesis runs as a program of its own, as it would against a stranger's server. The suite sends the boundary values of every
field and a few random requests; with QWENKIT_SLOW=1 it sends many thousands of random ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from qwenkit.engine.llm import LLM
from qwenkit.engine.sampling import SamplingParams
from qwenkit.serve.app import create_app
from qwenkit.serve.keys import Keys
from tests.conftest import ROOT
from tests.serve.conftest import MODEL, LiveServer, MakeServer, running
from tests.tiny_models import write_model

pytest.importorskip("schemathesis")
SLOW = bool(os.environ.get("QWENKIT_SLOW"))
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)
ANSWERS = (
    "Hello!",
    "<think>\nhm\n</think>\n\nYes.",
    '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
    "<tool_call>\n{",
)


def answer(prompt: list[int], params: SamplingParams) -> str:
    """Text, a thought, a call, half a call: another one for each length of a prompt."""
    return ANSWERS[len(prompt) % len(ANSWERS)]


def fuzz(live: LiveServer, folder: Path, phases: str, examples: int, *more: str) -> int:
    """How many requests schemathesis sent, all of which passed its checks."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", live.url + "/openapi.json", "--phases", phases]
    command += ["--max-examples", str(examples), "--checks", ",".join(CHECKS), "--no-color", *more]
    command += ["--report", "json", "--report-json-path", str(folder / "report.json"), "--warnings", "off"]
    if not SLOW:
        command.append("--generation-deterministic")
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "tests.serve.schemathesis_hooks", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, "\n".join(line[:500] for line in (ran.stdout + ran.stderr).splitlines()[:200])
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    sent = int(report["test_cases"]["generated"])
    print(f"{sent} requests")
    return sent


def test_boundary_values_of_every_field(make_server: MakeServer, tmp_path: Path) -> None:
    with running(make_server(answer)) as live:
        sent = fuzz(live, tmp_path, "coverage,fuzzing,stateful", 300 if SLOW else 3)
        assert live.server.driver.healthy
        assert live.get("/v1/models").json()["data"][0]["id"] == MODEL
    assert sent > 2000
    assert len(live.engine.asked) > 100, "hardly any request was good enough to be answered"


def test_a_model_that_computes(make_server: MakeServer, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "qwen3")
    llm = LLM(str(folder), device="cpu", kv_memory="4MiB", max_num_seqs=8)
    server = make_server(engine=llm.engine, tokenizer=llm.tokenizer, chat_format=llm.chat_format)
    app = create_app(server, keys=Keys(admin="admin"))
    with running(server, app=app) as live:
        sent = fuzz(live, tmp_path, "fuzzing", 300 if SLOW else 3, "--header", "Authorization: Bearer admin")
        assert live.server.driver.healthy
    assert sent > 2000 if SLOW else sent > 50
    llm.engine.check()
    assert not llm.engine.has_work


def test_every_operation_of_the_document_has_a_name_of_its_own(make_server: MakeServer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        document = create_app(make_server()).openapi()
    operations = [operation for routes in document["paths"].values() for operation in routes.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names) > 20
    assert all({"200", "4XX"} <= set(operation["responses"]) for operation in operations)
