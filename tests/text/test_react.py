"""Qwen-1's tools: the prompt of the original openai_api.py, and where results, several calls and the window go."""

import json
from typing import Any

import pytest

from qwenkit.text.chat_qwen1 import Qwen1Chat
from qwenkit.text.tokenizer import Tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "天气 now.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
PLUGIN = {"name_for_model": "search", "name_for_human": "Web search", "description_for_model": "Finds pages."}
INSTRUCTION = (
    "Answer the following questions as best you can. You have access to the following APIs:\n\n"
    "get_weather: Call this tool to interact with the get_weather API. What is the get_weather API useful for? "
    '天气 now. Parameters: {"type": "object", "properties": {"city": {"type": "string"}}}\n\n'
    "search: Call this tool to interact with the Web search API. What is the Web search API useful for? "
    "Finds pages. Parameters: {}\n\n"
    "Use the following format:\n\n"
    "Question: the input question you must answer\n"
    "Thought: you should always think about what to do\n"
    "Action: the action to take, should be one of [get_weather, search]\n"
    "Action Input: the input to the action\n"
    "Observation: the result of the action\n"
    "... (this Thought/Action/Action Input/Observation can be repeated zero or more times)\n"
    "Thought: I now know the final answer\n"
    "Final Answer: the final answer to the original input question\n\n"
    "Begin!\n\nQuestion: "
)
TOOLS: list[Any] = [WEATHER, PLUGIN]
ASK = {"role": "user", "content": "\nweather? "}
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def call(name: str, arguments: Any, id: str = "1") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def assistant(*calls: dict[str, Any], content: str | None = None, **fields: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls), **fields}


def result(content: str, id: str = "1") -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": id}


def rendered(
    tokenizer: Tokenizer, messages: list[Any], *, tools: Any = TOOLS, window: int = 6144, **options: Any
) -> str:
    chat = Qwen1Chat(tokenizer, max_window_size=window)
    return tokenizer.decode(chat.render(messages, tools=tools, **options).ids, skip_special=False)


def test_the_query_carries_the_tools(qwen1: Tokenizer) -> None:
    assert rendered(qwen1, [ASK]) == (
        f"{SYSTEM}<|im_start|>user\n{INSTRUCTION}weather?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_result_is_an_observation_and_the_answer_goes_on(qwen1: Tokenizer) -> None:
    messages = [ASK, assistant(call("get_weather", '{"city":  "北京"}'), content="I must look."), result("sunny\n")]
    assert rendered(qwen1, messages) == (
        f"{SYSTEM}<|im_start|>user\n{INSTRUCTION}weather?<|im_end|>\n<|im_start|>assistant\n"
        'Thought: I must look.\nAction: get_weather\nAction Input: {"city":  "北京"}\nObservation: sunny\nThought:'
    )
    # The thought may come back as reasoning; arguments may come as an object.
    messages[1] = assistant(call("get_weather", {"city": "北京"}), reasoning_content="Thought: I must look.")
    assert 'Thought: I must look.\nAction: get_weather\nAction Input: {"city": "北京"}\n' in rendered(qwen1, messages)


def test_a_finished_chain_is_one_turn_and_keeps_the_tools(qwen1: Tokenizer) -> None:
    messages = [
        ASK,
        assistant(call("search", "{}")),
        result("found"),
        {"role": "assistant", "content": "It rains."},
        {"role": "user", "content": "thanks"},
    ]
    chain = (
        "<|im_start|>assistant\nThought: \nAction: search\nAction Input: {}\nObservation: found\n"
        "Thought: I now know the final answer.\nFinal Answer: It rains.<|im_end|>\n"
    )
    assert rendered(qwen1, messages) == (
        f"{SYSTEM}<|im_start|>user\n{INSTRUCTION}weather?<|im_end|>\n{chain}"
        "<|im_start|>user\nthanks<|im_end|>\n<|im_start|>assistant\n"
    )
    # Where that turn does not fit into the window, the query has the tools.
    thanks = Qwen1Chat(qwen1, max_window_size=6144).render(messages[-1:], tools=TOOLS)
    assert rendered(qwen1, messages, window=len(thanks.ids)) == (
        f"{SYSTEM}<|im_start|>user\n{INSTRUCTION}thanks<|im_end|>\n<|im_start|>assistant\n"
    )
    without = rendered(qwen1, messages, tools=None)
    assert "Begin!" not in without
    assert "Observation: found\nIt rains.<|im_end|>" in without


def test_several_calls_are_told_one_by_one(qwen1: Tokenizer) -> None:
    messages = [
        ASK,
        assistant(call("search", "{}", "a"), call("get_weather", "{}", "b"), content="both"),
        result("second", "b"),
        result("first", "a"),
    ]
    assert rendered(qwen1, messages).endswith(
        "assistant\nThought: both\nAction: search\nAction Input: {}\nObservation: first\n"
        "Thought: \nAction: get_weather\nAction Input: {}\nObservation: second\nThought:"
    )


def test_the_mask_leaves_observations_out(qwen1: Tokenizer) -> None:
    messages = [ASK, assistant(call("search", "{}")), result("found"), {"role": "assistant", "content": "It rains."}]
    chat = Qwen1Chat(qwen1, max_window_size=6144).render(messages, tools=TOOLS, add_generation_prompt=False)
    assert chat.mask is not None
    unsaid = [id for id, says in zip(chat.ids, chat.mask, strict=True) if not says]
    said = [id for id, says in zip(chat.ids, chat.mask, strict=True) if says]
    assert "Observation: found" in qwen1.decode(unsaid)
    assert "found" not in qwen1.decode(said)
    assert qwen1.decode(said, skip_special=False).startswith("Thought: \nAction: search\nAction Input: {}\n")
    assert qwen1.decode(said, skip_special=False).endswith("Final Answer: It rains.<|im_end|>")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([ASK, result("x")], r"messages\[1\]\.role is 'tool'"),
        ([ASK, assistant(call("f", "{}")), assistant(call("f", "{}"))], r"messages\[2\]\.role is 'assistant'"),
        ([ASK, assistant(call("f", "{}"))], "the last one must be the user's"),
        ([ASK, assistant({"function": {}}), result("x")], r"messages\[1\]\.tool_calls\[0\]\.function\.name is None"),
        (
            [ASK, assistant(call("f", "{}"), call("g", "{}")), result("x"), ASK],
            r"messages\[1\]\.tool_calls\[1\]: its result is missing",
        ),
        ([ASK, assistant(call("f", "{}")), result("long " * 7000)], "more than the 6144 of max_window_size"),
    ],
)
def test_refused(qwen1: Tokenizer, messages: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rendered(qwen1, messages)


def test_a_tool_name_is_one_line(qwen1: Tokenizer) -> None:
    tool = json.loads(json.dumps(WEATHER))
    tool["function"]["name"] = "a\nb"
    with pytest.raises(ValueError, match=r"tools\[0\] has the name .*single line"):
        rendered(qwen1, [ASK], tools=[tool])
