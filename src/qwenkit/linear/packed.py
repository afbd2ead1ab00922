"""Linears and embeddings whose weights lie packed in memory, in 4, 8 or 16 bits.

In: a stored tensor of a checkpoint and how to pack it. Out: modules that take the place of nn.Linear and nn.Embedding.
A tied head shares its embedding's packed matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qwenkit import ops
from qwenkit.ops.packed import ROWS, PackedWeight

Pack = Callable[[Any], PackedWeight]  # of a checkpoint's stored tensor


@dataclass
class Matrix:
    """A packed matrix, filled while the model is loaded; an embedding and a tied head hold the same one."""

    packed: PackedWeight | None = None

    @property
    def weight(self) -> PackedWeight:
        assert self.packed is not None, "used before it was loaded"
        return self.packed


class PackedLinear(nn.Module):
    """y = x W^T + bias with W packed; `bias` is fp32, padded like the packed rows."""

    def __init__(self, linear: nn.Linear, matrix: Matrix, pack: Pack) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.matrix = matrix
        self._pack = pack
        self.bias: torch.Tensor | None = None

    def fill(self, kind: str, stored: Any) -> None:
        """Take what the checkpoint has for the Linear's weight or bias."""
        if kind == "bias":
            self.bias = F.pad(stored.load().float(), (0, -self.out_features % ROWS))
        elif self.matrix.packed is None:
            self.matrix.packed = self._pack(stored)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.packed_linear(x, self.matrix.weight, self.bias)


class PackedEmbedding(nn.Module):
    """Rows of a packed matrix, in fp32."""

    def __init__(self, matrix: Matrix, pack: Pack) -> None:
        super().__init__()
        self.matrix = matrix
        self._pack = pack

    def fill(self, kind: str, stored: Any) -> None:
        """Take the checkpoint's embedding."""
        assert kind == "weight"
        self.matrix.packed = self._pack(stored)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return ops.embedding(ids, self.matrix.weight)


def packed_matrices(model: nn.Module) -> dict[str, Matrix]:
    """Every packed matrix of a model once, under the name of the first module that holds it."""
    found: dict[int, tuple[str, Matrix]] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | PackedEmbedding):
            found.setdefault(id(module.matrix), (name, module.matrix))
    return dict(found.values())
