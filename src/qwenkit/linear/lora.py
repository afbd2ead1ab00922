"""LoRA: a Linear plus a product of two thin matrices, W x + scaling * B (A x) (arXiv 2106.09685).

`LoRALinear` trains one such update of any kind of Linear, merges it into a plain one and takes it out again. `AdaptedLinear`
serves many at a time: every row of the stream (T, in) gets the update that a `Routing` says, or none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def lora_scaling(rank: int, alpha: float, *, rslora: bool = False) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


@dataclass(frozen=True)
class LowRank:
    """An update of a matrix (out, in): a (r, in), b (out, r)."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (T, in) -> (T, out) in the dtype of a and b."""
        return F.linear(F.linear(x.to(self.a.dtype), self.a) * self.scaling, self.b)

    def matrix(self) -> torch.Tensor:
        """The update itself, (out, in) in fp32."""
        return self.scaling * (self.b.float() @ self.a.float())


class LoRALinear(nn.Module):
    """A frozen Linear of any kind with an update that is trained: lora_A (rank, in) and lora_B (out, rank) in `dtype`.

    At the start lora_B is zero, so the update is nothing. `dropout` is the share of inputs that the update does not see while
    training. Raises ValueError for a rank or a dropout that is out of range.
    """

    def __init__(
        self,
        base: nn.Linear | nn.Module,
        rank: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        dtype: torch.dtype = torch.float32,
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
        self.merged = False
        device = next((tensor.device for tensor in (*base.parameters(), *base.buffers())), None)
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, dtype=dtype, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A as torch initialises a Linear, B zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def update(self) -> LowRank:
        return LowRank(self.lora_A, self.lora_B, self.scaling)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if self.merged:
            return y
        return y + self.update(F.dropout(x, self.dropout, self.training)).to(y.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the base's weight. ValueError where the base is no plain Linear, whose weight can be changed."""
        if not self.merged:
            self._add(self.update.matrix())
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo `merge`, up to the rounding of the weight's dtype."""
        if self.merged:
            self._add(-self.update.matrix())
            self.merged = False

    def _add(self, matrix: torch.Tensor) -> None:
        if not isinstance(self.base, nn.Linear):
            raise ValueError(f"an update can be merged into a plain Linear only, not into a {type(self.base).__name__}")
        self.base.weight.copy_(self.base.weight.float() + matrix)


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
