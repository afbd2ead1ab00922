"""/v1/messages with Anthropic's own client, against a server whose engine says what the test wrote."""

import asyncio
import itertools
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pydantic
import pytest

from qwenkit.text.chat import JinjaChat
from qwenkit.text.tokenizer import Tokenizer
from tests.serve.api.templates import CALLS, HERMES_TEMPLATE, THOUGHT
from tests.serve.conftest import LiveServer, StartServer, asking, wait_until

HELLO: dict[str, Any] = {"model": "tiny", "max_tokens": 1000, "messages": [{"role": "user", "content": "hi"}]}
TOOLS: Any = [
    {
        "name": "weather",
        "description": "Of a city.",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
    {"name": "time", "input_schema": {"type": "object", "properties": {}}},
]


OPENED: list[anthropic.Anthropic] = []


def client(live: LiveServer, key: str = "none") -> anthropic.Anthropic:
    http = anthropic.DefaultHttpxClient(verify=False)
    OPENED.append(anthropic.Anthropic(base_url=live.url, api_key=key, max_retries=0, http_client=http))
    return OPENED[-1]


@pytest.fixture(autouse=True)
def _close_clients() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()


def streamed(live: LiveServer, **changes: Any) -> list[tuple[str, Any]]:
    """The events of a stream as they are on the wire: their names and their data."""
    with httpx.stream(
        "POST", live.url + "/v1/messages", json=HELLO | {"stream": True} | changes, timeout=60
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        blocks = response.read().decode().removesuffix("\n\n").split("\n\n")
    events = []
    for block in blocks:
        name, data = block.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


def prompt_of(live: LiveServer, number: int = -1) -> str:
    asked: str = live.server.tokenizer.decode(live.engine.asked[number].prompt, skip_special=False)
    return asked


@pytest.fixture
def hermes(tokenizer: Tokenizer) -> JinjaChat:
    return JinjaChat(tokenizer, HERMES_TEMPLATE)


def test_a_message(live_server: StartServer) -> None:
    live = live_server(["Hello!"])
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 3}  # newer clients have no arguments for these
    message = client(live).messages.create(**HELLO, metadata={"user_id": "u"}, extra_body=sampling)
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": "Hello!"}]
    assert (message.role, message.model, message.stop_reason, message.stop_sequence) == (
        "assistant",
        "tiny",
        "end_turn",
        None,
    )
    assert message.id.startswith("msg_")
    (asked,) = live.engine.asked
    assert message.usage.input_tokens == len(asked.prompt)
    assert message.usage.output_tokens == len("Hello!") + 1
    assert (asked.params.temperature, asked.params.top_p, asked.params.top_k) == (0.5, 0.9, 3)
    assert message._request_id is not None
    assert message._request_id.startswith("req-")


def test_a_streamed_message(live_server: StartServer) -> None:
    live = live_server(["Hello!"])
    with client(live).messages.stream(**HELLO) as stream:
        assert "".join(stream.text_stream) == "Hello!"
        message = stream.get_final_message()
    assert (message.stop_reason, message.usage.output_tokens) == ("end_turn", 7)
    raw = client(live).messages.create(**HELLO, stream=True)
    assert [event.type for event in raw][:2] == ["message_start", "content_block_start"]


def test_asynchronous(live_server: StartServer) -> None:
    live = live_server(["Hello!"])

    async def both() -> tuple[str, str]:
        async with anthropic.AsyncAnthropic(base_url=live.url, api_key="none", max_retries=0) as client:
            whole = await client.messages.create(**HELLO)
            async with client.messages.stream(**HELLO) as stream:
                return whole.content[0].text, await stream.get_final_text()  # type: ignore[union-attr]

    assert asyncio.run(both()) == ("Hello!", "Hello!")


def test_the_events_on_the_wire(live_server: StartServer) -> None:
    events = streamed(live_server(["Hi"]))
    assert [name for name, _ in events] == [
        *("message_start", "ping", "content_block_start", "content_block_delta", "content_block_delta"),
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    assert all(name == data["type"] for name, data in events)
    assert events[0][1]["message"]["content"] == []
    assert events[3][1] == {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "H"}}
    assert events[-2][1]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}


def test_why_it_stopped(live_server: StartServer) -> None:
    live = live_server(["one END two"])
    message = client(live).messages.create(**HELLO, stop_sequences=["END"])
    assert (message.content[0].text, message.stop_reason, message.stop_sequence) == ("one ", "stop_sequence", "END")  # type: ignore[union-attr]
    message = client(live).messages.create(**HELLO | {"max_tokens": 2})
    assert (message.content[0].text, message.stop_reason) == ("on", "max_tokens")  # type: ignore[union-attr]


