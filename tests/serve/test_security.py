"""Hostile requests of tests/data/security/http.jsonl against a live server, shorter than benchmarks/attacks.py sends them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest
from benchmarks.attack_cases import body_of, cases, expanded

from qwenkit.text.tokenizer import Tokenizer
from tests.serve.conftest import LiveServer, StartServer, running, servers
from tests.serve.test_http_protocol import answers, connect, is_closed

MOST = 1 << 20  # bytes of a body


@pytest.fixture(scope="module")
def live(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    settings: Any = {"served_model_name": ("served",), "header_timeout": 0.6, "keep_alive": 0.6}
    with servers(tokenizer, tmp_path_factory.mktemp("live")) as make, running(make(["x"], **settings)) as live:
        yield live


@pytest.mark.parametrize("case", cases("post"), ids=lambda case: case["id"])
def test_a_request_is_answered_soon(live: LiveServer, case: dict[str, Any]) -> None:
    body, kind = body_of(case["body"], MOST)
    head = f"POST {case['path']} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    with closing(connect(live, timeout=60)) as sock:
        began = time.process_time()
        sock.sendall(head.encode() + body)
        [(status, answer)] = answers(sock, 1)
        assert time.process_time() - began < 5, "CPU seconds, with much room"
        assert status in case["status"], answer[:500]
        assert len(answer) < 5000 or status == 200
        if "code" in case:
            assert json.loads(answer)["error"]["code"] == case["code"]
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answers(sock, 1)[0][0] == 200, "the connection is still good"


@pytest.mark.parametrize("case", cases("hold"), ids=lambda case: case["id"])
def test_a_connection_is_not_held(live: LiveServer, case: dict[str, Any]) -> None:
    with closing(connect(live)) as sock:
        sock.sendall(case["send"].encode())
        time.sleep(0.2)
        sock.sendall(case["after_1s"].encode())
        began = time.monotonic()
        while not is_closed(sock):
            pass
        assert time.monotonic() - began < 10, "0.6 + 0.6 + 1 s, with room"


@pytest.mark.parametrize("case", cases("batch"), ids=lambda case: case["id"])
def test_an_input_file_is_refused_soon(live_server: StartServer, case: dict[str, Any]) -> None:
    live = live_server(max_batch_lines=1000, api_key=("alice", "bob"))
    data = expanded(case["file"], MOST).encode()
    alice, bob = ({"Authorization": f"Bearer {key}"} for key in ("alice", "bob"))

    def batch(data: bytes, headers: dict[str, str]) -> str:
        upload = {"files": {"file": ("in.jsonl", data)}, "data": {"purpose": "batch"}}
        file = httpx.post(live.url + "/v1/files", headers=headers, timeout=60, **upload).json()  # type: ignore[arg-type]
        body = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "1h"}
        return str(live.post("/v1/batches", body, headers=headers).json()["id"])

    def ended(batch_id: str, headers: dict[str, str]) -> Any:
        while True:
            shown = live.get(f"/v1/batches/{batch_id}", headers=headers).json()
            if shown["status"] not in ("validating", "in_progress", "finalizing"):
                return shown
            time.sleep(0.05)

    bad = [batch(data, alice) for _ in range(3)]
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "max_tokens": 1}}
    good = batch(json.dumps(line).encode(), bob)
    assert ended(good, bob)["request_counts"]["completed"] == 1
    for one in bad:
        shown = ended(one, alice)
        assert shown["status"] == case["status"]
        assert len(shown["errors"]["data"]) <= 100


def test_rendering_has_a_budget_for_each_key(live_server: StartServer) -> None:
    [case] = cases("render")
    live = live_server(api_key=("alice", "bob"))
    live.post("/render", {"text": "a"}, headers={"x-api-key": "bob"})  # starts the process
    renderer = live.app.state.renderer
    renderer.timeout, renderer.budget.seconds = 0.2, 0.5
    text = expanded(case["text"], MOST)
    statuses = []
    for _ in range(case["times"]):
        answer = live.post("/render", {"text": text}, headers={"x-api-key": "alice"})
        statuses.append(answer.status_code)
        if answer.status_code == 429:
            break
    assert statuses[-1] == 429
    assert len(statuses) < 20
    assert int(answer.headers["retry-after"]) >= 1
    renderer.timeout = 10.0
    assert live.post("/render", {"text": "**a**"}, headers={"x-api-key": "bob"}).status_code == 200


@pytest.mark.parametrize("limit", ["tokens", "requests"])
def test_lines_of_batches_count_to_the_minute_of_their_key(live_server: StartServer, limit: str) -> None:
    live = live_server(["x"], api_key=("alice", "bob"), **{f"{limit}_per_minute": 20})
    alice, bob = ({"Authorization": f"Bearer {key}"} for key in ("alice", "bob"))

    def batch(number: int, headers: dict[str, str]) -> str:
        lines = [
            {
                "custom_id": str(n),
                "method": "POST",
                "url": "/v1/completions",
                "body": {"prompt": "abcde", "max_tokens": 1},
            }
            for n in range(number)
        ]
        upload = {"files": {"file": ("in.jsonl", "\n".join(map(json.dumps, lines)))}, "data": {"purpose": "batch"}}
        file = httpx.post(live.url + "/v1/files", headers=headers, timeout=60, **upload).json()  # type: ignore[arg-type]
        body = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "1h"}
        return str(live.post("/v1/batches", body, headers=headers).json()["id"])

    def completed(batch_id: str, headers: dict[str, str]) -> int:
        return int(live.get(f"/v1/batches/{batch_id}", headers=headers).json()["request_counts"]["completed"])

    many = batch(100, alice)
    deadline = time.monotonic() + 30
    while completed(many, alice) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    few = batch(2, bob)
    while completed(few, bob) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert completed(few, bob) == 2, "lines that wait for their key's minute take nobody's place"
    assert 2 <= completed(many, alice) <= 20
    assert live.post("/v1/completions", {"prompt": "abcde" * 3}, headers=alice).status_code == 429
