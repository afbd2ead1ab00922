"""A resumed run whose steps have another size than those of its checkpoint: what the step number means then.

In: the settings that a checkpoint was written with, and today's. Out: the step to go on from, and a sentence where sizes differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwenkit.train.config import TrainConfig


def resumed_step(state: Mapping[str, Any], config: TrainConfig, world_size: int) -> tuple[int, str | None]:
    """The step of a checkpoint's `state`, counted in steps of this run's size, and a sentence where that is another one.

    Where num_train_epochs says how long the run is, steps are counted anew by the samples that were seen, so that the rest of the
    data is what is left. Where max_steps says it, they are steps, whatever their size.
    """
    step = int(state["progress"]["step"])
    earlier = {key: value for key, value in dict(state.get("config") or {}).items() if key in config.settings()}
    if not earlier or "world_size" not in state:
        return step, None
    before = step_size(TrainConfig.from_settings(earlier), int(state["world_size"]))
    now = step_size(config, world_size)
    if before == now:
        return step, None
    what = "packs" if config.packs else "samples"
    said = (
        f"a step has {now} {what} now (per_device_train_batch_size, gradient_accumulation_steps and processes), and had "
        f"{before} before the checkpoint"
    )
    if config.max_steps is not None:
        return step, f"{said}; max_steps, warm-up and save_steps count steps whatever their size"
    counted = step * before // now
    return counted, f"{said}; the {step * before} {what} that were seen are {counted} steps of this size"


def step_size(config: TrainConfig, world_size: int) -> int:
    """Samples (with packing: packs) of one step of all processes."""
    copies = world_size // (config.tensor_parallel * config.context_parallel)
    return config.batch_size * config.gradient_accumulation_steps * max(copies, 1)
