"""The driver between asyncio and an engine's thread: order, limits, abort, heartbeat, drain, and an engine that fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from qwenkit.engine.request import Delta
from qwenkit.engine.sampling import SamplingParams
from qwenkit.serve.caller import Caller, caller
from qwenkit.serve.driver import Driver
from qwenkit.serve.errors import ApiError
from qwenkit.serve.limits import MinuteLimits
from qwenkit.text.tokenizer import Tokenizer
from tests.serve.scripted import ScriptedEngine

PARAMS = SamplingParams()


@asynccontextmanager
async def driving(engine: Any, **settings: Any) -> AsyncIterator[Driver]:
    driver = Driver(engine, **settings)
    driver.start()
    try:
        yield driver
    finally:
        gate = getattr(engine, "gate", None)
        if gate is not None:
            gate.set()
        driver.stop()


async def collect(driver: Driver, prompt: list[int], params: SamplingParams = PARAMS, **settings: Any) -> list[Delta]:
    return [delta async for delta in driver.stream(prompt, params, **settings)]


def text_of(deltas: list[Delta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(1000):
        if holds():
            return
        await asyncio.sleep(0.005)
    pytest.fail("it did not come true in time")


def test_streams_say_what_the_engine_said(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        engine = ScriptedEngine(tokenizer, lambda prompt, params: f"answer {prompt[0]}")
        async with driving(engine) as driver:
            answers = await asyncio.gather(*(collect(driver, [number]) for number in range(1, 30)))
            assert [text_of(answer) for answer in answers] == [f"answer {number}" for number in range(1, 30)]
            both = await collect(driver, [1], SamplingParams(n=2))
            assert text_of(both, 0) == text_of(both, 1) == "answer 1"
            assert (driver.num_waiting, driver.num_running) == (0, 0)

    asyncio.run(main())


def test_a_queue_that_is_full_says_so(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        engine = ScriptedEngine(tokenizer)
        engine.gate.clear()
        async with driving(engine, max_queued=3, max_queued_tokens=100) as driver:
            tasks = [asyncio.create_task(collect(driver, [1, 2])) for _ in range(3)]
            await until(lambda: driver.num_waiting == 3)
            with pytest.raises(ApiError, match="3 requests are waiting") as caught:
                await collect(driver, [1])
            assert caught.value.status == 429
            assert int(caught.value.headers["Retry-After"]) > 0
            engine.gate.set()
            assert [text_of(answer) for answer in await asyncio.gather(*tasks)] == ["Hello!"] * 3
            assert text_of(await collect(driver, [1])) == "Hello!"
            engine.gate.clear()
            long = asyncio.create_task(collect(driver, [1] * 200))  # alone it is taken, else nobody could ever ask it
            await until(lambda: driver.num_waiting == 1)
            with pytest.raises(ApiError, match="200 prompt tokens are waiting") as caught:
                await collect(driver, [1])
            assert caught.value.code == "queue_full"
            engine.gate.set()
            await long
            rejected = driver.metrics.registry.get_sample_value(
                "qwenkit:admission_rejections_total", {"model_name": "", "reason": "queue_full"}
            )
            assert rejected == 1

    asyncio.run(main())


def test_a_bad_prompt_is_refused_before_it_waits(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        engine = ScriptedEngine(tokenizer, max_model_len=10)
        async with driving(engine) as driver:
            for prompt, sentence in (([], "empty"), ([1] * 10, "10 tokens")):
                with pytest.raises(ValueError, match=sentence):
                    await collect(driver, prompt)
            assert not engine.asked
            assert driver.num_waiting == 0

    asyncio.run(main())


@pytest.mark.parametrize("place", ["queued", "running"])
def test_a_closed_stream_leaves_the_engine_within_a_step(tokenizer: Tokenizer, place: str) -> None:
    async def main() -> None:
        engine = ScriptedEngine(tokenizer, ["x" * 2000], max_num_seqs=1, seconds=0.002)
        async with driving(engine) as driver:
            other = asyncio.create_task(collect(driver, [1], SamplingParams(max_tokens=400)))
            await until(lambda: driver.num_running == 1)
            if place == "queued":
                task = asyncio.create_task(collect(driver, [2]))
                await until(lambda: len(engine.scheduler.waiting) == 1)
                task.cancel()
                await asyncio.wait([task])
                await until(lambda: not engine.scheduler.waiting)
            else:
                other.cancel()
                async with aclosing(driver.stream([2], PARAMS)) as stream:
                    async for _ in stream:
                        break
                await until(lambda: not engine.has_work)
                assert engine.pool.num_free == engine.pool.num_blocks
            assert engine.aborted
            assert driver.num_waiting == 0
            other.cancel()
            await asyncio.wait([other])
            assert driver.num_running == 0

    asyncio.run(main())


def test_a_stuck_engine_is_not_healthy_and_an_idle_one_is(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        engine = ScriptedEngine(tokenizer)
        async with driving(engine, stall_timeout=0.7) as driver:
            await asyncio.sleep(1.0)
            assert driver.healthy, "idle"
            engine.gate.clear()
            task = asyncio.create_task(collect(driver, [1]))
            await until(lambda: not driver.healthy)
            with pytest.raises(ApiError) as caught:
                await collect(driver, [2])
            assert caught.value.status == 503
            engine.gate.set()
            assert text_of(await task) == "Hello!"
            assert driver.healthy

    asyncio.run(main())


def test_a_step_that_fails_as_a_whole_costs_its_requests_and_not_the_server(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        engine = ScriptedEngine(tokenizer)
        async with driving(engine) as driver:
            for repeat in range(3):
                engine.fails = 1
                with pytest.raises(ApiError, match="request id abc") as caught:
                    await collect(driver, [1], request_id="abc")
                assert caught.value.status == 500
                assert driver.healthy == (repeat < 2)
            assert text_of(await collect(driver, [1])) == "Hello!"
            assert driver.healthy

    asyncio.run(main())


def test_draining_finishes_what_runs_and_takes_nothing_new(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        engine = ScriptedEngine(tokenizer, ["x" * 50], seconds=0.002)
        async with driving(engine) as driver:
            running = asyncio.create_task(collect(driver, [1]))
            await until(lambda: driver.num_running == 1)
            draining = asyncio.create_task(driver.drain(5))
            await asyncio.sleep(0)
            with pytest.raises(ApiError, match="shutting down") as caught:
                await collect(driver, [1])
            assert caught.value.status == 503
            assert await draining
            assert text_of(await running) == "x" * 50

    asyncio.run(main())


def test_a_drain_that_takes_too_long_gives_up(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        engine = ScriptedEngine(tokenizer, ["x" * 3000], seconds=0.01)
        async with driving(engine) as driver:
            running = asyncio.create_task(collect(driver, [1]))
            await until(lambda: driver.num_running == 1)
            assert not await driver.drain(0.05)
            with pytest.raises(ApiError, match="shutting down"):
                await running

    asyncio.run(main())


def test_who_asks_decides_priority_and_cache(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        engine = ScriptedEngine(tokenizer)
        async with driving(engine) as driver:
            token = caller.set(Caller("a", "space-a", priority=-5))
            await collect(driver, [1])
            caller.reset(token)
            await collect(driver, [2], priority=3, cache_namespace="mine", adapter="poet")
            assert engine.asked[0].settings == {"priority": -5, "principal": "space-a", "cache_namespace": "space-a"}
            assert engine.asked[1].settings == {
                "priority": 3,
                "principal": "",
                "cache_namespace": "mine",
                "adapter": "poet",
            }

    asyncio.run(main())


def test_tokens_a_minute(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        engine = ScriptedEngine(tokenizer, ["abcd"])
        async with driving(engine, limits=MinuteLimits(tokens=20)) as driver:
            token = caller.set(Caller("a", "a", is_limited=True))
            await collect(driver, [1] * 10)
            await asyncio.sleep(0)
            with pytest.raises(ApiError, match="20 tokens a minute") as caught:
                await collect(driver, [1] * 10)
            assert caught.value.status == 429
            assert 1 <= int(caught.value.headers["Retry-After"]) <= 60
            caller.reset(token)
            token = caller.set(Caller("b", "b", is_limited=True))
            await collect(driver, [1] * 10)
            with pytest.raises(ApiError, match="the prompt is 30 tokens long"):
                await collect(driver, [1] * 30)
            caller.reset(token)

    asyncio.run(main())


def test_an_error_of_one_answer_is_told_to_its_stream_only(tokenizer: Tokenizer) -> None:
    class Failing(ScriptedEngine):
        def step(self) -> list[Delta]:
            deltas = super().step()
            bad = next(
                (answer for answer in self.scheduler.running if answer.num_output > 2 and answer.num_prompt == 3), None
            )
            if bad is not None:
                self.scheduler.running.remove(bad)
                deltas.append(Delta(bad.request_id, bad.index, (), "", finish_reason="error", error="it broke"))
            return deltas

    async def main() -> None:
        async with driving(Failing(tokenizer, ["x" * 20])) as driver:
            good = asyncio.create_task(collect(driver, [1]))
            seen: list[Delta] = []

            async def see() -> None:
                async for delta in driver.stream([1, 2, 3], PARAMS, request_id="r1"):
                    seen.append(delta)

            with pytest.raises(ApiError, match=r"it broke \(request id r1\)"):
                await see()
            assert text_of(seen).startswith("xx")
            assert text_of(await good) == "x" * 20
            assert driver.healthy

    asyncio.run(main())


def test_calls_run_between_steps(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with driving(ScriptedEngine(tokenizer)) as driver:
            assert await driver.call(lambda engine: engine.max_model_len) == 4096
            with pytest.raises(ZeroDivisionError):
                await driver.call(lambda engine: 1 / 0)

    asyncio.run(main())
