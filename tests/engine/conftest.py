"""Engines around tiny random models."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qwenkit.engine.config import EngineConfig
from qwenkit.engine.engine import Engine
from qwenkit.engine.request import Delta
from qwenkit.engine.runner import Runner
from qwenkit.engine.sampling import SamplingParams
from qwenkit.model.context import pack
from qwenkit.model.qwen import Qwen
from qwenkit.text.tokenizer import Tokenizer
from tests.tiny_models import EOS, IM_END, write_tokenizer

GREEDY = SamplingParams.from_generation_config({})
MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="session")
def make_engine(tokenizer: Tokenizer) -> MakeEngine:
    def make(model: Qwen, *, num_blocks: int, max_model_len: int | None = None, **settings: Any) -> Engine:
        config = EngineConfig(**({"block_size": 4, "seed": 0} | settings))
        longest = max_model_len or num_blocks * config.block_size
        runner = Runner(
            model, num_blocks=num_blocks, block_size=config.block_size, max_model_len=longest, graphs=config.graphs
        )
        return Engine(
            runner,
            tokenizer,
            config,
            max_model_len=longest,
            eos_ids=[EOS, IM_END],
            defaults=GREEDY,
        )

    return make


def run(engine: Engine) -> dict[tuple[int, int], list[Delta]]:
    """Step until idle; deltas of each answer by (request, index)."""
    deltas: dict[tuple[int, int], list[Delta]] = {}
    while engine.has_work:
        for delta in engine.step():
            deltas.setdefault((delta.request_id, delta.index), []).append(delta)
    assert engine.pool.num_free == engine.pool.num_blocks
    return deltas


def tokens_of(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


@torch.no_grad()
def naive_greedy(model: Qwen, prompt: list[int], count: int, stop: tuple[int, ...] = (EOS, IM_END)) -> list[int]:
    """Greedy decoding by a full forward pass for each token; dynamic NTK keeps the stretch of the prompt."""
    tokens = list(prompt)
    alpha = pack([prompt], model.config)[2].rope_alpha
    for _ in range(count):
        ids, positions, ctx = pack([tokens], model.config)
        if alpha is not None:
            ctx = type(ctx)(ctx.lengths, alpha[:1].expand(len(tokens)))
        tokens.append(int(model.logits(model(ids, positions, ctx)[-1:]).argmax()))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]
