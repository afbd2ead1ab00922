"""How much each principal (API key) may ask for: in a minute, and waiting at the same time.

In: a caller and what it takes: a request, a prompt's tokens, an answer's tokens as they are made. Out: nothing, or ApiError 429
that says when to come again. Everything that costs the engine something is counted here and nowhere else, so that no route, no
`n` and no batch passes by. The window slides, and lives in this process's memory. Without keys all callers are one.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from qwenkit.serve.caller import Caller
from qwenkit.serve.errors import ApiError


class MinuteLimits:
    """Requests and tokens of each principal in a minute; None: no limit of that kind. Safe to use from several threads.

    What is made beyond a minute's tokens is owed and taken from the following minutes first, so that in the long run nobody has
    more than the limit.
    """

    def __init__(self, requests: int | None = None, tokens: int | None = None) -> None:
        self._requests = None if requests is None else RateLimitItemPerMinute(requests, namespace="requests")
        self._tokens = None if tokens is None else RateLimitItemPerMinute(tokens, namespace="tokens")
        self._window = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._owed: Counter[str] = Counter()  # tokens beyond the limit, by principal
        self._lock = threading.Lock()

    def take_request(self, who: Caller) -> None:
        """Count a request, or raise."""
        with self._lock:
            if self._requests is not None and not self._window.hit(self._requests, who.principal):
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
        with self._lock:
            self._pay(item, who)
            if self._owed[who.principal] or not self._window.hit(item, who.principal, cost=count):
                raise self._refusal(item, who, "tokens")

    def spend_tokens(self, who: Caller, count: int) -> bool:
        """Count the tokens of an answer that have been made; False when the minute has not as many left."""
        item = self._tokens
        if item is None or not who.is_limited or not count:
            return True
        with self._lock:
            self._owed[who.principal] += count
            return self._pay(item, who)

    def tokens_exceeded(self, who: Caller) -> ApiError:
        """429 for a caller whose minute has no tokens left."""
        assert self._tokens is not None
        return self._refusal(self._tokens, who, "tokens")

    def _pay(self, item: RateLimitItemPerMinute, who: Caller) -> bool:
        """Take what is owed from the window, as far as there is any left; whether that was all."""
        left = self._window.get_window_stats(item, who.principal).remaining
        paid = min(self._owed[who.principal], left)
        if paid > 0 and self._window.hit(item, who.principal, cost=paid):
            self._owed[who.principal] -= paid
        if self._owed[who.principal] <= 0:
            del self._owed[who.principal]
        return who.principal not in self._owed

    def _refusal(self, item: RateLimitItemPerMinute, who: Caller, what: str) -> ApiError:
        stats = self._window.get_window_stats(item, who.principal)
        wait = min(max(math.ceil(stats.reset_time - time.time()), 1), 60)
        return ApiError(
            429,
            f"this key may use {item.amount} {what} a minute; try again in {wait} s",
            "rate_limit_error",
            code="rate_limit_exceeded",
            headers={"Retry-After": str(wait)},
        )


class QueueLimits:
    """Requests and prompt tokens that wait for the engine, all together and of each principal.

    While those of only one wait, they may fill the queue. Where several wait, a full queue refuses who has his share of it and
    takes the others, so that nobody can shut anybody out; with p principals it holds at most 1 + 1/2 + ... + 1/p times its size.
    """

    def __init__(self) -> None:
        self._requests: Counter[str] = Counter()  # of principals of whom something waits
        self._tokens: Counter[str] = Counter()

    @property
    def num_requests(self) -> int:
        """Requests that wait."""
        return self._requests.total()

    def excess(self, principal: str, num_tokens: int, max_requests: int, max_tokens: int) -> tuple[str, str] | None:
        """Why a request of so many prompt tokens cannot wait too, as a word and as a sentence; None where it can.

        A principal of whom nothing waits may have one longer than the queue, else nothing could ever serve it.
        """
        own, requests, tokens = self._requests[principal], self.num_requests, self._tokens.total()
        principals = len(self._requests) + (not own)
        if requests >= max_requests and own >= max_requests / principals:
            return "queue_full", f"{requests} requests are waiting already"
        longest = max(max_tokens - tokens, max_tokens / principals - self._tokens[principal])
        if own and num_tokens > longest:
            return "queue_tokens", f"{tokens} prompt tokens are waiting already"
        return None

    def add(self, principal: str, num_tokens: int) -> None:
        """Note that a request waits."""
        self._requests[principal] += 1
        self._tokens[principal] += num_tokens

    def remove(self, principal: str, num_tokens: int) -> None:
        """Note that a request does not wait any more."""
        self._requests[principal] -= 1
        self._tokens[principal] -= num_tokens
        if not self._requests[principal]:
            del self._requests[principal], self._tokens[principal]
