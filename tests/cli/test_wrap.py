"""Word wrap of text that arrives in pieces."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st
from wcwidth import wcswidth

from qwenkit.cli.conversation.wrap import WordWrap


def wrapped(pieces: list[str], width: int | None) -> str:
    wrap = WordWrap()
    return "".join(wrap.feed(piece, width) for piece in pieces) + wrap.flush(width)


def test_words_are_not_cut() -> None:
    assert wrapped(["one two thr", "ee four"], 10) == "one two \nthree four"
    assert wrapped(["exactly", " ten"], 7) == "exactly\nten"


def test_a_word_wider_than_a_line_is_cut() -> None:
    assert wrapped(["a", "bcdefghijk l"], 5) == "abcde\nfghij\nk l"


def test_wide_characters_take_two_columns() -> None:
    assert wrapped(["你好世界你好"], 5) == "你好\n世界\n你好"
    assert wrapped(["ab你好"], 5) == "ab你\n好"


def test_without_a_width_nothing_changes() -> None:
    assert wrapped(["one ", "two\n", "x" * 500], None) == "one two\n" + "x" * 500


TEXTS = st.lists(st.text("ab \n你，x\u0301", max_size=12), max_size=20)


@given(TEXTS, st.integers(2, 30))
def test_only_line_ends_are_added_and_no_line_is_too_wide(pieces: list[str], width: int) -> None:
    shown, text = wrapped(pieces, width), "".join(pieces)
    assert re.sub(r"\s", "", shown) == re.sub(r"\s", "", text)
    assert shown == wrapped(list(text), width)
    assert all(wcswidth(line) <= width for line in shown.split("\n"))
    words = [word for word in re.findall(r"\S+", text) if word.isascii() and len(word) <= width]
    assert set(words) <= set(shown.split()) or not text.isascii()
