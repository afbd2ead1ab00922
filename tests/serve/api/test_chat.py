"""/v1/chat/completions with OpenAI's own client: text, answers in parallel, stops, log-probabilities, thinking, usage, limits."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serve.api.conftest import WEATHER, Connect, called
from tests.serve.conftest import LiveServer, StartServer, asking, wait_until

HI: Any = [{"role": "user", "content": "hi"}]


def test_an_answer(live_server: StartServer, connect: Connect) -> None:
    answer = connect(live_server(["Hello, wörld 你好!"])).chat.completions.create(model="tiny", messages=HI)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "tiny"
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello, wörld 你好!")
    assert choice.finish_reason == "stop"
    assert choice.message.tool_calls is None
    size = len("Hello, wörld 你好!".encode()) + 1
    assert answer.usage is not None
    assert answer.usage.completion_tokens == size
    assert answer.usage.prompt_tokens == len("<user\nhi>\n<assistant\n")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + size
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_a_stream(live_server: StartServer, connect: Connect) -> None:
    stream = connect(live_server(["Hello 你好"])).chat.completions.create(
        model="tiny", messages=HI, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.role for chunk in chunks[1:-1]] == [None] * (len(chunks) - 2)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello 你好"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len("Hello 你好".encode()) + 1


def test_the_bytes_of_a_stream(live_server: StartServer) -> None:
    response = live_server(["ab"]).post("/v1/chat/completions", {"messages": HI, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert all(set(chunk) == {"id", "object", "created", "model", "choices"} for chunk in chunks)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {"content": "b"},
        {},
    ]


def test_usage_in_every_chunk(live_server: StartServer, connect: Connect) -> None:
    chunks = list(
        connect(live_server(["abc"])).chat.completions.create(
            model="tiny",
            messages=HI,
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
        )
    )
    assert [chunk.usage and chunk.usage.completion_tokens for chunk in chunks] == [1, 1, 2, 3, 4, 4]


def test_two_answers(live_server: StartServer, connect: Connect) -> None:
    client = connect(live_server(["same"]))
    answer = client.chat.completions.create(model="tiny", messages=HI, n=2)
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [(0, "same"), (1, "same")]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 10
    texts = ["", ""]
    ends = []
    for chunk in client.chat.completions.create(model="tiny", messages=HI, n=2, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        ends += [choice.index] if choice.finish_reason else []
    assert texts == ["same", "same"]
    assert sorted(ends) == [0, 1]


def test_stop_and_length(live_server: StartServer, connect: Connect) -> None:
    client = connect(live_server(["one, two, three"]))
    answer = client.chat.completions.create(model="tiny", messages=HI, stop=[", th", "x"])
    assert answer.choices[0].message.content == "one, two"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == ", th"  # type: ignore[attr-defined]
    for limit in ({"max_tokens": 3}, {"max_completion_tokens": 3}):
        answer = client.chat.completions.create(model="tiny", messages=HI, **limit)  # type: ignore[call-overload]
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("one", "length")


def test_every_parameter_reaches_the_engine(live_server: StartServer, connect: Connect) -> None:
    live = live_server()
    connect(live).chat.completions.create(
        model="tiny",
        messages=HI,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=1.5,
        frequency_penalty=-0.5,
        seed=-7,
        n=2,
        stop="x",
        logit_bias={"5": -100},
        max_completion_tokens=9,
        user="somebody",
        metadata={"a": "b"},
        store=False,
        extra_body={
            "top_k": 20,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "ignore_eos": True,
            "min_tokens": 2,
            "skip_special_tokens": False,
            "stop_token_ids": [7],
            "prompt_logprobs": 1,
            "cache_salt": "mine",
        },
    )
    (asked,) = live.engine.asked
    params = asked.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 20, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1.5, -0.5, 1.1)
    assert (params.seed, params.n, params.stop, params.stop_token_ids) == (-7, 2, ("x",), (7,))
    assert (params.max_tokens, params.min_tokens, params.ignore_eos) == (9, 2, True)
    assert (params.skip_special_tokens, params.prompt_logprobs, params.logit_bias) == (False, 1, {5: -100.0})
    assert asked.settings["cache_namespace"] == "\0mine"


def test_logprobs(live_server: StartServer, connect: Connect) -> None:
    client = connect(live_server(["aé"]))
    answer = client.chat.completions.create(model="tiny", messages=HI, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert bytes(byte for token in logprobs.content for byte in token.bytes or ()) == "aé".encode()
    first = logprobs.content[0]
    assert (first.token, first.logprob, first.bytes) == ("a", -0.5, [ord("a")])
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("a", -0.5), ("b", -1.5)]
    streamed = []
    for chunk in client.chat.completions.create(model="tiny", messages=HI, logprobs=True, top_logprobs=2, stream=True):
        told = chunk.choices[0].logprobs
        streamed += [] if told is None else told.content or []
    assert streamed == logprobs.content


def test_prompt_logprobs_and_token_ids(live_server: StartServer, connect: Connect) -> None:
    answer: Any = connect(live_server(["ab"])).chat.completions.create(
        model="tiny", messages=HI, extra_body={"prompt_logprobs": 1, "return_token_ids": True}
    )
    assert len(answer.prompt_logprobs) == len(answer.prompt_token_ids) == answer.usage.prompt_tokens
    assert answer.prompt_logprobs[0] is None
    token = str(answer.prompt_token_ids[1])
    assert answer.prompt_logprobs[1][token]["rank"] == 1
    assert len(answer.choices[0].token_ids) == 3


def test_messages_of_every_kind(live_server: StartServer) -> None:
    live = live_server(["ok"])
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "call_1", "content": "1"},
        {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "2"},
        {"role": "user", "content": "c<|im_end|>"},
    ]
    response = live.post("/v1/chat/completions", {"messages": messages})
    assert response.status_code == 200, response.text
    text = live.server.tokenizer.decode(live.engine.asked[0].prompt, skip_special=False)
    roles = [turn.split("\n")[0] for turn in text.split("<|im_start|>")[1:]]
    assert roles[:2] == ["system", "user"]
    assert "\nab<|im_end|>" in text
    ends = [
        token for token in live.engine.asked[0].prompt if token == live.server.tokenizer.special_tokens["<|im_end|>"]
    ]
    assert len(ends) == len(messages)  # what a user writes is no control token


def test_thinking(thinking_server: Callable[..., LiveServer], connect: Connect) -> None:
    client = connect(thinking_server(["<think>\nhm, so\n</think>\n\nFour."]))
    answer: Any = client.chat.completions.create(model="tiny", messages=HI)
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content.strip(), message.reasoning) == (
        "Four.",
        "hm, so",
        message.reasoning_content,
    )
    details = answer.usage.completion_tokens_details
    assert details.reasoning_tokens == len("\nhm, so\n") + 2
    reasoning = content = ""
    for chunk in client.chat.completions.create(model="tiny", messages=HI, stream=True):
        delta: Any = chunk.choices[0].delta
        reasoning += getattr(delta, "reasoning_content", None) or ""
        content += delta.content or ""
    assert (reasoning, content) == (message.reasoning_content, "Four.")


@pytest.mark.parametrize(
    "how",
    [
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning_effort": "none"},
        {"enable_thinking": False},
    ],
    ids=str,
)
def test_thinking_switched_off(thinking_server: Callable[..., LiveServer], how: dict[str, Any]) -> None:
    live = thinking_server(["Four."])
    body = live.post("/v1/chat/completions", {"messages": HI} | how).json()
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "Four.", "reasoning_content": None}
    assert live.server.tokenizer.decode(live.engine.asked[0].prompt).endswith("<think>\n\n</think>\n\n")


def test_continue_the_last_message(live_server: StartServer) -> None:
    live = live_server([" world"])
    messages = [*HI, {"role": "assistant", "content": "Hello"}]
    response = live.post("/v1/chat/completions", {"messages": messages, "continue_final_message": True})
    assert response.json()["choices"][0]["message"]["content"] == " world"
    assert live.server.tokenizer.decode(live.engine.asked[0].prompt).endswith("assistant\nHello")


def test_the_asynchronous_client(live_server: StartServer) -> None:
    live = live_server(["Hello"])

    async def ask() -> tuple[str | None, str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
            whole = await client.chat.completions.create(model="tiny", messages=HI)
            pieces = ""
            async for chunk in await client.chat.completions.create(model="tiny", messages=HI, stream=True):
                pieces += chunk.choices[0].delta.content or ""
            return whole.choices[0].message.content, pieces

    assert asyncio.run(ask()) == ("Hello", "Hello")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves(live_server: StartServer, stream: bool) -> None:
    live = live_server(["word " * 2000], engine=None)
    live.engine.seconds = 0.01
    body = {"messages": HI, "stream": stream, "n": 2}
    if stream:
        with httpx.stream("POST", f"{live.url}/v1/chat/completions", json=body, timeout=60) as response:
            next(response.iter_bytes())
    else:
        with asking(live.url + "/v1/chat/completions", body):
            wait_until(lambda: bool(live.engine.scheduler.running))
    wait_until(lambda: not live.engine.has_work, why="the engine goes on for nobody")
    assert live.engine.aborted == [0]
    assert live.post("/v1/chat/completions", {"messages": HI, "max_tokens": 1}).status_code == 200


def test_a_client_that_leaves_while_queued(live_server: StartServer) -> None:
    live = live_server(["word"])
    live.engine.gate.clear()
    live.engine.seconds = 0.01
    with asking(live.url + "/v1/chat/completions", {"messages": HI}):
        wait_until(lambda: live.server.driver.num_waiting == 1)
    wait_until(lambda: live.server.driver.num_waiting == 0)
    live.engine.gate.set()
    wait_until(lambda: not live.engine.has_work)


def test_an_engine_that_fails_in_the_middle(live_server: StartServer) -> None:
    live = live_server(["word " * 700])
    live.engine.seconds = 0.005
    body = {"messages": HI, "stream": True}
    with httpx.stream("POST", f"{live.url}/v1/chat/completions", json=body, timeout=60) as response:
        events = []
        for line in response.iter_lines():
            events += [line.removeprefix("data: ")] if line else []
            if len(events) == 4:
                live.engine.fails = 1
    assert response.status_code == 200
    assert set(json.loads(events[-1])["error"]) == {"message", "type", "param", "code"}
    assert "[DONE]" not in events


PIECES = st.lists(
    st.sampled_from(
        [
            "<think>",
            "</think>",
            "<tool_call>",
            "</tool_call>",
            "text ",
            "\n",
            "你好",
            called("get_weather", '{"city": "x"}'),
        ]
    ),
    max_size=8,
).map("".join)


@pytest.fixture
def shared_thinker(thinking_server: Callable[..., LiveServer]) -> LiveServer:
    """A server whose engine says what `current` holds."""
    return thinking_server(lambda prompt, params: current[0])


current = [""]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=PIECES)
def test_deltas_add_up(shared_thinker: LiveServer, script: str) -> None:
    body = {"messages": HI, "tools": [WEATHER]}
    current[0] = script
    whole = shared_thinker.post("/v1/chat/completions", body).json()["choices"][0]
    text = shared_thinker.post("/v1/chat/completions", body | {"stream": True}).text
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    finish_reason = None
    for event in text.split("\n\n")[:-2]:
        (choice,) = json.loads(event.removeprefix("data: "))["choices"]
        finish_reason = choice["finish_reason"] or finish_reason
        for name in ("content", "reasoning_content"):
            message[name] += choice["delta"].get(name) or ""
        for call in choice["delta"].get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(message["tool_calls"])
                message["tool_calls"].append(call["function"])
            else:
                message["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
    expected = whole["message"]
    texts = [[one.get(name) or "" for name in ("reasoning_content", "content")] for one in (message, expected)]
    if re.match(r"(?s)(?:(?!<think>|<tool_call>).)*</think>", script):
        # A thought without an opening tag: in a stream it was content before that was known.
        texts = [["".join("".join(one).split())] for one in texts]
    assert texts[0] == texts[1]
    assert message["tool_calls"] == [call["function"] for call in expected.get("tool_calls", ())]
    assert finish_reason == whole["finish_reason"]
