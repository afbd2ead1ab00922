"""GrammarCompiler: says whether a grammar can be used, by compiling it on trial in a process that its limits can end.

In: a Grammar from a client, and who asks. Out: nothing, or a ValueError of one sentence. The source's length, the CPU
time and the memory are limited. Trials run side by side, one at a time for each principal, so that expensive grammars of
one make nobody else wait. Verdicts are remembered.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import threading
from collections import OrderedDict, deque
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from qwenkit.engine.grammar import Grammar, require_llguidance
from qwenkit.engine.grammar_worker import WALL_FACTOR
from qwenkit.engine.matcher import Grammars
from qwenkit.text.child_process import ChildProcess
from qwenkit.text.tokenizer import Tokenizer

Answer = dict[str, Any]

START_SECONDS = 60.0  # a worker that has not read the vocabulary by then will not
MAX_VERDICTS = 1024
MAX_TRIALS = 4  # side by side; one for each principal
MAX_QUEUED = 256  # grammars of one principal that may wait
GRACE_SECONDS = 5.0  # for the worker to notice that a trial has exceeded its limits


class GrammarBusyError(ValueError):
    """Too many grammars of this principal wait already; try again later."""


class GrammarCompiler:
    """Checks grammars against a vocabulary; safe to call from several threads.

    timeout: CPU seconds for one grammar. max_source: its longest text in bytes. max_memory: bytes while it is compiled;
    a compiled one may keep a quarter of that. max_wait: seconds to wait for grammars before it. `grammars`, an engine's,
    gets what passed already compiled, so that the engine's step does not wait for it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        timeout: float = 5.0,
        max_source: int = 64 << 10,
        max_memory: int = 512 << 20,
        max_wait: float = 30.0,
        grammars: Grammars | None = None,
    ) -> None:
        self.timeout, self.max_source, self.max_memory, self.max_wait = timeout, max_source, max_memory, max_wait
        self._grammars = grammars
        self._vocabulary = grammars or Grammars(tokenizer, tokenizer.num_ids)
        self._verdicts: OrderedDict[bytes, tuple[str | None, int]] = OrderedDict()
        self._lock = threading.Lock()
        self._queues: OrderedDict[str, deque[tuple[Grammar, Future[None]]]] = OrderedDict()  # by principal, in turn
        self._running: set[str] = set()
        self._worker = TrialWorker(self._vocabulary, timeout, max_memory)
        self._closed = False

    def check(self, grammar: Grammar, principal: str = "") -> None:
        """Return if the grammar can be used. Blocks, for its trial and what waits before it.

        Raises ValueError, one sentence, if the grammar is wrong, not supported, or exceeds a limit; GrammarBusyError if it waited
        longer than `max_wait`.
        """
        future = self.submit(grammar, principal)
        try:
            future.result(self.max_wait)
        except FutureTimeoutError:
            if future.cancel():
                raise self._busy() from None
            future.result()  # it runs, and ends within its limits

    async def check_async(self, grammar: Grammar, principal: str = "") -> None:
        """`check` without a thread that waits. Cancelling takes the grammar out of the queue."""
        future = self.submit(grammar, principal)
        waiter = asyncio.wrap_future(future)
        try:
            await asyncio.wait([waiter], timeout=self.max_wait)
            if not waiter.done() and future.cancel():
                raise self._busy()
            await waiter
        finally:
            future.cancel()

    def submit(self, grammar: Grammar, principal: str = "") -> Future[None]:
        """Queue a grammar; the future ends with None or with what `check` raises. Trials of one principal run one by one."""
        future: Future[None] = Future()
        size = len(grammar.source.encode())
        if size > self.max_source:
            future.set_exception(ValueError(f"grammar is {size} bytes long, allowed are at most {self.max_source}"))
            return future
        with self._lock:
            if self._closed:
                future.set_exception(_closed())
                return future
            queue = self._queues.setdefault(principal, deque())
            if len(queue) >= MAX_QUEUED:
                future.set_exception(self._busy())
                return future
            queue.append((grammar, future))
            self._start_next()
        return future

    def start(self) -> None:
        """Start the worker now, so that the first grammar does not wait for it. Raises RuntimeError if it does not start."""
        if self._closed:
            raise _closed()
        self._worker.start()

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """End the worker. Grammars that wait are refused."""
        with self._lock:
            self._closed = True
            waiting = [future for queue in self._queues.values() for _, future in queue]
            self._queues.clear()
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(_closed())
        self._worker.close()

    def _busy(self) -> GrammarBusyError:
        return GrammarBusyError(
            f"grammar has waited {self.max_wait:g} seconds for others to be compiled, try again later"
        )

    def _start_next(self) -> None:
        """Start trials while there is room, principals in turn. Called with the lock."""
        while len(self._running) < MAX_TRIALS:
            principal = next((name for name in self._queues if name not in self._running), None)
            if principal is None:
                return
            queue = self._queues[principal]
            grammar, future = queue.popleft()
            if queue:
                self._queues.move_to_end(principal)
            else:
                del self._queues[principal]
            if not future.set_running_or_notify_cancel():
                continue
            self._running.add(principal)
            threading.Thread(target=self._run, args=(grammar, principal, future), name="grammar", daemon=True).start()

    def _run(self, grammar: Grammar, principal: str, future: Future[None]) -> None:
        try:
            error, num_bytes = self._verdict(grammar)
            if error is not None:
                raise ValueError(error)
            if self._grammars is not None:
                self._grammars.compile(grammar, num_bytes)
        except BaseException as error:  # whoever waits has to hear of it, whatever it is
            future.set_exception(error)
        else:
            future.set_result(None)
        finally:
            with self._lock:
                self._running.discard(principal)
                self._start_next()

    def _verdict(self, grammar: Grammar) -> tuple[str | None, int]:
        """(what is wrong with the grammar or None, bytes that it takes once compiled)."""
        key = hashlib.sha256(f"{grammar.kind} {grammar.source}".encode()).digest()
        with self._lock:
            verdict = self._verdicts.get(key)
        if verdict is None:
            verdict = self._judge(self._worker.compile(grammar))
        with self._lock:
            self._verdicts[key] = verdict
            self._verdicts.move_to_end(key)
            if len(self._verdicts) > MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        return verdict

    def _judge(self, answer: dict[str, Any]) -> tuple[str | None, int]:
        failure = answer.get("failure")
        if failure == "time":
            return f"grammar takes longer to compile than the {self.timeout:g} seconds allowed", 0
        if failure is not None:
            return f"grammar needs more memory to compile than the {self.max_memory >> 20} MiB allowed", 0
        if answer["error"] is None and answer["bytes"] > self.max_memory // 4:
            return (
                f"grammar takes {answer['bytes'] >> 20} MiB of memory once compiled, "
                f"allowed are at most {self.max_memory >> 22} MiB"
            ), 0
        return answer["error"], answer.get("bytes", 0)


