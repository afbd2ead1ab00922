"""Fields that are not known are left out and told; those of other servers are obeyed, without effect, or refused."""

from __future__ import annotations

import logging
import types
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenkit.serve.api import messages_protocol, protocol, responses_protocol, unsupported
from qwenkit.serve.body import RequestModel, Whole, whole
from qwenkit.text.chat import JinjaChat
from qwenkit.text.tokenizer import Tokenizer
from tests.serve.api.conftest import TEMPLATE, WEATHER
from tests.serve.conftest import LiveServer, StartServer, running, servers

ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/messages": {"model": "tiny", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]},
    "/v1/responses": {"input": "Hi"},
    "/tokenize": {"prompt": "Hi"},
}
every_route = pytest.mark.parametrize("path", ROUTES)


@pytest.fixture(scope="module")
def live(thinker: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with servers(thinker, Path(tmp_path_factory.mktemp("state"))) as make, ExitStack() as stack:
        yield stack.enter_context(running(make(tokenizer=thinker, chat_format=JinjaChat(thinker, TEMPLATE))))


def prompt_of(live: LiveServer, path: str, body: dict[str, Any]) -> str:
    """The prompt that the engine got."""
    response = live.post(path, body)
    assert response.status_code == 200, response.text
    return live.server.tokenizer.decode(live.engine.asked[-1].prompt, skip_special=False)


@every_route
def test_an_unknown_field_is_left_out_and_told(live: LiveServer, path: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "qwenkit.serve"):
        for _ in range(2):
            answer = live.post(path, ROUTES[path] | {"shiny": 1, "with, comma": 2, "absent": None})
            assert answer.status_code == 200
            assert answer.headers["x-ignored-fields"] == "shiny, with??comma"
    assert [path in record.getMessage() for record in caplog.records].count(True) == 1
    assert "x-ignored-fields" not in live.post(path, ROUTES[path] | {"absent": None}).headers


def test_a_stream_tells_it_too(live: LiveServer) -> None:
    answer = live.post("/v1/chat/completions", ROUTES["/v1/chat/completions"] | {"stream": True, "shiny": 1})
    assert answer.headers["x-ignored-fields"] == "shiny"


@every_route
def test_strict_refuses_it(live_server: StartServer, path: str) -> None:
    strict = live_server(strict=True)
    answer = strict.post(path, ROUTES[path] | {"shiny": 1, "dull": 2})
    assert answer.status_code == 400
    assert "unknown fields: dull, shiny" in answer.text
    assert strict.post(path, ROUTES[path] | {"absent": None}).status_code == 200


def test_strict_refuses_an_answer_without_room(live_server: StartServer) -> None:
    body = ROUTES["/v1/chat/completions"] | {"max_tokens": 32000}
    answer = live_server(strict=True).post("/v1/chat/completions", body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "maximum context length is 4096 tokens" in answer.text
    assert live_server().post("/v1/chat/completions", body).status_code == 200


@pytest.mark.parametrize(
    ("path", "field", "value", "instead"),
    [
        ("/v1/chat/completions", "thinking_budget", 50, "max_tokens"),
        ("/v1/chat/completions", "thinking_budget", 0, "enable_thinking"),
        ("/v1/chat/completions", "bad_words", ["x"], "logit_bias"),
        ("/v1/chat/completions", "include_reasoning", False, "reasoning_content"),
        ("/v1/chat/completions", "previous_response_id", "r", "messages"),
        ("/v1/chat/completions", "use_beam_search", True, "n gives several"),
        ("/v1/chat/completions", "chat_template", "{{ x }}", "--chat-template"),
        ("/v1/chat/completions", "reasoning", {"max_tokens": 100}, "max_tokens"),
        ("/v1/completions", "truncate_prompt_tokens", 5, "/tokenize"),
        ("/v1/completions", "grammar", 'root ::= "a"', "guided_grammar"),
        ("/v1/messages", "thread", {}, "thread=False"),
        ("/v1/messages", "container", "c", "messages"),
        ("/v1/responses", "conversation", "c", "input"),
        ("/v1/responses", "top_logprobs", 2, "/v1/chat/completions"),
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_what_would_change_the_answer_is_refused(
    live_server: StartServer, path: str, field: str, value: Any, instead: str, *, strict: bool
) -> None:
    answer = live_server(strict=strict).post(path, ROUTES[path] | {field: value})
    assert answer.status_code == 400
    assert field in answer.text
    assert instead in answer.text


def test_neutral_values_pass_under_strict(live_server: StartServer) -> None:
    strict = live_server(strict=True)
    body = ROUTES["/v1/chat/completions"] | {
        name: field.neutral[0] for name, field in unsupported.CHAT.items() if field.neutral
    }
    body |= {
        "bad_words": [],
        "stop": ["", "x"],
        "store": True,
        "metadata": {"a": {"b": 1}},
        "user": 7,
        "top_logprobs": 0,
    }
    answer = strict.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    assert strict.engine.asked[-1].params.stop == ("x",)


@pytest.mark.parametrize(
    ("given", "same"),
    [
        ({"n_predict": 3}, {"max_tokens": 3}),
        ({"max_tokens": -1}, {}),
        ({"max_tokens": 3.0, "seed": 5.0, "n": 1.0}, {"max_tokens": 3, "seed": 5, "n": 1}),
        ({"repeat_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"seed": -1}, {}),
        ({"stop": "x"}, {"stop": ["x"]}),
    ],
)
def test_another_spelling_means_the_same(live: LiveServer, given: dict[str, Any], same: dict[str, Any]) -> None:
    params = []
    for more in (given, same):
        assert live.post("/v1/chat/completions", ROUTES["/v1/chat/completions"] | more).status_code == 200
        params.append(live.engine.asked[-1].params)
    assert params[0] == params[1]


@pytest.mark.parametrize(
    "more",
    [
        {"reasoning": {"effort": "none"}},
        {"reasoning": {"enabled": False}},
        {"thinking": {"type": "disabled"}},
        {"thinking": False},
        {"think": False},
        {"enable_thinking": "false"},
        {"chat_template_kwargs": {"thinking": False, "unknown": 1}},
    ],
)
def test_thinking_is_switched_off_in_many_words(live: LiveServer, more: dict[str, Any]) -> None:
    body = ROUTES["/v1/chat/completions"]
    wanted = prompt_of(live, "/v1/chat/completions", body | {"enable_thinking": False})
    assert prompt_of(live, "/v1/chat/completions", body | more) == wanted
    assert wanted.endswith("</think>\n\n")


def test_tools_that_the_server_cannot_run(live: LiveServer) -> None:
    body = ROUTES["/v1/responses"] | {"tools": [{"type": "web_search"}, {"type": "function", **WEATHER["function"]}]}  # type: ignore[dict-item]
    answer = live.post("/v1/responses", body)
    assert (answer.status_code, answer.headers["x-ignored-fields"]) == (200, "tools.0")
    for choice, tools in (({"type": "web_search"}, body["tools"]), ("required", body["tools"][:1])):
        refused = live.post("/v1/responses", body | {"tool_choice": choice, "tools": tools})
        assert refused.status_code == 400
        assert "web_search" in refused.text


def test_too_long_in_the_words_that_clients_look_for(live: LiveServer) -> None:
    long = "owl " * 2000
    chat = live.post("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}).json()["error"]
    assert chat["code"] == "context_length_exceeded"
    assert chat["message"].startswith(
        "This model's maximum context length is 4096 tokens and the prompt is too long: it has "
    )
    body = ROUTES["/v1/messages"] | {"messages": [{"role": "user", "content": long}]}
    message = live.post("/v1/messages", body).json()["error"]
    assert message["type"] == "invalid_request_error"
    assert message["message"].startswith("prompt is too long: ")
    assert message["message"].endswith(" tokens > 4095 maximum")


JSON = st.recursive(
    st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
MORE = st.dictionaries(
    st.sampled_from(["cache_control", "index", "extra", "opts", "annotations", "caller", "x"]), JSON, max_size=3
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(MORE, MORE, MORE)
def test_unknown_fields_inside_never_reach_the_prompt(
    live: LiveServer, first: dict[str, Any], second: dict[str, Any], third: dict[str, Any]
) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    plain = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "fine"},
    ]
    noisy = [
        {"role": "user", "content": [first | {"type": "text", "text": "Hi"}]} | {"opts": first},
        {"role": "assistant", "content": None, "tool_calls": [second | call]} | {"extra": second},
        third | {"role": "tool", "tool_call_id": "c1", "content": "fine"},
    ]
    tool = {"type": "function", "function": third | WEATHER["function"]} | {"x": third}  # type: ignore[operator]
    path = "/v1/chat/completions"
    wanted = prompt_of(live, path, {"messages": plain, "tools": [WEATHER]})
    assert prompt_of(live, path, {"messages": noisy, "tools": [tool]}) == wanted


@pytest.mark.parametrize("arguments", [None, "", "  ", "null", "{", "[]", "3", '"{\\"city\\": 1}"', [], 7, {"city": 1}])
@pytest.mark.parametrize(
    "printed",
    [
        "{{ call.function.arguments | tojson }}",
        "{% for k, v in call.function.arguments | items %}{{ k }}={{ v }}{% endfor %}",
    ],
)
def test_arguments_in_history_are_never_an_error(
    live_server: StartServer, thinker: Tokenizer, arguments: Any, printed: str
) -> None:
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
        "{% for call in message.tool_calls or [] %}"
        + printed
        + "{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    live = live_server(tokenizer=thinker, chat_format=JinjaChat(thinker, template))
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": None},
    ]
    prompt = prompt_of(live, "/v1/chat/completions", {"messages": messages})
    if isinstance(arguments, str) and "city" in arguments:
        assert "city" in prompt


def integers_of(kind: Any) -> Iterator[Any]:
    """The types in an annotation that are bare integers."""
    if get_origin(kind) in (Union, types.UnionType, list, tuple, dict):
        for one in get_args(kind):
            yield from integers_of(one)
    elif kind is int:
        yield kind


@pytest.mark.parametrize("module", [protocol, messages_protocol, responses_protocol])
def test_every_integer_field_takes_a_whole_float(module: Any) -> None:
    models: list[type[RequestModel]] = [
        one for one in vars(module).values() if isinstance(one, type) and issubclass(one, RequestModel)
    ]
    for model in models:
        for name, field in model.model_fields.items():
            bare = list(integers_of(field.annotation))
            assert not bare or any("whole" in repr(one) or "minus_one" in repr(one) for one in field.metadata), (
                f"{model.__name__}.{name}: use Whole"
            )
    assert whole(256.0) == 256
    assert whole(0.5) == 0.5
    assert Whole is not int


@pytest.mark.parametrize("flag", [{"prefix": True}, {"partial": True}, {}])
def test_a_begun_answer_is_continued_exactly(live: LiveServer, flag: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "The sum is  "} | flag]
    more = {} if flag else {"continue_final_message": True}
    prompt = prompt_of(live, "/v1/chat/completions", {"messages": messages} | more)
    assert prompt.endswith("<|im_start|>assistant\nThe sum is  ")


def test_hosts(live_server: StartServer) -> None:
    named = live_server(allowed_host=("host.docker.internal",))
    for host, status in (("host.docker.internal:8000", 200), ("evil.example", 403), ("127.0.0.1", 200)):
        answer = named.get("/v1/models", headers={"host": host})
        assert answer.status_code == status
    assert "--allowed-host evil.example" in named.get("/v1/models", headers={"host": "evil.example"}).text
    assert "--api-key" in named.get("/v1/models", headers={"host": "evil.example"}).text


def test_routes_that_evaluators_ask_for(live: LiveServer) -> None:
    info = live.get("/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"]) == ("<|im_end|>", None)
    counted = live.post("/v1/responses/input_tokens", ROUTES["/v1/responses"]).json()
    prompt_of(live, "/v1/responses", ROUTES["/v1/responses"])
    assert counted == {"object": "response.input_tokens", "input_tokens": len(live.engine.asked[-1].prompt)}
