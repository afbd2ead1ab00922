"""A process of its own that renders markdown, so that no text, however contrived, stops the server or slows the engine.

Texts go in one after the other, HTML comes out. A text that takes too long is shown as it is: its process is killed, which
frees the core, and the next text starts another. The process is a plain program on two pipes and ends when they close.
"""

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from qwenkit.serve.page import render

START_SECONDS = 30.0  # for a process to import what it needs; no text's fault


class BusyError(Exception):
    """More texts wait than may; one sentence for the client."""


class Renderer:
    """Owns the process; used from one event loop. `timeout` is in seconds, for one text, and `max_waiting` counts texts."""

    def __init__(self, timeout: float = 2.0, max_waiting: int = 64) -> None:
        self.timeout = timeout
        self.max_waiting = max_waiting
        self._waiting = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="render")  # one at a time: the pipes have no numbers

    async def html(self, text: str) -> str:
        """Markdown to HTML; raises BusyError."""
        if self._waiting >= self.max_waiting:
            raise BusyError(f"{self._waiting} texts wait to be rendered, no more are taken.")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self.render, text)
        finally:
            self._waiting -= 1

    def render(self, text: str) -> str:
        """What `html` does on its thread."""
        if len(text) > render.MAX_MARKDOWN:
            return render.plain(text)
        data = text.encode(errors="replace")
        for _ in range(2):  # a process that was found dead is replaced once
            answer, late = exchange_within(self._running(), data, self.timeout)
            if answer is not None:
                return answer.decode()
            self._end()
            if late:
                break
        return render.plain(text)

    def close(self) -> None:
        """End the process; a text being rendered is waited for, `timeout` at most."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._end()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            # By its path and not with -m: the working directory, which may be a model's folder, is no place to import from.
            program = [sys.executable, str(Path(render.__file__))]
            self._process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            exchange_within(self._process, b"", START_SECONDS)  # answered once it has started
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()  # closes the pipes and reaps it
            self._process = None


def exchange_within(process: subprocess.Popen[bytes], data: bytes, seconds: float) -> tuple[bytes | None, bool]:
    """`exchange` with a process that is killed if it takes longer than `seconds`; the answer, and True if it did."""
    late = threading.Event()

    def stop() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        return exchange(process, data), late.is_set()
    finally:
        timer.cancel()


def exchange(process: subprocess.Popen[bytes], data: bytes) -> bytes | None:
    """One text in, its HTML out; None if the process ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(len(data).to_bytes(8, "little") + data)
        process.stdin.flush()
    except OSError:
        return None
    size = read(process.stdout, 8)
    return None if size is None else read(process.stdout, int.from_bytes(size, "little"))


def read(pipe: IO[bytes], size: int) -> bytes | None:
    data = pipe.read(size)
    return data if len(data) == size else None
