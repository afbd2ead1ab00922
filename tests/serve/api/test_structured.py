"""Structured output end to end: a tiny random model that could not write any of it by itself."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pydantic
import pytest

from qwenkit.engine.engine import Engine
from qwenkit.engine.grammar import Grammar
from qwenkit.engine.llm import LLM
from qwenkit.engine.matcher import Matcher
from qwenkit.engine.sampling import SamplingParams
from qwenkit.serve.api.structured import check_compiles
from qwenkit.serve.errors import ApiError
from qwenkit.serve.server import Server
from qwenkit.text.chat import JinjaChat
from qwenkit.text.tokenizer import Tokenizer
from tests.serve.api.conftest import CLOCK, TEMPLATE, WEATHER, Connect, called
from tests.serve.conftest import LiveServer, MakeServer, running, wait_until
from tests.tiny_models import EOS, IM_END, write_model

HI: Any = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "size": {"enum": [1, 2]}},
    "required": ["ok", "size"],
    "additionalProperties": False,
}
THINK, THINK_END, CALL = "259", "260", "261"  # token ids of the tags
NO_BLANKS = dict.fromkeys(("9", "10", "13", "32"), -100)  # a random model could fill its answer with them


@pytest.fixture(scope="module")
def engine(thinker: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A random model over the vocabulary with tags."""
    llm = LLM(write_model(tmp_path_factory.mktemp("tiny"), max_position_embeddings=1024), graphs=False)
    return Engine(
        llm.engine.runner,
        thinker,
        llm.config,
        max_model_len=llm.max_model_len,
        eos_ids=[EOS, IM_END],
        defaults=SamplingParams.from_generation_config({}),
    )


@pytest.fixture
def live(make_server: MakeServer, engine: Engine, thinker: Tokenizer) -> Iterator[LiveServer]:
    server: Server = make_server(engine=engine, tokenizer=thinker, chat_format=JinjaChat(thinker, TEMPLATE))
    with running(server) as live:
        yield live


def answered(live: LiveServer, body: dict[str, Any]) -> dict[str, Any]:
    """The choice; unless the body says otherwise, the model is kept from thinking."""
    bias = NO_BLANKS | {THINK: -100}
    response = live.post("/v1/chat/completions", {"messages": HI, "max_tokens": 120, "logit_bias": bias} | body)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return dict(choice)


@pytest.mark.parametrize(
    "how",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
    ],
    ids=lambda how: next(iter(how)),
)
@pytest.mark.parametrize("thinking", [True, False])
def test_a_schema(live: LiveServer, how: dict[str, Any], thinking: bool) -> None:
    """With thinking left to the model, and with thinking closed by the prompt."""
    content = answered(live, how | {"enable_thinking": thinking})["message"]["content"]
    value = json.loads(content)
    assert isinstance(value["ok"], bool)
    assert value["size"] in (1, 2)


@pytest.mark.parametrize(
    ("how", "pattern"),
    [
        ({"guided_regex": r"[ab]{3}/\d"}, r"[ab]{3}/\d"),
        ({"structured_outputs": {"regex": "[ab]{3}|c/"}}, "[ab]{3}|c/"),
        ({"guided_choice": ['yes "1"', "no"]}, 'yes "1"|no'),
        ({"structured_outputs": {"choice": ["red", "green"]}}, "red|green"),
        ({"guided_grammar": 'start: "a" b\nb: "x" | "y"\n'}, "a[xy]"),
        ({"structured_outputs": {"grammar": 'start: "a" | "b"'}}, "[ab]"),
    ],
    ids=str,
)
@pytest.mark.parametrize("thinking", [True, False])
def test_other_grammars(live: LiveServer, how: dict[str, Any], pattern: str, thinking: bool) -> None:
    choice = answered(live, how | {"enable_thinking": thinking})
    assert re.fullmatch(pattern, choice["message"]["content"])
    assert choice["finish_reason"] == "stop"


def test_completions_too(live: LiveServer) -> None:
    body = {"prompt": ["a", "b"], "guided_choice": ["red", "green"]}
    answer = live.post("/v1/completions", body).json()
    assert {choice["text"] for choice in answer["choices"]} <= {"red", "green"}


def test_a_thought_comes_before_the_answer(live: LiveServer) -> None:
    """The model begins with <think>, which the grammar allows, and the answer after it obeys."""
    choice = answered(live, {"guided_choice": ["red", "green"], "logit_bias": {THINK: 100, THINK_END: 50}})
    message = choice["message"]
    assert re.fullmatch("\n*(red|green)", message["content"])
    assert choice["finish_reason"] == "stop"


