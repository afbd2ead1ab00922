"""Two engines in two Python threads of one process: each gives what it gives alone."""

import threading

import pytest
import torch

from qwenkit.engine.sampling import SamplingParams
from qwenkit.model.config import ModelConfig
from qwenkit.model.qwen import Qwen
from qwenkit.weights.checkpoint import open_checkpoint
from qwenkit.weights.load import load_model
from qwenkit.weights.pack import packing
from tests.engine.conftest import MakeEngine, run, tokens_of
from tests.tiny_models import write_model

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
ROUNDS = 6


@pytest.fixture(scope="module")
def models(instruction_set: str, tmp_path_factory: pytest.TempPathFactory) -> list[Qwen]:
    """Two models of the same shapes, so that their results are of the same sizes."""
    made = []
    for name in ("qwen2", "qwen3"):
        checkpoint = open_checkpoint(write_model(tmp_path_factory.mktemp(name), name, **SIZES))
        swap = packing(ModelConfig.from_dict(checkpoint.config), "int4")
        made.append(load_model(checkpoint, dtype=torch.float32, swaps=[swap]).eval())
    return made


def answer(make_engine: MakeEngine, model: Qwen) -> list[list[int]]:
    """Tokens of requests in batches of growing size, each of which records another step; greedy and sampled."""
    engine = make_engine(model, num_blocks=400, max_model_len=96)
    answers = []
    for count in (1, 2, 3, 5, 9):
        ids = [
            engine.add(
                [17, 3 + index, 40 + count],
                SamplingParams(max_tokens=12, temperature=float(index % 2), seed=index, ignore_eos=True),
            )
            for index in range(count)
        ]
        deltas = run(engine)
        answers += [tokens_of(deltas[request_id, 0]) for request_id in ids]
    assert engine.runner.graphs is not None
    assert engine.runner.graphs._steps, "steps were recorded"
    return answers


def test_engines_in_two_threads_answer_as_each_alone(make_engine: MakeEngine, models: list[Qwen]) -> None:
    alone = [answer(make_engine, model) for model in models]
    assert alone[0] != alone[1]
    start = threading.Barrier(len(models), timeout=60)
    failures: list[str] = []

    def work(index: int) -> None:
        for number in range(ROUNDS):
            start.wait()
            try:
                if answer(make_engine, models[index]) != alone[index]:
                    failures.append(f"round {number}: model {index} answered otherwise")
            except Exception as error:
                failures.append(f"round {number}: model {index} raised {error!r}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
