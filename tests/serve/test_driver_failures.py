"""What raises in the engine's thread, or on the way to a stream, costs the requests it concerns; no stream waits for ever."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing
from typing import Any

import pytest

from qwenkit.engine.request import Delta
from qwenkit.engine.sampling import SamplingParams
from qwenkit.serve.driver import Driver
from qwenkit.serve.errors import ApiError
from qwenkit.serve.limits import MinuteLimits
from qwenkit.text.tokenizer import Tokenizer
from tests.serve.scripted import ScriptedEngine
from tests.serve.test_driver import collect, driving, text_of, until


class _Panic(BaseException):
    """As pyo3's PanicException, which is no Exception."""


def leftovers(driver: Driver) -> list[object]:
    """Whatever a driver still holds of its requests."""
    return [*driver._open, *driver._by_engine_id, *driver._inbox, *driver._queue._requests, *driver._queue._tokens]


def run(main: Any) -> None:
    """Run a test's coroutine; a stream that hangs fails it."""

    async def bounded() -> None:
        await asyncio.wait_for(main(), 20)

    asyncio.run(bounded())


async def outcome(driver: Driver, prompt: list[int], params: SamplingParams | None = None) -> str | int:
    """An answer's text, or the status of its error."""
    try:
        return text_of(await collect(driver, prompt, params or SamplingParams()))
    except ApiError as error:
        return error.status


def test_what_is_over_is_forgotten(tokenizer: Tokenizer) -> None:
    """Finished, with several answers, failed, refused by the engine, left early."""

    class Failing(ScriptedEngine):
        def add(self, prompt: Any, params: Any = None, **settings: Any) -> int:
            if prompt[0] == 9:
                raise ValueError("prompt has a 9")
            return super().add(prompt, params, **settings)

        def step(self) -> list[Delta]:
            deltas = super().step()
            for bad in [answer for answer in self.scheduler.running if answer.num_prompt == 3]:
                self.scheduler.running.remove(bad)
                deltas.append(Delta(bad.request_id, bad.index, (), "", finish_reason="error", error="it broke"))
            self._count_blocks()
            return deltas

    async def main() -> None:
        async with driving(Failing(tokenizer)) as driver:
            for _ in range(20):
                asked = [collect(driver, [1]), collect(driver, [2], SamplingParams(n=3)), outcome(driver, [1, 2, 3])]
                asked += [
                    outcome(driver, [1, 2, 3], SamplingParams(n=2)),
                    outcome(driver, [4], SamplingParams(max_tokens=1)),
                ]
                await asyncio.gather(*asked)
                with pytest.raises(ValueError, match="has a 9"):
                    await collect(driver, [9])
                async with aclosing(driver.stream([5], SamplingParams(n=2))) as stream:
                    async for _ in stream:
                        break
            await until(lambda: not driver.engine.has_work and not driver._inbox)
            await until(lambda: not leftovers(driver))
            assert (driver.num_waiting, driver.num_running) == (0, 0)

    run(main)


def test_an_abort_that_raises_costs_what_is_in_the_engine_and_not_the_thread(tokenizer: Tokenizer) -> None:
    class Failing(ScriptedEngine):
        def abort(self, request_id: int) -> None:
            raise AssertionError("release of a block nobody holds")

    async def main() -> None:
        engine = Failing(tokenizer, ["x" * 3000], seconds=0.002)
        async with driving(engine) as driver:
            other = asyncio.create_task(outcome(driver, [1]))
            async with aclosing(driver.stream([2], SamplingParams())) as stream:
                async for _ in stream:
                    break
            assert await other == 500
            assert driver.healthy
            assert await outcome(driver, [3], SamplingParams(max_tokens=2)) == "xx"
            await until(lambda: not leftovers(driver))

    run(main)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), _Panic("a regex went too deep")])
