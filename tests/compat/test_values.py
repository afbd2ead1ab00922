"""Values of other trainers' keys, as ours."""

from typing import Any

import pytest

from qwenkit.compat.values import known_reporters, one_adapter, translate_schedule
from qwenkit.train.config import TrainConfig


@pytest.mark.parametrize(
    ("kind", "arguments", "expected"),
    [
        ("linear", None, {"lr_scheduler_type": "linear"}),
        ("cosine_with_restarts", {"num_cycles": 1}, {"lr_scheduler_type": "cosine"}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}, {"lr_scheduler_type": "cosine", "min_lr_ratio": 0.1}),
        ("cosine_with_min_lr", '{"min_lr": 1e-5}', {"lr_scheduler_type": "cosine", "min_lr_ratio": 0.1}),
        ("polynomial", {"lr_end": 0.0, "power": 1.0}, {"lr_scheduler_type": "linear", "min_lr_ratio": 0.0}),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 20, "decay_type": "linear"},
            {"lr_scheduler_type": "wsd", "decay_ratio": 0.2},
        ),
    ],
)
def test_schedules(kind: str, arguments: Any, expected: dict[str, Any]) -> None:
    found = translate_schedule(kind, arguments, 1e-4, 100)
    assert found == pytest.approx(expected, abs=1e-12) if "min_lr_ratio" in expected else found == expected
    TrainConfig.from_settings(found)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("cosine_with_restarts", {"num_cycles": 3}, "num_cycles is 3, allowed for cosine_with_restarts is 1 only"),
        ("cosine_with_min_lr", None, "needs min_lr or min_lr_rate"),
        ("polynomial", {"power": 2}, "power is 2"),
        ("warmup_stable_decay", {"num_decay_steps": 2}, "whose decay is a cosine"),
        ("linear", {"num_cycles": 2}, "lr_scheduler_kwargs has 'num_cycles', allowed for linear are none"),
        ("cosine_with_min_lr", {"min_lr": "x"}, "min_lr is 'x', allowed is a number"),
        ("linear", "{", "allowed is an object in JSON"),
        ("linear", [1], "allowed is an object"),
    ],
)
def test_schedules_that_are_not_known(kind: str, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        translate_schedule(kind, arguments, 1e-4, 100)


def test_lists_of_names() -> None:
    assert known_reporters("none", tolerant=True) == ([], [])
    assert known_reporters(["wandb", "clearml"], tolerant=True) == (["wandb"], ["clearml"])
    assert known_reporters("wandb,clearml", tolerant=False) == (["wandb", "clearml"], [])
    assert one_adapter(" a ") == one_adapter(["a"]) == "a"
    assert one_adapter(None) is one_adapter("") is None
    with pytest.raises(ValueError, match="adapter is a, b, but one adapter is allowed"):
        one_adapter("a,b")
