"""Lines of a batch within their key's limits: they wait for the minute, and their answers are whole."""

from __future__ import annotations

import json
import time

import pytest

from qwenkit.serve.batch import worker
from tests.serve.batch.test_http import begin, client_of, jsonl, wait_for
from tests.serve.conftest import StartServer


def test_lines_wait_for_the_minute(live_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_LONGEST_WAIT", 0.1)
    shift = 0.0
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + shift)
    live = live_server(["x" * 100], tokens_per_minute=2000, api_key=("k", "other"), batch_concurrency=4)
    client = client_of(live, "k")
    spent = live.post(
        "/v1/completions",
        {"prompt": "x", "n": 2, "max_tokens": 3000, "ignore_eos": True},
        headers={"Authorization": "Bearer k"},
    )
    assert 2000 <= spent.json()["usage"]["total_tokens"] <= 2002
    before = len(live.engine.asked)
    batch = begin(client, jsonl(6, max_tokens=60, ignore_eos=True))
    other = begin(client_of(live, "other"), jsonl(2))
    assert wait_for(client_of(live, "other"), other).status == "completed", "others do not wait"
    waiting = client.batches.retrieve(batch.id)
    assert waiting.status in ("validating", "in_progress")
    assert len(live.engine.asked) == before + 2, "no line of the key has reached the engine"
    shift = 180.0
    done = wait_for(client, batch)
    assert done.status == "completed"
    assert done.output_file_id is not None
    for line in client.files.content(done.output_file_id).text.splitlines():
        usage = json.loads(line)["response"]["body"]["usage"]
        assert usage["completion_tokens"] == 60, "an answer is never cut for the limit"


def test_a_line_that_runs_is_finished_beyond_the_minute(live_server: StartServer) -> None:
    live = live_server(["x" * 600], tokens_per_minute=100, api_key=("k",), batch_concurrency=4)
    client = client_of(live, "k")
    done = wait_for(client, begin(client, jsonl(1, max_tokens=300, ignore_eos=True)))
    assert done.status == "completed"
    assert done.output_file_id is not None
    records = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
    assert [record["response"]["body"]["usage"]["completion_tokens"] for record in records] == [300]
    refused = live.post("/v1/completions", {"prompt": "x"}, headers={"Authorization": "Bearer k"})
    assert refused.status_code == 429, "what they made is counted"
