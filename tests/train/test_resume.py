"""What the step of a checkpoint means to a run whose steps have another size."""

from dataclasses import replace
from typing import Any

import pytest

from qwenkit.train.config import TrainConfig
from qwenkit.train.resume import resumed_step

BEFORE = TrainConfig(per_device_train_batch_size=2, gradient_accumulation_steps=2)
STATE = {"progress": {"step": 6}, "config": BEFORE.settings(), "world_size": 1}


@pytest.mark.parametrize(
    ("changes", "processes", "step", "said"),
    [
        ({}, 1, 6, None),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, 1, 6, None),
        ({"gradient_accumulation_steps": 4}, 1, 3, "the 24 samples that were seen are 3 steps"),
        ({}, 4, 1, "a step has 16 samples now"),
        ({"gradient_accumulation_steps": 4, "max_steps": 10}, 1, 6, "max_steps, warm-up and save_steps count steps"),
        ({"packing": True}, 1, 6, None),
    ],
)
def test_steps_of_another_size(changes: dict[str, Any], processes: int, step: int, said: str | None) -> None:
    found, sentence = resumed_step(STATE, replace(BEFORE, **changes), processes)
    assert found == step
    assert sentence is None if said is None else said in str(sentence)


def test_an_older_checkpoint_says_nothing() -> None:
    assert resumed_step({"progress": {"step": 6}}, BEFORE, 1) == (6, None)
