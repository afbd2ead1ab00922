"""However an answer is cut up, its events add up to the same; nothing raises, and nothing of the answer is lost."""

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenkit.text.answer import AnswerEvent, AnswerFormat
from qwenkit.text.stream import Detokenizer, StopStrings
from qwenkit.text.tokenizer import Tokenizer
from tests.text.conftest import byte_alphabet

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
LINES = ("Thought:", "Action:", "Action Input:", "Observation:", "Final Answer:")
ABSENT, CONTROL, USER_DEFINED = 5, 3, 4  # GGUF's token types


def with_tags(*types: int) -> Tokenizer:
    """One token a byte, two that end answers or open turns, and the tags as tokens of these types."""
    return Tokenizer.from_bpe(
        [*byte_alphabet(), "<|im_start|>", "<|im_end|>", *TAGS], [], [1] * 256 + [3, 3, *types], "qwen2"
    )


FORMATS = {
    "tokens": AnswerFormat(with_tags(*[USER_DEFINED] * 4), "hermes", thinks=True),
    "control": AnswerFormat(with_tags(*[CONTROL] * 4), "hermes", thinks=True),
    "spelled": AnswerFormat(with_tags(*[ABSENT] * 4), "hermes", thinks=True),
    "mixed": AnswerFormat(with_tags(USER_DEFINED, ABSENT, CONTROL, USER_DEFINED), "hermes", thinks=True),
    "react": AnswerFormat(with_tags(*[ABSENT] * 4), "react", thinks=False),
}

CALLS = (
    '{"name": "f", "arguments": {"a": [1, "}"]}}',
    '{"arguments": {"b": "\\"<tool_call>"}, "name": "g"}',
    '{"name": "f", "arguments": "{\\"c\\": null}"}',
    '{"name": "h"}',
    '{"name": "f", "arguments": {"d": "line\nbreak é"}}',
    '{"name": "f", "arguments": {"a": 1}}}',
    '{"name": "f", "arguments": [1]}',
    '{"name": "\\ud800", "arguments": {}}',
    '{"name": "f", "arguments": {"a": NaN}}',
    '{"name": "f", "name": "g"}',
    '{"name": ',
    '"',
    "\\",
    "{}",
)
texts = st.sampled_from(
    ["hi", " ", "\n", "\n\n", "  x", "<", "<tool", "_call>", "</", ">", "é😀", "Act", "ion:", "\r\n", ""]
)
whole_calls = st.tuples(st.sampled_from(["", "\n"]), st.sampled_from(CALLS), st.sampled_from(["", "\n"])).map(
    lambda body: ("<tool_call>", *body, "</tool_call>")
)
react_calls = st.tuples(st.sampled_from(["f", "g ", ""]), st.sampled_from(['{"a": 1}', '{"a":\n {}}', "x", '{"a'])).map(
    lambda call: ("\nAction:", f" {call[0]}\n", "Action Input:", f" {call[1]}\n")
)
tags = st.sampled_from([*TAGS, *("\n" + line for line in LINES), *LINES])
fragments = (
    texts.map(lambda text: (text,))
    | tags.map(lambda tag: (tag,))
    | whole_calls
    | react_calls
    | st.sampled_from(CALLS).map(tuple)
)
# Each fragment with whether its tags are spelled with ordinary tokens; also bytes that are not UTF-8, control tokens.
answers = st.lists(
    st.tuples(fragments, st.sampled_from([False, False, False, True])) | st.integers(0x80, 257), max_size=12
)


def ids_of(tokenizer: Tokenizer, answer: list[tuple[tuple[str, ...], bool] | int]) -> list[int]:
    ids: list[int] = []
    for part in answer:
        if isinstance(part, int):
            ids.append(part)
            continue
        for text in part[0]:
            tag = tokenizer.token_id(text) if text in TAGS and not part[1] else None
            ids += list(text.encode()) if tag is None else [tag]
    return ids


def engine_deltas(
    tokenizer: Tokenizer, ids: list[int], stops: list[str], skip_special: bool
) -> list[tuple[list[int], str]]:
    """What the engine hands out, a token a step."""
    detokenizer, finder = Detokenizer(tokenizer, skip_special=skip_special), StopStrings(stops)
    deltas = []
    for number, id in enumerate(ids):
        text = detokenizer.push([id])
        last = number == len(ids) - 1
        text, matched = finder.push(text + detokenizer.finish() if last else text)
        if last and matched is None:
            text += finder.flush()
        deltas.append(([id], text))
        if matched is not None:
            break
    return deltas


def merged(events: Iterable[AnswerEvent]) -> list[AnswerEvent]:
    """Neighbouring pieces of the same text put together."""
    whole: list[AnswerEvent] = []
    for event in events:
        if (
            whole
            and event.kind != "tool_call"
            and (whole[-1].kind, whole[-1].tool_index) == (event.kind, event.tool_index)
        ):
            event = replace(event, text=whole.pop().text + event.text)
        whole.append(event)
    return whole


