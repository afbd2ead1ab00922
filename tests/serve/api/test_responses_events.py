"""Events of /v1/responses: their order and numbers, and that they add up to the response, however the answer was cut."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response

from qwenkit.engine.request import Delta
from qwenkit.engine.sampling import SamplingParams
from qwenkit.serve.api.reply import Usage
from qwenkit.serve.api.responses_events import ResponseWriter
from qwenkit.serve.api.responses_protocol import ResponsesRequest
from qwenkit.serve.errors import ApiError
from qwenkit.text.answer import AnswerEvent

CALL = [AnswerEvent("tool_call", "add", 0), AnswerEvent("arguments", '{"a": 1}', 0)]


def counted() -> Usage:
    usage = Usage(7)
    usage.count(0, [AnswerEvent("reasoning", "x")], Delta(0, 0, (1, 2), "", num_cached_tokens=3))
    return usage


def writer(**request: Any) -> ResponseWriter:
    params = SamplingParams(temperature=0.5, top_p=1.0)
    return ResponseWriter(ResponsesRequest.model_validate({"input": "hi"} | request), "m", params)


def written(
    pieces: list[list[AnswerEvent]], finish_reason: str = "stop"
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    writing = writer()
    events = writing.start(counted())
    for piece in pieces:
        events += writing.push(piece)
    events += writing.finish(Delta(0, 0, (), "", finish_reason=finish_reason), counted())
    return events, writing.whole()


def added_up(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output a client makes of the events. Asserts numbers, places and what the `done` events repeat."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    output: list[dict[str, Any]] = []
    for event in events[2:-1]:
        kind = event["type"].removeprefix("response.")
        assert event["output_index"] == len(output) - (kind != "output_item.added")
        if kind == "output_item.added":
            assert event["item"]["status"] == "in_progress"
            output.append(dict(event["item"]))
            continue
        item = output[-1]
        assert event.get("item_id", item["id"]) == item["id"]
        if kind == "content_part.added":
            item["content"] = [dict(event["part"])]
        elif kind in ("output_text.delta", "reasoning_text.delta"):
            item["content"][0]["text"] += event["delta"]
        elif kind == "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        elif kind in ("output_text.done", "reasoning_text.done"):
            assert event["text"] == item["content"][0]["text"]
        elif kind == "function_call_arguments.done":
            assert (event["name"], event["arguments"]) == (item["name"], item["arguments"])
        elif kind == "content_part.done":
            assert event["part"] == item["content"][0]
        else:
            assert kind == "output_item.done"
            assert event["item"] | {"status": "in_progress"} == item
            output[-1] = event["item"]
    return output


def test_thinking_text_and_a_call_in_order() -> None:
    events, response = written([[AnswerEvent("reasoning", "so")], [AnswerEvent("content", "I "), *CALL]])
    assert [event["type"].removeprefix("response.") for event in events] == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    assert response["status"] == "completed"
    assert added_up(events) == response["output"] == events[-1]["response"]["output"]
    assert events[0]["response"]["output"] == []
    assert events[0]["response"]["id"] == response["id"]


def test_the_response_is_one_of_openai_s() -> None:
    response = written([[AnswerEvent("reasoning", "so"), AnswerEvent("content", "I "), *CALL]])[1]
    read = Response.model_validate(response)
    assert read.output_text == "I "
    assert read.usage is not None
    assert (read.usage.input_tokens, read.usage.output_tokens, read.usage.total_tokens) == (7, 2, 9)
    assert read.usage.input_tokens_details.cached_tokens == 3
    assert read.usage.output_tokens_details.reasoning_tokens == 2


def test_what_was_asked_for_is_repeated() -> None:
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    form = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
    choice = {"type": "function", "name": "f"}
    asked = {
        "instructions": "A",
        "metadata": {"a": "b"},
        "max_output_tokens": 3,
        "tools": [tool],
        "tool_choice": choice,
    }
    response = writer(**asked, text={"format": form}, reasoning={"effort": "low"}).whole()
    assert response.items() >= {"instructions": "A", "metadata": {"a": "b"}, "max_output_tokens": 3}.items()
    assert response["tools"] == [tool | {"description": None, "strict": False}]
    assert response["tool_choice"] == choice
    assert response["text"] == {"format": form}
    assert response["reasoning"] == {"effort": "low", "summary": None}
    assert (response["temperature"], response["store"]) == (0.5, False)


def test_an_answer_cut_short_is_incomplete() -> None:
    events, response = written([[AnswerEvent("reasoning", "so"), AnswerEvent("content", "I ")]], "length")
    assert events[-1]["type"] == "response.incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]


def test_a_failure_ends_the_stream_with_what_there_was() -> None:
    writing = writer()
    before = writing.start(counted()) + writing.push([AnswerEvent("content", "I ")])
    (event,) = writing.fail(ApiError(500, "the server failed"))
    assert event["type"] == "response.failed"
    assert event["sequence_number"] == len(before)
    assert event["response"]["error"] == {"code": "server_error", "message": "the server failed"}
    assert event["response"]["output"][0]["status"] == "incomplete"


TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=5)
PIECES = st.one_of(
    st.tuples(st.sampled_from(["content", "reasoning"]), TEXTS).map(lambda pair: [AnswerEvent(*pair)]),  # type: ignore[arg-type]
    TEXTS.map(lambda text: [AnswerEvent("tool_call", "f"), AnswerEvent("arguments", text)]),
)


@given(st.lists(PIECES, max_size=8), st.sampled_from(["stop", "length"]))
def test_the_events_add_up_to_the_response(pieces: list[list[AnswerEvent]], finish_reason: str) -> None:
    events, response = written(pieces, finish_reason)
    assert added_up(events) == response["output"] == events[-1]["response"]["output"]
    again = written([[event for piece in pieces for event in piece]], finish_reason)[1]

    def without_ids(response: dict[str, Any]) -> Any:
        ids = ("id", "call_id")
        return [{name: value for name, value in item.items() if name not in ids} for item in response["output"]]

    assert without_ids(response) == without_ids(again)