def test_a_thought_that_the_prompt_left_open(live: LiveServer) -> None:
    messages = [*HI, {"role": "assistant", "content": "<think>\nhm"}]
    body = {"messages": messages, "continue_final_message": True, "guided_choice": ["red", "green"]}
    choice = answered(live, body | {"logit_bias": {THINK_END: 50}})
    assert choice["message"]["content"] in ("red", "green")


@pytest.mark.parametrize("name", ["clock", "get_weather"])
def test_a_named_tool_is_called(live: LiveServer, connect: Connect, name: str) -> None:
    tools: Any = [CLOCK, WEATHER]
    named: Any = {"type": "function", "function": {"name": name}}
    bias: dict[str, int] = NO_BLANKS | {THINK: -100, str(ord('"')): 60}  # strings end soon
    answer = connect(live).chat.completions.create(
        model="tiny",
        messages=HI,
        tools=tools,
        tool_choice=named,
        parallel_tool_calls=False,
        logit_bias=bias,
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"  # the call that was asked for is the answer
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == name
    assert set(json.loads(call.function.arguments)) == ({"city"} if name == "get_weather" else set())


def test_a_schema_beside_tools(live: LiveServer) -> None:
    """What is no call obeys the schema; a call stays possible."""
    body = {"tools": [CLOCK], "guided_choice": ["red", "green"], "parallel_tool_calls": False}
    text = answered(live, body | {"logit_bias": {THINK: -100, CALL: -100}})
    assert text["message"]["content"] in ("red", "green")
    call = answered(live, body | {"logit_bias": NO_BLANKS | {THINK: -100, CALL: 100}})
    assert call["finish_reason"] == "tool_calls"
    assert call["message"]["tool_calls"][0]["function"]["name"] == "clock"


def test_json_object(thinking_server: Callable[..., LiveServer]) -> None:
    live = thinking_server(['{"a": 1}'])
    for how in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        response = live.post("/v1/chat/completions", {"messages": HI, "enable_thinking": False} | how)
        assert response.status_code == 200, response.text
        assert live.engine.asked[-1].params.grammar.kind == "json_object"
    live.post("/v1/chat/completions", {"messages": HI, "response_format": {"type": "text"}})
    assert live.engine.asked[-1].params.grammar is None


class Verdict(pydantic.BaseModel):
    ok: bool
    why: str


def test_the_client_parses_into_its_own_types(thinking_server: Callable[..., LiveServer], connect: Connect) -> None:
    """`parse` and `stream` of OpenAI's client send a strict schema and read the answer with it."""
    client = connect(thinking_server(['{"ok": true, "why": "so"}']))
    parsed = client.chat.completions.parse(model="tiny", messages=HI, response_format=Verdict)
    assert parsed.choices[0].message.parsed == Verdict(ok=True, why="so")
    with client.chat.completions.stream(model="tiny", messages=HI, response_format=Verdict) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.parsed == Verdict(ok=True, why="so")


@pytest.mark.parametrize(
    ("how", "param"),
    [
        ({"guided_regex": "[a"}, "guided_regex"),
        ({"guided_json": "no schema"}, "guided_json"),
        ({"guided_json": {"type": "nonsense"}}, "guided_json"),
        ({"guided_json": {"$ref": "http://127.0.0.1:1/schema.json"}}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_grammar": "start: missing"}, "guided_grammar"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
            "response_format",
        ),
        ({"guided_regex": "a" * 70_000}, "guided_regex"),
    ],
    ids=str,
)
@pytest.mark.parametrize("thinking", [True, False])
def test_what_is_refused(
    thinking_server: Callable[..., LiveServer], how: dict[str, Any], param: str, thinking: bool
) -> None:
    live = thinking_server([called("clock", "{}")])
    response = live.post("/v1/chat/completions", {"messages": HI, "enable_thinking": thinking} | how)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert not live.engine.asked


def test_a_grammar_that_fails_in_mid_answer_is_the_requests_error(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends that request alone with 400 and the name of its field, streamed or not; the engine counts no failure."""

    def fail(matcher: Matcher, token: int) -> bool:
        matcher.error = "grammar cannot be used: too many states"
        return False

    other = {"messages": HI, "guided_regex": "[ab]{3}"}
    body = {"messages": HI, "guided_choice": ["red", "green"], "enable_thinking": False}
    with monkeypatch.context() as patch:
        patch.setattr(Matcher, "advance", fail)
        for _ in range(12):  # more than the failures in a row after which an engine counts as broken
            response = live.post("/v1/chat/completions", body)
            assert response.status_code == 400, response.text
        streamed = live.post("/v1/chat/completions", body | {"stream": True})
        events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    told = {
        "message": "guided_choice: grammar cannot be used: too many states",
        "type": "invalid_request_error",
        "param": "guided_choice",
        "code": "invalid_grammar",
    }
    assert response.json()["error"] == told
    assert events[-1]["error"] == told
    assert live.engine.num_failed == 0
    assert live.server.driver.healthy
    assert live.post("/v1/chat/completions", other).status_code == 200


def test_thousands_of_choices(live: LiveServer) -> None:
    choices = [str(number) for number in range(10_000, 12_001)]
    assert answered(live, {"guided_choice": choices})["message"]["content"] in choices
    del choices[0]
    body = {"guided_choice": choices, "logit_bias": {THINK: 100, THINK_END: 50}}
    assert answered(live, body)["message"]["content"] in choices


@pytest.mark.parametrize("pattern", ["(a|aa|aaa|aaaa){1000}b", "x{1000000}"])
def test_grammars_that_fail_at_the_first_token_are_refused(live: LiveServer, pattern: str) -> None:
    response = live.post("/v1/completions", {"prompt": "x", "max_tokens": 8, "guided_regex": pattern})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == "guided_regex"


def test_expensive_grammars_of_one_key_keep_no_other_key_waiting(
    make_server: MakeServer, engine: Engine, thinker: Tokenizer
) -> None:
    """Twelve at once of key A, more than the event loop's pool has threads; everything of key B comes back before the second
    of them has been refused."""
    server = make_server(
        engine=engine, tokenizer=thinker, chat_format=JinjaChat(thinker, TEMPLATE), api_key=("key-a", "key-b")
    )
    compiler = server.compiler
    assert compiler is not None
    compiler.start()
    refused: list[str] = []

    def ask(key: str, path: str, **content: Any) -> httpx.Response:
        return httpx.post(live.url + path, headers={"Authorization": f"Bearer {key}"}, timeout=120, **content)

    def bomb(number: int) -> None:
        schema = {"type": "integer", "multipleOf": number}
        answer = ask("key-a", "/v1/completions", json={"prompt": "x", "max_tokens": 8, "guided_json": schema})
        refused.append(answer.json()["error"]["param"])

    with running(server) as live:
        bombs = [threading.Thread(target=bomb, args=(999_983 - 2 * place,), daemon=True) for place in range(12)]
        for thread in bombs:
            thread.start()
        wait_until(lambda: sum(map(len, compiler._queues.values())) >= 7, seconds=30)
        body = {"prompt": "x", "max_tokens": 8, "guided_regex": "[ab]{3}"}
        assert ask("key-b", "/v1/completions", json=body).json()["choices"][0]["text"].strip("ab") == ""
        tokenized = ask("key-b", "/tokenize", json={"prompt": "a b " * 4608})  # longer than the small model's context
        assert tokenized.status_code == 400, tokenized.text
        upload = ask("key-b", "/v1/files", files={"file": ("x.jsonl", b"{}")}, data={"purpose": "batch"})
        assert upload.status_code in (200, 400), upload.text
        assert len(refused) <= 1
        compiler.close()
        for thread in bombs:
            thread.join(30)
        assert set(refused) == {"guided_json"}


def test_a_refusal_names_a_part_for_no_longer_than_one_grammar_may_take() -> None:
    """However many tools a request has: each of their schemas may take as long as the whole."""
    tried = []

    class SlowCompiler:
        timeout = 0.05

        async def check_async(self, grammar: Grammar, owner: str) -> None:
            tried.append(grammar)
            await asyncio.sleep(0.03)
            if len(tried) == 1:
                raise ValueError("grammar cannot be used")

    parts = [(f"tool {number}", Grammar("json_schema", "{}")) for number in range(100)]
    compiler: Any = SlowCompiler()
    with pytest.raises(ApiError, match="tools: grammar cannot be used"):
        asyncio.run(check_compiles(compiler, Grammar("json_schema", "{}"), "tools", lambda: parts))
    assert len(tried) < 10
