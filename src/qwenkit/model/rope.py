"""Rotary position embedding in the variants that Qwen checkpoints use, and Qwen-1's LogN query scaling.

In: positions (T,) and, for Qwen-1, a stretch `alpha` per token that the request's context decides.
Out: cos and sin (T, rotary_dim / 2) in fp32, computed once a forward pass and shared by all layers.
Sources: RoFormer (arXiv 2104.09864); linear interpolation (2306.15595); YaRN (2309.00071); dynamic NTK and LogN as the original
Qwen-1 code computes them (golden data in the tests).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

ROPE_TYPES = ("default", "linear", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary settings. `factor`, `original_length` and the betas are read only by the types that use them.

    `dynamic_ntk_length` is the trained length of Qwen-1's per-request NTK stretch, None where it is off.
    """

    theta: float
    rotary_dim: int
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    dynamic_ntk_length: int | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], *, head_dim: int, max_position: int) -> RopeConfig:
        """Read `rope_parameters` (new files) or `rope_theta` with `rope_scaling` (older ones) of a config.json."""
        scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        if kind not in ROPE_TYPES:
            raise ValueError(f"config: rope type {kind!r} is not supported; known types are {', '.join(ROPE_TYPES)}")
        theta = scaling.get("rope_theta") or config.get("rope_theta") or 10000.0
        partial = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
        rotary_dim = int(head_dim * partial)
        if kind == "default":
            return cls(theta=theta, rotary_dim=rotary_dim)
        factor = scaling.get("factor")
        original = scaling.get("original_max_position_embeddings") or max_position
        if factor is None and kind == "yarn":
            factor = max_position / original
        if not isinstance(factor, int | float) or factor < 1:
            raise ValueError(f"config: rope factor is {factor!r}, but a number of at least 1 is needed")
        return cls(
            theta=theta,
            rotary_dim=rotary_dim,
            kind=kind,
            factor=float(factor),
            original_length=original,
            beta_fast=scaling.get("beta_fast") or 32.0,
            beta_slow=scaling.get("beta_slow") or 1.0,
            attention_factor=_attention_factor(scaling, float(factor)) if kind == "yarn" else 1.0,
            truncate=scaling.get("truncate", True),
        )


def _attention_factor(scaling: Mapping[str, Any], factor: float) -> float:
    """YaRN's temperature on the attention logits, folded into cos and sin (2309.00071, section 3.4)."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    above, below = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return mscale(above) / mscale(below) if above and below else mscale(1.0)


def inverse_frequencies(config: RopeConfig, device: torch.device) -> torch.Tensor:
    """Angle per position of each rotated pair: (rotary_dim / 2,) fp32."""
    dim = config.rotary_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    plain = 1.0 / (config.theta**exponents)
    if config.kind == "default":
        return plain
    if config.kind == "linear":
        return plain / config.factor

    def pair_with(rotations: float) -> float:  # the (fractional) pair that turns so often over the trained length
        return dim * math.log(config.original_length / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = pair_with(config.beta_fast), pair_with(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / ((high - low) or 0.001)
    interpolated = ramp.clamp(0, 1)
    return plain / config.factor * interpolated + plain * (1 - interpolated)


def cos_sin(
    config: RopeConfig, positions: torch.Tensor, alpha: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin of every token's angles, each (T, rotary_dim / 2) fp32.

    `alpha` (T,) fp32 stretches the base by alpha^(r / (r - 2)) for each token: Qwen-1's dynamic NTK.
    """
    if alpha is None:
        angles = positions.float()[:, None] * inverse_frequencies(config, positions.device)
    else:
        dim = config.rotary_dim
        base = config.theta * alpha ** (dim / (dim - 2))
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
        angles = positions.float()[:, None] / base[:, None] ** exponents
    return angles.cos() * config.attention_factor, angles.sin() * config.attention_factor


def ntk_alpha(length: int, trained_length: int) -> float:
    """Qwen-1's stretch for a prompt of `length` tokens: 1 up to the trained length, then 3 up to twice, 7 up to four times, …

    It is chosen once, from the prompt, and kept while the answer grows.
    """
    return max(2 ** math.ceil(math.log2(length / trained_length) + 1) - 1, 1)


def logn_scale(positions: torch.Tensor, trained_length: int) -> torch.Tensor:
    """Qwen-1's query scale (T,) fp32: log of the position in base `trained_length` beyond that length, 1 before."""
    count = (positions + 1).float()
    return torch.where(count > trained_length, count.log() / math.log(trained_length), 1.0)
