"""What a run of training is made of, and how far it is: the seams between the loop and data, methods and preferences.

In: nothing. Out: the protocols that a data stream and an objective keep, the plain objective of next tokens, and the records that
the loop is given (Parts), keeps (Progress) and gives back (Outcome).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from qwenkit.model.qwen import Qwen
from qwenkit.train.batch import TrainBatch
from qwenkit.train.log import Meter
from qwenkit.train.loss import token_loss_sum
from qwenkit.train.parallel import World


class Stream(Protocol):
    """Micro-batches of this process; every process gets the same number. Iterating begins where the state says and ends with
    the epoch; iterating again is the next epoch."""

    @property
    def batches_per_epoch(self) -> int | None: ...

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to, from 0."""
        ...

    def __iter__(self) -> Iterator[TrainBatch]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Objective(Protocol):
    """What is made small. `weight` says over how many (targets, pairs) a batch's losses are summed, without computing them."""

    def weight(self, batch: TrainBatch) -> int: ...

    def __call__(self, model: Qwen, batch: TrainBatch) -> tuple[torch.Tensor, Mapping[str, float]]:
        """The sum of the losses, and sums of other numbers to be logged as means."""


@dataclass
class Progress:
    """How far a run is; all of it is saved."""

    step: int = 0
    halvings: int = 0  # of micro-batches, because memory ran out
    skipped: int = 0  # steps in a row whose loss was not finite
    loss_scale: float = 1.0
    good_steps: int = 0  # since the loss scale was changed
    best: float | None = None
    best_step: int | None = None
    waited: int = 0  # evaluations since the best
    evaluated: int = 0  # the step of the last evaluation
    tokens: int = 0


@dataclass(frozen=True)
class Outcome:
    """Why a run ended: done, early (stopping), or interrupted; with the last losses."""

    reason: str
    step: int
    loss: float
    eval_loss: float | None
    best_step: int | None


@dataclass
class Parts:
    """What a run is made of."""

    model: Qwen
    parameters: dict[str, nn.Parameter]
    objective: Objective
    train: Stream
    evaluation: Stream | None = None
    world: World = field(default_factory=World)
    meter: Meter | None = None
    answers: Callable[[], list[tuple[str, str]]] | None = None  # to the sample prompts
    beside: Callable[[Path], None] | None = None  # what else a checkpoint folder gets


@dataclass(frozen=True)
class NextTokens:
    """The objective of pt and sft: cross-entropy over targets."""

    chunk: int | None = None

    def weight(self, batch: TrainBatch) -> int:
        return batch.num_targets

    def __call__(self, model: Qwen, batch: TrainBatch) -> tuple[torch.Tensor, Mapping[str, float]]:
        return token_loss_sum(model, batch, chunk=self.chunk)[0], {}
