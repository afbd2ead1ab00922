"""The scheduler without a model: shares of principals, what a newcomer gets, and that everything ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenkit.engine.blocks import BlockPool
from qwenkit.engine.config import EngineConfig
from qwenkit.engine.request import Sequence
from qwenkit.engine.sampling import SamplingParams
from qwenkit.engine.scheduler import Row, Scheduler

Given = dict[str, int]


def scheduler_of(*, num_blocks: int = 1000, **settings: Any) -> Scheduler:
    config = EngineConfig(**({"block_size": 4, "max_num_seqs": 8, "max_batch_tokens": 32} | settings))
    return Scheduler(config, BlockPool(num_blocks))


_marks = iter(range(10**9))


def add(
    scheduler: Scheduler, principal: str, prompt: int = 3, answer: int = 50, *, count: int = 1, priority: int = 0
) -> list[Sequence]:
    """Sequences of prompts that begin differently."""
    made = []
    for _ in range(count):
        tokens = [next(_marks), *range(prompt - 1)]
        sequence = Sequence(
            request_id=tokens[0], index=0, tokens=tokens, num_prompt=prompt, params=SamplingParams(), seed=0,
            max_tokens=answer, stop_ids=frozenset(), detokenizer=None, stop_strings=None,  # type: ignore[arg-type]
            principal=principal, priority=priority,
        )  # fmt: skip
        scheduler.add(sequence)
        made.append(sequence)
    return made


def step(scheduler: Scheduler) -> list[Row]:
    """Schedule, compute and sample; sequences that are long enough end."""
    rows = scheduler.schedule()
    for row in rows:
        samples = row.samples
        scheduler.computed(row)
        if samples:
            row.sequence.tokens.append(1)
            if row.sequence.num_output >= row.sequence.max_tokens:
                scheduler.remove(row.sequence)
    scheduler.check()
    return rows


def tokens_of(rows: Iterable[Row]) -> Given:
    given: Counter[str] = Counter()
    for row in rows:
        given[row.sequence.principal] += row.num_tokens
    return dict(given)


def seats_of(scheduler: Scheduler) -> Given:
    return dict(Counter(sequence.principal for sequence in scheduler.running))


def test_a_newcomer_runs_in_the_next_step() -> None:
    scheduler = scheduler_of()
    add(scheduler, "heavy", count=1000)
    for _ in range(5):
        step(scheduler)
    assert seats_of(scheduler) == {"heavy": 8}
    (light,) = add(scheduler, "light")
    assert tokens_of(step(scheduler)) == {"light": 3}
    assert light.num_output == 1
    assert seats_of(scheduler) == {"heavy": 7, "light": 1}
    assert scheduler.num_preemptions == 1


def test_a_newcomer_gets_blocks_when_there_is_no_free_one() -> None:
    scheduler = scheduler_of(num_blocks=16, prefix_cache=False)
    add(scheduler, "heavy", prompt=8, answer=100, count=8)
    for _ in range(4):
        step(scheduler)
    (light,) = add(scheduler, "light", prompt=12)
    step(scheduler)
    assert light.num_output == 1


def test_seats_become_equal_and_nobody_is_preempted_for_nothing() -> None:
    scheduler = scheduler_of()
    add(scheduler, "a", count=30, answer=10_000)
    step(scheduler)
    add(scheduler, "b", count=30, answer=10_000)
    step(scheduler)
    assert seats_of(scheduler) == {"a": 4, "b": 4}
    add(scheduler, "c", count=1, answer=10_000)
    add(scheduler, "d", count=30, answer=10_000)
    step(scheduler)
    assert seats_of(scheduler) == {"a": 3, "b": 2, "c": 1, "d": 2}, "c has all it wants"
    preemptions = scheduler.num_preemptions
    assert preemptions == 4 + 3
    for _ in range(50):
        step(scheduler)
    assert scheduler.num_preemptions == preemptions, "equal shares take nothing from each other"


def test_whoever_was_there_first_keeps_his_oldest() -> None:
    scheduler = scheduler_of(max_num_seqs=2)
    first, second = add(scheduler, "a", count=2)
    step(scheduler)
    add(scheduler, "b", count=5)
    for _ in range(20):
        step(scheduler)
    assert first.num_output == 21
    assert second.num_output == 1


def test_a_step_gives_each_principal_its_quantum_first() -> None:
    scheduler = scheduler_of(max_batch_tokens=30)
    add(scheduler, "a", prompt=500, count=8)
    step(scheduler)
    add(scheduler, "b", prompt=500)
    assert tokens_of(step(scheduler)) == {"a": 15, "b": 15}
    add(scheduler, "c", prompt=4)
    assert tokens_of(step(scheduler)) == {"c": 4}, "c's first token"
    assert tokens_of(step(scheduler)) == {"a": 19, "b": 10, "c": 1}, "what c leaves is for the others"


def test_a_first_token_does_not_wait_for_what_others_have_in_the_step() -> None:
    scheduler = scheduler_of()
    add(scheduler, "heavy", count=100)
    add(scheduler, "other", prompt=1)
    for _ in range(3):
        step(scheduler)
    add(scheduler, "light", prompt=3)
    assert tokens_of(step(scheduler)) == {"light": 3, "other": 1}, "those with no more than the newcomer stay"
    add(scheduler, "late", prompt=3)
    assert tokens_of(step(scheduler)) == {"heavy": 5, "light": 1, "other": 1, "late": 3}, "every other step is whole"
    add(scheduler, "low", prompt=3, priority=-1)
    assert tokens_of(step(scheduler))["heavy"] == 5, "a lower priority hurries nobody"


def test_a_share_that_is_not_used_is_not_lost() -> None:
    scheduler = scheduler_of(max_batch_tokens=30)
    add(scheduler, "a", prompt=500, count=2)
    add(scheduler, "b", prompt=2)
    assert tokens_of(step(scheduler)) == {"b": 2}
    for _ in range(10):
        assert sum(tokens_of(step(scheduler)).values()) == 30


def test_priority_comes_before_shares() -> None:
    scheduler = scheduler_of(max_batch_tokens=30)
    add(scheduler, "a", prompt=500, priority=1)
    add(scheduler, "b", prompt=500)
    add(scheduler, "c", prompt=500)
    assert tokens_of(step(scheduler)) == {"a": 30}


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(-1, 1)), min_size=1, max_size=12),
    st.integers(1, 6),
    st.integers(1, 40),
)
def test_one_principal_is_served_by_priority_and_age(
    requests: list[tuple[int, int, int]], max_num_seqs: int, budget: int
) -> None:
    scheduler = scheduler_of(num_blocks=12, max_num_seqs=max_num_seqs, max_batch_tokens=budget)
    for prompt, answer, priority in requests:
        if prompt + answer <= 48:
            add(scheduler, "only", prompt, answer, priority=priority)
    while scheduler.has_work:
        rows = scheduler.schedule()
        ranks = [(-row.sequence.priority, row.sequence.order) for row in rows]
        assert ranks == sorted(ranks)
        assert [row.sequence for row in rows] == scheduler.running[: len(rows)], "no one is passed over"
        left = budget
        for row in rows:
            assert row.num_tokens == min(row.sequence.num_pending, left)
            left -= row.num_tokens
        for row in rows:
            samples = row.samples
            scheduler.computed(row)
            if samples:
                row.sequence.tokens.append(1)
                if row.sequence.num_output >= row.sequence.max_tokens:
                    scheduler.remove(row.sequence)


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"), st.integers(1, 30), st.integers(1, 12), st.integers(-1, 1), st.integers(0, 6)
        ),
        min_size=1,
        max_size=25,
    ),
    st.integers(1, 4),
    st.integers(1, 20),
    st.booleans(),
)
def test_everything_ends(
    requests: list[tuple[str, int, int, int, int]], max_num_seqs: int, budget: int, prefix_cache: bool
) -> None:
    """Whoever comes when, with a pool that holds the longest sequence and no more; some are aborted on the way."""
    scheduler = scheduler_of(
        num_blocks=11, max_num_seqs=max_num_seqs, max_batch_tokens=budget, prefix_cache=prefix_cache
    )
    made: list[Sequence] = []
    aborted: set[int] = set()
    for number, (principal, prompt, answer, priority, pause) in enumerate(requests):
        made += add(scheduler, principal, prompt, answer, priority=priority)
        for _ in range(pause):
            if scheduler.has_work:
                step(scheduler)
        if pause == 3:
            scheduler.remove(made[number // 2])
            aborted.add(number // 2)
    work = sum(prompt + answer for _, prompt, answer, _, _ in requests)
    for _ in range(40 * work):
        if not scheduler.has_work:
            break
        step(scheduler)
    assert not scheduler.has_work, "it does not come to an end"
    assert all(
        sequence.num_output == sequence.max_tokens for number, sequence in enumerate(made) if number not in aborted
    )
    assert scheduler.pool.num_free == 11


@pytest.mark.parametrize("lengths", [(3, 3), (30, 3), (3, 30)])
def test_two_that_always_have_more_get_as_much(lengths: tuple[int, int]) -> None:
    """Whatever the lengths of their prompts, as long as seats are not what limits them."""
    scheduler = scheduler_of(max_batch_tokens=16, max_num_seqs=32)
    for principal, prompt in zip("ab", lengths, strict=True):
        add(scheduler, principal, prompt, answer=4, count=300)
    total: Counter[str] = Counter()
    for _ in range(150):
        total.update(tokens_of(step(scheduler)))
    assert scheduler._lines.keys() == {"a", "b"}
    assert max(total.values()) <= 1.5 * min(total.values())
