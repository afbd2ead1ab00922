"""One request's misfortune stays its own: rows that raise, logits that are no numbers, priorities, prefix caches kept apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenkit.engine.engine import Engine
from qwenkit.engine.isolation import compute_apart
from qwenkit.engine.llm import LLM
from qwenkit.engine.request import Delta
from qwenkit.engine.runner import Runner
from qwenkit.engine.sampling import SamplingParams
from qwenkit.engine.scheduler import Row
from qwenkit.model.qwen import Qwen
from tests.engine.conftest import MakeEngine, naive_greedy, run, tokens_of
from tests.tiny_models import tiny_pair, write_model

PROMPTS = [[5, 6, 7], [9] * 9, [40, 41, 42, 43, 44], [100]]
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def model() -> Qwen:
    return tiny_pair("qwen2")[1]


def expected(model: Qwen, prompt: list[int], count: int = 8) -> list[int]:
    return naive_greedy(model, prompt, count, stop=())


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_only_those_at_fault_are_set_apart(case: tuple[int, set[int]]) -> None:
    count, guilty = case
    calls = 0

    def compute(rows: list[int]) -> list[int]:
        nonlocal calls
        calls += 1
        if guilty & set(rows):
            raise RuntimeError("a guilty row")
        return [row * row for row in rows]

    results = list(compute_apart(compute, list(range(count))))
    assert [row for row, _ in results] == list(range(count))
    for row, result in results:
        assert isinstance(result, RuntimeError) if row in guilty else result == row * row
    assert calls <= 1 + 2 * len(guilty) * (count - 1).bit_length()


@given(st.integers(1, 64), st.integers(0, 63))
def test_a_device_that_breaks_costs_a_few_tries(count: int, survived: int) -> None:
    """It breaks for good at some row; every row ends, whoever is innocent of it."""
    calls = 0
    broken = False

    def compute(rows: list[int]) -> list[int]:
        nonlocal calls, broken
        calls += 1
        broken = broken or survived in rows
        if broken:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return rows

    def works() -> bool:
        nonlocal calls
        calls += 1
        return not broken

    results = dict(compute_apart(compute, list(range(count)), works))
    assert list(results) == list(range(count))
    assert calls == (2 if survived < count else 1)
    assert broken == any(isinstance(result, RuntimeError) for result in results.values())


def test_an_engine_that_cannot_compute_says_so_until_it_can(make_engine: MakeEngine, model: Qwen) -> None:
    engine = make_engine(model, num_blocks=200)
    calls, broken = 0, True

    class Broken(_Poisoned):
        def run(self, rows: list[Row]) -> Any:
            nonlocal calls
            calls += 1
            if broken:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return self._runner.run(rows)

    engine.runner = Broken(engine.runner, -1, 0)  # type: ignore[assignment]
    for _ in range(3):
        before = calls
        ids = [engine.add([number, 1], PARAMS) for number in range(32)]
        deltas = run(engine)
        assert [deltas[request_id, 0][-1].finish_reason for request_id in ids] == ["error"] * 32
        assert calls == before + 2, "one try, and one to see whether anything can be computed"
        assert not engine.healthy
        engine.check()
    broken = False
    request_id = engine.add(PROMPTS[0], PARAMS)
    answer = run(engine)[request_id, 0]
    assert tokens_of(answer) == expected(model, PROMPTS[0])
    assert engine.healthy


class _Poisoned:
    """A runner that raises when a row's prompt begins with `token`, from the answer's `place`-th token on."""

    def __init__(self, runner: Runner, token: int, place: int) -> None:
        self._runner, self._token, self._place = runner, token, place

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def run(self, rows: list[Row]) -> Any:
        for row in rows:
            if row.sequence.tokens[0] == self._token and row.sequence.num_output >= self._place:
                raise RuntimeError("this row cannot be computed")
        return self._runner.run(rows)


@pytest.mark.parametrize("place", [0, 3])
def test_a_request_that_makes_a_step_raise_ends_alone(make_engine: MakeEngine, model: Qwen, place: int) -> None:
    engine = make_engine(model, num_blocks=40)
    engine.runner = _Poisoned(engine.runner, 40, place)  # type: ignore[assignment]
    ids = [engine.add(prompt, PARAMS) for prompt in PROMPTS]
    deltas = run(engine)
    for request_id, prompt in zip(ids, PROMPTS, strict=True):
        answer = deltas[request_id, 0]
        if prompt[0] == 40:
            assert tokens_of(answer) == expected(model, prompt)[:place]
            assert (answer[-1].finish_reason, answer[-1].token_ids) == ("error", ())
            assert answer[-1].error is not None
        else:
            assert tokens_of(answer) == expected(model, prompt)
    assert engine.num_failed == 1
    engine.check()


def test_all_answers_of_a_request_that_never_begins_end(make_engine: MakeEngine, model: Qwen) -> None:
    engine = make_engine(model, num_blocks=40)
    engine.runner = _Poisoned(engine.runner, 5, 0)  # type: ignore[assignment]
    request_id = engine.add([5, 6], SamplingParams(max_tokens=3, n=3))
    assert {key: [d.finish_reason for d in answer] for key, answer in run(engine).items()} == {
        (request_id, index): ["error"] for index in range(3)
    }


def test_a_token_that_cannot_be_added_ends_its_answer_only(
    make_engine: MakeEngine, model: Qwen, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model, num_blocks=40)
    append = Engine._append

    def broken(self: Engine, sequence: Any, choice: Any) -> Delta:
        if sequence.tokens[0] == 9 and sequence.num_output == 2:
            raise KeyError("a detokenizer's bug")
        return append(self, sequence, choice)

    monkeypatch.setattr(Engine, "_append", broken)
    ids = [engine.add(prompt, PARAMS) for prompt in PROMPTS]
    deltas = run(engine)
    assert [deltas[request_id, 0][-1].finish_reason for request_id in ids] == ["length", "error", "length", "length"]
    assert tokens_of(deltas[ids[2], 0]) == expected(model, PROMPTS[2])


def test_logits_that_are_no_numbers_end_their_answer_only(make_engine: MakeEngine) -> None:
    """A token whose embedding is NaN poisons the requests that have it in their prompt, and no other, now or later."""
    model = tiny_pair("qwen2")[1]
    with torch.no_grad():
        model.model.embed_tokens.weight[77] = torch.nan
    engine = make_engine(model, num_blocks=40)
    for temperature in (0.0, 0.8):
        params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=temperature, logprobs=1, seed=1)
        before = engine.num_corrupted
        bad = [engine.add([5, 6, 7, 8, 77, 5], params), engine.add([77] * 12, params)]
        good = [engine.add(prompt, params) for prompt in PROMPTS]
        deltas = run(engine)
        for request_id in bad:
            (delta,) = deltas[request_id, 0]
            assert (delta.finish_reason, delta.token_ids, delta.text) == ("error", (), "")
            assert "not finite" in (delta.error or "")
        for request_id, prompt in zip(good, PROMPTS, strict=True):
            assert deltas[request_id, 0][-1].finish_reason == "length"
            if not temperature:
                assert tokens_of(deltas[request_id, 0]) == expected(model, prompt)
        assert engine.num_corrupted == before + 2
    # blocks that a poisoned request held are used again by sound ones
    many = [engine.add([number] * 11, PARAMS) for number in range(3)]
    deltas = run(engine)
    assert [tokens_of(deltas[i, 0]) for i in many] == [expected(model, [number] * 11) for number in range(3)]


def test_higher_priority_runs_first_and_takes_seats(make_engine: MakeEngine, model: Qwen) -> None:
    engine = make_engine(model, num_blocks=40, max_num_seqs=2)
    low = [engine.add(prompt, PARAMS, priority=-1) for prompt in PROMPTS]
    for _ in range(3):
        engine.step()
    high = engine.add([7, 8, 9], PARAMS, priority=1)
    (delta, *_) = engine.step()
    assert delta.request_id == high, "it begins at once, although both seats were taken"
    assert engine.scheduler.num_preemptions == 1
    order = [delta.request_id for _ in range(200) for delta in engine.step() if delta.finish_reason is not None]
    assert order == [low[0], high, *low[1:]], (
        "who kept a seat ends first; who lost it comes before those who never had one"
    )


def test_the_lowest_priority_is_preempted_first(make_engine: MakeEngine, model: Qwen) -> None:
    engine = make_engine(model, num_blocks=8, prefix_cache=False)
    params = SamplingParams(max_tokens=14, ignore_eos=True)
    first_low, high, second_low = (
        engine.add([number] * 6, params, priority=priority) for number, priority in ((1, -1), (2, 1), (3, -1))
    )
    finished, answers = [], {first_low: [], high: [], second_low: []}  # type: ignore[var-annotated]
    while engine.has_work:
        for delta in engine.step():
            answers[delta.request_id] += delta.token_ids
            if delta.finish_reason is not None:
                finished.append(delta.request_id)
        engine.check()
    assert finished == [high, first_low, second_low]
    assert engine.scheduler.num_preemptions > 0
    for request_id, number in ((first_low, 1), (high, 2), (second_low, 3)):
        assert answers[request_id] == expected(model, [number] * 6, 14), "whoever had to wait says the same"


@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.integers(1, 10), st.integers(-1, 1), st.sampled_from("abc")),
        min_size=1,
        max_size=8,
    )
)
def test_any_mix_of_priorities_and_principals_finishes_and_loses_nothing(
    make_engine: MakeEngine, model: Qwen, requests: list[tuple[int, int, int, str]]
) -> None:
    engine = make_engine(model, num_blocks=9, max_num_seqs=3, max_batch_tokens=7)
    counts = {}
    for length, answer, priority, principal in requests:
        params = SamplingParams(max_tokens=answer, ignore_eos=True)
        counts[engine.add([length] * length, params, priority=priority, principal=principal)] = answer
    for _ in range(600):
        if not engine.has_work:
            break
        for delta in engine.step():
            counts[delta.request_id] -= len(delta.token_ids)
        engine.check()
    assert not engine.has_work, "it does not come to an end"
    assert set(counts.values()) == {0}


def test_prefixes_are_shared_within_a_namespace_only(make_engine: MakeEngine, model: Qwen) -> None:
    engine = make_engine(model, num_blocks=40)
    prompt = list(range(13))

    def cached(namespace: str) -> int:
        request_id = engine.add(prompt, PARAMS, cache_namespace=namespace)
        deltas = run(engine)[request_id, 0]
        assert tokens_of(deltas) == expected(model, prompt)
        return deltas[0].num_cached_tokens

    assert [cached(namespace) for namespace in ("a", "b", "a", "", "b", "")] == [0, 0, 12, 0, 12, 12]


def test_an_llms_answer_says_why_it_failed(tmp_path: Path) -> None:
    llm = LLM(write_model(tmp_path), device="cpu", kv_memory="4MiB", prefix_cache=False)
    llm.engine.runner = _Poisoned(llm.engine.runner, 40, 2)  # type: ignore[assignment]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=1)
    failed, whole = (output.completions[0] for output in llm.generate([[40, 6], [41, 6]], params))
    assert (failed.finish_reason, len(failed.token_ids)) == ("error", 2)
    assert failed.error == "the engine could not compute this request"
    assert failed.logprobs is not None
    assert len(failed.logprobs) == 2, "what is known of the tokens that came is kept"
    assert (whole.finish_reason, whole.error) == ("length", None)


def test_ending_a_request_flushes_its_answers(make_engine: MakeEngine, model: Qwen) -> None:
    """Those that run and those that have not begun end as at their longest; what was held back of their text comes."""
    engine = make_engine(model, num_blocks=40)
    params = SamplingParams(max_tokens=20, n=3, ignore_eos=True, stop=("never said at all",))
    request_id, other = engine.add([5, 6, 7], params), engine.add([9, 9], PARAMS)
    texts = dict.fromkeys(range(3), "")
    tokens: dict[int, list[int]] = {index: [] for index in range(3)}
    for _ in range(4):
        for delta in engine.step():
            if delta.request_id == request_id:
                texts[delta.index] += delta.text
                tokens[delta.index] += delta.token_ids
    last = engine.end(request_id)
    assert [(delta.index, delta.finish_reason, delta.token_ids) for delta in last] == [
        (index, "length", ()) for index in range(3)
    ]
    for delta in last:
        texts[delta.index] += delta.text
    assert texts == {index: engine.tokenizer.decode(ids) for index, ids in tokens.items()}
    assert engine.end(request_id) == []
    assert {key for key, _ in run(engine)} == {other}
    engine.check()


def test_a_reset_leaves_an_empty_engine(make_engine: MakeEngine, model: Qwen) -> None:
    engine = make_engine(model, num_blocks=40, max_num_seqs=2)
    for prompt in PROMPTS:
        engine.add(prompt, PARAMS)
    engine.step()
    engine.scheduler.running[0].block_table.append(39)  # books that do not balance
    engine.reset()
    assert not engine.has_work
    engine.check()
    request_id = engine.add(PROMPTS[1], PARAMS)
    assert tokens_of(run(engine)[request_id, 0]) == expected(model, PROMPTS[1])


def test_the_check_of_an_idle_engine_costs_nothing(make_engine: MakeEngine, model: Qwen) -> None:
    """It is done for each request that comes alone, over pools of a hundred thousand blocks: it must not look at each."""
    engine = make_engine(model, num_blocks=40)
    engine.pool.num_blocks = 10**7
    engine.pool._free = range(10**7)  # type: ignore[assignment]
    engine.pool._references = None  # type: ignore[assignment]
    engine.check_idle()
    engine.pool._free = range(10**7 - 3)  # type: ignore[assignment]
    with pytest.raises(AssertionError, match="3 blocks are held by nobody"):
        engine.check_idle()
