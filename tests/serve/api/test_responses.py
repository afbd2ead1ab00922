"""/v1/responses with OpenAI's own client, against a server whose engine says what the test wrote."""

import asyncio
import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest

from qwenkit.text.chat import JinjaChat
from qwenkit.text.tokenizer import Tokenizer
from tests.serve.api.templates import CALLS, HERMES_TEMPLATE, THOUGHT
from tests.serve.conftest import LiveServer, StartServer, asking, wait_until

HELLO: dict[str, Any] = {"model": "tiny", "input": "hi"}
TOOLS: Any = [
    {
        "type": "function",
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": False,
    },
    {"type": "function", "name": "time", "parameters": {"type": "object", "properties": {}}, "strict": False},
]


OPENED: list[openai.OpenAI] = []


def client(live: LiveServer) -> openai.OpenAI:
    http = openai.DefaultHttpxClient(verify=False)
    OPENED.append(openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0, http_client=http))
    return OPENED[-1]


@pytest.fixture(autouse=True)
def _close_clients() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()


def prompt_of(live: LiveServer, number: int = -1) -> str:
    asked: str = live.server.tokenizer.decode(live.engine.asked[number].prompt, skip_special=False)
    return asked


@pytest.fixture
def hermes(tokenizer: Tokenizer) -> JinjaChat:
    return JinjaChat(tokenizer, HERMES_TEMPLATE)


def test_a_response(live_server: StartServer) -> None:
    live = live_server(["Hello!"])
    response = client(live).responses.create(
        **HELLO,
        instructions="Be brief.",
        temperature=0.5,
        top_p=0.9,
        max_output_tokens=50,
        metadata={"a": "b"},
        store=False,
    )
    assert response.output_text == "Hello!"
    assert (response.status, response.model, response.metadata) == ("completed", "tiny", {"a": "b"})
    (asked,) = live.engine.asked
    assert prompt_of(live).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi")
    assert (asked.params.temperature, asked.params.top_p, asked.params.max_tokens) == (0.5, 0.9, 50)
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (len(asked.prompt), 7)


def test_a_streamed_response(live_server: StartServer) -> None:
    live = live_server(["Hello!"])
    with client(live).responses.stream(**HELLO) as stream:
        events = list(stream)
        response = stream.get_final_response()
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Hello!"
    assert response.output_text == "Hello!"
    assert [event.type for event in events][:2] == ["response.created", "response.in_progress"]
    raw = [event.sequence_number for event in client(live).responses.create(**HELLO, stream=True)]
    assert raw == list(range(len(events)))


def test_asynchronous(live_server: StartServer) -> None:
    live = live_server(["Hello!"])

    async def both() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as client:
            whole = await client.responses.create(**HELLO)
            async with client.responses.stream(**HELLO) as stream:
                return whole.output_text, (await stream.get_final_response()).output_text

    assert asyncio.run(both()) == ("Hello!", "Hello!")


