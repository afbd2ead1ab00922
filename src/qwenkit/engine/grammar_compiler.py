"""GrammarCompiler: says whether a grammar can be used, by compiling it on trial in a process that can be killed.

In: a Grammar from a stranger. Out: nothing, or a ValueError of one sentence. The source's length, the time and the memory are
limited; a grammar that exceeds them costs its process, which is replaced, and frees the core. Verdicts are remembered.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from typing import Any

from qwenkit.engine.grammar import Grammar, require_llguidance
from qwenkit.engine.grammar_worker import receive, send
from qwenkit.engine.matcher import Grammars
from qwenkit.text.tokenizer import Tokenizer

START_SECONDS = 60.0  # a worker that has not read the vocabulary by then will not
MAX_VERDICTS = 1024
# What the worker needs to find Python and its libraries; keys and tokens in the environment are none of its business.
ENVIRONMENT = (
    "PATH",
    "PYTHONPATH",
    "PYTHONHOME",
    "VIRTUAL_ENV",
    "LD_LIBRARY_PATH",
    "HOME",
    "LANG",
    "SYSTEMROOT",
    "TMPDIR",
)


class GrammarCompiler:
    """Checks grammars against a vocabulary; safe to call from several threads, one grammar is tried at a time.

    timeout: seconds for one grammar. max_source: its longest text in bytes. max_memory: bytes while it is compiled; a compiled
    one may keep a quarter of that. max_wait: seconds to wait for grammars before it. `grammars`, an engine's, gets what passed
    already compiled, in the calling thread, so that the engine's step does not wait for it.
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
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False  # whether it has read the vocabulary
        self._verdicts: OrderedDict[bytes, tuple[str | None, int]] = OrderedDict()
        self._closed = False

    def check(self, grammar: Grammar) -> None:
        """Return if the grammar can be used. Blocks, for `timeout` and what waits before it.

        Raises ValueError, one sentence, if the grammar is wrong, not supported, or exceeds a limit.
        """
        size = len(grammar.source.encode())
        if size > self.max_source:
            raise ValueError(f"grammar is {size} bytes long, allowed are at most {self.max_source}")
        if not self._lock.acquire(timeout=self.max_wait):
            raise ValueError(f"grammar has waited {self.max_wait:g} seconds for others to be compiled, try again later")
        try:
            key = hashlib.sha256(f"{grammar.kind} {grammar.source}".encode()).digest()
            verdict = self._verdicts.get(key)
            if verdict is None:
                verdict = self._verdicts[key] = self._try(grammar)
                if len(self._verdicts) > MAX_VERDICTS:
                    self._verdicts.popitem(last=False)
            self._verdicts.move_to_end(key)
        finally:
            self._lock.release()
        error, num_bytes = verdict
        if error is not None:
            raise ValueError(error)
        if self._grammars is not None:
            self._grammars.compile(grammar, num_bytes)

    def start(self) -> None:
        """Start the worker now, so that the first grammar does not wait for it. Raises RuntimeError if it does not start."""
        with self._lock:
            self._running()

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """End the worker. Grammars that wait are refused."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()
        with self._lock:
            self._drop()

    def _try(self, grammar: Grammar) -> tuple[str | None, int]:
        message = {"kind": grammar.kind, "source": grammar.source, "seconds": self.timeout}
        for attempt in (1, 2):  # a process may have died before, for a reason of its own
            process = self._running()
            started = time.monotonic()
            answer = self._ask(process, message, self.timeout)
            if answer is not None:
                break
            took = time.monotonic() - started
            self._drop()
            if self._closed:
                raise ValueError("grammar cannot be checked: the compiler is closed")
            self._process = self._spawn()  # what was tried pays for the new process, not who comes next
            if took >= self.timeout:
                return f"grammar takes longer to compile than the {self.timeout:g} seconds allowed", 0
            if attempt == 2:
                return f"grammar needs more memory to compile than the {self.max_memory >> 20} MiB allowed", 0
        assert answer is not None
        if answer["error"] is None and answer["bytes"] > self.max_memory // 4:
            return (
                f"grammar takes {answer['bytes'] >> 20} MiB of memory once compiled, "
                f"allowed are at most {self.max_memory >> 22} MiB"
            ), 0
        return answer["error"], answer.get("bytes", 0)

    def _running(self) -> subprocess.Popen[bytes]:
        """A worker that has read its vocabulary."""
        if self._closed:
            raise ValueError("grammar cannot be checked: the compiler is closed")
        if self._process is not None and self._process.poll() is not None:
            self._drop()
        if self._process is None:
            self._process = self._spawn()
        if not self._ready:
            if self._ask(self._process, None, START_SECONDS) is None:
                self._drop()
                raise RuntimeError("the process that compiles grammars did not start")
            self._ready = True
        return self._process

    def _spawn(self) -> subprocess.Popen[bytes]:
        require_llguidance()
        self._ready = False
        process = subprocess.Popen(
            [sys.executable, "-m", "qwenkit.engine.grammar_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # One arena of malloc: a thread's own would reserve 64 MiB of the address space that the worker limits, or not,
            # as its place happens to be aligned.
            env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ} | {"MALLOC_ARENA_MAX": "1"},
            start_new_session=True,  # Ctrl-C is for the server, which still ends its requests
        )
        tokens = [base64.b64encode(token).decode() for token in self._vocabulary.tokens()]
        setup = {"tokens": tokens, "special_ids": self._vocabulary.special_ids(), "max_memory": self.max_memory}
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it died: who waits for its first word will see
            send(process.stdin, setup)
        return process

    def _ask(
        self, process: subprocess.Popen[bytes], message: dict[str, Any] | None, seconds: float
    ) -> dict[str, Any] | None:
        """The worker's next message, after it was sent one; None if it died or was killed for taking too long."""
        assert process.stdin is not None
        assert process.stdout is not None
        watch = threading.Timer(seconds, process.kill)
        watch.daemon = True
        watch.start()
        try:
            if message is not None:
                send(process.stdin, message)
            return receive(process.stdout)
        except OSError:
            return None
        finally:
            watch.cancel()

    def _drop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
