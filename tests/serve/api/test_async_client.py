"""Every feature once more through OpenAI's asynchronous client, streamed and not; what the answers hold is tested beside it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import openai
import pytest

from tests.serve.api.conftest import CLOCK, WEATHER, called
from tests.serve.conftest import LiveServer, StartServer

HI: Any = [{"role": "user", "content": "hi"}]
TOOLS: Any = [WEATHER, CLOCK]
PARIS = called("get_weather", '{"city": "Paris"}')
T = TypeVar("T")
Thinking = Callable[..., LiveServer]


def with_client(live: LiveServer, use: Callable[[openai.AsyncOpenAI], Awaitable[T]]) -> T:
    async def run() -> T:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
            return await use(client)

    return asyncio.run(run())


async def streamed(client: openai.AsyncOpenAI, **body: Any) -> list[Any]:
    """The chunks of a streamed chat completion that have a choice."""
    stream = await client.chat.completions.create(model="tiny", messages=HI, stream=True, **body)
    return [chunk.choices[0] async for chunk in stream if chunk.choices]


def test_text_choices_and_stops(live_server: StartServer) -> None:
    live = live_server(["Hello, world"])

    async def use(client: openai.AsyncOpenAI) -> None:
        whole = await client.chat.completions.create(
            model="tiny", messages=HI, n=2, stop=[","], seed=1, temperature=0.5
        )
        assert [choice.message.content for choice in whole.choices] == ["Hello", "Hello"]
        pieces = await streamed(client, stop=[","])
        assert "".join(choice.delta.content or "" for choice in pieces) == "Hello"
        assert pieces[-1].finish_reason == "stop"

    with_client(live, use)


def test_log_probabilities_and_usage(live_server: StartServer) -> None:
    live = live_server(["Hi"])

    async def use(client: openai.AsyncOpenAI) -> None:
        whole = await client.chat.completions.create(model="tiny", messages=HI, logprobs=True, top_logprobs=2)
        logprobs = whole.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content
        stream = await client.chat.completions.create(
            model="tiny", messages=HI, stream=True, stream_options={"include_usage": True}
        )
        usages = [chunk.usage async for chunk in stream if chunk.usage is not None]
        assert whole.usage is not None
        assert [usage.completion_tokens for usage in usages] == [whole.usage.completion_tokens]

    with_client(live, use)


def test_thinking(thinking_server: Thinking) -> None:
    live = thinking_server(["<think>\nhm\n</think>\n\nFour."])

    async def use(client: openai.AsyncOpenAI) -> None:
        message: Any = (await client.chat.completions.create(model="tiny", messages=HI)).choices[0].message
        assert (message.reasoning_content.strip(), message.content) == ("hm", "Four.")
        pieces: list[Any] = await streamed(client)
        thought = "".join(getattr(choice.delta, "reasoning_content", None) or "" for choice in pieces)
        assert (thought, "".join(choice.delta.content or "" for choice in pieces)) == (
            message.reasoning_content,
            "Four.",
        )

    with_client(live, use)


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "get_weather"}}])
def test_tools(thinking_server: Thinking, choice: Any) -> None:
    live = thinking_server([PARIS])

    async def use(client: openai.AsyncOpenAI) -> None:
        whole = await client.chat.completions.create(model="tiny", messages=HI, tools=TOOLS, tool_choice=choice)
        (call,) = whole.choices[0].message.tool_calls or ()
        assert call.type == "function"
        assert json.loads(call.function.arguments) == {"city": "Paris"}
        pieces = await streamed(client, tools=TOOLS, tool_choice=choice)
        arguments = [part.function.arguments or "" for piece in pieces for part in piece.delta.tool_calls or ()]
        assert "".join(arguments) == call.function.arguments
        assert pieces[-1].finish_reason == whole.choices[0].finish_reason

    with_client(live, use)


def test_legacy_functions(thinking_server: Thinking) -> None:
    live = thinking_server([PARIS])

    async def use(client: openai.AsyncOpenAI) -> None:
        functions: Any = [WEATHER["function"]]
        whole = await client.chat.completions.create(model="tiny", messages=HI, functions=functions)
        call = whole.choices[0].message.function_call
        assert call is not None
        pieces = await streamed(client, functions=functions)
        parts = [piece.delta.function_call for piece in pieces if piece.delta.function_call]
        assert "".join(part.arguments or "" for part in parts) == call.arguments
        assert (call.name, pieces[-1].finish_reason) == ("get_weather", "function_call")

    with_client(live, use)


def test_structured_output(live_server: StartServer) -> None:
    live = live_server(['{"ok": true}'])
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    formats: list[Any] = [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    ]

    async def use(client: openai.AsyncOpenAI) -> None:
        for wanted in formats:
            whole = await client.chat.completions.create(model="tiny", messages=HI, response_format=wanted)
            assert json.loads(whole.choices[0].message.content or "") == {"ok": True}
            pieces = await streamed(client, response_format=wanted)
            assert json.loads("".join(piece.delta.content or "" for piece in pieces)) == {"ok": True}
        assert [one.params.grammar.kind for one in live.engine.asked] == ["json_object"] * 2 + ["json_schema"] * 2

    with_client(live, use)


def test_completions_models_and_responses(live_server: StartServer) -> None:
    live = live_server([" there"])

    async def use(client: openai.AsyncOpenAI) -> None:
        whole = await client.completions.create(model="tiny", prompt="Hi", echo=True)
        stream = await client.completions.create(model="tiny", prompt="Hi", stream=True)
        assert whole.choices[0].text == "Hi there"
        assert "".join([chunk.choices[0].text async for chunk in stream]) == " there"
        assert [model.id async for model in client.models.list()] == ["tiny"]
        response = await client.responses.create(model="tiny", input="hi")
        events = [event async for event in await client.responses.create(model="tiny", input="hi", stream=True)]
        assert response.output_text == " there"
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == " there"

    with_client(live, use)


def test_files_and_batches(live_server: StartServer) -> None:
    live = live_server(["Hello"])
    body = {"model": "tiny", "messages": HI}
    lines = [{"custom_id": f"c{n}", "method": "POST", "url": "/v1/chat/completions", "body": body} for n in range(3)]

    async def use(client: openai.AsyncOpenAI) -> None:
        data = "\n".join(map(json.dumps, lines)).encode()
        file = await client.files.create(file=("in.jsonl", data), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        while batch.status not in ("completed", "failed", "expired"):
            await asyncio.sleep(0.02)
            batch = await client.batches.retrieve(batch.id)
        assert batch.output_file_id is not None
        written = (await client.files.content(batch.output_file_id)).text.splitlines()
        assert sorted(json.loads(line)["custom_id"] for line in written) == ["c0", "c1", "c2"]

    with_client(live, use)


def test_errors(live_server: StartServer) -> None:
    live = live_server(["Hello"])

    async def use(client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.NotFoundError, match="other"):
            await client.chat.completions.create(model="other", messages=HI)
        with pytest.raises(openai.BadRequestError, match="thinking_budget"):
            await client.chat.completions.create(model="tiny", messages=HI, extra_body={"thinking_budget": 1})
        long: Any = [{"role": "user", "content": "x" * 5000}]
        with pytest.raises(openai.BadRequestError, match="maximum context length is"):
            await client.chat.completions.create(model="tiny", messages=long)

    with_client(live, use)