@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None, max_examples=250)
@given(
    answer=answers,
    prompt=st.sampled_from(["", "<think>\n", "<think>\n\n</think>\n\n", "q\nThought:"]),
    stops=st.just([])
    | st.lists(st.sampled_from(["\nObservation:", "l_c", "</tool_call>", "hi", "}", "k>!", "l>!"]), max_size=2),
    skip_special=st.booleans(),
    tools=st.sampled_from([True, True, False]),
    thinking=st.sampled_from([True, True, False]),
    data=st.data(),
)
def test_pieces_add_up(
    name: str,
    answer: list[tuple[tuple[str, ...], bool] | int],
    prompt: str,
    stops: list[str],
    skip_special: bool,
    tools: bool,
    thinking: bool,
    data: st.DataObject,
) -> None:
    format = FORMATS[name]
    tokenizer = format.tokenizer
    ids = ids_of(tokenizer, answer)
    deltas = engine_deltas(tokenizer, ids, stops, skip_special)
    text = "".join(piece for _, piece in deltas)
    prompt_ids = tokenizer.encode(f"<|im_start|>assistant\n{prompt}", allow_special=True)
    new = lambda: format.parser(prompt_ids, tools=tools, thinking=thinking, skip_special=skip_special)  # noqa: E731
    parser = new()
    whole = merged([*parser.push(ids[: len(deltas)], text), *parser.finish()])
    count = parser.num_tool_calls

    cuts = sorted(data.draw(st.sets(st.integers(0, len(deltas)), max_size=10)) | {0, len(deltas)})
    parser, events = new(), list[AnswerEvent]()
    for start, end in pairwise(cuts):
        step = deltas[start:end]
        events += parser.push([id for ids, _ in step for id in ids], "".join(piece for _, piece in step))
    assert merged([*events, *parser.finish()]) == whole
    parser = new()
    assert merged([*(event for ids, piece in deltas for event in parser.push(ids, piece)), *parser.finish()]) == whole
    assert parser.num_tool_calls == count == sum(event.kind == "tool_call" for event in whole)
    for event in whole:
        event.text.encode()
        assert event.text or event.kind == "arguments"
        if event.kind == "arguments":
            assert isinstance(json.loads(event.text), dict)
    assert_nothing_is_lost(text, whole)


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


TAG = re.compile("|".join(re.escape(squeezed(tag)) for tag in (*TAGS, *LINES)))


def assert_nothing_is_lost(answer: str, events: list[AnswerEvent]) -> None:
    """Blanks aside, `answer` is the events' texts in order, with nothing but tags and well-formed calls between them."""
    rest = squeezed(answer)
    for event in events:
        wanted = squeezed(event.text)
        if event.kind == "tool_call":
            rest = rest.removeprefix("Action:")
            if rest.startswith(f"{wanted}ActionInput:"):
                rest = rest.removeprefix(f"{wanted}ActionInput:")
            while tag := TAG.match(rest):
                rest = rest[tag.end() :]
            call, rest = mended_call(rest)
            assert call.get("name", wanted) == wanted
        elif event.kind in ("content", "reasoning"):
            while wanted:
                tag = TAG.match(rest)
                size = len(tag.group()) if tag else 1
                if wanted.startswith(rest[:size]):
                    wanted = wanted[size:]
                else:
                    assert tag
                rest = rest[size:]
    while tag := TAG.match(rest):
        rest = rest[tag.end() :]
    assert rest == ""


def mended_call(text: str) -> tuple[dict[str, str], str]:
    """The object that `text` begins with, even if it lacks closing braces, and what comes after it and braces too many."""
    braces = 0
    while True:
        try:
            call, end = json.JSONDecoder(strict=False).raw_decode(text)
        except json.JSONDecodeError as error:
            assert braces < 4
            text, braces = f"{text[: error.pos]}}}{text[error.pos :]}", braces + 1
        else:
            return call, text[end:] if braces else re.sub(r"\A}+(?=</|\Z)", "", text[end:])


def test_many_tags_take_linear_time() -> None:
    """Each of these would be tens of seconds if every tag were read to the end of the answer."""
    format = FORMATS["spelled"]
    for unit in (
        '<tool_call>{"',
        '<tool_call>{"\\"',
        '<tool_call>{\\"',
        '<tool_call>{"a":\\"',
        "<tool_call>{",
        "<tool_call>\n",
    ):
        parser = format.parser([], tools=True)
        answer = '<tool_call>{"' + unit * 20_000
        events = [event for start in range(0, len(answer), 40) for event in parser.push([], answer[start : start + 40])]
        assert "".join(event.text for event in [*events, *parser.finish()]) == answer
