"""Threads for work that is too long for the event loop, given to callers in turn.

In: functions, each under the key of whoever asked for it. Out: their results. A caller with a hundred jobs delays the next job
of any other caller by one job for each busy thread, not by a hundred.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any


class FairExecutor:
    """A thread pool that serves keys round robin. Used from one event loop."""

    def __init__(self, threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._num_free = threads
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # keys in the order of their next turn

    def num_waiting(self, key: str) -> int:
        """Jobs of `key` that no thread has begun."""
        return len(self._waiting.get(key, ()))

    async def run(self, key: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run function(*args, **kwargs) in a thread when it is the turn of `key`; returns its result or raises its exception.

        The function sees the context variables of the caller. Cancelling the call before the job's turn drops the job; later the
        thread still finishes it, and counts as busy until then.
        """
        loop = asyncio.get_running_loop()
        await self._acquire(loop, key)
        job = self._pool.submit(contextvars.copy_context().run, partial(function, *args, **kwargs))

        def finished(_: Future[Any]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._release)

        job.add_done_callback(finished)
        return await asyncio.wrap_future(job)

    def close(self, *, wait: bool = True) -> None:
        """Drop the jobs that no thread has begun, and wait for the others."""
        self._pool.shutdown(wait=wait, cancel_futures=True)

    async def _acquire(self, loop: asyncio.AbstractEventLoop, key: str) -> None:
        if self._num_free:
            self._num_free -= 1
            return
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.setdefault(key, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._release()
            raise

    def _release(self) -> None:
        while self._waiting:
            key, turns = next(iter(self._waiting.items()))
            del self._waiting[key]
            turn = turns.popleft()
            if turns:
                self._waiting[key] = turns  # behind all others
            if not turn.done():
                turn.set_result(None)
                return
        self._num_free += 1