def test_the_events_on_the_wire(live_server: StartServer) -> None:
    with httpx.stream(
        "POST", live_server(["Hi"]).url + "/v1/responses", json=HELLO | {"stream": True}, timeout=60
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        blocks = response.read().decode().removesuffix("\n\n").split("\n\n")
    for block in blocks:
        name, data = block.split("\n")
        assert json.loads(data.removeprefix("data: "))["type"] == name.removeprefix("event: ")
    assert name == "event: response.completed"


def test_cut_short(live_server: StartServer) -> None:
    live = live_server(["Hello!"])
    response = client(live).responses.create(**HELLO, max_output_tokens=2)
    assert (response.status, response.output_text) == ("incomplete", "He")
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    with client(live).responses.stream(**HELLO, max_output_tokens=2) as stream:
        assert [event.type for event in stream][-1] == "response.incomplete"


def test_reasoning(live_server: StartServer, hermes: JinjaChat) -> None:
    live = live_server([THOUGHT, THOUGHT, "Four.", "Good."], chat_format=hermes)
    response = client(live).responses.create(**HELLO, reasoning={"effort": "high", "summary": "auto"})
    thought, message = response.output
    assert thought.type == "reasoning"
    assert thought.content is not None
    assert [part.text for part in thought.content] == ["Two and two."]
    assert (message.type, response.output_text) == ("message", "Four.")
    assert response.usage is not None
    assert 0 < response.usage.output_tokens_details.reasoning_tokens < response.usage.output_tokens
    with client(live).responses.stream(**HELLO) as stream:
        kinds = [event.type for event in stream]
        assert [item.type for item in stream.get_final_response().output] == ["reasoning", "message"]
    assert kinds.index("response.reasoning_text.delta") < kinds.index("response.reasoning_text.done")
    client(live).responses.create(**HELLO, reasoning={"effort": "none"})
    assert prompt_of(live).endswith("<think>\n\n</think>\n\n")
    again: Any = [{"role": "user", "content": "2+2?"}, *response.output, {"role": "user", "content": "Sure?"}]
    client(live).responses.create(model="tiny", input=again)
    assert "<|im_start|>assistant\n<think>\nTwo and two.\n</think>\n\nFour.<|im_end|>" in prompt_of(live)


@pytest.mark.parametrize("stream", [False, True])
def test_two_turns_with_tools(live_server: StartServer, hermes: JinjaChat, stream: bool) -> None:
    live = live_server([CALLS, "Rain."], chat_format=hermes)

    def ask(items: list[Any]) -> Any:
        if not stream:
            return client(live).responses.create(model="tiny", input=items, tools=TOOLS)
        with client(live).responses.stream(model="tiny", input=items, tools=TOOLS) as events:
            return events.get_final_response()

    items: list[Any] = [{"role": "user", "content": "hi"}]
    response = ask(items)
    message, first, second = response.output
    assert message.content[0].text == "Let me see."
    assert (first.name, json.loads(first.arguments)) == ("weather", {"city": "Köln"})
    assert (second.name, second.arguments) == ("time", "{}")
    assert first.call_id != second.call_id
    items += response.output
    items += [
        {"type": "function_call_output", "call_id": call.call_id, "output": f"to {call.name}"}
        for call in (first, second)
    ]
    assert ask(items).output_text == "Rain."
    prompt = prompt_of(live)
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>' in prompt
    assert "<|im_start|>tool\nto weather<|im_end|>\n<|im_start|>tool\nto time<|im_end|>" in prompt


def test_tool_choice(live_server: StartServer, hermes: JinjaChat) -> None:
    live = live_server([CALLS], chat_format=hermes)
    client(live).responses.create(**HELLO, tools=TOOLS, tool_choice={"type": "function", "name": "time"})
    grammar = live.engine.asked[0].params.grammar
    assert grammar is not None
    assert "weather" not in grammar.source
    client(live).responses.create(**HELLO, tools=TOOLS, tool_choice="none")
    assert "weather" not in prompt_of(live)
    response = client(live).responses.create(**HELLO, tools=TOOLS, parallel_tool_calls=False)
    assert [item.type for item in response.output] == ["message", "function_call"]
    assert response.parallel_tool_calls is False


def test_structured_output(live_server: StartServer) -> None:
    class Answer(pydantic.BaseModel):
        value: int

    live = live_server(['{"value": 4}'])
    response = client(live).responses.parse(**HELLO, text_format=Answer)
    assert response.output_parsed == Answer(value=4)
    grammar = live.engine.asked[0].params.grammar
    assert grammar is not None
    assert "value" in grammar.source
    client(live).responses.create(**HELLO, text={"format": {"type": "json_object"}})
    assert live.engine.asked[1].params.grammar is not None


REFUSED: Any = [
    ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens"),
    ({"input": "x" * 5000}, "input", "maximum context length is 4096 tokens"),
    ({"previous_response_id": "resp_1"}, "previous_response_id", "stores no responses"),
    ({"background": True}, "background", "in the background"),
    ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice", "'web_search', which this server"),
    ({"extra_body": {"mirostat": 1}}, "mirostat", "mirostat is not supported"),
    (
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": 3}}}},
        "text.format",
        "text.format",
    ),
]


def test_errors(live_server: StartServer) -> None:
    live = live_server()
    for (changes, param, words), stream in itertools.product(REFUSED, (False, True)):
        with pytest.raises(openai.BadRequestError, match=words) as caught:
            client(live).responses.create(**HELLO | changes, stream=stream)
        assert caught.value.type == "invalid_request_error"
        assert caught.value.param is not None
        assert caught.value.param.startswith(param)


def test_a_model_that_is_not_there(live_server: StartServer) -> None:
    with pytest.raises(openai.NotFoundError):
        client(live_server()).responses.create(model="gpt", input="hi")


def test_a_failing_engine_ends_the_stream_with_response_failed(live_server: StartServer) -> None:
    live = live_server(["x" * 400])
    live.engine.seconds = 0.005
    stream = client(live).responses.create(**HELLO, stream=True)
    events = [next(stream)]
    live.engine.fails = 1
    events += stream
    last = events[-1]
    assert last.type == "response.failed"
    assert last.sequence_number == len(events) - 1
    assert last.response.error is not None
    assert last.response.error.code == "server_error"


def test_a_client_that_goes_away_stops_the_engine(live_server: StartServer) -> None:
    live = live_server(["x" * 4000])
    live.engine.seconds = 0.002
    stream = client(live).responses.create(**HELLO, stream=True)
    next(stream)
    stream.close()
    wait_until(lambda: live.engine.aborted == [0])
    with asking(live.url + "/v1/responses", HELLO):
        wait_until(lambda: len(live.engine.asked) == 2)
    wait_until(lambda: live.engine.aborted == [0, 1])
    assert live.engine.pool.num_free == live.engine.pool.num_blocks


def test_what_is_repeated_may_be_more_than_fast_json_can_say(live_server: StartServer) -> None:
    tool = {"type": "function", "name": "f", "parameters": {"type": "object", "maximum": 10**30}}
    answer = live_server().post("/v1/responses", HELLO | {"tools": [tool], "stream": False})
    assert answer.status_code == 200
    assert answer.json()["tools"][0]["parameters"]["maximum"] == 10**30


def test_a_request_nested_beyond_what_can_be_written(live_server: StartServer) -> None:
    live = live_server()
    for depth in (200, 400, 900, 960, 980, 1000, 5000):
        nested = '{"a":' * depth + "1" + "}" * depth
        tool = '{"type": "function", "name": "f", "parameters": ' + nested + "}"
        body = '{"input": "hi", "tool_choice": "none", "tools": [' + tool + "]}"
        answer = httpx.post(
            live.url + "/v1/responses", content=body, headers={"content-type": "application/json"}, timeout=60
        )
        assert answer.status_code in (200, 400)
