"""Activation checkpointing: of a block only its input is kept, the rest is computed again backwards (arXiv 1604.06174).

In: a finished model, before it is laid over processes. Out: the same model; names of modules and parameters stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from qwenkit.model.qwen import Block, Qwen

__all__ = ["recompute_blocks"]


def recompute_blocks(model: Qwen) -> None:
    """Let every block keep its input only, wherever gradients are wanted. To be called once."""
    for block in model.model.layers:
        assert isinstance(block, Block)
        block.__dict__["forward"] = _Recomputed(block)


class _Recomputed:
    """A block's forward, computed again for its backward. It takes the method from the class, so that copies of the model
    that a deepcopy makes refer to their own block."""

    def __init__(self, block: Block) -> None:
        self.block = block

    def __call__(self, *args: Any) -> torch.Tensor:
        forward = Block.forward.__get__(self.block)
        if not torch.is_grad_enabled():
            return forward(*args)
        out: torch.Tensor = checkpoint(forward, *args, use_reentrant=False)
        return out