class TrialWorker:
    """The process of grammar_worker.py, started when first needed and again if it dies; safe to use from several threads."""

    def __init__(self, vocabulary: Grammars, timeout: float, max_memory: int) -> None:
        self._vocabulary, self._timeout, self._max_memory = vocabulary, timeout, max_memory
        self._lock = threading.Lock()
        self._process: ChildProcess | None = None
        self._waiting: dict[int, Future[Answer | None]] = {}  # of this process
        self._reader: threading.Thread | None = None
        self._next_number = 0
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The process's id; None before the first start."""
        return None if self._process is None else self._process.pid

    def start(self) -> tuple[ChildProcess, dict[int, Future[Answer | None]]]:
        """A process that has read its vocabulary, and who waits for its answers.

        Raises RuntimeError if it does not start, ValueError once closed.
        """
        with self._lock:
            if self._closed:
                raise _closed()
            if self._process is not None and self._process.alive:
                return self._process, self._waiting
            require_llguidance()
            process = self._process = ChildProcess("qwenkit.engine.grammar_worker")
            tokens = [base64.b64encode(token).decode() for token in self._vocabulary.tokens()]
            process.send({"tokens": tokens, "special_ids": self._vocabulary.special_ids()})
            if process.receive(START_SECONDS) is None:
                process.close()
                if self._closed:
                    raise _closed()
                raise RuntimeError("the process that compiles grammars did not start")
            self._waiting = {}
            self._reader = threading.Thread(target=self._read, args=(process, self._waiting), daemon=True)
            self._reader.start()
            return process, self._waiting

    def compile(self, grammar: Grammar) -> Answer:
        """The worker's answer: `error` and `bytes`, or `failure`: time or memory."""
        message: dict[str, Any] = {"kind": grammar.kind, "source": grammar.source}
        message |= {"seconds": self._timeout, "max_memory": self._max_memory}
        for _ in range(2):  # a process may have died before, for a reason of its own
            process, waiting = self.start()
            future: Future[Answer | None] = Future()
            with self._lock:
                number = self._next_number = self._next_number + 1
                waiting[number] = future
            answer = None
            if process.send(message | {"number": number}) and process.alive:
                try:
                    answer = future.result(WALL_FACTOR * self._timeout + GRACE_SECONDS)
                except FutureTimeoutError:
                    process.kill()
            with self._lock:
                waiting.pop(number, None)
            if answer is not None:
                return answer
            if self._closed:
                raise _closed()
        return {"failure": "memory"}

    def close(self) -> None:
        """End the process and wait for its end; who waits for an answer gets ValueError."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()
        if self._reader is not None:
            self._reader.join(GRACE_SECONDS)

    def _read(self, process: ChildProcess, waiting: dict[int, Future[Answer | None]]) -> None:
        """Hand the process's answers to those who wait, until it ends."""
        while (answer := process.receive()) is not None:
            with self._lock:
                future = waiting.pop(answer["number"], None)
            if future is not None:
                future.set_result(answer)
        process.close()
        with self._lock:
            left = list(waiting.values())
            waiting.clear()
        for future in left:
            future.set_result(None)


def _closed() -> ValueError:
    return ValueError("grammar cannot be checked: the compiler is closed")
