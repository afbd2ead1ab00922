"""Qwen-Agent talks to the server: two tools, called one after the other or together, in the API's words or in its own.

Runs where Qwen-Agent is installed, or in the interpreter of another environment that QWENKIT_QWEN_AGENT names.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from qwenkit.serve.api.conversation import plain_messages
from qwenkit.serve.api.protocol import Message
from tests.conftest import ROOT
from tests.serve.api.conftest import called
from tests.serve.conftest import LiveServer

PYTHON = os.environ.get("QWENKIT_QWEN_AGENT") or (sys.executable if importlib.util.find_spec("qwen_agent") else None)
WEATHER, CLOCK = called("get_weather", '{"city": "Köln"}'), called("clock", '{"zone": "CET"}')
ANSWER = "It rains in Köln, and it is noon."


def converse(live: LiveServer, writer: str) -> list[dict[str, Any]]:
    """What the agent says that was said."""
    assert PYTHON is not None
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    ran = subprocess.run(
        [PYTHON, str(ROOT / "tests" / "outside" / "qwen_agent_client.py"), live.url, writer],
        capture_output=True, text=True, check=False, timeout=120, env=environment,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    messages: list[dict[str, Any]] = json.loads(ran.stdout.splitlines()[-1])
    return messages


def test_its_way_to_say_what_a_tool_answers(thinking_server: Callable[..., LiveServer]) -> None:
    live = thinking_server([ANSWER])
    call = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    tool = {"role": "tool", "name": "clock", "content": "noon", "id": "call_1", "extra": {"function_id": "call_1"}}
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}, tool]
    assert live.post("/v1/chat/completions", {"messages": said}).status_code == 200
    assert plain_messages([Message.model_validate(tool)])[0]["tool_call_id"] == "call_1"
    assert "function_id" not in live.server.tokenizer.decode(live.engine.asked[-1].prompt)


@pytest.mark.skipif(PYTHON is None, reason="needs Qwen-Agent: pip install qwen-agent soundfile python-dateutil")
@pytest.mark.parametrize("writer", ["server", "agent"])
@pytest.mark.parametrize(
    "script",
    [
        ["<think>\nTwo things.\n</think>\n\n" + WEATHER, "Now the time.\n" + CLOCK, ANSWER],
        [WEATHER + "\n" + CLOCK, ANSWER],
    ],
    ids=["in turn", "together"],
)
def test_two_tools(thinking_server: Callable[..., LiveServer], script: list[str], writer: str) -> None:
    live = thinking_server(script)
    messages = converse(live, writer)
    calls = [message["function_call"] for message in messages if message.get("function_call")]
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == [
        ("get_weather", {"city": "Köln"}),
        ("clock", {"zone": "CET"}),
    ]
    results = [message["content"] for message in messages if message["role"] == "function"]
    assert results == ["rain in Köln", "noon in CET"]
    assert messages[-1]["content"] == ANSWER
    if len(script) == 3:
        assert any("Two things." in (message.get("reasoning_content") or "") for message in messages)
    asked = live.engine.asked
    assert len(asked) == len(script)
    prompt = live.server.tokenizer.decode(asked[-1].prompt)
    assert "rain in Köln" in prompt
    assert "noon in CET" in prompt
    assert asked[0].params.top_k == 20
