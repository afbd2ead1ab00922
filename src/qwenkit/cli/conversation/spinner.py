"""A sign of life on a terminal: a character that turns and what is being done, erased when it is done.

Nothing is written where the stream is no terminal or a dumb one, or where the work is done at once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from shutil import get_terminal_size
from types import TracebackType
from typing import TextIO

FRAMES = "|/-\\"
DELAY = 0.3  # seconds before the first frame
PAUSE = 0.12  # seconds between frames


class Spinner:
    """A context manager; `label` is asked for at each frame. `stop` may be called at any time, more than once."""

    def __init__(self, out: TextIO, label: Callable[[], str]) -> None:
        self.out = out
        self.label = label
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._shown = False

    def __enter__(self) -> Spinner:
        if self.out.isatty() and os.environ.get("TERM") != "dumb":
            self._thread = threading.Thread(target=self._turn, name="spinner", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Erase the line; nothing is written after this returns."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._shown:
                self.out.write("\r\x1b[K")
                self.out.flush()

    def _turn(self) -> None:
        frame = 0
        pause = DELAY
        while not self._done.wait(pause):
            text = f"{FRAMES[frame % len(FRAMES)]} {self.label()}"[: get_terminal_size().columns - 1]
            self.out.write(f"\r\x1b[K{text}")
            self.out.flush()
            self._shown = True
            frame, pause = frame + 1, PAUSE
