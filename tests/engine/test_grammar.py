"""Answers that must look like a grammar says, written by tiny random models."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qwenkit import LLM
from qwenkit.engine import matcher as matchers
from qwenkit.engine.grammar import Grammar
from qwenkit.engine.request import Delta
from qwenkit.engine.sampling import SamplingParams
from qwenkit.model.qwen import Qwen
from tests.engine.conftest import MakeEngine, run, tokens_of
from tests.tiny_models import EOS, IM_END, IM_START, VOCAB_SIZE, tiny_pair, write_model

PROMPT = [72, 101, 108, 108, 111]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
REGEX = r"(\+\d{1,3} )?\d{2,4}-[a-f]{3}"
CHOICES = ["yes", "no", "perhaps", "ni\u00f1o \u4f60\u597d", 'with "quotes" \\ and\nlines']
LARK = 'start: verb " " noun ("s")?\nverb: "see" | "hear"\nnoun: /[a-z]{2,4}/'
GRAMMARS = {
    "json_schema": Grammar("json_schema", json.dumps(SCHEMA)),
    "json_object": Grammar("json_object"),
    "regex": Grammar("regex", REGEX),
    "choice": Grammar("choice", json.dumps(CHOICES)),
    "lark": Grammar("lark", LARK),
}
SAMPLED = {"temperature": 1.5, "seed": 3}


@pytest.fixture(scope="module")
def model() -> Qwen:
    return tiny_pair("qwen2")[1]


def is_like_the_schema(text: str) -> bool:
    value = json.loads(text)
    return (
        isinstance(value, dict)
        and {"name", "age"} <= set(value) <= {"name", "age", "tags"}
        and isinstance(value["name"], str)
        and len(value["name"]) <= 5
        and type(value["age"]) is int
        and 0 <= value["age"] <= 120
        and len(value.get("tags", [])) <= 2
        and set(value.get("tags", [])) <= {"red", "blue"}
    )


def holds(kind: str, text: str) -> bool:
    if kind == "json_schema":
        return is_like_the_schema(text)
    if kind == "regex":
        return re.fullmatch(REGEX, text) is not None
    if kind == "choice":
        return text in CHOICES
    if kind == "lark":
        return re.fullmatch(r"(see|hear) [a-z]{2,4}s?", text) is not None
    return isinstance(json.loads(text), dict)


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def answer(make_engine: MakeEngine, model: Qwen, params: SamplingParams, **settings: Any) -> list[Delta]:
    engine = make_engine(model, num_blocks=60, **settings)
    request_id = engine.add(PROMPT, params)
    return run(engine)[request_id, 0]


@pytest.mark.parametrize("how", [{}, *({"temperature": 1.5, "seed": seed} for seed in range(3))])
@pytest.mark.parametrize("kind", GRAMMARS)
def test_an_answer_is_what_its_grammar_says(
    make_engine: MakeEngine, model: Qwen, kind: str, how: dict[str, Any]
) -> None:
    # A random model would write an object without end, so that one is pushed to close what it opens.
    bias = {"logit_bias": {ord("}") - 33: 100.0, ord('"') - 33: 20.0}} if kind == "json_object" else {}
    deltas = answer(make_engine, model, SamplingParams(grammar=GRAMMARS[kind], **how, **bias))
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].error is None
    assert holds(kind, text_of(deltas)), text_of(deltas)


def test_nothing_breaks_a_grammar(make_engine: MakeEngine, model: Qwen) -> None:
    """Bias, penalties and min_tokens choose among what is allowed."""
    params = SamplingParams(
        grammar=GRAMMARS["json_schema"],
        logit_bias={EOS: 100.0, 5: 100.0, VOCAB_SIZE - 1: 100.0},
        repetition_penalty=2.0,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        min_tokens=200,
        **SAMPLED,
    )
    deltas = answer(make_engine, model, params)
    assert holds("json_schema", text_of(deltas))
    assert deltas[-1].finish_reason == "stop"


def test_min_tokens_keeps_an_answer_going_while_it_can(make_engine: MakeEngine, model: Qwen) -> None:
    grammar = Grammar("regex", "a{2,12}")
    bias = {EOS: 100.0}
    short = answer(make_engine, model, SamplingParams(grammar=grammar, logit_bias=bias))
    longer = answer(make_engine, model, SamplingParams(grammar=grammar, logit_bias=bias, min_tokens=8))
    longest = answer(make_engine, model, SamplingParams(grammar=grammar, logit_bias=bias, min_tokens=50))
    assert [len(text_of(deltas)) for deltas in (short, longer, longest)] == [2, 8, 12]
    assert {deltas[-1].finish_reason for deltas in (short, longer, longest)} == {"stop"}


def test_ignore_eos_goes_on_until_the_grammar_ends(make_engine: MakeEngine, model: Qwen) -> None:
    params = SamplingParams(grammar=Grammar("regex", "a{2,12}"), logit_bias={EOS: 100.0}, ignore_eos=True)
    deltas = answer(make_engine, model, params)
    assert (text_of(deltas), deltas[-1].finish_reason) == ("a" * 12, "stop")


def test_a_grammar_of_nothing_ends_at_once(make_engine: MakeEngine, model: Qwen) -> None:
    for extra in ({}, {"min_tokens": 5}, {"ignore_eos": True}):
        deltas = answer(make_engine, model, SamplingParams(grammar=Grammar("regex", ""), **extra))  # type: ignore[arg-type]
        assert (text_of(deltas), deltas[-1].finish_reason, len(deltas)) == ("", "stop", 1)


def test_stop_token_ids_end_where_the_grammar_accepts(make_engine: MakeEngine, model: Qwen) -> None:
    bias = {IM_START: 100.0}
    params = SamplingParams(grammar=Grammar("regex", "[a-c]{3,20}"), stop_token_ids=(IM_START,), logit_bias=bias)
    deltas = answer(make_engine, model, params)
    assert len(text_of(deltas)) == 3
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", IM_START)


def test_length_and_stop_strings_still_end(make_engine: MakeEngine, model: Qwen) -> None:
    grammar = Grammar("regex", "[a-c]{20}")
    cut = answer(make_engine, model, SamplingParams(grammar=grammar, max_tokens=4))
    assert (len(text_of(cut)), cut[-1].finish_reason) == (4, "length")
    stop = text_of(cut)[2:4]
    stopped = answer(make_engine, model, SamplingParams(grammar=grammar, stop=(stop,)))
    assert (stopped[-1].finish_reason, stopped[-1].stop_reason) == ("stop", stop)


def test_rows_with_and_without_grammar_do_not_touch_each_other(make_engine: MakeEngine, model: Qwen) -> None:
    free = [
        SamplingParams(max_tokens=30, ignore_eos=True),
        SamplingParams(max_tokens=30, ignore_eos=True, temperature=1.0, seed=7),
    ]
    bound = [SamplingParams(grammar=grammar, max_tokens=30, **SAMPLED) for grammar in GRAMMARS.values()]
    alone = [tokens_of(answer(make_engine, model, params)) for params in [*free, *bound]]
    engine = make_engine(model, num_blocks=200)
    ids = [engine.add(PROMPT, params) for params in [*free, *bound]]
    deltas = run(engine)
    assert [tokens_of(deltas[request_id, 0]) for request_id in ids] == alone


def test_preemption_does_not_disturb_a_grammar(make_engine: MakeEngine, model: Qwen) -> None:
    params = [SamplingParams(grammar=GRAMMARS["json_schema"], temperature=1.5, seed=seed) for seed in range(6)]
    roomy = make_engine(model, num_blocks=200, max_model_len=120)
    tight = make_engine(model, num_blocks=30, max_model_len=120)
    texts = []
    for engine in (roomy, tight):
        ids = [engine.add([place, *PROMPT], one) for place, one in enumerate(params)]
        deltas = run(engine)
        texts.append([text_of(deltas[request_id, 0]) for request_id in ids])
    assert texts[0] == texts[1]
    assert all(is_like_the_schema(text) for text in texts[0])


def test_answers_to_one_prompt_have_places_of_their_own(make_engine: MakeEngine, model: Qwen) -> None:
    engine = make_engine(model, num_blocks=200)
    engine.add(PROMPT, SamplingParams(grammar=GRAMMARS["json_schema"], n=4, temperature=2.0, seed=1))
    texts = {text_of(deltas) for deltas in run(engine).values()}
    assert len(texts) > 1
    assert all(is_like_the_schema(text) for text in texts)


def test_a_grammar_is_armed_by_a_token(make_engine: MakeEngine, model: Qwen) -> None:
    """Thinking is free and cannot be the whole answer; after its end the grammar holds."""
    arm = ord("~") - 33
    never = dict.fromkeys([arm, *range(IM_END + 1, VOCAB_SIZE)], -100.0)
    free = answer(
        make_engine,
        model,
        SamplingParams(max_tokens=12, ignore_eos=True, logit_bias=never | {EOS: -100.0, IM_END: -100.0}),
    )
    bound = answer(
        make_engine,
        model,
        SamplingParams(
            max_tokens=12,
            grammar=GRAMMARS["choice"],
            grammar_after=arm,
            logit_bias=never | {EOS: 100.0, IM_END: 100.0},
        ),
    )
    assert tokens_of(bound) == tokens_of(free)
    params = SamplingParams(
        grammar=GRAMMARS["choice"], grammar_after=arm, temperature=1.0, seed=5, logit_bias={arm: 2.0}
    )
    before, _, after = text_of(answer(make_engine, model, params)).partition("~")
    assert before
    assert after in CHOICES


def test_logprobs_are_the_models_own(make_engine: MakeEngine, model: Qwen) -> None:
    deltas = answer(make_engine, model, SamplingParams(grammar=GRAMMARS["choice"], logprobs=2))
    assert all(delta.logprobs is not None and delta.logprobs[0].logprob < 0 for delta in deltas)


def test_a_matcher_that_fails_ends_only_its_own_request(
    make_engine: MakeEngine, model: Qwen, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model, num_blocks=100)
    # After its first letter there are more places where one may be than llguidance considers.
    ambiguous = Grammar("lark", 'start: "y"' + " a" * 3000 + '\na: "x" | "xx" | ')
    failing = engine.add(PROMPT, SamplingParams(grammar=ambiguous, ignore_eos=True, n=2))
    sound = engine.add(PROMPT, SamplingParams(grammar=GRAMMARS["choice"]))
    monkeypatch.setattr(matchers, "describe_failure", lambda message: "grammar is too complex")
    deltas = run(engine)
    assert text_of(deltas[sound, 0]) in CHOICES
    for index in range(2):
        last = deltas[failing, index][-1]
        assert (last.finish_reason, last.error, last.error_field) == ("error", "grammar is too complex", "grammar")
    assert engine.num_failed == 0, "it is the request's fault"


def test_a_bad_grammar_is_refused_by_add(make_engine: MakeEngine, model: Qwen) -> None:
    engine = make_engine(model, num_blocks=20)
    with pytest.raises(ValueError, match="keyword not,"):
        engine.add(PROMPT, SamplingParams(grammar=Grammar("json_schema", '{"not": {}}')))
    assert not engine.has_work
    engine.check()


def test_without_llguidance_it_says_what_to_install(
    make_engine: MakeEngine, model: Qwen, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model, num_blocks=20)
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"pip install .*\[serve\]"):
        engine.add(PROMPT, SamplingParams(grammar=GRAMMARS["regex"]))
    engine.add(PROMPT, SamplingParams(max_tokens=2))
    run(engine)


def test_llm_and_graphs(tmp_path: Path) -> None:
    llm = LLM(write_model(tmp_path), max_model_len=128)
    params = SamplingParams(grammar=GRAMMARS["json_schema"], **SAMPLED)
    outputs = llm.generate(["a", "bc"], params) + llm.chat([{"role": "user", "content": "Hi"}], params)
    assert all(is_like_the_schema(output.text) for output in outputs)
    plain = LLM(tmp_path, max_model_len=128, graphs=False).generate(["a", "bc"], params)
    assert [output.text for output in plain] == [output.text for output in outputs[:2]]
