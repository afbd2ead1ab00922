"""LoRA: a Linear plus a product of two thin matrices, W x + scaling * B (A x) (arXiv 2106.09685); DoRA: the length of each row
of that sum a parameter of its own (arXiv 2402.09353).

`LoRALinear` trains one such update of any kind of Linear, merges it into a plain one and takes it out again. `AdaptedLinear`
serves many at a time: every row of the stream (T, in) gets the update that a `Routing` says, or none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qwenkit.linear.frozen import dequantized_weight
from qwenkit.linear.lora_product import lora_product

_ROWS = 1024  # of a matrix whose lengths are computed at once, so that its fp32 copy is small


def lora_scaling(rank: int, alpha: float, *, rslora: bool = False) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


@dataclass(frozen=True)
class LowRank:
    """An update of a matrix (out, in): a (r, in), b (out, r); of DoRA also the length of each row, magnitude (out,)."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (T, in) -> (T, out) in the dtype of a and b."""
        return F.linear(F.linear(x.to(self.a.dtype), self.a) * self.scaling, self.b)

    def matrix(self) -> torch.Tensor:
        """The update itself, (out, in) in fp32; DoRA's lengths are not in it."""
        return self.scaling * (self.b.float() @ self.a.float())

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """The matrix (out, in) with the update in it, computed in fp32."""
        total = weight.float() + self.matrix()
        if self.magnitude is None:
            return total
        return total * (self.magnitude.float() / _lengths(total))[:, None]

    def to(self, device: torch.device | str) -> LowRank:
        """The same on a device."""
        magnitude = None if self.magnitude is None else self.magnitude.to(device)
        return LowRank(self.a.to(device), self.b.to(device), self.scaling, magnitude)

    def lengths(self, weight: torch.Tensor) -> torch.Tensor:
        """Of each row of the matrix (out, in) and the update together: (out,) fp32."""
        a, parts = self.a.float(), zip(weight.split(_ROWS), self.b.split(_ROWS), strict=True)
        return torch.cat([_lengths(rows.float() + self.scaling * (b.float() @ a)) for rows, b in parts])


def _lengths(matrix: torch.Tensor) -> torch.Tensor:
    """Of each row; a row of zeros counts as 1, so that it can be divided by."""
    lengths = torch.linalg.vector_norm(matrix, dim=1)
    return torch.where(lengths > 0, lengths, 1.0)


