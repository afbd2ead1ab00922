"""A process of its own that renders markdown, so that no text, however contrived, stops the server or slows the engine.

Texts go in one after the other, the callers' in turn, HTML comes out. A text that takes too long is shown as it is: its process
is killed, which frees the core, and the next text starts another. Each caller has CPU seconds a minute. The process is a plain
program on two pipes that ends when they close; of the server's environment, which may hold keys, it gets only what it needs.
"""

import math
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

from qwenkit.serve.executor import FairExecutor
from qwenkit.serve.page import render
from qwenkit.text.child_process import clean_environment

START_SECONDS = 30.0  # for a process to import what it needs; no text's fault
MAX_WAITING_OF_KEY = 16  # texts of one caller that wait
CPU_SECONDS = 20.0  # for each caller in a minute; a page that streams one long answer takes a few


class BusyError(Exception):
    """More texts wait than may, or the caller's CPU seconds are spent; one sentence for the client."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class CpuBudget:
    """Seconds of CPU time that each key may spend in a minute: a bucket that leaks at the same rate."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._levels: dict[str, tuple[float, float]] = {}  # key -> seconds spent, as of when

    def check(self, key: str) -> None:
        """Raises BusyError while the bucket of `key` is full."""
        over = self._level(key) - self.seconds
        if over >= 0:
            wait = math.ceil(over * 60 / self.seconds) + 1
            raise BusyError(
                f"this key has spent its {self.seconds:g} seconds of rendering a minute; try again in {wait} s", wait
            )

    def spend(self, key: str, seconds: float) -> None:
        self._levels[key] = (self._level(key) + seconds, time.monotonic())

    def _level(self, key: str) -> float:
        level, since = self._levels.get(key, (0.0, 0.0))
        return max(level - (time.monotonic() - since) * self.seconds / 60, 0.0)


class Renderer:
    """Owns the process; used from one event loop. `timeout` is in seconds, for one text, and `max_waiting` counts texts."""

    def __init__(self, timeout: float = 2.0, max_waiting: int = 64, cpu_seconds: float = CPU_SECONDS) -> None:
        self.timeout = timeout
        self.max_waiting = max_waiting
        self.budget = CpuBudget(cpu_seconds)
        self._waiting = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._executor = FairExecutor(1, "render")  # one at a time: the pipes have no numbers
        self._spent = 0.0  # CPU seconds of the last text; written and read by the thread

    async def html(self, text: str, key: str = "", *, partial: bool = False) -> str:
        """Markdown to HTML (see render.render), in the turn of the caller `key`; raises BusyError."""
        self.budget.check(key)
        if self._waiting >= self.max_waiting or self._executor.num_waiting(key) >= MAX_WAITING_OF_KEY:
            raise BusyError(f"{self._waiting} texts wait to be rendered, no more are taken.")
        self._waiting += 1
        try:
            html, spent = await self._executor.run(key, self._measured, text, partial)
        finally:
            self._waiting -= 1
        self.budget.spend(key, spent)
        return str(html)

    def _measured(self, text: str, partial: bool) -> tuple[str, float]:
        self._spent = 0.0
        return self.render(text, partial=partial), self._spent

    def render(self, text: str, *, partial: bool = False) -> str:
        """What `html` does on its thread."""
        if len(text) > render.MAX_MARKDOWN:
            return render.plain(text)
        data = text.encode(errors="replace")
        for _ in range(2):  # a process that was found dead is replaced once
            answer, late = exchange_within(self._running(), data, self.timeout, partial)
            if answer is not None:
                self._spent = answer[1]
                return answer[0].decode()
            self._end()
            if late:
                self._spent = self.timeout
                break
        return render.plain(text)

    def close(self) -> None:
        """End the process; a text being rendered is waited for, `timeout` at most."""
        self._executor.close()
        self._end()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            # By its path and not with -m: the working directory, which may be a model's folder, is no place to import from.
            program = [sys.executable, str(Path(render.__file__))]
            self._process = subprocess.Popen(
                program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=clean_environment()
            )
            exchange_within(self._process, b"", START_SECONDS)  # answered once it has started
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()  # closes the pipes and reaps it
            self._process = None


def exchange_within(
    process: subprocess.Popen[bytes], data: bytes, seconds: float, partial: bool = False
) -> tuple[tuple[bytes, float] | None, bool]:
    """`exchange` with a process that is killed if it takes longer than `seconds`; the answer, and True if it did."""
    late = threading.Event()

    def stop() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        return exchange(process, data, partial), late.is_set()
    finally:
        timer.cancel()


def exchange(process: subprocess.Popen[bytes], data: bytes, partial: bool = False) -> tuple[bytes, float] | None:
    """One text in; its HTML and the CPU seconds it took, or None if the process ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(partial.to_bytes(1, "little") + len(data).to_bytes(8, "little") + data)
        process.stdin.flush()
    except OSError:
        return None
    head = read(process.stdout, 16)
    html = None if head is None else read(process.stdout, int.from_bytes(head[8:], "little"))
    return None if head is None or html is None else (html, int.from_bytes(head[:8], "little") / 1e9)


def read(pipe: IO[bytes], size: int) -> bytes | None:
    data = pipe.read(size)
    return data if len(data) == size else None
