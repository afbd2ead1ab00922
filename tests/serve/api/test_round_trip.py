"""What a route gives out it takes back: any answer, on each of the three routes, whole and streamed, is the history of the next
request; and the pieces of a stream add up to the answer that is not streamed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenkit.text.chat import JinjaChat
from qwenkit.text.tokenizer import Tokenizer
from tests.serve.api.conftest import TEMPLATE, WEATHER
from tests.serve.conftest import LiveServer, running, servers

NAMES = st.sampled_from(["get_weather", "web search", "ns:search", " x ", "天气", "a/b", '"', ""]) | st.text(max_size=8)
ARGUMENTS = st.dictionaries(
    st.text(max_size=4), st.none() | st.booleans() | st.integers() | st.text(max_size=6), max_size=3
)
CALLS = st.builds(
    lambda name, arguments, key, end: (
        f'<tool_call>\n{{"name": {json.dumps(name)}, "{key}": {json.dumps(arguments, ensure_ascii=False)}}}\n{end}'
    ),
    NAMES,
    ARGUMENTS,
    st.sampled_from(["arguments", "arguments", "parameters", "other"]),
    st.sampled_from(["</tool_call>", "</tool_call>", "}</tool_call>", ""]),
)
PIECES = (
    CALLS
    | st.sampled_from(["<think>\n", "\n</think>\n\n", "<tool_call>", "</tool_call>", " ", "\n"])
    | st.text(max_size=8)
)
SCRIPTS = st.lists(PIECES, max_size=5).map("".join)
CHECKED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def live(thinker: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with servers(thinker, Path(tmp_path_factory.mktemp("state"))) as make, ExitStack() as stack:
        yield stack.enter_context(running(make(tokenizer=thinker, chat_format=JinjaChat(thinker, TEMPLATE))))


def events(live: LiveServer, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    text = live.post(path, body | {"stream": True}).text
    return [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]


def told(text: str | None) -> str:
    """A text without blanks: a thought without its opening tag was content in a stream before that was known."""
    return "".join((text or "").split())


@CHECKED
@given(script=SCRIPTS)
def test_chat(live: LiveServer, script: str) -> None:
    live.engine._scripts = [script]
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "tools": [WEATHER]}
    whole = live.post("/v1/chat/completions", body).json()["choices"][0]["message"]
    streamed: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": []}
    for event in events(live, "/v1/chat/completions", body):
        for choice in event["choices"]:
            delta = choice["delta"]
            assert choice["finish_reason"] is None or not (delta.get("content") or delta.get("tool_calls"))
            for name in ("content", "reasoning_content"):
                streamed[name] += delta.get(name) or ""
            for call in delta.get("tool_calls") or ():
                if call.get("id"):
                    streamed["calls"].append([call["function"]["name"], ""])
                streamed["calls"][call["index"]][1] += call["function"]["arguments"]
    calls = [[call["function"]["name"], call["function"]["arguments"]] for call in whole.get("tool_calls", ())]
    assert streamed["calls"] == calls
    texts = (whole.get("reasoning_content"), whole["content"])
    assert told(streamed["reasoning_content"] + streamed["content"]) == told("".join(filter(None, texts)))
    results = [
        {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"], "content": "fine"}
        for call in whole.get("tool_calls", ())
    ]
    again = [*body["messages"], whole, *results, {"role": "user", "content": "Go on"}]
    answer = live.post("/v1/chat/completions", body | {"messages": again})
    assert answer.status_code == 200, answer.text
    assert "x-ignored-fields" not in answer.headers


@CHECKED
@given(script=SCRIPTS)
def test_messages(live: LiveServer, script: str) -> None:
    live.engine._scripts = [script]
    tool = {"name": "get_weather", "input_schema": WEATHER["function"]["parameters"]}  # type: ignore[index]
    body: dict[str, Any] = {
        "model": "tiny",
        "max_tokens": 2000,
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": [tool],
        "thinking": {"type": "adaptive"},
    }
    whole = live.post("/v1/messages", body).json()["content"]
    streamed: list[dict[str, Any]] = []
    for event in events(live, "/v1/messages", body):
        if event["type"] == "content_block_start":
            streamed.append({"text": "", **event["content_block"]} | {"written": ""})
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            written = delta.get("text", delta.get("thinking", delta.get("partial_json", "")))
            streamed[event["index"]]["written"] += written
    assert [json.loads(block["written"]) for block in streamed if block["type"] == "tool_use"] == [
        block["input"] for block in whole if block["type"] == "tool_use"
    ]
    texts = [block.get("text", block.get("thinking", "")) for block in whole if block["type"] != "tool_use"]
    assert told("".join(block["written"] for block in streamed if block["type"] != "tool_use")) == told("".join(texts))
    results = [
        {"type": "tool_result", "tool_use_id": block["id"], "content": "fine"}
        for block in whole
        if block["type"] == "tool_use"
    ]
    turn = {"role": "user", "content": [*results, {"type": "text", "text": "Go on"}]}
    again = [*body["messages"], {"role": "assistant", "content": whole}, turn]
    answer = live.post("/v1/messages", body | {"messages": again})
    assert answer.status_code == 200, answer.text


@CHECKED
@given(script=SCRIPTS)
def test_responses(live: LiveServer, script: str) -> None:
    live.engine._scripts = [script]
    tool = {"type": "function", **WEATHER["function"]}  # type: ignore[dict-item]
    body: dict[str, Any] = {"model": "tiny", "input": [{"role": "user", "content": "Hi"}], "tools": [tool]}
    whole = live.post("/v1/responses", body).json()["output"]
    done = [event["response"] for event in events(live, "/v1/responses", body) if event["type"] == "response.completed"]
    streamed = done[0]["output"]
    calls = [
        [(item["name"], item["arguments"]) for item in out if item["type"] == "function_call"]
        for out in (whole, streamed)
    ]
    assert calls[0] == calls[1]
    texts = [
        told("".join(part["text"] for item in out if item["type"] != "function_call" for part in item["content"]))
        for out in (whole, streamed)
    ]
    assert texts[0] == texts[1]
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "fine"}
        for item in whole
        if item["type"] == "function_call"
    ]
    again = [*body["input"], *whole, *results, {"role": "user", "content": "Go on"}]
    answer = live.post("/v1/responses", body | {"input": again})
    assert answer.status_code == 200, answer.text
