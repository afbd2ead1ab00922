"""Driver: the engine's thread on one side, asyncio on the other.

In: prompts and what is wanted of them, from any number of tasks of one event loop. Out: a stream of Deltas for each. Only the
engine's thread touches the engine; it hands all Deltas of a step over in one call, so that a step costs the event loop one
wake-up and a token a list append. A stream that is closed early takes its request out before the next step, whatever it is
doing. The thread's heartbeat tells a busy engine from a stuck one.

Whatever raises in the thread ends the requests that it concerns with an error, and the thread goes on: no stream waits for ever.
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
from qwenkit.serve.limits import MinuteLimits, QueueLimits
from qwenkit.serve.metrics import Metrics
from qwenkit.serve.ticket import Batch, Ticket, count_tokens, watch_engine

log = logging.getLogger("qwenkit.serve")

IDLE_BEAT = 0.5  # seconds between heartbeats of an idle engine
RAISED_STEPS = 3  # steps in a row that raise as a whole before the engine counts as broken
RETRY_AFTER = "2"


class Driver:
    """Runs `engine` in a thread of its own between `start` and `stop`.

    Refused with ApiError 429: what would make more than `max_queued` requests or `max_queued_tokens` prompt tokens wait, see
    QueueLimits. `stall_timeout`: seconds in which a living engine's thread comes by.

    Tokens are counted by `limits` as they are made. When a key's minute is used up, those of its answers that have begun end with
    finish_reason length, and requests of which nothing has come yet with ApiError 429.
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
        self.stall_timeout = stall_timeout
        self.metrics, self.limits = metrics or Metrics(), limits or MinuteLimits()
        self.log_contents = log_contents
        self.draining = False
        self.max_queued, self.max_queued_tokens = max_queued, max_queued_tokens
        self._queue = QueueLimits()
        self._inbox: deque[tuple[str, Any]] = deque()
        self._bell = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._beat = time.monotonic()
        self._raised = 0
        self._unchecked = False  # the engine has worked since its books were last looked at
        self._open: set[Ticket] = set()
        self._by_engine_id: dict[int, Ticket] = {}  # the thread's, of requests in the engine
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
        return self._responds and self._raised < RAISED_STEPS and self.engine.healthy

    @property
    def _responds(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and self.heartbeat_age <= self.stall_timeout

    @property
    def num_waiting(self) -> int:
        """Requests accepted of which nothing has come back yet."""
        return self._queue.num_requests

    @property
    def num_running(self) -> int:
        """Requests that are being answered."""
        return len(self._open) - self.num_waiting

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
            "principal": who.principal,
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
        principal, length = ticket.caller.principal, len(ticket.prompt)
        excess = self._queue.excess(principal, length, self.max_queued, self.max_queued_tokens)
        if excess is not None:
            raise self._refused(excess[0], 429, excess[1], "queue_full")
        try:
            self.limits.take_tokens(ticket.caller, length)
        except ApiError:
            self.metrics.rejected("rate_limit")
            raise
        self._loop = asyncio.get_running_loop()
        if self.log_contents:
            ticket.texts = []
        ticket.open_answers = ticket.unfinished = ticket.params.n
        self._queue.add(principal, length)
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
            self._queue.remove(ticket.caller.principal, len(ticket.prompt))

    def _close(self, ticket: Ticket) -> None:
        """The stream is over, by whichever side."""
        self._dequeue(ticket)
        if ticket not in self._open:
            return
        self._open.discard(ticket)
        if ticket.open_answers:
            self._send("abort", ticket)
            ticket.reason = "abort" if ticket.error is None else "error"
            self.metrics.finished(ticket.reason)
        self.metrics.generation_tokens.inc(ticket.num_tokens)
        ticket.record(self.engine.tokenizer)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        ticket.error = error
        self._wake(ticket)

    @staticmethod
    def _wake(ticket: Ticket) -> None:
        if ticket.waiter is not None and not ticket.waiter.done():
            ticket.waiter.set_result(None)

    def _deliver(self, batch: Batch, now: float) -> None:
        """All Deltas of one step, on the event loop."""
        for ticket, delta in batch:
            try:
                if ticket.error is None:  # else a Delta is missing already
                    self._take(ticket, delta, now)
            except Exception:
                log.exception("what was added to request %s could not be delivered", ticket.request_id)
                self._fail(ticket, internal_error(ticket.request_id))

    def _take(self, ticket: Ticket, delta: Delta, now: float) -> None:
        if delta.error is not None:
            self._fail(ticket, ticket.engine_error(delta))
            return
        if ticket.queued:
            self._dequeue(ticket)
            ticket.began(delta, now, self.metrics)
        elif delta.token_ids:
            self.metrics.inter_token_latency.observe(now - ticket.last)
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
        self._wake(ticket)

    # The engine thread's side.

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._beat = time.monotonic()
                try:
                    self._turn()
                except BaseException:  # a panic in a tokenizer's Rust code is not an Exception
                    log.exception("the engine's thread failed")
                    self._raised += 1
                    self._drop_all()
        finally:
            self._abandon()

    def _turn(self) -> None:
        """Do what was sent, then one step; wait a while where there is neither."""
        with self._bell:
            if not self._inbox and not self.engine.has_work and not self._stopping:
                self._bell.wait(IDLE_BEAT)
        while self._inbox and not self._stopping:
            self._obey(*self._inbox.popleft())
        if self.engine.has_work and not self._stopping:
            self._step()
        elif self._unchecked:
            self._unchecked = False
            self._check_idle()

    def _step(self) -> None:
        deltas = self.engine.step()
        self._raised, self._unchecked = 0, True
        known = self._by_engine_id
        self._hand_over(self._count([(known[d.request_id], d) for d in deltas if d.request_id in known]))

    def _hand_over(self, batch: Batch) -> None:
        """Send Deltas to the event loop, and forget requests that are finished."""
        if batch:
            self._to_loop(self._deliver, batch, time.monotonic())
        for ticket, delta in batch:
            ticket.begun = True
            ticket.unfinished -= delta.finish_reason is not None
            if not ticket.unfinished:
                self._by_engine_id.pop(delta.request_id, None)

    def _count(self, batch: Batch) -> Batch:
        """Count the tokens of a step, and end the requests whose minute they use up; what is to be delivered."""
        for ticket in count_tokens(batch, self.limits):
            assert ticket.engine_id is not None
            rest = self.engine.end(ticket.engine_id)
            if ticket.begun:
                batch = batch + [(ticket, delta) for delta in rest]
            else:
                batch = [one for one in batch if one[0] is not ticket]
                del self._by_engine_id[ticket.engine_id]
                self.metrics.rejected("rate_limit")
                self._to_loop(self._fail, ticket, self.limits.tokens_exceeded(ticket.caller))
        return batch

    def _obey(self, kind: str, what: Any) -> None:
        if kind == "add":
            try:
                what.engine_id = self.engine.add(what.prompt, what.params, **what.settings)
                self._by_engine_id[what.engine_id] = what
            except ValueError as error:
                self._to_loop(self._fail, what, error)
            except BaseException:
                log.exception("request %s could not be added", what.request_id)
                self._to_loop(self._fail, what, internal_error(what.request_id))
        elif kind == "abort":
            if what.engine_id in self._by_engine_id:
                self.engine.abort(what.engine_id)
                del self._by_engine_id[what.engine_id]
                self._unchecked = True
        else:
            function, loop, future = what
            try:
                self._to(loop, _settle, future, function(self.engine), None)
            except BaseException as error:
                told = error if isinstance(error, Exception) else RuntimeError(str(error))
                self._to(loop, _settle, future, None, told)

    def _drop_all(self) -> None:
        """The engine cannot go on with what it has: every request in it is answered with an error."""
        while self._by_engine_id:
            _, ticket = self._by_engine_id.popitem()
            self._to_loop(self._fail, ticket, internal_error(ticket.request_id))
        try:
            self.engine.reset()
        except Exception:
            log.exception("the engine could not be emptied")
        if self._raised >= RAISED_STEPS:
            time.sleep(IDLE_BEAT)  # it may be for good

    def _abandon(self) -> None:
        """The thread ends: nobody else will answer what is in the engine or was sent to it."""
        stopped = ApiError(503, "the server is shutting down", "server_error", code="shutting_down")
        for ticket in self._by_engine_id.values():
            self._to_loop(self._fail, ticket, stopped)
        self._by_engine_id.clear()
        for kind, what in self._inbox:
            if kind == "add":
                self._to_loop(self._fail, what, stopped)
            elif kind == "call":
                self._to(what[1], _settle, what[2], None, stopped)

    def _check_idle(self) -> None:
        """An engine without work holds no block: said aloud where it is not so, and the server goes on."""
        try:
            self.engine.check_idle()
        except Exception:
            log.exception("the idle engine's books do not balance")

    def _to_loop(self, function: Callable[..., None], *args: Any) -> None:
        assert self._loop is not None
        self._to(self._loop, function, *args)

    @staticmethod
    def _to(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> None:
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
