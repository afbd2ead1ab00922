"""What a thousand requests leave behind: nothing. Finished, refused, failed, aborted ones, with grammars, adapters, batches.

The real app is called in this process, over ASGI, around a scripted engine and around a real tiny one. After a first round that
fills what is bounded (compiled grammars, the prefix cache, labels of metrics), a second, longer one must leave as many objects of
each type, blocks, files, tasks, threads and entries of the engine's and the server's tables as there were.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from qwenkit.engine.engine import Engine
from qwenkit.engine.llm import LLM
from qwenkit.engine.sampling import SamplingParams
from qwenkit.serve.app import create_app
from qwenkit.serve.keys import Keys
from qwenkit.serve.server import Server
from qwenkit.text.tokenizer import Tokenizer
from tests.serve.conftest import MakeServer
from tests.serve.scripted import ScriptedEngine
from tests.tiny_models import tiny_pair, write_model
from tests.weights.test_adapter import save_adapter

KEYS = ("key-of-alice", "key-of-bob", "key-of-carol")
REQUESTS = 1000
POOLS = ("AnyIO worker", "asyncio_", "ThreadPoolExecutor", "tqdm")  # of as many threads as were busy at once
SLACK = {"weakref.ReferenceType": 250}  # sqlite3 drops those of cursors that are gone by the hundred; of other types 30


async def call(
    app: FastAPI, path: str, body: Any, key: str, *, leave: int | None = None, method: str = "POST", kind: str = "json"
) -> tuple[int, bytes]:
    """Status and body of a request to the app; with `leave` the client goes away after so many parts of the answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    content = "application/json" if kind == "json" else f"multipart/form-data; boundary={kind}"
    headers = {"host": "localhost", "authorization": f"Bearer {key}", "content-type": content}
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method,
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()] +
        [(b"content-length", str(len(data)).encode())], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    sent, gone = False, asyncio.Event()
    status, answer, parts = 0, bytearray(), 0

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": data, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal status, parts
        if message["type"] == "http.response.start":
            status = message["status"]
            return
        answer.extend(message.get("body", b""))
        parts += 1
        if not message.get("more_body", False) or (leave is not None and parts >= leave):
            gone.set()

    if leave == 0:
        gone.set()
    await app(scope, receive, send)
    return status, bytes(answer)


async def batch(app: FastAPI, key: str) -> None:
    """A batch of three lines, one of them wrong, from the upload to the deletion of its files."""
    lines = [
        {"custom_id": f"c{n}", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x" * n, "max_tokens": 3}}
        for n in range(3)
    ]
    data = "\n".join(map(json.dumps, lines))
    form = "".join(
        f'--sep\r\ncontent-disposition: form-data; name="{name}"{more}\r\n\r\n{value}\r\n'
        for name, more, value in (("purpose", "", "batch"), ("file", '; filename="in.jsonl"', data))
    )
    status, answer = await call(app, "/v1/files", (form + "--sep--\r\n").encode(), key, kind="sep")
    assert status == 200, answer
    file = json.loads(answer)["id"]
    body = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
    status, answer = await call(app, "/v1/batches", body, key)
    assert status == 200, answer
    name = json.loads(answer)["id"]
    deadline = time.monotonic() + 60
    while (found := json.loads((await call(app, f"/v1/batches/{name}", b"", key, method="GET"))[1]))["status"] not in (
        "completed",
        "failed",
    ):
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.02)
    assert found["request_counts"]["completed"] == 2, found
    for one in (file, found["output_file_id"], found["error_file_id"]):
        assert (await call(app, f"/v1/files/{one}", b"", key, method="DELETE"))[0] == 200


