"""An answer on the screen while it is written, and the numbers under it.

In: pieces of an answer. Out: its text on a stream; on a terminal thoughts and numbers are dim and control characters harmless,
elsewhere nothing but the text. On a terminal words are wrapped at its width, a spinner turns until the first piece comes, and
what is typed meanwhile is held for the next prompt.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import TextIO

from qwenkit.cli.conversation.keyboard import held_keys
from qwenkit.cli.conversation.spinner import Spinner
from qwenkit.cli.conversation.state import Piece
from qwenkit.cli.conversation.wrap import WordWrap

# A model may write anything; escape sequences that move the cursor or set a title stay visible characters.
_HARMLESS = {code: chr(0xFFFD) for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"} | {0x0D: None}


class Screen:
    """Text to one stream. `dim` is plain where the stream is no terminal, NO_COLOR is set or the terminal is dumb."""

    def __init__(self, out: TextIO) -> None:
        self.out = out
        self.is_terminal = out.isatty()
        self._colours = self.is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def write(self, text: str, *, dim: bool = False) -> None:
        """Show text at once, without a line end of its own."""
        if self.is_terminal:
            text = text.translate(_HARMLESS)
        self.out.write(f"\x1b[2m{text}\x1b[0m" if dim and self._colours and text else text)
        self.out.flush()

    @property
    def width(self) -> int | None:
        """Columns of the terminal; None where the stream is none, or none that has a width."""
        try:
            return (os.get_terminal_size(self.out.fileno()).columns or None) if self.is_terminal else None
        except (OSError, ValueError):
            return None

    def line(self, text: str, *, dim: bool = False) -> None:
        """Show a whole line, wrapped on a terminal."""
        wrap = WordWrap()
        text = wrap.feed(text, self.width)
        self.write(text + wrap.flush(self.width), dim=dim)
        self.write("\n")


def doing_of(talker: object) -> Callable[[], str]:
    """What a model in this process is doing; a server does not say."""
    known: Callable[[], str] = getattr(talker, "doing", lambda: "waiting for the server")
    return known


@dataclass
class Meter:
    """Counts an answer: tokens, and seconds (monotonic clock) from the question to its first and its last piece."""

    asked: float
    tokens: int = 0
    first_tokens: int = 0
    first: float | None = None
    last: float = 0.0
    finish_reason: str | None = None

    def note(self, piece: Piece, now: float) -> None:
        """Take in a piece that arrived at `now`."""
        self.tokens += piece.tokens
        self.last = now
        self.finish_reason = piece.finish_reason or self.finish_reason
        if self.first is None:
            self.first, self.first_tokens = now, piece.tokens

    def summary(self, *, stopped: bool = False) -> str:
        """`12 tokens, 34.5 tokens/s, first after 0.21 s`; the rate is that of the tokens after the first piece."""
        parts = [f"{self.tokens} token{'' if self.tokens == 1 else 's'}"]
        if self.first is not None:
            if self.last > self.first and self.tokens > self.first_tokens:
                parts.append(f"{(self.tokens - self.first_tokens) / (self.last - self.first):.1f} tokens/s")
            parts.append(f"first after {self.first - self.asked:.2f} s")
        if stopped:
            parts.append("stopped")
        elif self.finish_reason == "length":
            parts.append("cut at the longest allowed length")
        return ", ".join(parts)


def show_answer(
    pieces: Generator[Piece, None, None], screen: Screen, meter: Meter, doing: Callable[[], str] = lambda: "waiting"
) -> None:
    """Write an answer as it comes and end its line, whatever ends it. Thoughts are shown on a terminal only.

    `doing` says what happens before the first piece.
    """
    thinking, at_line_start = False, True
    wrap = WordWrap()

    def write(text: str, *, dim: bool = False) -> None:
        if screen.is_terminal:
            text = text.translate(_HARMLESS)
        screen.write(wrap.feed(text, screen.width), dim=dim)

    keys = held_keys(sys.stdin) if screen.is_terminal else nullcontext()
    with keys, closing(pieces), Spinner(screen.out, doing) as spinner:
        try:
            for piece in pieces:
                meter.note(piece, time.monotonic())
                if piece.reasoning and screen.is_terminal:
                    spinner.stop()
                    write(piece.reasoning, dim=True)
                    thinking, at_line_start = True, piece.reasoning.endswith("\n")
                if piece.text:
                    spinner.stop()
                    if thinking:
                        screen.write(wrap.flush(screen.width), dim=True)
                        write("\n" if at_line_start else "\n\n")
                        thinking = False
                    write(piece.text)
                    at_line_start = piece.text.endswith("\n")
        finally:
            spinner.stop()
            screen.write(wrap.flush(screen.width), dim=thinking)
            if not at_line_start:
                screen.write("\n")
