"""A scripted model in place of the engine: fast, deterministic, and it remembers what it was asked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner

from qwenkit.engine.config import EngineConfig
from qwenkit.engine.sampling import SamplingParams

WORDS = [f"word{number}" for number in range(14)]


def as_text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else " ".join(message["content"] for message in prompt)


class FakeLLM:
    """Speaks the interface of LLM. A token is a word; an answer depends on prompt and params alone.

    `during(step)` is called before each token, `refuse` words make a prompt an error.
    """

    instances: ClassVar[list[FakeLLM]] = []

    def __init__(self, model: str, config: EngineConfig | None = None, *, progress: bool = False) -> None:
        if model == "absent":
            raise FileNotFoundError("there is no file or folder 'absent'")
        self.model_name = model
        self.config = config
        self.model = SimpleNamespace(config=SimpleNamespace(vocab_size=1000))
        self.max_model_len = 40
        self.default_params = SamplingParams(temperature=0.6, top_p=0.9)
        self.asked: list[tuple[Any, SamplingParams | None]] = []
        self.closed = 0
        self.during: Callable[[int], None] = lambda step: None
        self.instances.append(self)

    def encode(self, prompt: Any, *, tools: Any = None) -> list[int]:
        if not isinstance(prompt, str):
            for message in prompt:
                if message["role"] not in ("system", "user", "assistant", "tool"):
                    raise ValueError(f"the chat template refuses the role {message['role']!r}")
        ids = [sum(word.encode()) % 1000 for word in as_text(prompt).split()]
        ids += [len(tools)] if tools else []
        if len(ids) >= self.max_model_len:
            raise ValueError(
                f"prompt is {len(ids)} tokens long, but the context for prompt and answer is {self.max_model_len} tokens"
            )
        return ids

    def answer(self, ids: list[int], params: SamplingParams | None, index: int = 0) -> tuple[list[str], str]:
        params = params or SamplingParams()
        start = (sum(ids) + (params.seed or 0) + index) % len(WORDS)
        wanted = 3 + len(ids) % 4
        words = [WORDS[(start + place) % len(WORDS)] for place in range(wanted)]
        cut = words[: params.max_tokens]
        return cut, "length" if len(cut) < wanted else "stop"

    def stream(self, prompt: Any, params: SamplingParams | None = None) -> Iterator[Any]:
        self.asked.append((prompt, params))
        return self._deltas(self.encode(prompt), params)

    def _deltas(self, ids: list[int], params: SamplingParams | None) -> Iterator[Any]:
        words, reason = self.answer(ids, params)
        try:
            for place, word in enumerate(words):
                self.during(place)
                last = place == len(words) - 1
                text = word if place == 0 else f" {word}"
                yield SimpleNamespace(text=text, token_ids=(place,), finish_reason=reason if last else None)
        finally:
            self.closed += 1

    def as_completed(self, requests: Iterable[tuple[list[int], SamplingParams | None]]) -> Iterator[tuple[int, Any]]:
        """Answers of each four requests in reverse order, as a batch may finish them."""
        waiting: list[tuple[int, Any]] = []
        for place, (ids, params) in enumerate(requests):
            waiting.append((place, self._output(ids, params or SamplingParams())))
            if len(waiting) == 4:
                yield from self._finish(waiting)
        yield from self._finish(waiting)

    def _finish(self, waiting: list[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        while waiting:
            self.during(len(self.asked))
            self.asked.append(waiting[-1])
            yield waiting.pop()

    def _output(self, ids: list[int], params: SamplingParams) -> Any:
        completions = []
        for index in range(params.n):
            words, reason = self.answer(ids, params, index)
            completions.append(
                SimpleNamespace(
                    text=" ".join(words),
                    token_ids=list(range(len(words))),
                    finish_reason=reason,
                    logprobs=None,
                    error=None,
                )
            )
        return SimpleNamespace(prompt_token_ids=ids, completions=completions, prompt_logprobs=None)


@pytest.fixture
def fake_llm(monkeypatch: pytest.MonkeyPatch) -> list[FakeLLM]:
    """The models that were opened; in this test each is a fake."""
    monkeypatch.setattr(FakeLLM, "instances", [])
    monkeypatch.setitem(sys.modules, "qwenkit.engine.llm", SimpleNamespace(LLM=FakeLLM))  # type: ignore[misc]
    monkeypatch.setattr("qwenkit.hub.find.find_model", lambda name, **_: name)
    return FakeLLM.instances


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()
