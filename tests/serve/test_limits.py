"""Limits of each key: tokens of a minute as they are made, what is owed, and shares of the queue."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenkit.engine.request import Delta
from qwenkit.engine.sampling import SamplingParams
from qwenkit.serve.caller import Caller, caller
from qwenkit.serve.driver import Driver
from qwenkit.serve.errors import ApiError
from qwenkit.serve.limits import MinuteLimits, QueueLimits
from qwenkit.text.tokenizer import Tokenizer
from tests.serve.conftest import StartServer
from tests.serve.scripted import ScriptedEngine
from tests.serve.test_driver import collect, driving, until

ALICE, BOB = Caller("a", "space-a", is_limited=True), Caller("b", "space-b", is_limited=True)
BATCH = Caller("a", "space-a", priority=-1, is_limited=True, may_owe=True)


class Clock:
    """time.time() at the beginning of a minute, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_800_000_000.0
        monkeypatch.setattr(time, "time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


async def ask(driver: Driver, who: Caller, prompt: list[int], **params: Any) -> list[Delta]:
    token = caller.set(who)
    try:
        return await collect(driver, prompt, SamplingParams(**params))
    finally:
        caller.reset(token)


def total(deltas: list[Delta]) -> int:
    return sum(len(delta.token_ids) for delta in deltas)


def test_many_long_answers_end_when_the_minute_is_used_up(tokenizer: Tokenizer, clock: Clock) -> None:
    async def main() -> None:
        engine = ScriptedEngine(tokenizer, ["x" * 3000], max_num_seqs=10)
        async with driving(engine, limits=MinuteLimits(tokens=2000)) as driver:
            deltas = await ask(driver, ALICE, [1], n=16, max_tokens=3000, ignore_eos=True)
            assert 2000 <= 1 + total(deltas) <= 2000 + 16, "at most one step more than the minute holds"
            ended = {delta.index: delta.finish_reason for delta in deltas if delta.finish_reason is not None}
            assert ended == dict.fromkeys(range(16), "length"), "those that never began too"
            with pytest.raises(ApiError, match="2000 tokens a minute") as caught:
                await ask(driver, ALICE, [1])
            assert caught.value.status == 429
            assert 1 <= int(caught.value.headers["Retry-After"]) <= 60
            assert total(await ask(driver, BOB, [1], max_tokens=5)) == 5, "others have a minute of their own"
            unlimited = Caller("admin", is_admin=True)
            assert total(await ask(driver, unlimited, [1], max_tokens=2500)) == 2500
            await until(lambda: not driver._by_engine_id and not engine.has_work)

    asyncio.run(main())


def test_a_request_of_which_nothing_has_come_is_refused(tokenizer: Tokenizer, clock: Clock) -> None:
    async def main() -> None:
        engine = ScriptedEngine(tokenizer, ["x" * 3000], max_num_seqs=1)
        async with driving(engine, limits=MinuteLimits(tokens=100)) as driver:
            first, second = await asyncio.gather(
                ask(driver, ALICE, [1], max_tokens=98), ask(driver, ALICE, [1], max_tokens=50), return_exceptions=True
            )
            assert not isinstance(first, BaseException)
            assert total(first) == 98
            assert isinstance(second, ApiError)
            assert (second.status, second.code) == (429, "rate_limit_exceeded")
            assert driver.num_waiting == driver.num_running == 0

    asyncio.run(main())


def test_what_a_batch_makes_too_much_is_owed(tokenizer: Tokenizer, clock: Clock) -> None:
    """Its lines are finished; the following ones wait until the key has paid, and so do its other requests."""

    async def main() -> None:
        async with driving(ScriptedEngine(tokenizer, ["x" * 500]), limits=MinuteLimits(tokens=100)) as driver:
            assert total(await ask(driver, BATCH, [1] * 10, max_tokens=390)) == 390
            for half_minute in range(1, 20):
                clock.now += 30
                with contextlib.suppress(ApiError):
                    await ask(driver, (BATCH, ALICE)[half_minute % 2], [1] * 10, max_tokens=1)
                    break
            assert 6 <= half_minute <= 12, "400 tokens are four minutes' worth"
            assert not driver.limits._owed

    asyncio.run(main())


@given(
    st.lists(st.tuples(st.sampled_from([ALICE, BATCH]), st.integers(1, 80), st.integers(0, 300), st.integers(0, 90)))
)
def test_in_the_long_run_nobody_has_more_than_the_limit(steps: list[tuple[Caller, int, int, int]]) -> None:
    limits, used, began = MinuteLimits(tokens=100), 0, 1_800_000_000.0
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        worst = 0
        for who, prompt, answer, pause in steps:
            try:
                limits.take_tokens(who, prompt)
            except ApiError:
                pass
            else:
                used += prompt + answer
                worst = max(worst, answer)
                limits.spend_tokens(who, answer)
            clock.now += pause
        minutes = (clock.now - began) / 60
        assert used <= 100 * (minutes + 2) + worst


def test_a_prompt_longer_than_the_minute_is_refused_for_good(clock: Clock) -> None:
    with pytest.raises(ApiError, match="the prompt is 101 tokens long, but this key may use 100"):
        MinuteLimits(tokens=100).take_tokens(ALICE, 101)


def test_names_of_keys_may_be_alike(clock: Clock) -> None:
    """What is counted is the key."""
    limits = MinuteLimits(requests=1, tokens=10)
    for who in (Caller("same", "space-1", is_limited=True), Caller("same", "space-2", is_limited=True)):
        limits.take_request(who)
        limits.take_tokens(who, 10)
        with pytest.raises(ApiError):
            limits.take_request(who)


def test_a_heavy_key_cannot_fill_the_queue(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        engine = ScriptedEngine(tokenizer)
        engine.gate.clear()
        async with driving(engine, max_queued=6) as driver:
            tasks = [asyncio.create_task(ask(driver, ALICE, [1])) for _ in range(6)]
            await until(lambda: driver.num_waiting == 6)
            with pytest.raises(ApiError, match="6 requests are waiting"):
                await ask(driver, ALICE, [1])
            tasks += [asyncio.create_task(ask(driver, BOB, [1])) for _ in range(3)]
            await until(lambda: driver.num_waiting == 9)
            for who in (ALICE, BOB):
                with pytest.raises(ApiError, match="9 requests are waiting") as caught:
                    await ask(driver, who, [1])
                assert caught.value.code == "queue_full"
            engine.gate.set()
            await asyncio.gather(*tasks)
            assert not driver._queue._requests

    asyncio.run(main())


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(1, 200), st.booleans()), max_size=200))
def test_a_queue_is_shared_and_bounded(steps: list[tuple[str, int, bool]]) -> None:
    queue = QueueLimits()
    waiting: list[tuple[str, int]] = []
    for principal, length, leaves in steps:
        if leaves and waiting:
            queue.remove(*waiting.pop(0))
            continue
        excess = queue.excess(principal, length, 10, 300)
        own = [tokens for name, tokens in waiting if name == principal]
        if excess is None:
            queue.add(principal, length)
            waiting.append((principal, length))
        else:
            assert own, "of whom nothing waits is never refused"
            assert excess[0] in ("queue_full", "queue_tokens")
            if excess[0] == "queue_full":
                assert len(waiting) >= 10
            else:
                assert sum(tokens for _, tokens in waiting) + length > 300
        assert queue.num_requests == len(waiting) <= 10 * (1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) + 5
    for principal, length in waiting:
        queue.remove(principal, length)
    assert queue._requests == queue._tokens == Counter()


def test_over_http_one_request_ends_at_the_limit(live_server: StartServer) -> None:
    live = live_server(["x" * 3000], api_key=("k",), tokens_per_minute=300)
    headers = {"Authorization": "Bearer k"}
    body = {"prompt": "x", "n": 16, "max_tokens": 2000, "ignore_eos": True}
    first = live.post("/v1/completions", body, headers=headers)
    assert first.status_code == 200
    assert first.json()["usage"]["total_tokens"] <= 300 + 16
    assert {choice["finish_reason"] for choice in first.json()["choices"]} == {"length"}
    streamed = live.post("/v1/completions", body | {"stream": True}, headers=headers)
    assert streamed.status_code == 429
    assert int(streamed.headers["Retry-After"]) > 0
