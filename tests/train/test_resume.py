"""What the step of a checkpoint means to a run whose steps have another size."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwenkit.train.checkpoint import Saved
from qwenkit.train.config import TrainConfig
from qwenkit.train.resume import check_end, resumed_step

BEFORE = TrainConfig(per_device_train_batch_size=2, gradient_accumulation_steps=2)
STATE = {"step": 6, "config": BEFORE.settings(), "world_size": 1}


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
    assert resumed_step({"step": 6}, BEFORE, 1) == (6, None)


def test_the_size_that_was_saved_goes_before_what_follows_from_settings() -> None:
    step, said = resumed_step(STATE | {"sequences_per_step": 8}, BEFORE, 1)
    assert step == 12
    assert "a step has 4 samples now" in str(said)
    assert "had 8 before the checkpoint" in str(said)


def test_a_checkpoint_beyond_the_last_step_is_refused_but_for_what_counting_anew_adds() -> None:
    saved = Saved({"step": 6}, {})
    assert check_end(Path("checkpoint-6"), saved, 6, 6) == 6
    with pytest.raises(ValueError, match="checkpoint-6 is at step 6, but the run has 5: nothing is left to train"):
        check_end(Path("checkpoint-6"), saved, 6, 5)
    assert check_end(Path("checkpoint-6"), saved, 12, 11) == 11  # the last step of the data was a smaller one
