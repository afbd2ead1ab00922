"""A worker without a model, for tests: an ASGI app that answers what it is asked to, and a process that runs batches with it.

As a program: `python -m tests.serve.batch.echo_app FOLDER SECONDS` prints a line, works on the batches in FOLDER until none is
left, and takes SECONDS for an answer.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
from starlette.types import Receive, Scope, Send

from qwenkit.serve.batch.rows import BatchLimits, BatchRow, FileRow, NewFile, new_id
from qwenkit.serve.batch.store import BatchStore
from qwenkit.serve.batch.worker import BatchWorker
from qwenkit.serve.caller import SCOPE_KEY, Caller

URL = "/v1/chat/completions"


class EchoApp:
    """Answers {"echo": body["say"], "usage"}. body["status"]: answer with it (a list: one for each try); body["crash"]: raise.

    `asked` holds who asked what; `most` is how many were at it at the same time. `gate` holds every answer back.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.running, self.most = seconds, 0, 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked: list[tuple[Caller, Any]] = []
        self.tries: dict[str, int] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = orjson.loads((await receive())["body"])
        self.asked.append((scope[SCOPE_KEY], body.get("say")))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.gate.wait()
            await asyncio.sleep(self.seconds)
        finally:
            self.running -= 1
        if body.get("crash"):
            raise RuntimeError("as the test asked")
        status, key = body.get("status", 200), scope[SCOPE_KEY].request_id
        if isinstance(status, list):
            self.tries[key] = self.tries.get(key, 0) + 1
            status = status[min(self.tries[key], len(status)) - 1]
        answer = {"echo": body.get("say"), "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
        if status >= 300:
            answer = {"error": {"message": "as the test asked"}}
        await send({"type": "http.response.start", "status": status, "headers": [(b"retry-after", b"0")]})
        await send({"type": "http.response.body", "body": orjson.dumps(answer)})


def request_line(number: int, **body: Any) -> bytes:
    body = {"model": "tiny", "say": number} | body
    return orjson.dumps({"custom_id": f"line-{number}", "method": "POST", "url": URL, "body": body}) + b"\n"


def add_input(store: BatchStore, data: bytes, owner: str = "") -> FileRow:
    new = NewFile(new_id("file-"), "in.jsonl", len(data))
    store.path(new.id).write_bytes(data)
    return store.add_file(owner, "batch", new, None)


def add_batch(store: BatchStore, lines: list[bytes] | bytes, owner: str = "", seconds: int = 3600) -> BatchRow:
    data = lines if isinstance(lines, bytes) else b"".join(lines)
    return store.create_batch(add_input(store, data, owner), URL, "1h", seconds)


def records(store: BatchStore, batch: BatchRow, kind: str) -> list[dict[str, Any]]:
    """The lines of a finished batch's `output` or `error` file."""
    file_id = getattr(batch, f"{kind}_file_id")
    return [orjson.loads(line) for line in store.path(file_id).read_bytes().splitlines()] if file_id else []


def worker(app: Any, store: BatchStore, *, concurrency: int = 4, **settings: Any) -> BatchWorker:
    return BatchWorker(app, store, BatchLimits(), concurrency=concurrency, max_line_bytes=10_000, **settings)


async def until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    async def wait() -> None:
        while not holds():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(wait(), seconds)


async def work(folder: Path, seconds: float) -> None:
    store = BatchStore(folder)
    running = worker(EchoApp(seconds), store)
    running.start()
    print("works", flush=True)
    await until(lambda: not store.open_batches())
    await running.stop()


if __name__ == "__main__":
    asyncio.run(work(Path(sys.argv[1]), float(sys.argv[2])))