def test_more_tokens_than_there_is_room_for_are_no_error(live_server: StartServer) -> None:
    message = client(live_server(["Hello!"])).messages.create(**HELLO | {"max_tokens": 20_000})
    assert message.stop_reason == "end_turn"


def test_thinking_is_off_unless_asked_for(live_server: StartServer, hermes: JinjaChat) -> None:
    live = live_server(["Four.", THOUGHT, THOUGHT], chat_format=hermes)
    message = client(live).messages.create(**HELLO)
    assert [block.type for block in message.content] == ["text"]
    assert prompt_of(live).endswith("<think>\n\n</think>\n\n")
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    message = client(live).messages.create(**HELLO | {"max_tokens": 2000}, thinking=thinking)
    assert prompt_of(live).endswith("<|im_start|>assistant\n")
    assert [block.to_dict() for block in message.content] == [
        {"type": "thinking", "thinking": "Two and two.", "signature": ""},
        {"type": "text", "text": "Four."},
    ]
    assert message.usage.output_tokens_details is not None
    assert 0 < message.usage.output_tokens_details.thinking_tokens < message.usage.output_tokens
    with client(live).messages.stream(**HELLO | {"max_tokens": 2000}, thinking=thinking) as stream:
        kinds = [event.type for event in stream]
        again = stream.get_final_message()
    assert "thinking" in kinds
    assert "signature" in kinds
    assert [block.to_dict() for block in again.content] == [block.to_dict() for block in message.content]


@pytest.mark.parametrize("stream", [False, True])
def test_two_turns_with_tools(live_server: StartServer, hermes: JinjaChat, stream: bool) -> None:
    live = live_server([CALLS, "Rain."], chat_format=hermes)

    def ask(messages: Any) -> Any:
        request = HELLO | {"messages": messages, "tools": TOOLS}
        if not stream:
            return client(live).messages.create(**request)
        with client(live).messages.stream(**request) as events:
            return events.get_final_message()

    messages: list[Any] = list(HELLO["messages"])
    message = ask(messages)
    assert message.stop_reason == "tool_use"
    text, first, second = message.content
    assert text.text == "Let me see."
    assert (first.name, first.input, second.name, second.input) == ("weather", {"city": "Köln"}, "time", {})
    assert first.id != second.id
    messages.append({"role": "assistant", "content": message.content})
    results = [
        {"type": "tool_result", "tool_use_id": call.id, "content": f"to {call.name}"} for call in (first, second)
    ]
    messages.append({"role": "user", "content": results})
    message = ask(messages)
    assert message.content[0].text == "Rain."
    prompt = prompt_of(live)
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>' in prompt
    assert "<|im_start|>tool\nto weather<|im_end|>\n<|im_start|>tool\nto time<|im_end|>" in prompt


def test_no_parallel_tool_use(live_server: StartServer, hermes: JinjaChat) -> None:
    live = live_server([CALLS], chat_format=hermes)
    choice: Any = {"type": "auto", "disable_parallel_tool_use": True}
    message = client(live).messages.create(**HELLO, tools=TOOLS, tool_choice=choice)
    assert [block.type for block in message.content] == ["text", "tool_use"]
    assert message.stop_reason == "tool_use"


def test_the_choice_none_hides_the_tools(live_server: StartServer, hermes: JinjaChat) -> None:
    live = live_server(["Hello!"], chat_format=hermes)
    client(live).messages.create(**HELLO, tools=TOOLS, tool_choice={"type": "none"})
    assert "weather" not in prompt_of(live)


def test_a_forced_call_constrains_the_answer(live_server: StartServer, hermes: JinjaChat) -> None:
    live = live_server([CALLS], chat_format=hermes)
    client(live).messages.create(**HELLO, tools=TOOLS, tool_choice={"type": "tool", "name": "time"})
    grammar = live.engine.asked[0].params.grammar
    assert grammar is not None
    assert "time" in grammar.source
    assert "weather" not in grammar.source


def test_the_answer_goes_on_where_the_assistant_broke_off(live_server: StartServer) -> None:
    live = live_server(["B)"])
    messages = [*HELLO["messages"], {"role": "assistant", "content": "The answer is ("}]
    message = client(live).messages.create(**HELLO | {"messages": messages})
    assert message.content[0].text == "B)"  # type: ignore[union-attr]
    assert prompt_of(live).endswith("<|im_start|>assistant\nThe answer is (")


def test_counting_tokens(live_server: StartServer, hermes: JinjaChat) -> None:
    live = live_server(["Hello!"], chat_format=hermes)
    request: Any = {"model": "tiny", "messages": HELLO["messages"], "tools": TOOLS, "system": "Be brief."}
    counted = client(live).messages.count_tokens(**request)
    message = client(live).messages.create(**request, max_tokens=5)
    assert counted.input_tokens == message.usage.input_tokens
    long = [{"role": "user", "content": "x" * 10_000}]
    assert client(live).messages.count_tokens(model="tiny", messages=long).input_tokens > 10_000  # type: ignore[arg-type]
    assert len(live.engine.asked) == 1


