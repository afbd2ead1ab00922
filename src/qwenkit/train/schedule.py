"""The learning rate of a step, a pure function of its number: nothing to save, nothing to restore.

In: the step (from 0), the number of steps, a TrainConfig. Out: the learning rate. Warm-up is linear from 0; at step 0 of a
warm-up it is 0, as in transformers' schedules, so that curves can be laid side by side.
"""

from __future__ import annotations

import math

from qwenkit.train.config import TrainConfig


def warmup_length(total: int, config: TrainConfig) -> int:
    """Steps in which the learning rate rises."""
    if config.lr_scheduler_type == "constant":
        return 0
    if config.warmup_steps:
        return steps_of(config.warmup_steps, total)
    return math.ceil(total * config.warmup_ratio)


def steps_of(value: float, total: int) -> int:
    """A number of steps that may be a share of `total`, as transformers reads values below 1."""
    return math.ceil(value * total) if value < 1 else int(value)


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Of step `step` (0 to total - 1): warm-up, then cosine (arXiv 1608.03983), linear, constant, or warm-up-stable-decay
    (arXiv 2404.06395, linear in the decay) down to `min_lr_ratio` of the largest."""
    return config.learning_rate * _factor(step, total, config)


def _factor(step: int, total: int, config: TrainConfig) -> float:
    warmup = warmup_length(total, config)
    if step < warmup:
        return step / warmup
    kind, floor = config.lr_scheduler_type, config.min_lr_ratio
    if kind.startswith("constant"):
        return 1.0
    start = max(warmup, total - math.ceil(total * config.decay_ratio)) if kind == "wsd" else warmup
    progress = min(max((step - start) / max(1, total - start), 0.0), 1.0)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if kind == "cosine" else 1 - progress
    return floor + (1 - floor) * left