class LoRALinear(nn.Module):
    """A frozen Linear of any kind with an update that is trained: lora_A (rank, in) and lora_B (out, rank) in `dtype`.

    At the start lora_B is zero, so the update is nothing. `dropout` is the share of inputs that the update does not see while
    training. With `dora` the lengths of the rows are trained too, lora_magnitude_vector (out,); a base that has no values yet
    needs `reset_lengths` when it has. `device` None is the base's. While `enabled` is False the base works alone. Raises
    ValueError for a rank or a dropout that is out of range.
    """

    def __init__(
        self,
        base: nn.Linear | nn.Module,
        rank: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = features(base)
        if not 1 <= rank <= min(self.in_features, self.out_features):
            raise ValueError(
                f"rank is {rank}, allowed are 1 to {min(self.in_features, self.out_features)} "
                f"for a Linear of {self.in_features} inputs and {self.out_features} outputs"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}, allowed is at least 0 and less than 1")
        self.base = base.requires_grad_(False)
        self.dropout = dropout
        self.scaling = lora_scaling(rank, alpha, rslora=rslora)
        self.enabled = True
        self.merged = False
        if device is None:
            device = next((tensor.device for tensor in (*base.parameters(), *base.buffers())), None)
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, dtype=dtype, device=device))
        self.lora_magnitude_vector: nn.Parameter | None = None
        if dora:
            self.lora_magnitude_vector = nn.Parameter(torch.empty(self.out_features, dtype=dtype, device=device))
        self._merged_by: torch.Tensor | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A as torch initialises a Linear, B zero, the lengths those of the base."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if not any(tensor.is_meta for tensor in self.base.parameters()):
            self.reset_lengths()

    @torch.no_grad()
    def reset_lengths(self) -> None:
        """DoRA's lengths are those of the matrix as it is now."""
        if self.lora_magnitude_vector is not None:
            self.lora_magnitude_vector.copy_(self._lengths(self.lora_magnitude_vector.dtype))

    @property
    def update(self) -> LowRank:
        return LowRank(self.lora_A, self.lora_B, self.scaling, self.lora_magnitude_vector)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (T, in) -> (T, out); the update is computed in x's dtype, whatever its own."""
        if isinstance(self.base, nn.Linear) and self._is_one_product(self.base, x):
            a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
            return lora_product(x, self.base.weight, self.base.bias, a, b, self.scaling)
        y = self.base(x)
        if self.merged or not self.enabled:
            return y
        dropped = F.dropout(x, self.dropout, self.training)
        update = F.linear(F.linear(dropped, self.lora_A.to(x.dtype)) * self.scaling, self.lora_B.to(x.dtype))
        if self.lora_magnitude_vector is None:
            return y + update.to(y.dtype)
        # Section 4.3 of the paper: the lengths that are divided by count as constants in the gradient.
        factor = (self.lora_magnitude_vector / self._lengths(x.dtype)).to(y.dtype)
        bias = self.base.bias
        if bias is None:
            return factor * (y + update.to(y.dtype))
        bias = bias.to(y.dtype)
        return factor * (y - bias + update.to(y.dtype)) + bias

    def _is_one_product(self, base: nn.Linear, x: torch.Tensor) -> bool:
        if self.merged or not self.enabled or self.lora_magnitude_vector is not None:
            return False
        if type(base) is not nn.Linear or (self.dropout and self.training) or x.ndim != 2:
            return False
        weight, bias = base.weight, base.bias
        plain = type(weight) is nn.Parameter and not weight.requires_grad and weight.dtype == x.dtype
        alike = plain and (bias is None or bias.dtype == x.dtype)
        # the meta device, where plans are made, knows no autocast
        return alike and (x.is_meta or not torch.is_autocast_enabled(x.device.type))

    @torch.no_grad()
    def _lengths(self, dtype: torch.dtype) -> torch.Tensor:
        if isinstance(self.base, nn.Linear):
            dtype = self.base.weight.dtype  # as it lies there, without a copy
        return self.update.lengths(dequantized_weight(self.base, dtype))

    @torch.no_grad()
    def merge(self) -> None:
        """Put the update into the base's weight. ValueError where the base is no plain Linear, whose weight can be changed."""
        if not self.merged:
            base = self._plain_base()
            if self.lora_magnitude_vector is not None:
                self._merged_by = self.lora_magnitude_vector.float() / self.update.lengths(base.weight)
            base.weight.copy_(self.update.merged(base.weight))
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo `merge`, up to the rounding of the weight's dtype."""
        if self.merged:
            base = self._plain_base()
            weight = base.weight.float()
            if self._merged_by is not None:
                weight = weight / self._merged_by[:, None]
            base.weight.copy_(weight - self.update.matrix())
            self.merged = False

    def _plain_base(self) -> nn.Linear:
        if not isinstance(self.base, nn.Linear):
            raise ValueError(f"an update can be merged into a plain Linear only, not into a {type(self.base).__name__}")
        return self.base


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside it every LoRALinear is its base alone: the model as it was before training."""
    found = [module for module in model.modules() if isinstance(module, LoRALinear) and module.enabled]
    for module in found:
        module.enabled = False
    try:
        yield
    finally:
        for module in found:
            module.enabled = True


def merge_lora(model: nn.Module) -> list[str]:
    """Put every LoRALinear's base, with the update in its weight, back in its place; returns their names."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    for name, module in found:
        module.merge()
        put(model, name, module.base)
    return [name for name, _ in found]


@dataclass
class Routing:
    """Which adapter works on which rows of the stream that is computed now: (adapter, rows (n,) int64 or None for all).

    One object, shared by all AdaptedLinears of a model; empty wherever nobody set it.
    """

    groups: tuple[tuple[str, torch.Tensor | None], ...] = field(default=())


class AdaptedLinear(nn.Module):
    """A Linear of any kind, and by name the updates of it that rows may ask for."""

    def __init__(self, base: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = features(base)
        self.routing = routing
        self.updates: dict[str, LowRank] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (T, in) -> (T, out)."""
        y: torch.Tensor = self.base(x)
        for adapter, rows in self.routing.groups:
            update = self.updates.get(adapter)
            if update is None:
                continue
            y = y + update(x).to(y.dtype) if rows is None else y.index_add(0, rows, update(x[rows]).to(y.dtype))
        return y


def features(linear: Any) -> tuple[int, int]:
    """Inputs and outputs of a Linear of any kind."""
    return linear.in_features, linear.out_features


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every Linear of whatever kind by name; of one that keeps another inside, the outer one."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(outer in found for outer in _parents(name))
        if not inside and hasattr(module, "in_features") and hasattr(module, "out_features"):
            found[name] = module
    return found


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set the submodule of that dotted name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]
