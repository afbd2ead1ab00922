"""What honest clients send that is large: long conversations, many tools, files. With the real client, against a live server."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.serve.conftest import LiveServer, StartServer
from tests.serve.scripted import ScriptedEngine


@pytest.fixture
def live(live_server: StartServer, tokenizer: Any) -> LiveServer:
    return live_server(engine=ScriptedEngine(tokenizer, ["Hello!"], max_model_len=5_000_000), state_disk="1GiB")


@pytest.fixture
def client(live: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0, timeout=120)


def test_a_conversation_of_two_megabytes(client: openai.OpenAI) -> None:
    turns: Any = [
        {"role": ("user", "assistant")[number % 2], "content": "All work and no play. " * 500} for number in range(181)
    ]
    answer = client.chat.completions.create(model="tiny", messages=turns, max_tokens=20)
    assert answer.choices[0].message.content == "Hello!"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 100_000
    parts = [{"type": "text", "text": "And again. " * 10} for _ in range(1000)]
    many: Any = [{"role": "user", "content": parts}]
    assert client.chat.completions.create(model="tiny", messages=many).choices[0].message.content == "Hello!"


def test_thirty_tools_of_five_kilobytes(client: openai.OpenAI) -> None:
    properties = {f"field_{n}": {"type": "string", "description": "What it is. " * 10} for n in range(30)}
    tools: Any = [
        {
            "type": "function",
            "function": {
                "name": f"tool_{n}",
                "description": "Does something. " * 20,
                "parameters": {"type": "object", "properties": properties},
            },
        }
        for n in range(30)
    ]
    answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hi"}], tools=tools)
    assert answer.choices[0].message.content == "Hello!"
    response = client.responses.create(
        model="tiny", input="Hi", tools=[{"type": "function", **one["function"], "strict": False} for one in tools]
    )
    assert response.output_text == "Hello!"


def test_a_prompt_of_many_ids(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=[5] * 30_000, max_tokens=2)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 30_000


def test_a_file_of_five_megabytes(client: openai.OpenAI) -> None:
    line = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "%s"}}\n' % (b"x" * 900)
    data = line * (5_000_000 // len(line))
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    assert file.bytes == len(data)
    assert client.files.content(file.id).read() == data