def shapes(adapter: str) -> list[tuple[str, dict[str, Any], set[int], int | None]]:
    """(path, body, statuses that are right, after how many parts the client leaves)."""
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    text = {"prompt": "once", "max_tokens": 4}
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    shaped = {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}}
    long = {"max_tokens": 200, "ignore_eos": True, "stream": True}
    gone = {0, 200, 499}
    return [
        ("/v1/chat/completions", chat, {200}, None),
        ("/v1/chat/completions", chat | {"stream": True, "n": 3}, {200}, None),
        ("/v1/chat/completions", chat | {"model": adapter, "logprobs": True}, {200}, None),
        ("/v1/chat/completions", chat | shaped, {200}, None),
        ("/v1/chat/completions", chat | long, gone, 3),
        ("/v1/chat/completions", chat | long | {"n": 4, "model": adapter}, gone, 0),
        ("/v1/chat/completions", chat | {"thinking_budget": 1}, {400}, None),
        ("/v1/completions", text | {"stop": ["\n", "never"], "temperature": 1.0, "seed": 3}, {200}, None),
        ("/v1/completions", text | {"prompt": ["a", "b", "c"], "echo": True}, {200}, None),
        ("/v1/completions", text | {"guided_regex": "[ab]{2}", "stream": True}, {200}, None),
        ("/v1/completions", text | {"guided_regex": "(("}, {400}, None),
        ("/v1/completions", text | {"model": "nobody"}, {404}, None),
        ("/v1/completions", text | long, gone, 2),
        ("/v1/completions", {"prompt": [13, 13, 13], "max_tokens": 4}, {500}, None),  # the engine fails at it
        ("/v1/completions", {"prompt": [13, 13, 13], "max_tokens": 4, "n": 3, "stream": True}, {500}, None),
        ("/v1/messages", chat | {"model": "tiny"}, {200}, None),
        ("/v1/messages", chat | {"model": "tiny", "stream": True}, {200}, None),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 4, "stream": True}, {200}, None),
        ("/tokenize", {"prompt": "Hi"}, {200}, None),
    ]


