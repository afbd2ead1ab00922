"""Files and batches through the real openai client, against a live server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types import Batch

from qwenkit.text.tokenizer import Tokenizer
from tests.serve.conftest import LiveServer, MakeServer, StartServer, running
from tests.serve.scripted import ScriptedEngine

URL = "/v1/chat/completions"


_clients: list[openai.OpenAI] = []


@pytest.fixture(autouse=True)
def closed_clients() -> Iterator[None]:
    yield
    while _clients:
        _clients.pop().close()


def client_of(live: LiveServer, key: str = "none") -> openai.OpenAI:
    http = openai.DefaultHttpxClient(verify=False)
    _clients.append(openai.OpenAI(base_url=live.url + "/v1", api_key=key, max_retries=0, http_client=http))
    return _clients[-1]


def jsonl(count: int, url: str = URL, **body: Any) -> bytes:
    lines = [
        {
            "custom_id": f"c{n}",
            "method": "POST",
            "url": url,
            "body": {"model": "tiny", "messages": [{"role": "user", "content": f"hi {n}"}], "max_tokens": 8} | body,
        }
        for n in range(count)
    ]
    return "\n".join(map(json.dumps, lines)).encode()


def wait_for(client: openai.OpenAI, batch: Batch, seconds: float = 60.0) -> Batch:
    deadline = time.monotonic() + seconds
    while (found := client.batches.retrieve(batch.id)).completed_at is None and time.monotonic() < deadline:
        if found.status in ("failed", "expired", "cancelled"):
            break
        time.sleep(0.02)
    return found


def begin(client: openai.OpenAI, data: bytes, endpoint: Any = URL, window: Any = "24h", **settings: Any) -> Batch:
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window=window, **settings)


def test_the_whole_way(live_server: StartServer) -> None:
    live = live_server(["Hello!"])
    client = client_of(live)
    data = jsonl(5) + b"\n" + jsonl(1, messages=[]).replace(b"c0", b"wrong")
    file = client.files.create(file=("my input.jsonl", data), purpose="batch")
    assert (file.filename, file.bytes, file.purpose, file.status) == ("my input.jsonl", len(data), "batch", "processed")
    assert client.files.content(file.id).content == data
    batch = client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h", metadata={"who": "me"})
    assert (batch.object, batch.endpoint, batch.metadata) == ("batch", URL, {"who": "me"})
    assert batch.expires_at == batch.created_at + 86400
    done = wait_for(client, batch)
    assert done.status == "completed"
    assert done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 6, "completed": 5, "failed": 1}
    assert done.output_file_id is not None
    assert done.error_file_id is not None
    output = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
    assert [record["custom_id"] for record in output] == [f"c{n}" for n in range(5)]
    assert {record["response"]["body"]["choices"][0]["message"]["content"] for record in output} == {"Hello!"}
    [error] = [json.loads(line) for line in client.files.content(done.error_file_id).text.splitlines()]
    assert (error["custom_id"], error["response"]["status_code"]) == ("wrong", 400)
    assert {asked.settings["priority"] for asked in live.engine.asked} == {-1}
    assert done.usage is not None
    assert done.usage.output_tokens > 0
    assert client.files.retrieve(done.output_file_id).purpose == "batch_output"
    with pytest.raises(openai.ConflictError, match="completed"):
        client.batches.cancel(batch.id)
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}),
    ],
)
def test_every_endpoint(live_server: StartServer, url: str, body: dict[str, Any]) -> None:
    client = client_of(live_server(["Hello!"]))
    line = {"custom_id": "a", "method": "POST", "url": url, "body": {"model": "tiny"} | body}
    done = wait_for(client, begin(client, json.dumps(line).encode(), url))
    assert done.error_file_id is None, client.files.content(done.error_file_id or "").text
    assert done.output_file_id is not None
    assert "Hello!" in client.files.content(done.output_file_id).text


def test_lists_have_pages(live_server: StartServer) -> None:
    client = client_of(live_server())
    batches = [begin(client, jsonl(1)).id for _ in range(5)]
    assert [batch.id for batch in client.batches.list(limit=2)] == batches[::-1]
    uploads = [file.id for file in client.files.list(limit=2, purpose="batch")]
    assert len(uploads) == 5
    assert [file.id for file in client.files.list(limit=2, purpose="batch", order="asc")] == uploads[::-1]


def test_cancel_and_expire(live_server: StartServer) -> None:
    live = live_server()
    client = client_of(live)
    live.engine.gate.clear()
    batch = begin(client, jsonl(3))
    with pytest.raises(openai.ConflictError, match="reads"):
        client.files.delete(batch.input_file_id)
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    late = begin(client, jsonl(3), window="1s")
    live.engine.gate.set()
    assert wait_for(client, batch).status == "cancelled"
    live.engine.seconds = 0.5
    late = wait_for(client, begin(client, jsonl(3), window="1s"))
    assert late.status == "expired"
    assert late.error_file_id is not None
    assert "batch_expired" in client.files.content(late.error_file_id).text


def test_keys_do_not_see_each_other(live_server: StartServer) -> None:
    live = live_server(api_key=("first-key", "second-key"))
    mine, theirs = client_of(live, "first-key"), client_of(live, "second-key")
    batch = begin(mine, jsonl(2))
    done = wait_for(mine, batch)
    assert done.output_file_id is not None
    for attempt in (
        lambda: theirs.batches.retrieve(batch.id),
        lambda: theirs.batches.cancel(batch.id),
        lambda: theirs.files.content(done.output_file_id or ""),
        lambda: theirs.files.delete(batch.input_file_id),
        lambda: theirs.batches.create(input_file_id=batch.input_file_id, endpoint=URL, completion_window="24h"),
        lambda: theirs.files.list(after=batch.input_file_id),
    ):
        with pytest.raises(openai.NotFoundError):
            attempt()
    assert list(theirs.files.list()) == list(theirs.batches.list()) == []
    assert len({asked.settings["cache_namespace"] for asked in live.engine.asked}) == 1
    assert live.engine.asked[0].settings["cache_namespace"], "a batch runs in the name of its key"
    with pytest.raises(openai.AuthenticationError):
        client_of(live, "third-key").files.list()


def test_limits(live_server: StartServer) -> None:
    live = live_server(max_file="4KB", state_disk_per_key="6KB", max_batches=1, max_batch_lines=2)
    client = client_of(live)
    with pytest.raises(openai.APIStatusError) as caught:
        client.files.create(file=("big", b"x" * 6000), purpose="batch")
    assert caught.value.status_code == 413
    live.engine.gate.clear()
    first = begin(client, jsonl(2))
    with pytest.raises(openai.RateLimitError, match="unfinished"):
        begin(client, jsonl(1))
    live.engine.gate.set()
    client.files.create(file=("in", b"x" * 3500), purpose="batch")
    with pytest.raises(openai.APIStatusError, match="may keep"):
        client.files.create(file=("in", b"x" * 3500), purpose="batch")
    files = [file.id for file in client.files.list()]
    assert not list(live.app.state.batches.folder.glob("files/*.part"))
    wait_for(client, first)
    for file_id in files:
        client.files.delete(file_id)
    failed = wait_for(client, begin(client, jsonl(3)))
    assert failed.status == "failed"
    assert failed.errors is not None
    assert failed.errors.data is not None
    assert (failed.errors.data[0].code, failed.errors.data[0].line) == ("too_many_lines", 3)


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"window": "soon"}, "completion_window"),
        ({"window": "31d"}, "completion_window"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
    ],
)
def test_bad_batches(live_server: StartServer, settings: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        begin(client_of(live_server()), jsonl(1), **settings)
    assert caught.value.param == param


def test_bad_uploads(live_server: StartServer) -> None:
    live = live_server()
    purposes = live.post("/v1/files", data={"purpose": "vision"}, files={"file": b"x"})
    assert (purposes.status_code, purposes.json()["error"]["param"]) == (400, "purpose")
    for content, kind in ((b"{}", "application/json"), (b"x", "multipart/form-data; boundary=b"), (b"", "")):
        answer = live.post("/v1/files", content=content, headers={"content-type": kind})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_multipart")
    two = live.post("/v1/files", data={"purpose": "batch"}, files=[("file", b"x"), ("file", b"y")])
    assert two.status_code == 400
    name = live.post("/v1/files", data={"purpose": "batch"}, files={"file": ("../../etc/passwd", b"x")}).json()
    assert live.app.state.batches.folder.joinpath("files", name["id"]).read_bytes() == b"x"
    assert live.get("/v1/files/..%2f..%2fbatches.sqlite3/content").status_code == 404


def test_a_revoked_keys_batch_stays_where_it_is(make_server: MakeServer, tokenizer: Tokenizer) -> None:
    batches = {}
    slow = ScriptedEngine(tokenizer, ["Hello!"], max_num_seqs=1, seconds=0.05)
    with running(make_server(engine=slow, api_key=("old", "kept"))) as live:
        for key in ("old", "kept"):
            with client_of(live, key) as client:
                file = client.files.create(file=("in.jsonl", jsonl(30)), purpose="batch")
                batches[key] = client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
    with running(make_server(api_key=("kept",))) as live, client_of(live, "kept") as client:
        assert wait_for(client, batches["kept"]).status == "completed"
        answer = live.get(f"/v1/batches/{batches['old'].id}", headers={"x-api-key": "old"})
        assert answer.status_code == 401
    with running(make_server(engine=slow, api_key=("old", "kept"))) as live, client_of(live, "old") as client:
        found = client.batches.retrieve(batches["old"].id)
        assert found.status == "in_progress", "it waited for its key"
        assert found.request_counts is not None
        assert found.request_counts.completed < 30
    with running(make_server(api_key=("old",))) as live, client_of(live, "old") as client:
        done = wait_for(client, batches["old"])
        assert done.status == "completed"
        assert done.request_counts is not None
        assert done.request_counts.completed == 30
