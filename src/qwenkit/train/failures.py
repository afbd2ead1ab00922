"""What goes wrong in a training step, recognised and put into words.

In: an exception, or the losses of a step. Out: whether memory ran out; a sentence that names the records of a batch at fault.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from qwenkit.train.batch import TrainBatch

_NAMED_ORIGINS = 8


def is_out_of_memory(error: BaseException) -> bool:
    """True for memory that ran out. Torch has a class for it on GPUs; on a CPU its allocator only says so."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def describe_not_finite(
    step: int, batches: Sequence[TrainBatch], losses: Sequence[torch.Tensor], total: float, norm: float
) -> str:
    """Name the records of the batches whose loss is not finite, or of all where only the gradient's norm is not."""
    guilty = [batch for batch, loss in zip(batches, losses, strict=True) if not bool(loss.isfinite())]
    origins = list(dict.fromkeys(origin for batch in guilty or batches for origin in batch.origins))
    more = len(origins) - _NAMED_ORIGINS
    named = ", ".join(origins[:_NAMED_ORIGINS]) + (f" and {more} more" if more > 0 else "")
    what = f"the gradient's norm is {norm}" if math.isfinite(total) else f"the loss is {total}"
    return f"step {step}: {what}; its batch holds {named}"
