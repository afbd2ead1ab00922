"""A conversation's state and its slash commands, without a terminal."""

import contextlib
import json
import os
import signal
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenkit.cli.conversation.commands import COMMANDS, help_text, parse_settings, run_command, speaks_chinese
from qwenkit.cli.conversation.local import Local
from qwenkit.cli.conversation.state import SETTINGS, Conversation, Message, Piece
from qwenkit.engine.sampling import SamplingParams
from qwenkit.hub.smollm2 import CHAT_DEFAULTS
from tests.cli.conftest import FakeLLM


class Script:
    """Answers with the given pieces; an exception among them is raised."""

    name = "script"

    def __init__(self, *answers: list[Any]) -> None:
        self.answers = list(answers)
        self.asked: list[Any] = []

    def stream(self, prompt: Any, params: Any) -> Generator[Piece, None, None]:
        self.asked.append((prompt, params))
        for piece in self.answers.pop(0):
            if isinstance(piece, BaseException):
                raise piece
            yield Piece(piece, tokens=1)

    def defaults(self) -> Mapping[str, Any]:
        return {"temperature": 0.6, "top_k": None}


def say(conversation: Conversation, text: str) -> str:
    return "".join(piece.text for piece in conversation.ask(text))


def test_what_is_said_and_answered_is_sent_again() -> None:
    talker = Script(["one"], ["two"])
    conversation = Conversation(talker, system="be brief")
    assert say(conversation, "first") == "one"
    assert say(conversation, "second") == "two"
    assert talker.asked[1][0] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "second"},
    ]


@pytest.mark.parametrize("error", [ValueError("prompt is too long"), KeyboardInterrupt()])
def test_a_message_without_any_answer_is_not_kept(error: BaseException) -> None:
    conversation = Conversation(Script(["one"], [error]))
    say(conversation, "first")
    before = list(conversation.messages)
    with pytest.raises(type(error)):
        say(conversation, "second")
    assert conversation.messages == before


@pytest.mark.parametrize("error", [ValueError("the connection broke"), KeyboardInterrupt()])
def test_half_an_answer_is_kept_and_marked(error: BaseException) -> None:
    conversation = Conversation(Script(["ha", "lf", error], ["whole"]))
    with pytest.raises(type(error)):
        say(conversation, "question")
    assert conversation.messages == [Message("user", "question"), Message("assistant", "half", partial=True)]
    assert run_command(conversation, "/history").show == "user: question\nassistant (stopped): half"


def test_closing_the_answer_stops_it() -> None:
    conversation = Conversation(Script(["a", "b", "c"]))
    pieces = conversation.ask("question")
    next(pieces)
    pieces.close()
    assert conversation.messages[-1] == Message("assistant", "a", partial=True)


def test_retry_replaces_the_answer_once_a_new_one_begins() -> None:
    conversation = Conversation(Script(["one"], [ValueError("no")], ["two", KeyboardInterrupt()], ["three"]))
    say(conversation, "question")
    with pytest.raises(ValueError, match="no"):
        list(conversation.retry())
    assert conversation.messages[-1] == Message("assistant", "one")
    with pytest.raises(KeyboardInterrupt):
        list(conversation.retry())
    assert conversation.messages[-1] == Message("assistant", "two", partial=True)
    outcome = run_command(conversation, "/retry")
    assert outcome.answer is not None
    assert [piece.text for piece in outcome.answer] == ["three"]
    assert conversation.messages == [Message("user", "question"), Message("assistant", "three")]


def test_a_seed_counts_on_and_begins_again() -> None:
    talker = Script(*[["x"]] * 6)
    conversation = Conversation(talker)
    run_command(conversation, "/seed 5")
    for text in "ab":
        say(conversation, text)
    list(conversation.retry())
    run_command(conversation, "/clear")
    say(conversation, "a")
    run_command(conversation, "/seed 9")
    say(conversation, "b")
    run_command(conversation, "/seed default")
    say(conversation, "c")
    assert [params.seed for _, params in talker.asked] == [5, 6, 7, 5, 9, None]


def test_undo_and_clear() -> None:
    conversation = Conversation(Script(["one"], ["two"]), system="s")
    say(conversation, "first")
    say(conversation, "second")
    assert run_command(conversation, "/undo").show == "taken back: second"
    assert [message.content for message in conversation.messages] == ["first", "one"]
    run_command(conversation, "/clear")
    assert (conversation.messages, conversation.system) == ([], "s")
    for command in ("/undo", "/retry"):
        with pytest.raises(ValueError, match="there is nothing to"):
            run_command(conversation, command)


