"""Matrices that are multiplied with but never trained, kept in fewer bits than they are computed in.

In: activations, and a way to make the matrix. Out: their product, differentiable in the activations. The matrix is made for each
use, forwards and again backwards, so that no dequantized copy of it outlives the product. `PackedBase` keeps what a quantized
checkpoint (GPTQ, AWQ, GGUF) has, as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qwenkit.linear.packed import Pack
from qwenkit.ops.packed import PackedWeight, dequantize

Dequantize = Callable[[torch.dtype], torch.Tensor]
# From a parameter to what this process holds of it, and where in the whole that begins.
Place = Callable[[torch.Tensor], tuple[torch.Tensor, tuple[int, ...]]]


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Dequantize) -> torch.Tensor:
        ctx.weight = weight
        return F.linear(x, weight(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.weight(grad.dtype), None


def frozen_linear(x: torch.Tensor, weight: Dequantize, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (T, in) times the matrix (out, in) that `weight(dtype)` makes, plus bias (out,): (T, out) in x's dtype."""
    y: torch.Tensor = _FrozenProduct.apply(x, weight)
    return y if bias is None else y + bias.to(y.dtype)


_TENSORS = ("q", "scale", "offset", "row_scale")  # of a PackedWeight


class PackedBase(nn.Module):
    """A Linear whose weight stays packed as its checkpoint stores it, under adapters that are trained.

    The tensors of the PackedWeight are parameters that want no gradient, so that they move with the module.
    """

    def __init__(self, linear: nn.Linear, pack: Pack) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._pack = pack
        self._form: tuple[int, int, int, int] | None = None
        self.q = nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
        for name in _TENSORS[1:]:
            self.register_parameter(name, None)
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)

    def fill(self, kind: str, stored: Any) -> None:
        """Take the checkpoint's weight."""
        assert kind == "weight"
        self.take(self._pack(stored))

    def take(self, packed: PackedWeight) -> None:
        """Keep a matrix that is packed already, where this module lies."""
        device = self.q.device
        self._form = packed.bits, packed.rows, packed.cols, packed.group
        for name in _TENSORS:
            value = getattr(packed, name)
            if value is not None:
                setattr(self, name, nn.Parameter(value.to(device), requires_grad=False))

    @property
    def packed(self) -> PackedWeight:
        """The matrix where it lies now."""
        assert self._form is not None, "used before it was loaded"
        return PackedWeight(*self._form, **{name: getattr(self, name) for name in _TENSORS})

    @torch.no_grad()
    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix (out, in)."""
        return dequantize(self.packed).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (T, in) -> (T, out)."""
        return frozen_linear(x, self.dequantized, self.bias)


def dequantized_weight(linear: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The matrix (out, in) of a Linear of any kind. ValueError for one that cannot say it."""
    if isinstance(linear, nn.Linear):
        return linear.weight.detach().to(dtype)
    make = getattr(linear, "dequantized", None)
    if make is None:
        raise ValueError(f"a {type(linear).__name__} has no matrix to compute with")
    weight: torch.Tensor = make(dtype)
    return weight
