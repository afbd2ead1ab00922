"""The worker: takes batches through their life, line by line, on the engine that also serves people.

In: open batches from the store. Out: results in the store, and at the end the files. A line is a request to the same app, in
this process, in the name of the key that made the batch and below everybody's priority. All transitions but creation and
cancelling are made by one task, so that a batch is never at two stations; whatever a kill interrupts is found again at the
next start, because a line without a result is still to be done.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sqlite3
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
import orjson
from starlette.types import ASGIApp, Receive, Scope, Send

from qwenkit.serve.batch.lines import Scan, answered, assemble, read_body, scan, unanswered, usage
from qwenkit.serve.batch.rows import BatchLimits, BatchRow, Line
from qwenkit.serve.batch.store import BatchStore
from qwenkit.serve.body import MAX_FIELDS, MIN_VALUES
from qwenkit.serve.caller import SCOPE_KEY, Caller, caller
from qwenkit.serve.executor import FairExecutor

log = logging.getLogger("qwenkit.serve")

PRIORITY = -1
TICK = 0.5  # seconds between looks at the clock when nothing else happens
SWEEP = 60.0  # seconds between deletions of what has expired
OUTPUT_SECONDS = 30 * 86400  # life of the files that a batch writes, where it does not say
_HOST = "http://localhost"
_AHEAD = 256  # lines of a batch held in memory
_CRASHES = 2  # tries of a request that the server fails at
_WAIT, _LONGEST_WAIT = 0.25, 30.0  # seconds before a refused request is tried again


@dataclass(eq=False)
class _Feed:
    """A batch in progress: lines read ahead, those that are being answered, and when it last had its turn."""

    batch: BatchRow
    waiting: deque[Line] = field(default_factory=deque)
    loaded: int = 0  # last line that was read ahead
    exhausted: bool = False
    running: set[asyncio.Task[None]] = field(default_factory=set)
    turn: int = 0
    resumes: float = 0.0  # time.monotonic() before which its key has no room for another line


class _KeyWaitsError(Exception):
    """A key's minute, or its part of the queue, is used up for so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class BatchWorker:
    """Runs the batches of `store` through `app` between `start` and `stop`, `concurrency` lines at a time.

    `crowded` says whether requests wait at the engine already: then no line is added to them, so that batches fill what
    people leave free and never the queue. `serves` says whether a key (its namespace) still exists; batches of one that does
    not are left where they are until they expire.
    """

    def __init__(
        self,
        app: ASGIApp,
        store: BatchStore,
        limits: BatchLimits,
        *,
        concurrency: int,
        max_line_bytes: int,
        crowded: Callable[[], bool] = lambda: False,
        serves: Callable[[str], bool] = lambda owner: True,
        max_values: int = MIN_VALUES + MAX_FIELDS,
    ) -> None:
        self.store = store
        self._app, self._limits, self._concurrency, self._max_line_bytes = app, limits, concurrency, max_line_bytes
        self._crowded, self._serves, self._max_values = crowded, serves, max_values
        self._feeds: dict[int, _Feed] = {}
        self._jobs: dict[int, asyncio.Task[None]] = {}  # reading an input file, or writing the output
        self._reading = FairExecutor(1, "input-files")
        self._bell = asyncio.Event()
        self._turns = 0
        self._swept = 0.0
        self._task: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")

    async def call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A method of the store, off the event loop, in the order of the calls."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: method(*args, **kwargs))

    def start(self) -> None:
        assert self._task is None, "a worker starts once"
        self._task = asyncio.create_task(self._run(), name="batches")

    def wake(self) -> None:
        """A batch was created or cancelled."""
        self._bell.set()

    async def stop(self) -> None:
        """Let go of every line that is being answered, keep what is done, and close the store."""
        tasks = [task for feed in self._feeds.values() for task in feed.running]
        tasks += [*self._jobs.values(), *([self._task] if self._task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.call(self.store.close)
        self._thread.shutdown()
        self._reading.close(wait=False)

    async def _run(self) -> None:
        while True:
            self._bell.clear()
            wait = TICK
            try:
                wait = await self._round()
            except (OSError, sqlite3.Error):  # a full disk: what is running goes on, the rest waits
                log.exception("batches stand still")
                await asyncio.sleep(10 * TICK)
            bell = asyncio.ensure_future(self._bell.wait())
            try:  # not wait_for, which before Python 3.12 forgets a cancellation that comes with the bell
                await asyncio.wait([bell], timeout=wait)
            finally:
                bell.cancel()

    async def _round(self) -> float:
        """Move every batch on that can be, and hand out lines. The seconds after which to look again."""
        if time.monotonic() >= self._swept + SWEEP:
            self._swept = time.monotonic()
            await self.call(self.store.sweep)
        for batch in await self.call(self.store.open_batches):
            if batch.seq in self._jobs:
                continue
            if batch.status == "validating":  # read even when late: the error file names every request
                self._begin_job(batch, partial(self._read, batch))
            elif batch.status == "in_progress" and batch.expires_at <= self.store.now:
                if await self.call(self.store.expire, batch.seq):
                    self.wake()
            elif batch.status == "in_progress":
                if self._serves(batch.owner):
                    self._feeds.setdefault(batch.seq, _Feed(batch))
            else:
                self._begin_job(batch, partial(self._write, batch, self._feeds.pop(batch.seq, None)))
        return await self._hand_out()

    def _begin_job(self, batch: BatchRow, job: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async def logged() -> None:
            try:
                await job()
            except (OSError, sqlite3.Error):
                log.exception("batch %s stands still", batch.id)
                await asyncio.sleep(10 * TICK)
            finally:
                self._jobs.pop(batch.seq, None)
                self.wake()

        self._jobs[batch.seq] = asyncio.create_task(logged())

    async def _read(self, batch: BatchRow) -> None:
        """validating -> in_progress or failed."""
        limits = {"max_lines": self._limits.max_lines, "max_line_bytes": self._max_line_bytes}
        path = self.store.path(batch.input_file_id)
        try:
            found: Scan = await self._reading.run(
                batch.owner, scan, path, batch.endpoint, **limits, max_values=self._max_values
            )
        except FileNotFoundError:
            error = {"code": "file_not_found", "line": None, "message": "The input file is gone.", "param": None}
            await self.call(self.store.fail, batch.seq, [error])
            return
        if found.errors:
            await self.call(self.store.fail, batch.seq, found.errors)
        else:
            await self.call(self.store.begin, batch.seq, found.lines, found.model)

    async def _write(self, batch: BatchRow, feed: _Feed | None) -> None:
        """finalizing or cancelling -> the end, after the lines still being answered are let go."""
        running = list(feed.running) if feed else []
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        output, error = await asyncio.to_thread(assemble, self.store, batch)
        seconds = batch.output_seconds or OUTPUT_SECONDS
        if not await self.call(self.store.finish, batch, output, error, seconds):
            raise AssertionError(f"batch {batch.id} was finished by somebody else")
        log.info("batch %s is %s", batch.id, batch.outcome)

    # -- lines -----------------------------------------------------------------------------------------------------

    async def _hand_out(self) -> float:
        while sum(len(feed.running) for feed in self._feeds.values()) < self._concurrency:
            for feed in self._feeds.values():
                if not feed.waiting and not feed.exhausted:
                    lines = await self.call(self.store.waiting, feed.batch.seq, feed.loaded, _AHEAD)
                    feed.waiting.extend(lines)
                    feed.loaded = lines[-1].line if lines else feed.loaded
                    feed.exhausted = not lines
            chosen = self._next_feed()
            if chosen is None:
                break
            if self._crowded():
                return 0.05
            self._turns += 1
            chosen.turn = self._turns
            task = asyncio.create_task(self._answer(chosen, chosen.waiting.popleft()))
            chosen.running.add(task)
            task.add_done_callback(partial(self._done, chosen))
            await asyncio.sleep(0)  # the line gets to the engine before the next look at its queue
        return TICK

    def _next_feed(self) -> _Feed | None:
        """Whose turn it is: the key, then the batch, with the fewest lines being answered; of equals, who waited longest."""
        busy: Counter[str] = Counter()
        for feed in self._feeds.values():
            busy[feed.batch.owner] += len(feed.running)
        now = time.monotonic()
        ready = [feed for feed in self._feeds.values() if feed.waiting and feed.resumes <= now]
        return min(ready, key=lambda feed: (busy[feed.batch.owner], len(feed.running), feed.turn), default=None)

    def _done(self, feed: _Feed, task: asyncio.Task[None]) -> None:
        feed.running.discard(task)
        self.wake()
        if not task.cancelled() and task.exception() is not None:
            log.error("a line of batch %s was lost until the next start", feed.batch.id, exc_info=task.exception())

    async def _answer(self, feed: _Feed, line: Line) -> None:
        """One line, from the input file to its result in the store; or back into the line, where its key has to wait."""
        batch = feed.batch
        try:
            ok, record, tokens = await self._ask(batch, line)
        except _KeyWaitsError as error:
            feed.resumes = max(feed.resumes, time.monotonic() + error.seconds)
            feed.waiting.appendleft(line)
            return
        except Exception:
            log.exception("line %d of batch %s failed", line.line, batch.id)
            message = f"The server failed at this request (request id {_request_id(batch, line)})."
            ok, record, tokens = False, unanswered(line.custom_id, "server_error", message), (0, 0)
        while True:
            try:
                await self.call(self.store.put_result, batch.seq, line.line, ok, record, tokens)
                return
            except (OSError, sqlite3.Error):  # the answer is kept until there is room for it
                log.exception("line %d of batch %s cannot be kept", line.line, batch.id)
                await asyncio.sleep(10 * TICK)

    async def _ask(self, batch: BatchRow, line: Line) -> tuple[bool, bytes, tuple[int, int]]:
        try:
            body = await asyncio.to_thread(read_body, self.store.path(batch.input_file_id), line)
        except (OSError, ValueError, LookupError):
            return False, unanswered(line.custom_id, "file_not_found", "The input file is gone or was changed."), (0, 0)
        request_id = _request_id(batch, line)
        if body.get("stream"):
            error = {"message": "stream is true, allowed in a batch is false", "type": "invalid_request_error"}
            refused = {"error": error | {"param": "stream", "code": "invalid_value"}}
            return False, answered(line.custom_id, 400, request_id, refused), (0, 0)
        is_admin = not batch.owner and bool(batch.owner_name)
        who = Caller(
            batch.owner_name,
            batch.owner,
            priority=PRIORITY,
            request_id=request_id,
            is_limited=not is_admin,
            may_owe=True,
        )
        content, wait, crashes = orjson.dumps(body), _WAIT, 0
        while True:
            response = await post(self._app, batch.endpoint, content, who)
            status = response.status_code
            crashed = status >= 500 and status != 503
            crashes += crashed
            if status == 429 and "retry-after" not in response.headers:
                break  # more than a whole minute allows
            if status == 429:  # others may go on meanwhile
                raise _KeyWaitsError(_retry_after(response, wait) * random.uniform(1.0, 1.25))
            if status != 503 and not (crashed and crashes < _CRASHES):
                break
            await asyncio.sleep(_retry_after(response, wait) * random.uniform(1.0, 1.25))
            wait = min(2 * wait, _LONGEST_WAIT)
        try:
            answer = orjson.loads(response.content)
        except ValueError:
            answer = response.text
        return status < 300, answered(line.custom_id, status, request_id, answer), usage(answer)


def _request_id(batch: BatchRow, line: Line) -> str:
    return f"{batch.id}-{line.line}"


async def post(app: ASGIApp, path: str, content: bytes, who: Caller) -> httpx.Response:
    """POST JSON to a route of `app` in this process, in the name of `who`. Cancelling it is the client going away."""

    async def named(scope: Scope, receive: Receive, send: Send) -> None:
        token = caller.set(who)
        try:
            await app({**scope, SCOPE_KEY: who}, receive, send)
        finally:
            caller.reset(token)

    transport = httpx.ASGITransport(named)
    async with httpx.AsyncClient(transport=transport, base_url=_HOST, timeout=None, trust_env=False) as client:
        headers = {"content-type": "application/json", "anthropic-version": "2023-06-01"}
        return await client.post(path, content=content, headers=headers)


def _retry_after(response: httpx.Response, wait: float) -> float:
    try:
        return min(max(float(response.headers.get("retry-after", "")), wait), _LONGEST_WAIT)
    except ValueError:
        return wait
