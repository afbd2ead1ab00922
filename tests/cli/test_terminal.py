"""The conversation at a terminal, driven by keys; and what an answer looks like on the screen."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from qwenkit.cli.conversation.screen import Meter, Screen, show_answer
from qwenkit.cli.conversation.state import SETTINGS, Conversation, Message, Piece
from qwenkit.cli.conversation.terminal import SlashCompleter, Terminal, open_history
from tests.cli.test_conversation import Script


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe:
        yield pipe


def converse(keys: PipeInput, typed: str, *answers: list[Any], out: io.StringIO | None = None) -> Conversation:
    keys.send_text(typed)
    conversation = Conversation(Script(*answers))
    screen = Screen(out or io.StringIO())
    Terminal(conversation, screen, InMemoryHistory(), input=keys, output=DummyOutput()).run()
    return conversation


def test_a_conversation(keys: PipeInput) -> None:
    out = io.StringIO()
    conversation = converse(keys, "hello\r\r/exit\r", ["Hi", " there"], out=out)
    assert conversation.messages == [Message("user", "hello"), Message("assistant", "Hi there")]
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("script: /help")
    assert lines[1] == "Hi there"
    assert lines[2].startswith("2 tokens, ")
    assert "\x1b" not in out.getvalue()


def test_end_of_file_leaves(keys: PipeInput) -> None:
    assert converse(keys, "\x04").messages == []


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("one\x1b\rtwo\r", "one\ntwo"),
        ("one\\\rtwo\r", "one\ntwo"),
        ("a\\b\r", "a\\b"),
        ("//etc is a folder\r", "/etc is a folder"),
        ("  padded  \r", "padded"),
        ("你好\r", "你好"),
        ("\x1b[200~pasted\nlines\x1b[201~\r", "pasted\nlines"),
    ],
)
def test_what_is_typed_is_what_is_said(keys: PipeInput, typed: str, said: str) -> None:
    assert converse(keys, typed + "\x04", ["ok"]).messages[0].content == said


def test_ctrl_c_at_the_prompt_clears_the_line(keys: PipeInput) -> None:
    out = io.StringIO()
    assert converse(keys, "never mind\x03/exit\r", out=out).messages == []
    assert "(/exit or Ctrl-D leaves)" in out.getvalue()


def test_ctrl_c_stops_the_answer_only(keys: PipeInput) -> None:
    out = io.StringIO()
    conversation = converse(keys, "a\rb\r\x04", ["ha", KeyboardInterrupt()], ["whole"], out=out)
    assert [message.content for message in conversation.messages] == ["a", "ha", "b", "whole"]
    assert [message.partial for message in conversation.messages] == [False, True, False, False]
    assert "ha\n1 token, " in out.getvalue()
    assert ", stopped\n" in out.getvalue()


def test_errors_are_shown_and_the_conversation_goes_on(keys: PipeInput, tmp_path: Path) -> None:
    out = io.StringIO()
    typed = f"too long\r/histroy\r/load {tmp_path}/absent\r/retry\r/history\r\x04"
    conversation = converse(keys, typed, [ValueError("prompt is 99 tokens long")], out=out)
    assert conversation.messages == []
    text = out.getvalue()
    assert "error: prompt is 99 tokens long\n" in text
    assert "error: /histroy is no command; did you mean /history?" in text
    assert f"error: no such file or directory: {tmp_path}/absent\n" in text
    assert "error: there is nothing to retry\n" in text
    assert text.endswith("no messages yet\n")
    assert isinstance(conversation.talker, Script)
    assert len(conversation.talker.asked) == 1  # no command went to the model


def test_retry_shows_the_new_answer(keys: PipeInput) -> None:
    out = io.StringIO()
    conversation = converse(keys, "a\r/retry\r\x04", ["one"], ["two"], out=out)
    assert [message.content for message in conversation.messages] == ["a", "two"]
    assert "\ntwo\n1 token, " in out.getvalue()


def test_history_is_private_and_survives(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "chat_history"
    history = open_history(path)
    assert isinstance(history, FileHistory)
    history.store_string("secret")
    assert path.stat().st_mode & 0o077 == 0
    assert list(open_history(path).load_history_strings()) == ["secret"]
    assert isinstance(open_history(path / "below a file"), InMemoryHistory)


def completions(text: str) -> list[str]:
    return [one.text for one in SlashCompleter().get_completions(Document(text), CompleteEvent())]


def test_completion(tmp_path: Path) -> None:
    assert completions("/h") == ["help", "history"]
    assert completions("/set temp") == ["temperature"]
    assert completions("/set temperature 0.5 top_") == ["top_k", "top_p"]
    assert completions("/set temperature=0.5 top_k") == ["top_k"]
    assert completions("/set ") == list(SETTINGS)
    assert completions("/set temperature ") == []
    assert completions("hello /h") == completions("//h") == completions("/system x") == []
    (tmp_path / "talk.json").touch()
    assert completions(f"/load {tmp_path}/ta") == ["lk.json"]


def answer(out: io.StringIO, *pieces: Piece) -> str:
    show_answer((piece for piece in pieces), Screen(out), Meter(asked=0))
    return out.getvalue()


def test_thoughts_are_dim_on_a_terminal_and_absent_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    pieces = (Piece(reasoning="hm"), Piece(text="yes"))
    assert answer(io.StringIO(), *pieces) == "yes\n"
    assert answer(Tty(), *pieces) == "\x1b[2mhm\x1b[0m\n\nyes\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert answer(Tty(), *pieces) == "hm\n\nyes\n"


def test_control_characters_of_a_model_do_nothing_to_a_terminal() -> None:
    assert answer(Tty(), Piece("a\x1b]0;title\x07\tb\r\nc\x9b2J")) == "a\ufffd]0;title\ufffd\tb\nc\ufffd2J\n"
    assert answer(io.StringIO(), Piece("a\x1bb")) == "a\x1bb\n"


def test_one_line_end_only() -> None:
    assert answer(io.StringIO(), Piece("a\n")) == "a\n"
    assert answer(io.StringIO()) == ""


def test_numbers() -> None:
    meter = Meter(asked=10.0)
    assert meter.summary() == "0 tokens"
    for place, now in enumerate((10.5, 11.0, 11.5)):
        meter.note(Piece("x", tokens=2, finish_reason="length" if place == 2 else None), now)
    assert meter.summary() == "6 tokens, 4.0 tokens/s, first after 0.50 s, cut at the longest allowed length"
    assert meter.summary(stopped=True).endswith("first after 0.50 s, stopped")


def test_an_answer_is_wrapped_at_the_width_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Screen, "width", property(lambda self: 12 if self.is_terminal else None))
    pieces = ["several wo", "rds, 你好世界", "你好 end"]
    for out, shown in ((Tty(), "several \nwords, 你好\n世界你好 end\n"), (io.StringIO(), "".join(pieces) + "\n")):
        show_answer((Piece(text) for text in pieces), Screen(out), Meter(asked=0.0))
        assert out.getvalue() == shown