@pytest.mark.parametrize("where", ["step", "add", "call"])
def test_whatever_raises_the_next_request_is_answered(
    tokenizer: Tokenizer, where: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        engine = ScriptedEngine(tokenizer)

        def broken(*args: Any, **settings: Any) -> Any:
            raise error

        async with driving(engine) as driver:
            assert await outcome(driver, [1]) == "Hello!"
            if where == "call":
                with pytest.raises(RuntimeError):
                    await driver.call(broken)
            else:
                with monkeypatch.context() as patch:
                    patch.setattr(engine, where, broken)
                    assert await asyncio.gather(outcome(driver, [1]), outcome(driver, [2])) == [500, 500]
            assert await outcome(driver, [1]) == "Hello!"
            assert driver.healthy
            await until(lambda: not leftovers(driver))

    run(main)


def test_an_engine_that_stays_broken_says_so_and_answers_with_errors(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        engine = ScriptedEngine(tokenizer)
        async with driving(engine) as driver:
            engine.fails = 10**9
            for _ in range(4):
                assert await outcome(driver, [1]) == 500
            assert not driver.healthy
            engine.fails = 0
            await until(lambda: not engine.has_work)
            assert await outcome(driver, [1]) == "Hello!"
            assert driver.healthy
            engine.healthy = False
            assert not driver.healthy, "the engine found that it cannot compute"

    run(main)


@pytest.mark.parametrize("name", ["time_to_first_token", "inter_token_latency", "e2e_latency", "prompt_tokens"])
def test_a_metric_that_raises_costs_its_request_only(
    tokenizer: Tokenizer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def observe(self, value: float) -> None:
            raise OSError("no space left on device")

        inc = observe

    async def main() -> None:
        async with driving(ScriptedEngine(tokenizer)) as driver:
            with monkeypatch.context() as patch:
                patch.setattr(driver.metrics, name, Broken())
                assert await outcome(driver, [1]) in (500, "Hello!")
            assert await outcome(driver, [1]) == "Hello!"
            await until(lambda: not leftovers(driver))

    run(main)


def test_limits_that_raise_cost_what_is_in_the_engine(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> bool:
        raise OSError("the storage is gone")

    async def main() -> None:
        async with driving(ScriptedEngine(tokenizer), limits=MinuteLimits(tokens=1000)) as driver:
            with monkeypatch.context() as patch:
                patch.setattr("qwenkit.serve.driver.count_tokens", broken)
                assert await outcome(driver, [1]) == 500
            assert await outcome(driver, [1]) == "Hello!"

    run(main)


def test_a_thread_that_stops_leaves_no_stream_waiting(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        engine = ScriptedEngine(tokenizer, ["x" * 3000], seconds=0.002)
        async with driving(engine) as driver:
            streams = [asyncio.create_task(outcome(driver, [number])) for number in range(3)]
            await until(lambda: driver.num_running == 3)
            await asyncio.to_thread(driver.stop)
            assert await asyncio.gather(*streams) == [503, 503, 503]
            assert not driver.healthy
            assert await outcome(driver, [1]) == 503

    run(main)


def test_the_check_of_an_idle_engine_comes_after_its_answers(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it finds: the answers are out, the server goes on, and it is said once."""
    checked: list[float] = []

    class Unbalanced(ScriptedEngine):
        def check_idle(self) -> None:
            checked.append(time.monotonic())
            raise AssertionError("3 blocks are held by nobody")

    async def main() -> None:
        async with driving(Unbalanced(tokenizer)) as driver:
            for _ in range(3):
                assert await outcome(driver, [1]) == "Hello!"
                assert not checked, "nobody waits for it"
            await until(lambda: bool(checked))
            assert driver.healthy
            assert await outcome(driver, [1]) == "Hello!"

    with caplog.at_level(logging.ERROR, "qwenkit.serve"):
        run(main)
    assert sum("do not balance" in record.message for record in caplog.records) == len(checked)


def test_a_ticket_of_many_answers_is_kept_until_the_last(tokenizer: Tokenizer) -> None:
    """Answers of one request that end in different steps."""

    class Uneven(ScriptedEngine):
        def _next(self, answer: Any) -> Delta:
            if answer.num_output == 0:
                answer.ids = [*answer.ids[: 1 + answer.index], self.eos_id]
            return super()._next(answer)

    async def main() -> None:
        async with driving(Uneven(tokenizer, ["abcdef"])) as driver:
            deltas = await collect(driver, [1], SamplingParams(n=4))
            assert [text_of(deltas, index) for index in range(4)] == ["a", "ab", "abc", "abcd"]
            await until(lambda: not leftovers(driver))

    run(main)