async def work(app: FastAPI, count: int, adapter: str) -> None:
    """`count` requests of all shapes under several keys, a dozen at a time, and a batch of each key."""
    limit = asyncio.Semaphore(12)
    kinds = shapes(adapter)

    async def one(number: int) -> None:
        path, body, right, leave = kinds[number % len(kinds)]
        async with limit:
            status, answer = await call(app, path, body, KEYS[number % len(KEYS)], leave=leave)
        assert status in right, (path, body, status, answer)

    async def cancelled(number: int) -> None:
        async with limit:
            body = {"prompt": "x", "max_tokens": 200, "ignore_eos": True}
            task = asyncio.create_task(call(app, "/v1/completions", body, KEYS[number % len(KEYS)]))
            await asyncio.sleep(0.002)
            task.cancel()
            await asyncio.wait([task])

    await asyncio.gather(
        *(one(number) for number in range(count)),
        *(cancelled(number) for number in range(count // 40)),
        *(batch(app, key) for key in KEYS),
    )


class Remains:
    """What is there at a moment at which nothing is asked."""

    def __init__(self, server: Server) -> None:
        timers: list[asyncio.TimerHandle] = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
        timers[:] = sorted(timer for timer in timers if not timer.cancelled())  # the loop itself keeps up to a hundred
        gc.collect()
        driver, engine = server.driver, server.driver.engine
        self.objects = Counter(f"{type(thing).__module__}.{type(thing).__qualname__}" for thing in gc.get_objects())
        self.tasks = sorted(task.get_name() for task in asyncio.all_tasks() if not task.get_name().startswith("Task-"))
        self.num_tasks = len(asyncio.all_tasks())
        names = [thread.name for thread in threading.enumerate() if not isinstance(thread, threading.Timer)]
        self.threads = sorted(name for name in names if not name.startswith(POOLS))
        self.pooled = len(names) - len(self.threads)
        self.files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        tables = (driver._open, driver._by_engine_id, driver._inbox, driver._queue._requests, driver._queue._tokens)
        self.tables = [len(table) for table in tables]
        self.held = engine.pool.num_blocks - engine.pool.num_free
        if isinstance(engine, Engine):
            scheduler = engine.scheduler
            self.tables += map(len, (engine._live, scheduler.running, scheduler._lines, scheduler._seats))
            engine.check()

    def grown(self, before: Remains) -> dict[str, tuple[int, int]]:
        """Types of which there are more than before, with both numbers; our own, Tasks and Futures to the last one."""
        exact = ("qwenkit.", "_asyncio.", "asyncio.")
        return {
            name: (before.objects[name], count)
            for name, count in self.objects.items()
            if count > before.objects[name] + (0 if name.startswith(exact) else SLACK.get(name, 30))
        }


async def settle(server: Server) -> Remains:
    driver = server.driver
    deadline = time.monotonic() + 20
    while driver.num_running or driver.num_waiting or driver.engine.has_work or driver._inbox or driver._unchecked:
        assert time.monotonic() < deadline, "it does not come to rest"
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.1)
    return Remains(server)


def leaves_nothing(server: Server, adapter: str, count: int) -> None:
    app = create_app(server, keys=Keys([("alice", KEYS[0]), ("bob", KEYS[1]), ("carol", KEYS[2])]))

    async def main() -> None:
        server.driver.start()
        async with app.router.lifespan_context(app):
            await work(app, count // 4, adapter)
            await settle(server)  # looking makes objects too, once
            before = await settle(server)
            await work(app, count, adapter)
            after = await settle(server)
        assert not any(after.tables), after.tables
        assert after.held == 0
        assert after.grown(before) == {}
        assert (after.tasks, after.num_tasks) == (before.tasks, before.num_tasks)
        assert after.threads == before.threads
        assert after.pooled <= 64
        assert after.files <= before.files
        assert server.driver.healthy

    try:
        asyncio.run(asyncio.wait_for(main(), 300))
    finally:
        server.driver.stop()


@pytest.fixture(autouse=True)
def no_records() -> Iterator[None]:
    """pytest keeps every record of the log, and with it whatever an exception's frames hold."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_after_a_thousand_requests_to_a_scripted_engine(make_server: MakeServer, tokenizer: Tokenizer) -> None:
    def script(prompt: list[int], params: SamplingParams) -> str:
        if prompt == [13, 13, 13]:
            raise RuntimeError("the engine cannot add this")
        return "x" * 400 if params.ignore_eos else '{"a":true}'

    class Lean(ScriptedEngine):
        def add(self, *args: Any, **settings: Any) -> int:
            try:
                return super().add(*args, **settings)
            finally:
                self.asked[-1] = None  # type: ignore[call-overload]

        def abort(self, request_id: int) -> None:
            super().abort(request_id)
            self.aborted.clear()

    server = make_server(engine=Lean(tokenizer, script), server_fields={"adapters": {"poet": "/nowhere"}})
    leaves_nothing(server, "poet", REQUESTS)


def test_after_many_requests_to_a_real_engine(make_server: MakeServer, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    save_adapter(tiny_pair("qwen2")[0], tmp_path / "poet", seed=1, r=2, target_modules=["q_proj", "v_proj"])
    llm = LLM(str(folder), device="cpu", kv_memory="1MiB", max_num_seqs=8, lora={"poet": tmp_path / "poet"})
    step = llm.engine.runner.run

    def run(rows: list[Any]) -> Any:
        if any(row.sequence.tokens[:3] == [13, 13, 13] for row in rows):
            raise RuntimeError("this row cannot be computed")
        return step(rows)

    llm.engine.runner.run = run  # type: ignore[method-assign]
    server = make_server(
        engine=llm.engine,
        tokenizer=llm.tokenizer,
        chat_format=llm.chat_format,
        server_fields={"adapters": {"poet": str(tmp_path / "poet")}},
    )
    leaves_nothing(server, "poet", REQUESTS // 4)
