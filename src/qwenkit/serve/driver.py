"""Driver: the engine's thread on one side, asyncio on the other.

In: prompts and what is wanted of them, from any number of tasks of one event loop. Out: a stream of Deltas for each. Only the
engine's thread touches the engine; it hands all Deltas of a step over in one call, so that a step costs the event loop one
wake-up and a token a list append. A stream that is closed early takes its request out before the next step, whatever it is
doing. The thread's heartbeat tells a busy engine from a stuck one.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from qwenkit.engine.engine import Engine
from qwenkit.engine.request import Delta
from qwenkit.engine.sampling import SamplingParams
from qwenkit.serve.caller import caller
from qwenkit.serve.errors import ApiError, internal_error
from qwenkit.serve.limits import MinuteLimits
from qwenkit.serve.metrics import Metrics
from qwenkit.serve.ticket import Ticket, watch_engine

log = logging.getLogger("qwenkit.serve")

IDLE_BEAT = 0.5  # seconds between heartbeats of an idle engine
RAISED_STEPS = 3  # steps in a row that raise as a whole before the engine counts as broken
FAILED_REQUESTS = 10  # the same for requests in a row that fail one by one
RETRY_AFTER = "2"


class Driver:
    """Runs `engine` in a thread of its own between `start` and `stop`.

    Refused with ApiError 429: what would make more than `max_queued` requests or `max_queued_tokens` prompt tokens wait. One
    request alone may be longer than that, else nothing could ever serve it. `stall_timeout`: seconds in which a living engine's
    thread comes by.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_queued: int = 512,
        max_queued_tokens: int = 1_000_000,
        stall_timeout: float = 60.0,
        metrics: Metrics | None = None,
        limits: MinuteLimits | None = None,
        log_contents: bool = False,
    ) -> None:
        self.engine = engine
        self.max_queued = max_queued
        self.max_queued_tokens = max_queued_tokens
        self.stall_timeout = stall_timeout
        self.metrics = metrics or Metrics()
        self.limits = limits or MinuteLimits()
        self.log_contents = log_contents
        self.draining = False
        self._inbox: deque[tuple[str, Any]] = deque()
        self._bell = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._beat = time.monotonic()
        self._raised = 0
        self._failed = 0
        self._open: set[Ticket] = set()
        self._by_engine_id: dict[int, Ticket] = {}  # the thread's
        self._num_queued = 0
        self._queued_tokens = 0
        watch_engine(self.metrics, engine, lambda: self.heartbeat_age)

    def start(self) -> None:
        """Start the engine's thread. Called once."""
        assert self._thread is None, "a driver starts once"
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def drain(self, timeout: float) -> bool:
        """Take no new requests; wait until all accepted ones are answered, at most `timeout` seconds. Whether all were."""
        self.draining = True
        until = time.monotonic() + timeout
        while self._open and time.monotonic() < until:
            await asyncio.sleep(0.02)
        finished = not self._open
        for ticket in list(self._open):
            self._fail(ticket, ApiError(503, "the server is shutting down", "server_error", code="shutting_down"))
        return finished

    def stop(self, timeout: float = 5.0) -> None:
        """End the thread after the step it is in. What still runs is dropped."""
        with self._bell:
            self._stopping = True
            self._bell.notify()
        if self._thread is not None:
            self._thread.join(timeout)

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the engine's thread last came by."""
        return time.monotonic() - self._beat

    @property
    def healthy(self) -> bool:
        """Whether the engine's thread lives, comes by, and can compute."""
        return self._responds and self._raised < RAISED_STEPS and self._failed < FAILED_REQUESTS

    @property
    def _responds(self) -> bool:
        alive = self._thread is not None and self._thread.is_alive()
        return alive and self.heartbeat_age <= self.stall_timeout

    @property
    def num_waiting(self) -> int:
        """Requests accepted of which nothing has come back yet."""
        return self._num_queued

    @property
    def num_running(self) -> int:
        """Requests that are being answered."""
        return len(self._open) - self._num_queued

    async def stream(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        adapter: str | None = None,
        priority: int | None = None,
        cache_namespace: str | None = None,
        request_id: str = "",
    ) -> AsyncIterator[Delta]:
        """What the engine adds to the answers of one request, until all `params.n` are finished.

        What is None comes from the Caller of the running task. Raises ApiError (429, 503, 500) or ValueError, from a prompt
        or params that cannot be, before the first Delta; 500 later when the engine fails at this request. Closing the
        generator takes the request out of the engine.
        """
        who = caller.get()
        settings: dict[str, Any] = {
            "priority": who.priority if priority is None else priority,
            "cache_namespace": who.namespace if cache_namespace is None else cache_namespace,
        }
        if adapter is not None:
            settings["adapter"] = adapter
        ticket = self._admit(Ticket(prompt, params, settings, who, request_id or who.request_id, time.monotonic()))
        try:
            while ticket.open_answers or ticket.pending:
                if not ticket.pending:
                    if ticket.error is not None:
                        raise ticket.error
                    assert self._loop is not None
                    ticket.waiter = self._loop.create_future()
                    await ticket.waiter
                pending, ticket.pending = ticket.pending, []
                for delta in pending:
                    yield delta
        finally:
            self._close(ticket)

    def call(self, function: Callable[[Engine], Any]) -> asyncio.Future[Any]:
        """Run something on the engine's thread between two steps (loading an adapter); its result, or what it raised."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._send("call", (function, loop, future))
        return future

    # The event loop's side.

    def _admit(self, ticket: Ticket) -> Ticket:
        if self.draining:
            raise self._refused("draining", 503, "the server is shutting down", "shutting_down")
        if not self._responds:
            raise self._refused("unhealthy", 503, "the engine does not respond", "engine_unhealthy")
        self.engine.check_prompt(ticket.prompt)
        if self._num_queued >= self.max_queued:
            raise self._refused("queue_full", 429, f"{self._num_queued} requests are waiting already", "queue_full")
        length = len(ticket.prompt)
        if self._num_queued and self._queued_tokens + length > self.max_queued_tokens:
            raise self._refused(
                "queue_tokens", 429, f"{self._queued_tokens} prompt tokens are waiting already", "queue_full"
            )
        try:
            self.limits.take_tokens(ticket.caller, length)
        except ApiError:
            self.metrics.rejected("rate_limit")
            raise
        self._loop = asyncio.get_running_loop()
        if self.log_contents:
            ticket.texts = []
        ticket.open_answers = ticket.params.n
        self._num_queued += 1
        self._queued_tokens += length
        self._open.add(ticket)
        self._send("add", ticket)
        return ticket

    def _refused(self, reason: str, status: int, message: str, code: str) -> ApiError:
        self.metrics.rejected(reason)
        kind = "rate_limit_error" if status == 429 else "server_error"
        return ApiError(status, f"{message}; try again later", kind, code=code, headers={"Retry-After": RETRY_AFTER})

    def _send(self, kind: str, what: Any) -> None:
        with self._bell:
            self._inbox.append((kind, what))
            self._bell.notify()

    def _dequeue(self, ticket: Ticket) -> None:
        if ticket.queued:
            ticket.queued = False
            self._num_queued -= 1
            self._queued_tokens -= len(ticket.prompt)

    def _close(self, ticket: Ticket) -> None:
        """The stream is over, by whichever side."""
        self._dequeue(ticket)
        if ticket in self._open:
            self._open.discard(ticket)
            if ticket.open_answers:
                ticket.reason = "abort" if ticket.error is None else "error"
                self.metrics.finished(ticket.reason)
                self._send("abort", ticket)
            self.metrics.generation_tokens.inc(ticket.num_tokens)
            self.limits.spend_tokens(ticket.caller, ticket.num_tokens)
            ticket.record(self.engine.tokenizer)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        ticket.error = error
        self._wake(ticket)

    @staticmethod
    def _wake(ticket: Ticket) -> None:
        if ticket.waiter is not None and not ticket.waiter.done():
            ticket.waiter.set_result(None)

    def _deliver(self, batch: list[tuple[Ticket, Delta]], now: float) -> None:
        """All Deltas of one step, on the event loop."""
        gaps = self.metrics.inter_token_latency
        for ticket, delta in batch:
            if delta.error is not None and delta.error_field is not None:
                self._fail(ticket, ValueError(delta.error))  # its sentence begins with the field
                continue
            if delta.error is not None:
                where = f" (request id {ticket.request_id})" if ticket.request_id else ""
                self._fail(ticket, ApiError(500, delta.error + where, "server_error", code="engine_error"))
                continue
            if ticket.queued:
                self._dequeue(ticket)
                ticket.began(delta, now, self.metrics)
            else:
                gaps.observe(now - ticket.last)
            ticket.last = now
            ticket.num_tokens += len(delta.token_ids)
            ticket.pending.append(delta)
            if ticket.texts is not None:
                ticket.texts.append(delta.text)
            if delta.finish_reason is not None:
                ticket.open_answers -= 1
                ticket.reason = delta.finish_reason
                self.metrics.finished(delta.finish_reason)
                if not ticket.open_answers:
                    ticket.ended(now, self.metrics)
            if ticket.waiter is not None and not ticket.waiter.done():
                ticket.waiter.set_result(None)

    # The engine thread's side.

    def _run(self) -> None:
        engine = self.engine
        while True:
            self._beat = time.monotonic()
            with self._bell:
                if not self._inbox and not engine.has_work and not self._stopping:
                    self._bell.wait(IDLE_BEAT)
                if self._stopping:
                    return
                commands = list(self._inbox)
                self._inbox.clear()
            for kind, what in commands:
                self._obey(kind, what)
            if not engine.has_work:
                continue
            try:
                deltas = engine.step()
                self._raised = 0
            except Exception:
                log.exception("a step of the engine failed")
                self._raised += 1
                self._drop_all()
                continue
            for delta in deltas:
                self._failed = 0 if delta.error is None or delta.error_field is not None else self._failed + 1
            batch = [
                (ticket, delta) for delta in deltas if (ticket := self._by_engine_id.get(delta.request_id)) is not None
            ]
            if batch:
                self._to_loop(self._deliver, batch, time.monotonic())

    def _obey(self, kind: str, what: Any) -> None:
        if kind == "add":
            try:
                what.engine_id = self.engine.add(what.prompt, what.params, **what.settings)
                self._by_engine_id[what.engine_id] = what
            except ValueError as error:
                self._to_loop(self._fail, what, error)
            except Exception:
                log.exception("request %s could not be added", what.request_id)
                self._to_loop(self._fail, what, internal_error(what.request_id))
        elif kind == "abort":
            if what.engine_id is not None:
                self._by_engine_id.pop(what.engine_id, None)
                self.engine.abort(what.engine_id)
                self._check_idle()
        else:
            function, loop, future = what
            try:
                outcome = function(self.engine)
            except Exception as error:
                loop.call_soon_threadsafe(_settle, future, None, error)
            else:
                loop.call_soon_threadsafe(_settle, future, outcome, None)

    def _drop_all(self) -> None:
        """The engine cannot go on with what it has: every request in it is answered with an error."""
        for engine_id, ticket in list(self._by_engine_id.items()):
            try:
                self.engine.abort(engine_id)
            except Exception:
                log.exception("a request could not be taken out of the engine")
            self._to_loop(self._fail, ticket, internal_error(ticket.request_id))
        self._by_engine_id.clear()

    def _check_idle(self) -> None:
        """An engine without work holds no block: said aloud where it is not so, and the server goes on."""
        if not self.engine.has_work:
            try:
                self.engine.check()
            except AssertionError:
                log.exception("the idle engine's books do not balance")

    def _to_loop(self, function: Callable[..., None], *args: Any) -> None:
        loop = self._loop
        assert loop is not None
        try:
            loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop has been closed: nobody waits any more
            if not loop.is_closed():
                raise


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
