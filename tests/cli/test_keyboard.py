"""Typed keys while an answer streams, and the spinner, at a pseudo-terminal."""

from __future__ import annotations

import io
import os
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator

import pytest

from qwenkit.cli.conversation.keyboard import held_keys
from qwenkit.cli.conversation.spinner import Spinner


@pytest.fixture
def terminal() -> Iterator[tuple[int, io.TextIOWrapper]]:
    """The side of the keyboard and screen, and the side of the program."""
    master, slave = os.openpty()
    with open(slave, encoding="utf-8", closefd=False) as source:
        yield master, source
    os.close(master)
    os.close(slave)


def test_typed_keys_are_not_echoed_and_wait(terminal: tuple[int, io.TextIOWrapper]) -> None:
    master, source = terminal
    before = termios.tcgetattr(source.fileno())
    with held_keys(source):
        os.write(master, b"typed\r")
        assert not select.select([master], [], [], 0.1)[0], "nothing is echoed"
        assert termios.tcgetattr(source.fileno())[3] & termios.ISIG, "Ctrl-C interrupts"
    assert termios.tcgetattr(source.fileno()) == before
    os.set_blocking(source.fileno(), False)
    raw = termios.tcgetattr(source.fileno())
    raw[3] &= ~(termios.ICANON | termios.ECHO)
    termios.tcsetattr(source.fileno(), termios.TCSANOW, raw)
    assert os.read(source.fileno(), 100) == b"typed\r"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_exception_restores_the_terminal(terminal: tuple[int, io.TextIOWrapper], error: type[BaseException]) -> None:
    _, source = terminal
    before = termios.tcgetattr(source.fileno())
    with pytest.raises(error), held_keys(source):
        raise error
    assert termios.tcgetattr(source.fileno()) == before


def test_a_signal_restores_the_terminal(terminal: tuple[int, io.TextIOWrapper]) -> None:
    _, source = terminal
    before = termios.tcgetattr(source.fileno())
    program = (
        "import sys, time\nfrom qwenkit.cli.conversation.keyboard import held_keys\n"
        "with held_keys(sys.stdin):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=source, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert termios.tcgetattr(source.fileno()) != before
        process.terminate()
        assert process.wait(30) == -signal.SIGTERM
    assert termios.tcgetattr(source.fileno()) == before


def test_what_is_no_terminal_is_left_alone() -> None:
    with held_keys(io.StringIO()), held_keys(None), open(os.devnull, encoding="utf-8") as null, held_keys(null):
        pass


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_spinner_says_what_is_done_and_is_erased(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("qwenkit.cli.conversation.spinner.DELAY", 0.0)
    monkeypatch.setattr("qwenkit.cli.conversation.spinner.PAUSE", 0.001)
    out, asked = Tty(), iter(range(1, 10**9))
    seen = [0]

    def label() -> str:
        seen[0] = next(asked)
        return f"{seen[0]} of 9 tokens"

    with Spinner(out, label):
        while seen[0] < 3:
            select.select([], [], [], 0.001)
    assert "\r\x1b[K/ 2 of 9 tokens" in out.getvalue()
    assert out.getvalue().endswith("\r\x1b[K")


def test_a_pipe_gets_no_spinner() -> None:
    out = io.StringIO()
    with Spinner(out, lambda: "waiting") as spinner:
        spinner.stop()
    assert out.getvalue() == ""
