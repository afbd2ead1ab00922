"""The driver between asyncio and an engine's thread: order, limits, abort, heartbeat, drain, and an engine that fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from qwenkit.engine.request import Delta
from qwenkit.engine.sampling import SamplingParams
from qwenkit.serve.driver import Driver
from qwenkit.serve.errors import ApiError
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
