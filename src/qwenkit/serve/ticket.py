"""Ticket: one request on its way through the driver, and what is noted of it.

In: Deltas and the times at which they came. Out: observations for Prometheus, one line for the log, and numbers for the trace.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from qwenkit.engine.engine import Engine
from qwenkit.engine.request import Delta
from qwenkit.engine.sampling import SamplingParams
from qwenkit.serve.caller import Caller
from qwenkit.serve.errors import ApiError
from qwenkit.serve.limits import MinuteLimits
from qwenkit.serve.logs import log_answer
from qwenkit.serve.metrics import Metrics
from qwenkit.serve.tracing import current
from qwenkit.text.tokenizer import Tokenizer


@dataclass(eq=False)
class Ticket:
    """The event loop owns it, but for `engine_id`, `unfinished` and `begun`, which are the engine thread's. Times are
    time.monotonic().
    """

    prompt: Sequence[int]
    params: SamplingParams
    settings: dict[str, Any]
    caller: Caller
    request_id: str
    arrived: float
    pending: list[Delta] = field(default_factory=list)
    error: Exception | None = None
    waiter: asyncio.Future[None] | None = None
    queued: bool = True  # counted among the waiting: nothing has come back yet
    open_answers: int = 0
    engine_id: int | None = None
    unfinished: int = 0  # answers of which the engine has not given the last Delta
    begun: bool = False  # Deltas have been handed to the event loop
    first: float = 0.0
    last: float = 0.0
    num_tokens: int = 0
    num_cached: int = 0
    reason: str = "abort"
    texts: list[str] | None = None  # kept only where contents go to the log

    def began(self, delta: Delta, now: float, metrics: Metrics) -> None:
        """Its first Delta is here."""
        self.first = now
        self.num_cached = delta.num_cached_tokens
        metrics.time_to_first_token.observe(now - self.arrived)
        if delta.admitted_at:
            metrics.queue_time.observe(max(delta.admitted_at - self.arrived, 0))
            metrics.prefill_time.observe(max(now - delta.admitted_at, 0))
        metrics.prompt_tokens.inc(len(self.prompt))
        metrics.request_prompt_tokens.observe(len(self.prompt))
        metrics.prefix_cache_queries.inc(len(self.prompt))
        metrics.prefix_cache_hits.inc(delta.num_cached_tokens)

    def engine_error(self, delta: Delta) -> Exception:
        """What the stream raises for a Delta with an error: ValueError for one of the request's fields, else ApiError 500."""
        assert delta.error is not None
        if delta.error_field is not None:
            return ValueError(delta.error)  # its sentence begins with the field
        where = f" (request id {self.request_id})" if self.request_id else ""
        return ApiError(500, delta.error + where, "server_error", code="engine_error")

    def ended(self, now: float, metrics: Metrics) -> None:
        """All its answers are finished."""
        metrics.request_generation_tokens.observe(self.num_tokens)
        metrics.e2e_latency.observe(now - self.arrived)
        metrics.decode_time.observe(now - self.first)
        if self.num_tokens > 1:
            metrics.time_per_output_token.observe((now - self.first) / (self.num_tokens - 1))

    def record(self, tokenizer: Tokenizer) -> None:
        """Write down that it is over, in the log and in the trace of the running task."""
        fields: dict[str, Any] = {
            "request_id": self.request_id,
            "key": self.caller.name,
            "prompt_tokens": len(self.prompt),
            "cached_tokens": self.num_cached,
            "completion_tokens": self.num_tokens,
            "finish_reason": self.reason,
            "ttft_ms": round((self.first - self.arrived) * 1000, 1) if self.first else None,
            "ms": round((time.monotonic() - self.arrived) * 1000, 1),
        }
        current.get().answered(fields)
        if self.texts is not None:
            fields |= {"prompt": tokenizer.decode(self.prompt, skip_special=False), "answer": "".join(self.texts)}
        log_answer(fields)


Batch: TypeAlias = list[tuple[Ticket, Delta]]  # what a step added, and to which requests


def count_tokens(batch: Batch, limits: MinuteLimits) -> list[Ticket]:
    """Count the tokens of a step for the keys of their requests; the requests that must end because a minute is used up."""
    made: dict[str, tuple[Caller, int]] = {}
    finished: Counter[Ticket] = Counter()
    for ticket, delta in batch:
        finished[ticket] += delta.finish_reason is not None
        if ticket.caller.is_limited:
            _, count = made.get(ticket.caller.principal, (ticket.caller, 0))
            made[ticket.caller.principal] = ticket.caller, count + len(delta.token_ids)
    over = {principal for principal, (who, count) in made.items() if not limits.spend_tokens(who, count)}
    return [
        ticket
        for ticket, count in finished.items()
        if count < ticket.unfinished and ticket.caller.is_limited and not ticket.caller.may_owe
        and ticket.caller.principal in over
    ]  # fmt: skip


def watch_engine(metrics: Metrics, engine: Engine, heartbeat_age: Callable[[], float]) -> None:
    """Publish what the engine counts itself. It is read from another thread: each number is one look at one attribute."""
    pool, scheduler = engine.pool, engine.scheduler
    watch, count = metrics.watch, metrics.watch_count
    watch("num_requests_running", "Answers being computed.", lambda: len(scheduler.running))
    watch("num_requests_waiting", "Answers waiting to be computed.", lambda: len(scheduler.waiting))
    watch(
        "kv_cache_usage_perc",
        "Share of the cache's blocks in use, 0 to 1.",
        lambda: 1 - pool.num_free / pool.num_blocks,
    )
    watch("engine_heartbeat_age_seconds", "Since the engine's loop last came by.", heartbeat_age)
    count("num_preemptions", "Answers that lost their place to others.", lambda: scheduler.num_preemptions)
    count("corrupted_requests", "Answers ended because their logits were not finite.", lambda: engine.num_corrupted)
    count("failed_requests", "Answers ended because computing them raised.", lambda: engine.num_failed)
