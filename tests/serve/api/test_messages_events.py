"""Anthropic's events: their order, and that they add up to the message, however the answer was cut into pieces."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from qwenkit.engine.request import Delta
from qwenkit.serve.api.messages_events import MessageWriter
from qwenkit.serve.api.reply import Usage
from qwenkit.text.answer import AnswerEvent

CALL = [AnswerEvent("tool_call", "add", 0), AnswerEvent("arguments", '{"a": 1}', 0)]


def counted(num_output: int = 4, *, thinking: bool = False) -> Usage:
    usage = Usage(7)
    found = [AnswerEvent("reasoning", "x")] if thinking else []
    usage.count(0, found, Delta(0, 0, tuple(range(num_output)), "", num_cached_tokens=3))
    return usage


def written(
    pieces: list[list[AnswerEvent]], finish_reason: str = "stop", stop_reason: Any = None, stops: tuple[str, ...] = ()
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    writer = MessageWriter("m", stops)
    last = Delta(0, 0, (), "", finish_reason=finish_reason, stop_reason=stop_reason)
    events = writer.start(counted())
    for piece in pieces:
        events += writer.push(piece)
    events += writer.finish(last, counted(thinking=True))
    return events, writer.whole()


def added_up(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What a client makes of the events. Asserts that they come in a possible order."""
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "ping"]
    assert kinds[-2:] == ["message_delta", "message_stop"]
    message = dict(events[0]["message"])
    content: list[dict[str, Any]] = []
    open = False
    texts: list[str] = []
    for event in events[2:-2]:
        if event["type"] == "content_block_start":
            assert not open
            assert event["index"] == len(content)
            content.append(dict(event["content_block"]))
            open, texts = True, []
        elif event["type"] == "content_block_delta":
            assert open
            assert event["index"] == len(content) - 1
            delta, block = event["delta"], content[-1]
            if delta["type"] == "input_json_delta":
                texts.append(delta["partial_json"])
                block["input"] = json.loads("".join(texts)) if delta["partial_json"].endswith("}") else {}
            else:
                kind = delta["type"].removesuffix("_delta")
                block[kind] += delta[kind]
        else:
            assert event == {"type": "content_block_stop", "index": len(content) - 1}
            assert open
            open = False
    assert not open
    return message | events[-2]["delta"] | {"content": content, "usage": events[-2]["usage"]}


def test_thinking_text_and_a_call_in_order() -> None:
    pieces = [[AnswerEvent("reasoning", "so")], [AnswerEvent("content", "I "), *CALL]]
    events, message = written(pieces)
    assert [event["type"] for event in events] == [
        *("message_start", "ping"),
        *("content_block_start", "content_block_delta", "content_block_delta", "content_block_stop"),  # and signature
        *("content_block_start", "content_block_delta", "content_block_stop"),
        *("content_block_start", "content_block_delta", "content_block_stop"),
        *("message_delta", "message_stop"),
    ]
    assert [block["type"] for block in message["content"]] == ["thinking", "text", "tool_use"]
    assert message["content"][2]["input"] == {"a": 1}
    assert message["stop_reason"] == "tool_use"
    assert added_up(events) == message


def test_usage_keeps_cached_tokens_apart() -> None:
    events, message = written([[AnswerEvent("content", "x")]])
    assert events[0]["message"]["usage"]["output_tokens"] == 0
    assert message["usage"] == {
        "input_tokens": 4,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 3,
        "output_tokens": 4,
        "output_tokens_details": {"thinking_tokens": 4},
    }


def test_why_it_stopped() -> None:
    text = [[AnswerEvent("content", "x")]]
    assert written(text)[1]["stop_reason"] == "end_turn"
    assert written(text, "length")[1]["stop_reason"] == "max_tokens"
    assert written([CALL], "length")[1]["stop_reason"] == "max_tokens"
    stopped = written(text, "stop", "END", ("END",))[1]
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "END")
    own = written([CALL], "stop", "\nObservation:")[1]  # a stop string of the format, not of the caller
    assert (own["stop_reason"], own["stop_sequence"]) == ("tool_use", None)


def test_an_empty_answer_has_no_blocks() -> None:
    events, message = written([[]])
    assert message["content"] == []
    assert added_up(events) == message


def test_a_call_without_arguments() -> None:
    assert written([[AnswerEvent("tool_call", "now")]])[1]["content"][0]["input"] == {}


TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=5)
PIECES = st.one_of(
    st.tuples(st.sampled_from(["content", "reasoning"]), TEXTS).map(lambda pair: [AnswerEvent(*pair)]),  # type: ignore[arg-type]
    st.dictionaries(TEXTS, st.integers() | TEXTS, max_size=2).map(
        lambda value: [AnswerEvent("tool_call", "f"), AnswerEvent("arguments", json.dumps(value))]
    ),
)


@given(st.lists(PIECES, max_size=8), st.randoms(use_true_random=False))
def test_the_events_add_up_to_the_message(pieces: list[list[AnswerEvent]], random: Any) -> None:
    whole = [event for piece in pieces for event in piece]
    cut: list[list[AnswerEvent]] = [[]]
    for event in whole:
        if event.kind in ("content", "reasoning") and len(event.text) > 1:
            at = random.randrange(1, len(event.text))
            parts = [AnswerEvent(event.kind, event.text[:at]), AnswerEvent(event.kind, event.text[at:])]
        else:
            parts = [event]
        for part in parts:
            if random.random() < 0.5:
                cut.append([])
            cut[-1].append(part)
    events, message = written(cut)
    assert added_up(events) == message

    def without_ids(message: dict[str, Any]) -> Any:
        return [{name: value for name, value in block.items() if name != "id"} for block in message["content"]]

    assert without_ids(message) == without_ids(written([whole])[1])
