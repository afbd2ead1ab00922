"""/tokenize and /detokenize in vLLM's shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serve.api.conftest import WEATHER
from tests.serve.conftest import LiveServer, StartServer


@pytest.fixture
def live(live_server: StartServer) -> LiveServer:
    return live_server()


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_there_and_back(live: LiveServer, text: str) -> None:
    told = live.post("/tokenize", {"prompt": text}).json()
    assert told == {
        "count": len(text.encode()),
        "max_model_len": 4096,
        "tokens": live.server.tokenizer.encode(text),
        "token_strs": None,
    }
    assert live.post("/detokenize", {"tokens": told["tokens"]}).json() == {"prompt": text}


def test_control_tokens_and_token_texts(live: LiveServer) -> None:
    told = live.post("/tokenize", {"model": "tiny", "prompt": "<|im_end|>hi", "return_token_strs": True}).json()
    assert told["token_strs"] == ["<|im_end|>", "h", "i"]
    assert live.post("/detokenize", {"tokens": told["tokens"]}).json() == {"prompt": "<|im_end|>hi"}


def test_a_conversation_is_what_chat_reads(thinking_server: Callable[..., LiveServer]) -> None:
    live = thinking_server()
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "hi<|im_end|>"}],
        "tools": [WEATHER],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    told = live.post("/tokenize", body).json()
    live.post("/v1/chat/completions", body)
    assert live.engine.asked[0].prompt == told["tokens"]
    shorter = live.post("/tokenize", body | {"add_generation_prompt": False}).json()
    assert told["tokens"][: shorter["count"]] == shorter["tokens"]
    assert shorter["count"] < told["count"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, 400),
        ("/tokenize", {"prompt": 5}, 400),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": 1}, 400),
        ("/tokenize", {"prompt": "a", "model": "nope"}, 404),
        ("/detokenize", {}, 400),
        ("/detokenize", {"tokens": [-1]}, 400),
        ("/detokenize", {"tokens": ["a"]}, 400),
        ("/detokenize", {"tokens": [2**31]}, 400),
        ("/detokenize", {"tokens": [], "model": "nope"}, 404),
    ],
)
def test_what_is_refused(live: LiveServer, path: str, body: dict[str, Any], status: int) -> None:
    response = live.post(path, body)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
