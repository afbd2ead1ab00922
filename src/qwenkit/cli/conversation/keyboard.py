"""The keyboard while an answer streams: what is typed is not echoed into it, and is there at the next prompt.

In: a terminal to read from. Echo and line editing are off while `held_keys` lasts; the keys wait in the terminal's own queue.
Ctrl-C still interrupts, and discards what was typed before it. The state is restored however the block ends, SIGTERM and
SIGHUP included.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

try:
    import termios
except ImportError:  # Windows
    termios = None  # type: ignore[assignment]


@contextmanager
def held_keys(source: Any) -> Iterator[None]:
    """Keep typed keys for whoever reads `source` next; nothing happens where it is no terminal."""
    try:
        descriptor = source.fileno()
        before = termios.tcgetattr(descriptor) if termios is not None and os.isatty(descriptor) else None
    except (AttributeError, OSError, ValueError):
        before = None
    except Exception as error:  # termios.error is no OSError
        if termios is None or not isinstance(error, termios.error):
            raise
        before = None
    if before is None:
        yield
        return

    def restore() -> None:
        with suppress(termios.error):
            termios.tcsetattr(descriptor, termios.TCSANOW, before)  # the typed keys stay in the queue

    with _restored_when_killed(restore):
        held = [*before[:6], list(before[6])]
        held[0] &= ~termios.ICRNL  # Enter is the same key to the prompt
        held[3] &= ~(termios.ECHO | termios.ICANON)
        held[6][termios.VMIN], held[6][termios.VTIME] = 1, 0
        try:
            with suppress(termios.error):
                termios.tcsetattr(descriptor, termios.TCSANOW, held)
            yield
        finally:
            restore()


@contextmanager
def _restored_when_killed(restore: Any) -> Iterator[None]:
    """Signals that would end the process without cleaning up restore the terminal first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        restore()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
