"""How much each key may ask for in a minute.

In: a caller and what it wants (a request, so many tokens). Out: nothing, or ApiError 429 that says when to come again. The window
slides, and lives in this process's memory. Without keys all callers are one.
"""

from __future__ import annotations

import math
import time

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from qwenkit.serve.caller import Caller
from qwenkit.serve.errors import ApiError


class MinuteLimits:
    """None: no limit of that kind."""

    def __init__(self, requests: int | None = None, tokens: int | None = None) -> None:
        self._requests = None if requests is None else RateLimitItemPerMinute(requests, namespace="requests")
        self._tokens = None if tokens is None else RateLimitItemPerMinute(tokens, namespace="tokens")
        self._window = SlidingWindowCounterRateLimiter(MemoryStorage())

    def take_request(self, who: Caller) -> None:
        """Count a request, or raise."""
        if self._requests is not None and not self._window.hit(self._requests, who.name):
            raise self._refusal(self._requests, who, "requests")

    def take_tokens(self, who: Caller, count: int) -> None:
        """Count the tokens of a prompt, or raise."""
        item = self._tokens
        if item is None or not who.is_limited:
            return
        if count > item.amount:
            raise ApiError(
                429,
                f"the prompt is {count} tokens long, but this key may use {item.amount} tokens a minute",
                "rate_limit_error",
                code="rate_limit_exceeded",
            )
        if not self._window.hit(item, who.name, cost=count):
            raise self._refusal(item, who, "tokens")

    def spend_tokens(self, who: Caller, count: int) -> None:
        """Count the tokens of an answer, as far as the minute has any left."""
        item = self._tokens
        if item is None or not who.is_limited or not count:
            return
        left = self._window.get_window_stats(item, who.name).remaining
        self._window.hit(item, who.name, cost=min(count, max(left, 0)))

    def _refusal(self, item: RateLimitItemPerMinute, who: Caller, what: str) -> ApiError:
        stats = self._window.get_window_stats(item, who.name)
        wait = min(max(math.ceil(stats.reset_time - time.time()), 1), 60)
        return ApiError(
            429,
            f"this key may use {item.amount} {what} a minute; try again in {wait} s",
            "rate_limit_error",
            code="rate_limit_exceeded",
            headers={"Retry-After": str(wait)},
        )
