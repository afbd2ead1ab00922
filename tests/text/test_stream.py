"""Streaming equals the whole: characters are never cut, stop strings are found wherever the pieces end."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenkit.text.stream import Detokenizer, StopStrings
from qwenkit.text.tokenizer import Tokenizer


def chunks(data: st.DataObject, sequence: list[int] | str) -> list[list[int] | str]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sequence)), max_size=8)))
    return [sequence[a:b] for a, b in zip([0, *cuts], [*cuts, len(sequence)], strict=True)]


# Ids of `tiny` are bytes below 256, so these are arbitrary byte strings, valid UTF-8 and not, with control tokens.
token_ids = st.lists(st.integers(0, 270)) | st.text().map(lambda text: list(text.encode()))


@settings(deadline=None)
@given(ids=token_ids, skip_special=st.booleans(), data=st.data())
def test_detokenizer_equals_decode(tiny: Tokenizer, ids: list[int], skip_special: bool, data: st.DataObject) -> None:
    detokenizer = Detokenizer(tiny, skip_special=skip_special)
    text = "".join(detokenizer.push(piece) for piece in chunks(data, ids)) + detokenizer.finish()
    assert text == tiny.decode(ids, skip_special=skip_special)


def test_detokenizer_waits_for_the_whole_character(tiny: Tokenizer) -> None:
    detokenizer = Detokenizer(tiny)
    assert [detokenizer.push([byte]) for byte in "a😀é".encode()] == ["a", "", "", "", "😀", "", "é"]
    assert detokenizer.push([0xF0, 0x9F]) == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""


def first_completed(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition, one character at a time."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(deadline=None)
@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    data=st.data(),
)
def test_stop_strings_do_not_depend_on_the_pieces(text: str, stops: list[str], data: st.DataObject) -> None:
    finder, shown, matched = StopStrings(stops), "", None
    for piece in chunks(data, text):
        safe, matched = finder.push(piece)
        shown += safe
    shown += finder.flush()
    assert (shown, matched) == first_completed(text, stops)


@settings(deadline=None)
@given(text=st.text("abc", max_size=30), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_stop_strings_hold_back_no_more_than_needed(text: str, stops: list[str]) -> None:
    finder = StopStrings(stops)
    safe, matched = finder.push(text)
    if matched is None:
        held = text[len(safe) :]
        beginnings = {stop[:size] for stop in stops for size in range(1, len(stop))}
        assert held == max((end for end in beginnings if text.endswith(end)), key=len, default="")


def test_stop_strings_by_hand() -> None:
    finder = StopStrings(["\nObservation:", "<end>"])
    assert finder.push("answer\nObs") == ("answer", None)
    assert finder.push("tacle <en") == ("\nObstacle ", None)
    assert finder.push("d> more") == ("", "<end>")
    assert finder.push("more") == ("", "<end>")
    assert finder.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="stop: an empty string"):
        StopStrings(["a", ""])
