"""Requests of /v1/responses: what is accepted, what is refused by name, and the chat request they stand for."""

from typing import Any

import pytest
from pydantic import ValidationError

from qwenkit.serve.api.protocol import ChatRequest
from qwenkit.serve.api.responses_protocol import ResponsesRequest, chat_fields

TOOL = {"type": "function", "name": "add", "description": "Adds.", "parameters": {"type": "object"}, "strict": True}


def fields(input: Any = "hi", **changes: Any) -> dict[str, Any]:
    found = chat_fields(ResponsesRequest.model_validate({"input": input} | changes))
    ChatRequest.model_validate(found)  # what comes out is a chat request
    return found


def refused(**changes: Any) -> list[Any]:
    with pytest.raises(ValidationError) as caught:
        ResponsesRequest.model_validate({"input": "hi"} | changes)
    return list(caught.value.errors())


def test_the_smallest_request() -> None:
    assert fields() == {"messages": [{"role": "user", "content": "hi"}]}


def test_instructions_and_messages_in_either_form() -> None:
    items = [
        {"role": "developer", "content": "B"},
        {"role": "user", "content": "hi"},
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}],
        },
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "bye"}]},
    ]
    assert fields(items, instructions="A")["messages"] == [
        {"role": "system", "content": "A\n\nB"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "bye"},
    ]


def test_reasoning_text_and_calls_of_a_turn_are_one_message() -> None:
    items = [
        {"role": "user", "content": "add"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "easy"}]},
        {"role": "assistant", "content": "I add."},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}', "namespace": None},
        {
            "type": "function_call",
            "call_id": "c2",
            "name": "add",
            "arguments": "{}",
            "id": "fc_2",
            "status": "completed",
        },
        {"type": "function_call_output", "call_id": "c1", "output": "3"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "4"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "again"}]},
        {"type": "function_call", "call_id": "c3", "name": "add", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c3", "output": "5"},
    ]
    call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
    assert fields(items)["messages"] == [
        {"role": "user", "content": "add"},
        {
            "role": "assistant",
            "content": "I add.",
            "reasoning_content": "easy",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
                {"id": "c2", **call},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "3"},
        {"role": "tool", "tool_call_id": "c2", "name": "add", "content": "4"},
        {"role": "assistant", "content": "", "reasoning_content": "again", "tool_calls": [{"id": "c3", **call}]},
        {"role": "tool", "tool_call_id": "c3", "name": "add", "content": "5"},
    ]


def test_sampling_and_extras() -> None:
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3, "stop": ["END"], "stream": True, "user": "u"}
    found = fields(**given, max_output_tokens=9, chat_template_kwargs={"enable_thinking": False})
    expected = {**given, "max_tokens": 9, "chat_template_kwargs": {"enable_thinking": False}}
    assert found == {"messages": [{"role": "user", "content": "hi"}], **expected}


def test_effort_and_format() -> None:
    schema = {"type": "object"}
    form = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    found = fields(reasoning={"effort": "none", "summary": "auto"}, text={"format": form})
    assert found["reasoning_effort"] == "none"
    json_schema = {"name": "n", "strict": True, "schema": schema}
    assert found["response_format"] == {"type": "json_schema", "json_schema": json_schema}
    assert fields(text={"format": {"type": "json_object"}})["response_format"] == {"type": "json_object"}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("auto", "auto"),
        ("required", "required"),
        ({"type": "function", "name": "add"}, {"type": "function", "function": {"name": "add"}}),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "add"}]},
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "add"}}]},
            },
        ),
    ],
)
def test_tools_and_their_choice(choice: Any, expected: Any) -> None:
    found = fields(tools=[TOOL], tool_choice=choice, parallel_tool_calls=False)
    function = {name: value for name, value in TOOL.items() if name != "type"}
    assert found["tools"] == [{"type": "function", "function": function}]
    assert found["tool_choice"] == expected
    assert found["parallel_tool_calls"] is False


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input": [{"type": "item_reference", "id": "x"}]}, "an item of the type 'item_reference' was given"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "only text"),
        ({"previous_response_id": "resp_1"}, "previous_response_id must be left out"),
        ({"conversation": "conv_1"}, "conversation must be left out"),
        ({"background": True}, "background must be left out"),
    ],
)
def test_what_is_not_there_is_refused_in_one_sentence(changes: dict[str, Any], words: str) -> None:
    (error,) = refused(**changes)
    assert words in error["msg"]


def test_store_false_is_what_happens_anyway() -> None:
    assert fields(store=False, background=False, truncation="disabled", include=["reasoning.encrypted_content"])


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"input": []}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"truncation": "sometimes"}, "truncation"),
        ({"metadata": "k"}, "metadata"),
        ({"text": {"format": {"type": "grammar"}}}, "text"),
    ],
)
def test_fields_out_of_bounds_or_unknown(changes: dict[str, Any], place: str) -> None:
    assert {error["loc"][0] for error in refused(**changes)} == {place}


def test_an_output_without_its_call_is_shown() -> None:
    (message,) = fields([{"type": "function_call_output", "call_id": "zz", "output": "1"}])["messages"]
    assert message == {"role": "tool", "tool_call_id": "zz", "name": None, "content": "1"}


def test_a_schema_format_needs_its_schema() -> None:
    with pytest.raises(ValueError, match="schema is missing"):
        fields(text={"format": {"type": "json_schema", "name": "n"}})
