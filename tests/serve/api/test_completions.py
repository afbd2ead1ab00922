"""/v1/completions with OpenAI's own client: prompts of every kind, echo, the old shape of log-probabilities, streams."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.serve.api.conftest import Connect
from tests.serve.conftest import LiveServer, StartServer, wait_until


def test_a_completion(live_server: StartServer, connect: Connect) -> None:
    live = live_server([" world, and more of it"])
    answer = connect(live).completions.create(model="tiny", prompt="Hello")
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (" world, and more", "length", None)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 16)


@pytest.mark.parametrize("stream", [False, True])
def test_many_prompts_with_many_answers(live_server: StartServer, connect: Connect, stream: bool) -> None:
    live = live_server(lambda prompt, params: live.server.tokenizer.decode(prompt).upper())
    created = connect(live).completions.create(  # type: ignore[call-overload]
        model="tiny",
        prompt=["ab", "c", "def"],
        n=2,
        stream=stream,
        stream_options={"include_usage": True} if stream else None,
    )
    texts = [""] * 6
    usage = None
    for answer in created if stream else [created]:
        usage = answer.usage or usage
        for choice in answer.choices:
            texts[choice.index] += choice.text
    assert texts == ["AB", "AB", "C", "C", "DEF", "DEF"]
    assert usage.prompt_tokens == 6
    assert usage.completion_tokens == 2 * (6 + 3)


@pytest.mark.parametrize("prompt", [[72, 105], [[72, 105], [33]]])
def test_prompts_of_token_ids(live_server: StartServer, connect: Connect, prompt: Any) -> None:
    live = live_server(["x"])
    answer = connect(live).completions.create(model="tiny", prompt=prompt)
    many = prompt if isinstance(prompt[0], list) else [prompt]
    assert [asked.prompt for asked in live.engine.asked] == many
    assert [choice.text for choice in answer.choices] == ["x"] * len(many)


def test_control_tokens_in_a_prompt_count(live_server: StartServer) -> None:
    live = live_server(["x"])
    live.post("/v1/completions", {"prompt": "<|im_start|>user"})
    assert live.engine.asked[0].prompt[0] == live.server.tokenizer.special_tokens["<|im_start|>"]


@pytest.mark.parametrize("stream", [False, True])
def test_echo(live_server: StartServer, connect: Connect, stream: bool) -> None:
    created = connect(live_server(["é!"])).completions.create(model="tiny", prompt="añ", echo=True, n=2, stream=stream)
    texts = ["", ""]
    for answer in created if stream else [created]:  # type: ignore[list-item,union-attr]
        for choice in answer.choices:
            texts[choice.index] += choice.text
    assert texts == ["añé!"] * 2


def test_logprobs_in_the_old_shape(live_server: StartServer, connect: Connect) -> None:
    client = connect(live_server(["bé!"]))
    answer = client.completions.create(model="tiny", prompt="xy", echo=True, logprobs=2, max_tokens=9)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert answer.choices[0].text == "xybé!"
    assert logprobs.tokens == ["x", "y", "b", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert logprobs.text_offset == [0, 1, 2, 3, 3, 4]
    assert logprobs.token_logprobs == [None, *[-0.5] * 5]  # type: ignore[comparison-overlap]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] is None
    assert logprobs.top_logprobs[2] == {"b": -0.5, "c": -1.5}
    tokens: list[str] = []
    offsets: list[int] = []
    for chunk in client.completions.create(model="tiny", prompt="xy", echo=True, logprobs=2, max_tokens=9, stream=True):
        told = chunk.choices[0].logprobs
        tokens += (told and told.tokens) or []
        offsets += (told and told.text_offset) or []
    assert (tokens, offsets) == (logprobs.tokens, logprobs.text_offset)


@pytest.mark.parametrize("stream", [False, True])
def test_scoring_a_prompt_without_an_answer(live_server: StartServer, stream: bool) -> None:
    live = live_server(["bc"])
    body = {"prompt": "xyz", "echo": True, "logprobs": 0, "max_tokens": 0}
    if stream:
        response = live.post("/v1/completions", body | {"stream": True})
        assert '"text":"xyz"' in response.text
        return
    answer = live.post("/v1/completions", body).json()
    assert answer["choices"][0]["text"] == "xyz"
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0


def test_stop_and_stream(live_server: StartServer, connect: Connect) -> None:
    chunks = list(
        connect(live_server(["one two three"])).completions.create(model="tiny", prompt="x", stop=" th", stream=True)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == "one two"
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"suffix": "end"}, ["suffix"]),
        ({"best_of": 3}, ["best_of", "n"]),
        ({"prompt": ""}, ["prompt"]),
        ({"prompt": []}, ["prompt"]),
        ({"prompt": [[]]}, ["prompt"]),
        ({"prompt": [-1]}, ["prompt"]),
        ({"prompt": None}, ["prompt"]),
        ({"prompt": ["x"] * 65}, ["prompt", "65", "64"]),
        ({"logprobs": 21}, ["logprobs", "20"]),
        ({"logprobs": True}, ["logprobs"]),
        ({"max_tokens": -2}, ["max_tokens"]),
        ({"prompt": "x" * 5000}, ["5000", "4096"]),
        ({"stream": True, "prompt_logprobs": 1}, ["prompt_logprobs"]),
    ],
    ids=str,
)
def test_what_is_refused(live_server: StartServer, body: dict[str, Any], words: list[str]) -> None:
    live = live_server()
    response = live.post("/v1/completions", {"prompt": "x"} | body)
    assert response.status_code == 400, response.text
    for word in words:
        assert word in response.json()["error"]["message"]
    assert not live.engine.asked


def test_suffix_and_best_of_that_ask_for_nothing(live_server: StartServer) -> None:
    body = {"prompt": "x", "suffix": "", "best_of": 2, "n": 2, "user": "me"}
    assert live_server(["y"]).post("/v1/completions", body).status_code == 200


def test_one_refused_prompt_ends_all(live_server: StartServer, connect: Connect) -> None:
    live = live_server(["word " * 100])
    live.server.driver.max_queued = 1
    live.engine.gate.clear()
    with pytest.raises(openai.RateLimitError):
        connect(live).completions.create(model="tiny", prompt=["a", "b"])
    live.engine.gate.set()
    wait_until(lambda: not live.engine.has_work)


def test_a_client_that_leaves_ends_every_prompt(live_server: StartServer, connect: Connect) -> None:
    live: LiveServer = live_server(["word " * 500])
    live.engine.seconds = 0.01
    stream = connect(live).completions.create(model="tiny", prompt=["a", "b", "c"], max_tokens=2000, stream=True)
    next(iter(stream))
    stream.close()
    wait_until(lambda: not live.engine.has_work)
    assert sorted(live.engine.aborted) == [0, 1, 2]


@pytest.mark.parametrize(("given", "room"), [(-1, 4095), (4096, 4095), (7.0, 7), (None, 16)])
def test_the_longest_answer(live_server: StartServer, given: Any, room: int) -> None:
    live = live_server()
    assert live.post("/v1/completions", {"prompt": "x", "max_tokens": given}).status_code == 200
    assert live.engine.asked[-1].params.max_tokens == room
