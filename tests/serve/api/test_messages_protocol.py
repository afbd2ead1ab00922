"""Requests of Anthropic's shape: what is accepted, what is refused by name, and the chat request they stand for."""

from typing import Any

import pytest
from pydantic import ValidationError

from qwenkit.serve.api.messages_protocol import CountTokensRequest, MessagesRequest, chat_fields
from qwenkit.serve.api.protocol import ChatRequest

HELLO: dict[str, Any] = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
TOOL = {
    "name": "add",
    "description": "Adds.",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
}


def fields(**changes: Any) -> dict[str, Any]:
    found = chat_fields(MessagesRequest.model_validate(HELLO | changes))
    ChatRequest.model_validate(found)  # what comes out is a chat request
    return found


def refused(**changes: Any) -> list[Any]:
    with pytest.raises(ValidationError) as caught:
        MessagesRequest.model_validate(HELLO | changes)
    return list(caught.value.errors())


def test_the_smallest_request_does_not_think() -> None:
    assert fields() == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "chat_template_kwargs": {"enable_thinking": False},
        "max_tokens": 5,
        "stream": False,
    }


@pytest.mark.parametrize(
    ("thinking", "expected"),
    [
        ({"type": "enabled", "budget_tokens": 1024}, {"enable_thinking": True}),
        ({"type": "disabled"}, {"enable_thinking": False}),
        ({"type": "adaptive"}, None),
    ],
)
def test_thinking(thinking: Any, expected: Any) -> None:
    assert fields(thinking=thinking).get("chat_template_kwargs") == expected


def test_sampling_and_user() -> None:
    found = fields(temperature=0.5, top_p=0.9, top_k=7, stop_sequences=["END"], metadata={"user_id": "u1"}, stream=True)
    assert found.items() >= {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "stop": ["END"], "stream": True}.items()


def test_system_as_text_as_blocks_and_among_the_messages() -> None:
    blocks = [{"type": "text", "text": "A", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "B"}]
    assert fields(system="A")["messages"][0] == {"role": "system", "content": "A"}
    assert fields(system=blocks)["messages"][0] == {"role": "system", "content": "A\n\nB"}
    mixed = [{"role": "system", "content": "C"}, {"role": "user", "content": "hi"}, {"role": "system", "content": "D"}]
    found = fields(system="A", messages=[*mixed, {"role": "user", "content": "?"}])["messages"]
    assert [(m["role"], m["content"]) for m in found] == [
        ("system", "A\n\nC"),
        ("user", "hi"),
        ("system", "D"),
        ("user", "?"),
    ]


def test_a_whole_tool_conversation() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "one and "}, {"type": "text", "text": "two"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "easy", "signature": ""},
                {"type": "redacted_thinking", "data": "xx"},
                {"type": "text", "text": "I add.", "citations": None, "parsed_output": None},
                {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": "ä"}, "toolset_name": None},
                {"type": "tool_use", "id": "t2", "name": "sub", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "3"}]},
                {"type": "tool_result", "tool_use_id": "t2", "content": "no", "is_error": True},
                {"type": "text", "text": "and now?"},
            ],
        },
    ]
    assert fields(messages=messages, tools=[TOOL])["messages"] == [
        {"role": "user", "content": "one and two"},
        {
            "role": "assistant",
            "content": "I add.",
            "reasoning_content": "easy",
            "tool_calls": [
                {"id": "t1", "type": "function", "function": {"name": "add", "arguments": '{"a": "ä"}'}},
                {"id": "t2", "type": "function", "function": {"name": "sub", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "t1", "name": "add", "content": "3"},
        {"role": "tool", "tool_call_id": "t2", "name": "sub", "content": "Error: no"},
        {"role": "user", "content": "and now?"},
    ]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "any", "disable_parallel_tool_use": True}, {"tool_choice": "required", "parallel_tool_calls": False}),
        ({"type": "tool", "name": "add"}, {"tool_choice": {"type": "function", "function": {"name": "add"}}}),
        ({"type": "none"}, {"tool_choice": "none"}),
    ],
)
def test_tools_and_their_choice(choice: Any, expected: dict[str, Any]) -> None:
    found = fields(tools=[TOOL], tool_choice=choice)
    assert found["tools"] == [
        {"type": "function", "function": {"name": "add", "parameters": TOOL["input_schema"], "description": "Adds."}}
    ]
    assert {name: found[name] for name in found if name in ("tool_choice", "parallel_tool_calls")} == expected


def test_a_last_message_of_the_assistant_is_continued() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer is ("}]
    assert fields(messages=messages)["continue_final_message"] is True
    assert "continue_final_message" not in fields()


def test_an_output_format_is_a_response_format() -> None:
    schema = {"type": "object"}
    found = fields(output_config={"format": {"type": "json_schema", "schema": schema}, "effort": "low"})
    assert found["response_format"]["json_schema"]["schema"] == schema


def test_counting_needs_no_max_tokens() -> None:
    request = CountTokensRequest.model_validate({"model": "m", "messages": HELLO["messages"]})
    assert "max_tokens" not in chat_fields(request)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "an image was given"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "only text"),
    ],
)
def test_what_a_text_model_cannot_read_is_refused_in_one_sentence(changes: dict[str, Any], words: str) -> None:
    (error,) = refused(**changes)
    assert words in error["msg"]


def test_images_in_results_of_tools_are_refused() -> None:
    result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "image", "source": {}}]}
    (error,) = refused(messages=[{"role": "user", "content": [result]}])
    assert "an image was given" in error["msg"]


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"thinking": {"type": "sometimes"}}, "thinking"),
        ({"stop_sequences": [1]}, "stop_sequences"),
    ],
)
def test_fields_out_of_bounds_or_unknown(changes: dict[str, Any], place: str) -> None:
    assert {error["loc"][0] for error in refused(**changes)} == {place}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tool_choice": {"type": "any"}}, "tools is empty"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "mul"}}, "'mul', which is none of tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name is needed"),
        ({"messages": [{"role": "system", "content": "x"}]}, "only system messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]},
            "thinking block, which belongs to the assistant",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "z"}]}]},
            "belongs into a user message",
        ),
    ],
)
def test_contradictions(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        chat_fields(MessagesRequest.model_validate(HELLO | changes))


def test_a_result_without_its_call_is_shown() -> None:
    (message,) = fields(messages=[{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "zz"}]}])[
        "messages"
    ]
    assert message == {"role": "tool", "tool_call_id": "zz", "name": None, "content": ""}
