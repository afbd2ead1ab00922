"""What a token's position means to attention, computed once a forward pass and shared by all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwenkit.model.config import ModelConfig
from qwenkit.model.rope import cos_sin, logn_scale


@dataclass(frozen=True)
class Positions:
    """cos and sin (T, R / 2) fp32; query_scale (T, 1, 1) fp32 or None (Qwen-1's LogN)."""

    cos: torch.Tensor
    sin: torch.Tensor
    query_scale: torch.Tensor | None

    @classmethod
    def of(cls, config: ModelConfig, positions: torch.Tensor, rope_alpha: torch.Tensor | None) -> Positions:
        """From positions (T,) and the context's rotary stretch (T,) or None."""
        cos, sin = cos_sin(config.rope, positions, rope_alpha)
        scale = None
        if config.logn_length is not None:
            scale = logn_scale(positions, config.logn_length)[:, None, None]
        return cls(cos, sin, scale)
