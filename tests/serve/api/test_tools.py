"""Tool calls through /v1/chat/completions: every tool_choice, parallel calls, legacy functions, and calls that are broken."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from qwenkit.text.chat_qwen1 import Qwen1Chat
from qwenkit.text.tokenizer import Tokenizer
from tests.serve.api.conftest import CLOCK, WEATHER, Connect, called
from tests.serve.conftest import LiveServer, StartServer

HI: Any = [{"role": "user", "content": "hi"}]
TOOLS: Any = [WEATHER, CLOCK]
PARIS = called("get_weather", '{"city": "Paris"}')
Thinking = Callable[..., LiveServer]


def asked(live: LiveServer) -> Any:
    return live.engine.asked[-1]


def test_a_call(thinking_server: Thinking, connect: Connect) -> None:
    live = thinking_server([f"Let me look.\n{PARIS}"])
    answer = connect(live).chat.completions.create(model="tiny", messages=HI, tools=TOOLS)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert (choice.message.content or "").strip() == "Let me look."
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    assert re.fullmatch("call_[0-9a-f]{24}", call.id)
    assert asked(live).params.grammar is None
    assert "get_weather" in live.server.tokenizer.decode(asked(live).prompt)


def test_only_a_call_has_no_content(thinking_server: Thinking, connect: Connect) -> None:
    answer = connect(thinking_server([PARIS])).chat.completions.create(model="tiny", messages=HI, tools=TOOLS)
    assert answer.choices[0].message.content is None


def test_a_streamed_call(thinking_server: Thinking, connect: Connect) -> None:
    chunks = list(
        connect(thinking_server([PARIS + "\n" + called("clock", "{}")])).chat.completions.create(
            model="tiny", messages=HI, tools=TOOLS, stream=True
        )
    )
    names, arguments, ids = {}, {0: "", 1: ""}, set()
    for chunk in chunks:
        for call in chunk.choices[0].delta.tool_calls or ():
            assert call.function is not None
            if call.id:
                ids.add(call.id)
                assert call.type == "function"
                names[call.index] = call.function.name
            arguments[call.index] += call.function.arguments or ""
    assert names == {0: "get_weather", 1: "clock"}
    assert [json.loads(text) for text in arguments.values()] == [{"city": "Paris"}, {}]
    assert len(ids) == 2
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_at_a_time(thinking_server: Thinking, stream: bool) -> None:
    """parallel_tool_calls: false ends the answer where a second call begins."""
    live = thinking_server([PARIS + "\n" + called("clock", "{}") + "\nmore text" * 50])
    body = {"messages": HI, "tools": TOOLS, "parallel_tool_calls": False, "stream": stream}
    response = live.post("/v1/chat/completions", body)
    if stream:
        assert "clock" not in response.text
        assert '"finish_reason":"tool_calls"' in response.text
    else:
        (choice,) = response.json()["choices"]
        assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["get_weather"]
        assert choice["finish_reason"] == "tool_calls"


def test_no_tools_wanted(thinking_server: Thinking) -> None:
    live = thinking_server([PARIS])
    body = {"messages": HI, "tools": TOOLS, "tool_choice": "none"}
    (choice,) = live.post("/v1/chat/completions", body).json()["choices"]
    assert choice["message"]["content"] == PARIS
    assert choice["finish_reason"] == "stop"
    assert "get_weather" not in live.server.tokenizer.decode(asked(live).prompt)


@pytest.mark.parametrize(
    ("choice", "forced"),
    [
        ("required", {"get_weather", "clock"}),
        ({"type": "function", "function": {"name": "clock"}}, {"clock"}),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "clock"}}]},
            },
            {"clock"},
        ),
    ],
)
def test_a_call_is_forced_by_a_grammar(thinking_server: Thinking, choice: Any, forced: set[str]) -> None:
    live = thinking_server([called("clock", "{}")])
    response = live.post("/v1/chat/completions", {"messages": HI, "tools": TOOLS, "tool_choice": choice})
    assert response.status_code == 200, response.text
    params = asked(live).params
    assert params.grammar.kind == "lark"
    assert {name for name in ("get_weather", "clock") if name in params.grammar.source} == forced
    assert params.grammar_after is None
    reason = "stop" if isinstance(choice, dict) and "function" in choice else "tool_calls"
    assert response.json()["choices"][0]["finish_reason"] == reason


def test_a_grammar_waits_for_the_end_of_open_thinking(thinking_server: Thinking) -> None:
    live = thinking_server(["so</think>" + called("clock", "{}")])
    messages = [*HI, {"role": "assistant", "content": "<think>\nhm"}]
    body = {"messages": messages, "continue_final_message": True, "tools": TOOLS, "tool_choice": "required"}
    response = live.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    assert asked(live).params.grammar_after == live.server.tokenizer.token_id("</think>")
    (choice,) = response.json()["choices"]
    assert choice["message"]["reasoning_content"] == "so"
    assert choice["finish_reason"] == "tool_calls"


def test_legacy_functions(thinking_server: Thinking, connect: Connect) -> None:
    live = thinking_server([PARIS])
    functions: Any = [tool["function"] for tool in TOOLS]
    client = connect(live)
    answer = client.chat.completions.create(model="tiny", messages=HI, functions=functions)
    (choice,) = answer.choices
    assert choice.finish_reason == "function_call"
    assert choice.message.tool_calls is None
    assert choice.message.function_call is not None
    assert choice.message.function_call.name == "get_weather"
    assert json.loads(choice.message.function_call.arguments) == {"city": "Paris"}
    name, arguments, reasons = "", "", []
    for chunk in client.chat.completions.create(model="tiny", messages=HI, functions=functions, stream=True):
        call = chunk.choices[0].delta.function_call
        name += (call and call.name) or ""
        arguments += (call and call.arguments) or ""
        reasons.append(chunk.choices[0].finish_reason)
    assert (name, json.loads(arguments), reasons[-1]) == ("get_weather", {"city": "Paris"}, "function_call")
    live.post("/v1/chat/completions", {"messages": HI, "functions": functions, "function_call": {"name": "clock"}})
    assert asked(live).params.grammar is not None


def test_a_conversation_with_a_tool(thinking_server: Thinking, connect: Connect) -> None:
    """What the server gave out goes back in as it was, and the model sees it."""
    live = thinking_server([PARIS, "Sunny."])
    client = connect(live)
    first = client.chat.completions.create(model="tiny", messages=HI, tools=TOOLS).choices[0].message
    assert first.tool_calls is not None
    messages: Any = [*HI, first, {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "sun"}]
    answer = client.chat.completions.create(model="tiny", messages=messages, tools=TOOLS)
    assert answer.choices[0].message.content == "Sunny."
    text = live.server.tokenizer.decode(asked(live).prompt)
    assert '{"name": "get_weather", "arguments": {"city": "Paris"}}' in text
    assert "tool\nsun" in text


@pytest.mark.parametrize(
    "script",
    [
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Pa',
        "<tool_call>\nno JSON\n</tool_call>",
        '<tool_call>\n{"name": 5}\n</tool_call>',
    ],
)
def test_a_broken_call_is_text(thinking_server: Thinking, script: str) -> None:
    live = thinking_server([script])
    (choice,) = live.post("/v1/chat/completions", {"messages": HI, "tools": TOOLS}).json()["choices"]
    assert choice["message"]["content"] == script
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"
    cut = live.post("/v1/chat/completions", {"messages": HI, "tools": TOOLS, "max_tokens": 5}).json()["choices"][0]
    assert cut["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tool_choice": "required"}, None),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice"),
        ({"tools": [CLOCK, CLOCK]}, "tools"),
        ({"tools": TOOLS, "functions": [CLOCK["function"]]}, None),
        ({"functions": [CLOCK["function"]], "function_call": {"name": "nope"}}, "function_call"),
        ({"function_call": {"name": "f"}}, None),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "two words"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]}, "tools"),
    ],
)
def test_what_is_refused(thinking_server: Thinking, body: dict[str, Any], param: str | None) -> None:
    response = thinking_server().post("/v1/chat/completions", {"messages": HI} | body)
    assert response.status_code == 400, response.text
    if param is not None:
        assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_in_the_words_of_qwen_1(live_server: StartServer, thinker: Tokenizer, stream: bool) -> None:
    """ReAct: the stop string that its format needs ends the answer, and nobody hears of it."""
    script = 'Thought: I look it up.\nAction: get_weather\nAction Input: {"city": "Paris"}\nObservation: made up'
    live = live_server([script], tokenizer=thinker, chat_format=Qwen1Chat(thinker, max_window_size=3000))
    body = {"messages": HI, "tools": TOOLS, "stop": ["END"], "stream": stream}
    response = live.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    assert asked(live).params.stop == ("END", "\nObservation:")
    assert "Observation" not in response.text
    assert "made up" not in response.text
    if stream:
        assert '"finish_reason":"tool_calls"' in response.text
        return
    (choice,) = response.json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["stop_reason"] is None
    assert choice["message"]["reasoning_content"] == "I look it up."
    (call,) = choice["message"]["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("get_weather", {"city": "Paris"})
