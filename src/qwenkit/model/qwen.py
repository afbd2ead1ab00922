"""The one model definition: every supported Qwen (and its Llama-shaped cousins) is this file read with another ModelConfig.

In: a flat stream of token ids, their positions, and a context that knows who attends to whom. Out: hidden states.
It knows nothing of caches, batches, phases, quantization, adapters, ranks or training. Parameter names are Hugging Face's.
"""

from __future__ import annotations

import torch
from torch import nn

from qwenkit import ops
from qwenkit.model.attention import Attention
from qwenkit.model.config import ModelConfig
from qwenkit.model.context import Context
from qwenkit.model.layers import MLP, RMSNorm
from qwenkit.model.moe import SparseMLP
from qwenkit.model.positions import Positions


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        sparse = config.moe is not None and layer in config.moe.sparse_layers
        self.mlp = (
            SparseMLP(config) if sparse else MLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        )

    def forward(self, x: torch.Tensor, positions: Positions, ctx: Context) -> torch.Tensor:
        x, normed = self.post_attention_layernorm.add(x, self.self_attn(self.input_layernorm(x), positions, ctx))
        return ops.add(x, self.mlp(normed))


class Trunk(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: torch.Tensor, positions: Positions, ctx: Context) -> torch.Tensor:
        x = self.embed_tokens(ids)
        for block in self.layers:
            x = block(x, positions, ctx)
        return self.norm(x)


class Qwen(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, ctx: Context) -> torch.Tensor:
        """ids (T,), positions (T,) -> hidden states (T, hidden_size), final norm applied.

        The caller decides which rows meet the vocabulary: see `logits`.
        """
        return self.model(ids, Positions.of(self.config, positions, ctx.rope_alpha), ctx)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (N, hidden_size) -> fp32 logits (N, vocab_size)."""
        return self.lm_head(hidden).float()