def test_system_text() -> None:
    conversation = Conversation(Script())
    assert "default" in run_command(conversation, "/system").show
    run_command(conversation, "/system  two\nlines ")
    assert conversation.system == "two\nlines"
    run_command(conversation, "/system\nbelow")
    assert conversation.system == "below"
    run_command(conversation, "/system default")
    assert conversation.system is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("temperature 0.7", {"temperature": 0.7}),
        ("temperature=0.7 top_k 5", {"temperature": 0.7, "top_k": 5}),
        ("max-tokens 9 temperature default", {"max_tokens": 9, "temperature": None}),
        ("stop 'a b' stop=c", {"stop": ("a b", "c")}),
        ("logit_bias 5=1.5 logit_bias=6=-2", {"logit_bias": {5: 1.5, 6: -2.0}}),
        ("ignore_eos on", {"ignore_eos": True}),
        ("top_k 1 top_k 2", {"top_k": 2}),
    ],
)
def test_set_takes_pairs_of_all_kinds(text: str, expected: dict[str, Any]) -> None:
    assert parse_settings(text) == expected
    conversation = Conversation(Script())
    run_command(conversation, f"/set {text}")
    assert conversation.settings == {name: value for name, value in expected.items() if value is not None}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/set temprature 1", "'temprature' is no setting; did you mean temperature?"),
        ("/set temperature", "temperature needs a value"),
        ("/set temperature hot", "temperature is 'hot', allowed is a number"),
        ("/set top_p 0.5 temperature -1", "temperature is -1.0, allowed is a number of at least 0"),
        ("/set n 2", "'n' is no setting"),
        ("/set stop 'a", "a quote is open"),
        ("/set stop a stop default", "values and default at once"),
        ("/seed x", "seed is 'x', allowed is a whole number"),
        ("/sysstem x", "/sysstem is no command; did you mean /system\\? .*//sysstem"),
        ("/", "/ is no command; known are help"),
        ("/usr/bin is a folder", "/usr/bin is no command"),
        ("/clear all", "/clear stands alone"),
        ("/save", "/save needs a file"),
        ("/load", "/load needs a file"),
    ],
)
def test_a_wrong_command_is_one_sentence_and_changes_nothing(line: str, said: str) -> None:
    conversation = Conversation(Script(), settings={"top_p": 0.9})
    with pytest.raises(ValueError, match=said) as caught:
        run_command(conversation, line)
    assert "\n" not in str(caught.value)
    assert conversation == Conversation(conversation.talker, settings={"top_p": 0.9})


@given(st.text(max_size=30))
def test_any_line_is_a_command_or_one_error(text: str) -> None:
    conversation = Conversation(Script(["x"] * 3))
    if not text.startswith(("save", "load")):
        with contextlib.suppress(ValueError):
            run_command(conversation, "/" + text)


def test_set_alone_lists_values_and_where_they_come_from() -> None:
    conversation = Conversation(Script(), settings={"stop": ("a b",), "ignore_eos": True})
    shown = run_command(conversation, "/set").show.splitlines()
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in shown}
    assert list(lines) == list(SETTINGS)
    assert lines["temperature"] == "0.6 (default)"
    assert lines["top_k"] == "(default)"
    assert lines["stop"] == "'a b'"
    assert lines["ignore_eos"] == "on"


def test_help_names_everything_in_both_languages() -> None:
    for chinese in (False, True):
        text = help_text(chinese)
        assert all(f"/{name}" in text for name in COMMANDS)
        assert "Esc" in text
        assert "\\" in text
        assert ("显示" in text) is chinese


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"LANG": "zh_CN.UTF-8"}, True),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "en_US.UTF-8"}, False),
        ({"LANG": "en_US.UTF-8", "LC_ALL": "", "LC_MESSAGES": "zh_TW"}, True),
        ({}, False),
    ],
)
def test_locale(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], expected: bool) -> None:
    assert speaks_chinese(environ) is expected
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.setenv(name, environ.get(name, ""))
    assert ("显示" in run_command(Conversation(Script()), "/help").show) is expected


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    conversation = Conversation(Script(["答", KeyboardInterrupt()]), system="s")
    run_command(conversation, "/set temperature 0.5 stop x logit_bias 3=1")
    with pytest.raises(KeyboardInterrupt):
        say(conversation, "问")
    path = tmp_path / "my talk.json"
    assert run_command(conversation, f"/save {path}").show == f"saved to {path}"
    assert "答" in path.read_text(encoding="utf-8")
    other = Conversation(conversation.talker, system="x", messages=[Message("user", "q"), Message("assistant", "a")])
    assert run_command(other, f"/load {path}").show.startswith("1 exchanges loaded")
    assert (other.system, other.messages, other.settings) == (
        conversation.system,
        conversation.messages,
        conversation.settings,
    )
    run_command(other, f"/save {path}")  # a saved conversation may be replaced
    assert [item.name for item in tmp_path.iterdir()] == ["my talk.json"]


