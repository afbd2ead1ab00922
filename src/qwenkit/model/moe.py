"""Mixture of experts: a router sends each token through a few of many MLPs (Qwen1.5-MoE, Qwen2-57B-A14B, Qwen3-MoE).

Experts are ordinary MLP modules under their Hugging Face names, so that whatever replaces a Linear replaces theirs too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from qwenkit.model.config import ModelConfig
from qwenkit.model.layers import MLP


class SparseMLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        moe = config.moe
        assert moe is not None
        self.num_experts_per_tok = moe.num_experts_per_tok
        self.norm_topk_prob = moe.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, moe.num_experts, bias=False)
        self.experts = nn.ModuleList(MLP(config.hidden_size, moe.intermediate_size) for _ in range(moe.num_experts))
        self.shared_expert: MLP | None = None
        self.shared_expert_gate: nn.Linear | None = None
        if moe.shared_expert_intermediate_size is not None:
            self.shared_expert = MLP(config.hidden_size, moe.shared_expert_intermediate_size)
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (T, hidden) -> (T, hidden). Routing probabilities are taken in fp32 over all experts, before the choice."""
        probabilities = F.softmax(self.gate(x), dim=-1, dtype=torch.float32)
        weights, chosen = probabilities.topk(self.num_experts_per_tok, dim=-1)  # (T, k)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.to(x.dtype)
        # Tokens sorted by expert: each expert runs once, over all its tokens, whatever the batch.
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        out = torch.zeros_like(x)
        for expert, places in zip(self.experts, order.split(counts), strict=True):
            if places.numel():
                token = places // self.num_experts_per_tok
                out = out.index_add(0, token, expert(x[token]) * weights.flatten()[places, None])
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            out = out + F.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return out
