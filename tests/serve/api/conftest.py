"""A tiny vocabulary whose chat format thinks and calls tools, and OpenAI's clients for a live server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import openai
import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qwenkit.text.chat import JinjaChat
from qwenkit.text.tokenizer import Tokenizer
from tests.serve.conftest import LiveServer, StartServer

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Call with <tool_call></tool_call>.<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}

Connect = Callable[[LiveServer], openai.OpenAI]


def called(name: str, arguments: str) -> str:
    """A tool call as the model writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@pytest.fixture(scope="session")
def thinker() -> Tokenizer:
    """One token a byte, ChatML's control tokens, and the tags of Qwen3."""
    alphabet = [bytes_to_unicode()[byte] for byte in range(256)]
    return Tokenizer.from_bpe([*alphabet, *CONTROL, *TAGS], [], [1] * 256 + [3] * 3 + [4] * 4, "qwen2")


@pytest.fixture
def thinking_server(live_server: StartServer, thinker: Tokenizer) -> Callable[..., LiveServer]:
    """live_server's arguments; the model thinks in <think> and calls tools in <tool_call>."""

    def start(*args: Any, **kwargs: Any) -> LiveServer:
        return live_server(*args, tokenizer=thinker, chat_format=JinjaChat(thinker, TEMPLATE), **kwargs)

    return start


@pytest.fixture
def connect() -> Iterator[Connect]:
    """connect(live) -> OpenAI's client for it."""
    with ExitStack() as stack:

        def make(live: LiveServer) -> openai.OpenAI:
            http = openai.DefaultHttpxClient(verify=False)  # no certificates to read: that takes longer than most tests
            client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, http_client=http)
            return stack.enter_context(client)

        yield make
