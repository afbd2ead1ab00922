"""Attention of one layer: project, normalise, rotate, ask the context, project back."""

from __future__ import annotations

import torch
from torch import nn

from qwenkit import ops
from qwenkit.model.config import ModelConfig
from qwenkit.model.context import Context
from qwenkit.model.layers import RMSNorm
from qwenkit.model.positions import Positions


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.window = config.sliding_windows[layer]
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: torch.Tensor, positions: Positions, ctx: Context) -> torch.Tensor:
        """x (T, hidden) -> (T, hidden)."""
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))  # (T, H, D)
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim)))  # (T, K, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        q = ops.rotate(q, positions.cos, positions.sin)
        k = ops.rotate(k, positions.cos, positions.sin)
        if positions.query_scale is not None:
            q = q * positions.query_scale.to(q.dtype)
        return self.o_proj(ctx.attend(self.layer, q, k, v, window=self.window).flatten(1))