REFUSED: Any = [
    ({"max_tokens": 0}, anthropic.BadRequestError, "max_tokens"),
    ({"model": "gpt"}, anthropic.NotFoundError, "'gpt' is not served here"),
    (
        {"messages": [{"role": "user", "content": "x" * 5000}]},
        anthropic.BadRequestError,
        "prompt is too long: 5019 tokens > 4095",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x"}}]}]},
        anthropic.BadRequestError,
        "an image was given, but this model reads only text",
    ),
    ({"extra_body": {"thread": {"type": "create"}}}, anthropic.BadRequestError, "thread is not supported"),
    ({"tool_choice": {"type": "any"}}, anthropic.BadRequestError, "tools is empty"),
    ({"stop_sequences": [str(n) for n in range(99)]}, anthropic.BadRequestError, "stop_sequences: 99 is more than"),
]


def test_errors(live_server: StartServer) -> None:
    live = live_server()
    for (changes, error, words), stream in itertools.product(REFUSED, (False, True)):
        with pytest.raises(error, match=words) as caught:
            client(live).messages.create(**HELLO | changes, stream=stream)
        body = caught.value.body
        assert set(body) == {"type", "error", "request_id"}
        assert body["type"] == "error"
        assert set(body["error"]) == {"type", "message"}
        expected = "not_found_error" if error is anthropic.NotFoundError else "invalid_request_error"
        assert body["error"]["type"] == expected
        assert body["request_id"] == caught.value.response.headers["request-id"]


def test_keys_in_either_header_and_unknown_paths(live_server: StartServer) -> None:
    live = live_server(["Hello!"], api_key=("secret-key-1",))
    assert client(live, "secret-key-1").messages.create(**HELLO).stop_reason == "end_turn"
    bearer = {"authorization": "Bearer secret-key-1", "anthropic-version": "2023-06-01"}
    assert live.post("/v1/messages", HELLO, headers=bearer).status_code == 200
    with pytest.raises(anthropic.AuthenticationError) as caught:
        client(live, "wrong").messages.create(**HELLO)
    assert caught.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]
    answer = live.post("/v1/messages/batches", {}, headers=bearer)
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found_error"


def test_a_body_that_is_no_json(live_server: StartServer) -> None:
    answer = httpx.post(
        live_server().url + "/v1/messages", content="{", headers={"content-type": "application/json"}, timeout=60
    )
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_failing_engine_is_told_within_the_stream(live_server: StartServer) -> None:
    live = live_server(["x" * 4000])
    live.engine.seconds = 0.005
    with client(live).messages.stream(**HELLO | {"max_tokens": 3900}) as stream:
        assert next(stream).type == "message_start"
        live.engine.fails = 1
        with pytest.raises(anthropic.APIStatusError) as caught:
            stream.until_done()
    assert caught.value.body["error"]["type"] == "api_error"  # type: ignore[index]


def test_a_client_that_goes_away_stops_the_engine(live_server: StartServer) -> None:
    live = live_server(["x" * 4000])
    live.engine.seconds = 0.002
    with client(live).messages.stream(**HELLO | {"max_tokens": 3000}) as stream:
        next(iter(stream))
    wait_until(lambda: live.engine.aborted == [0])
    with asking(live.url + "/v1/messages", HELLO | {"max_tokens": 3000}):
        wait_until(lambda: len(live.engine.asked) == 2)
    wait_until(lambda: live.engine.aborted == [0, 1])
    assert live.engine.pool.num_free == live.engine.pool.num_blocks


def test_numbers_and_characters_that_json_has_and_others_do_not(live_server: StartServer, hermes: JinjaChat) -> None:
    script = '<tool_call>\n{"name": "time", "arguments": {"a": 123456789012345678901234567890, "b": "\\ud800"}}\n</tool_call>'
    live = live_server([script], chat_format=hermes)
    answer = live.post("/v1/messages", HELLO | {"tools": TOOLS})
    assert answer.status_code == 200
    assert answer.json()["content"][0]["input"] == {"a": 123456789012345678901234567890, "b": "\ufffd"}


def test_structured_output(live_server: StartServer) -> None:
    class Answer(pydantic.BaseModel):
        value: int

    live = live_server(['{"value": 4}'])
    message = client(live).messages.parse(**HELLO, output_format=Answer)
    assert message.parsed_output == Answer(value=4)
    grammar = live.engine.asked[0].params.grammar
    assert grammar is not None
    assert "value" in grammar.source


def test_the_path_that_beta_clients_take(live_server: StartServer) -> None:
    message = client(live_server(["Hello!"])).beta.messages.create(**HELLO)
    assert message.stop_reason == "end_turn"
