"""What /v1/chat/completions refuses, and how it says so: OpenAI's error shape, the field by name, both numbers of a context."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.serve.api.conftest import Connect
from tests.serve.conftest import LiveServer, StartServer

HI: Any = [{"role": "user", "content": "hi"}]
IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}


@pytest.fixture
def live(live_server: StartServer) -> LiveServer:
    return live_server()


@pytest.fixture
def strict(live_server: StartServer) -> LiveServer:
    return live_server(strict=True)


def refused(live: LiveServer, body: dict[str, Any], status: int = 400) -> dict[str, Any]:
    response = live.post("/v1/chat/completions", {"messages": HI} | body)
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert not live.engine.asked
    return dict(error)


def test_unknown_fields_are_named(strict: LiveServer) -> None:
    error = refused(strict, {"temprature": 1, "Stop": "x"})
    assert "temprature" in error["message"]
    assert "Stop" in error["message"]
    assert error["code"] == "unknown_parameter"
    assert "chat_template" in refused(strict, {"chat_template": "{{ 1 }}"})["message"]


def test_a_template_of_the_request_is_never_rendered(live: LiveServer) -> None:
    body = {"messages": HI, "chat_template_kwargs": {"chat_template": "{{ 1 }}", "messages": []}}
    assert live.post("/v1/chat/completions", body).status_code == 200
    assert live.post("/v1/chat/completions", {"messages": HI}).status_code == 200
    assert live.engine.asked[0].prompt == live.engine.asked[1].prompt


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.1, 2.1, "1", None.__class__.__name__]),
        ("top_p", [0, 1.1, -1]),
        ("top_k", [-2, 1.5]),
        ("min_p", [-0.1, 1.1]),
        ("repetition_penalty", [0, 2.1]),
        ("presence_penalty", [-2.1, 2.1]),
        ("frequency_penalty", [-2.1, 2.1]),
        ("seed", [2**63, -(2**63), 1.5, True]),
        ("n", [0, 17, 129, "2", 2**80]),
        ("stop", [["x"] * 17, [1], "x" * 513]),
        ("stop_token_ids", [[-1], ["a"], [1] * 17]),
        ("max_tokens", [0, -2, 1.5, 2**31]),
        ("max_completion_tokens", [0, 2**31]),
        ("min_tokens", [-1, 2**31]),
        ("top_logprobs", [-1, 5, 21]),
        ("prompt_logprobs", [-1, 21]),
        ("logit_bias", [{"x": 1}, {"1": 101}, {"1": "1"}, {"-1": 1}, [1]]),
        ("stream", ["yes", 1]),
        ("stream_options", [{"include_usage": 1}, "usage"]),
        ("use_beam_search", [True]),
        ("include_stop_str_in_output", [True]),
        ("modalities", [["audio"]]),
        ("chat_template_kwargs", [{"enable_thinking": "no"}, []]),
        ("reasoning_effort", ["huge"]),
        ("messages", [[], "hi", [{"role": "wizard", "content": "x"}], [{"content": "x"}]]),
        (
            "response_format",
            [{"type": "xml"}, {"type": "json_schema"}, {"type": "text", "json_schema": {"schema": {}}}],
        ),
    ],
)
def test_every_field_has_bounds(live: LiveServer, field: str, values: list[Any]) -> None:
    for value in values:
        error = refused(live, {field: value})
        assert field in error["message"], (value, error)
    assert live.post("/v1/chat/completions", {"messages": HI}).status_code == 200


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [0, 2]),
        ("top_p", [0.01, 1]),
        ("top_k", [-1, 0, 2**31 - 1]),
        ("seed", [2**63 - 1, -(2**63) + 1]),
        ("n", [1, 16]),
        ("stop", [["x"] * 16, None, [], "", [""]]),
        ("min_tokens", [0, 5]),
        ("logit_bias", [{"1": -100}, {}, None]),
        ("user", [None, "x", 5, {"id": 5}]),
        ("max_tokens", [-1, 1, 4090, 2**31 - 1]),
        ("metadata", [{str(i): i for i in range(17)}]),
        ("stream_options", [{"include_usage": True}]),
        ("store", [True, False]),
    ],
)
def test_bounds_are_allowed_themselves(live: LiveServer, field: str, values: list[Any]) -> None:
    for value in values:
        response = live.post("/v1/chat/completions", {"messages": HI, field: value})
        assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user", "content": [IMAGE]}, ["messages[0].content[0]", "image_url", "text only"]),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, ["input_audio"]),
    ],
)
def test_what_is_no_text_is_refused(live: LiveServer, message: dict[str, Any], words: list[str]) -> None:
    error = refused(live, {"messages": [message]})
    for word in words:
        assert word in error["message"]


@pytest.mark.parametrize(
    ("message", "same"),
    [
        ({"role": "user", "content": [{"type": "text"}]}, {"role": "user", "content": ""}),
        ({"role": "user", "content": [{"type": "text", "text": "x", "size": 3}]}, {"role": "user", "content": "x"}),
        ({"role": "user", "content": None}, {"role": "user", "content": ""}),
        (
            {"role": "user", "content": "x", "tool_calls": [{"id": "a", "function": {"name": "f"}}]},
            {"role": "user", "content": "x"},
        ),
        ({"role": "user", "content": "x", "tool_call_id": "a"}, {"role": "user", "content": "x"}),
        ({"role": "assistant"}, {"role": "assistant", "content": ""}),
        ({"role": "function", "content": "x"}, {"role": "tool", "content": "x"}),
    ],
)
def test_history_is_not_judged(live: LiveServer, message: dict[str, Any], same: dict[str, Any]) -> None:
    for one in (message, same):
        answer = live.post("/v1/chat/completions", {"messages": [*HI, one, *HI]})
        assert answer.status_code == 200, answer.text
    assert live.engine.asked[0].prompt == live.engine.asked[1].prompt


def test_the_context_and_both_numbers(strict: LiveServer) -> None:
    error = refused(strict, {"messages": [{"role": "user", "content": "x" * 5000}]})
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "messages"
    assert "5019" in error["message"]
    assert "4096" in error["message"]
    error = refused(strict, {"max_tokens": 4090})
    assert error["code"] == "context_length_exceeded"
    assert "4090" in error["message"]
    assert "4096" in error["message"]


def test_errors_as_the_client_raises_them(live: LiveServer, connect: Connect) -> None:
    client = connect(live)
    with pytest.raises(openai.NotFoundError, match="nope") as missing:
        client.chat.completions.create(model="nope", messages=HI)
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=HI, temperature=3)
    assert bad.value.param == "temperature"


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_a_status_also_for_streams(live_server: StartServer, stream: bool) -> None:
    live = live_server(["x"])
    live.server.driver.max_queued = 0
    response = live.post("/v1/chat/completions", {"messages": HI, "stream": stream})
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) > 0
    assert response.json()["error"]["type"] == "rate_limit_error"


def test_strange_bodies(live: LiveServer) -> None:
    for content in (b"", b"{", b"[]", b"null", b"5", b'{"messages": "\xff"}', b'{"a":' * 2000, b'{"\\ud800": 1}'):
        response = live.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
        assert response.status_code == 400, (content[:20], response.status_code, response.text)
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    surrogates = b'{"messages": [{"role": "user", "content": "\\ud800"}], "model": "\\ud800"}'
    response = live.post("/v1/chat/completions", content=surrogates, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "bad_json")


def test_a_body_that_is_not_said_to_be_json(live_server: StartServer) -> None:
    """What `curl -d` sends unless it is told otherwise."""
    live, body = live_server(), b'{"messages": [{"role": "user", "content": "Hi"}]}'
    for headers in ({"content-type": "application/x-www-form-urlencoded"}, {}):
        answer = live.post("/v1/chat/completions", content=body, headers=headers)
        assert answer.status_code == 415
        given = headers.get("content-type", "missing")
        assert answer.json()["error"]["message"] == f"the header Content-Type is {given}, allowed is application/json"
        assert answer.json()["error"]["code"] == "unsupported_media_type"