def test_save_spares_other_files(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("precious")
    with pytest.raises(ValueError, match="holds no saved conversation: choose another name"):
        run_command(Conversation(Script()), f"/save {path}")
    assert path.read_text() == "precious"


GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "settings": {}}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("{", "it is no JSON text"),
        ([], 'no list "messages"'),
        ({"messages": 1}, 'no list "messages"'),
        (GOOD | {"setings": {}}, "'setings' is unknown; did you mean settings?"),
        (GOOD | {"settings": []}, '"settings" is no object'),
        (GOOD | {"settings": {"temprature": 1}}, "did you mean temperature?"),
        (GOOD | {"settings": {"temperature": -1}}, "temperature is -1, allowed"),
        (GOOD | {"settings": {"n": 2}}, "'n' is no setting"),
        ({"messages": ["a"]}, 'message 1 needs "role" and "content"'),
        ({"messages": [{"role": "user", "content": None}]}, 'message 1 needs "role" and "content"'),
        ({"messages": [{"role": "user", "content": "a", "x": 1}]}, "message 1 may have"),
        ({"messages": [{"role": "user", "content": "a"}]}, "the last message has no answer"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "message 1 is of role 'assistant', due is 'user'"),
        ({"messages": [{"role": "system", "content": "a"}] * 2}, "message 2 is of role 'system'"),
        ("[" * 100_000, "it is no JSON text"),
    ],
)
def test_load_refuses_in_one_sentence_and_changes_nothing(tmp_path: Path, record: Any, said: str) -> None:
    path = tmp_path / "talk.json"
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    conversation = Conversation(Script(), system="s", messages=[Message("user", "q"), Message("assistant", "a")])
    with pytest.raises(ValueError, match="is no saved conversation: ") as caught:
        run_command(conversation, f"/load {path}")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (conversation.system, len(conversation.messages)) == ("s", 2)


def test_the_first_ctrl_c_waits_for_the_engine_and_the_second_does_not() -> None:
    llm = FakeLLM("tiny")
    steps: list[int] = []

    def press(step: int) -> None:
        steps.append(step)
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)  # in the middle of a step: it must reach its end

    llm.during = press
    conversation = Conversation(Local(llm, "tiny"))  # type: ignore[arg-type]
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        say(conversation, "a b c")
    assert (steps, llm.closed) == ([0, 1], 1)
    assert conversation.messages[-1].partial
    assert len(conversation.messages[-1].content.split()) == 2
    assert signal.getsignal(signal.SIGINT) is handler

    llm.during = lambda step: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)] and None
    with pytest.raises(KeyboardInterrupt):
        say(conversation, "d")
    assert len(conversation.messages) == 2
    assert signal.getsignal(signal.SIGINT) is handler


def test_show_tells_what_most_decides_an_answer() -> None:
    llm: Any = FakeLLM("tiny")
    local = Local(llm, "tiny", defaults=CHAT_DEFAULTS)
    conversation = Conversation(local, "Be brief.", {"seed": 4, "top_p": 0.5})
    shown = run_command(conversation, "/show").show
    assert "tiny" in shown
    assert "Be brief." in shown
    values = dict(line.split(maxsplit=1) for line in shown.splitlines()[2:])
    assert values["temperature"] == "0.2 (default)"
    assert values["max_tokens"] == "1024 (default)"
    assert (values["top_p"], values["seed"]) == ("0.5", "4")


def test_own_defaults_hold_where_nothing_is_said() -> None:
    llm: Any = FakeLLM("tiny")
    list(Local(llm, "tiny", defaults=CHAT_DEFAULTS).stream("a b", SamplingParams(temperature=0.0)))
    asked = llm.asked[0][1]
    assert (asked.temperature, asked.top_p, asked.repetition_penalty, asked.max_tokens) == (0.0, 0.9, 1.1, 1024)
