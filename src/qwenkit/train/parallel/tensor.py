"""Tensor parallelism: each matrix of a block cut over the processes of a node (Megatron-LM, arXiv 1909.08053, section 3).

In: a finished model and the mesh of one tensor group. Out: the same model, its matrices DTensors: q, k, v, gate, up and the head
cut by outputs, o and down by inputs, the embedding by rows of the vocabulary. Every process sees the whole stream of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from qwenkit import ops
from qwenkit.linear.lora import put
from qwenkit.model.layers import RMSNorm
from qwenkit.model.qwen import Qwen

BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
BY_INPUTS = ("o_proj", "down_proj")


def cut(model: Qwen, mesh: DeviceMesh) -> None:
    """Cut the matrices of `model` over `mesh`, in place; each process already holds them whole.

    Raises ValueError for heads or widths that do not divide, and for matrices that are no plain Linear (LoRA, 4-bit).
    """
    check_widths(model, mesh.size())
    plan: dict[str, ParallelStyle] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in BY_OUTPUTS:
            plan[name] = ColwiseParallel()
        elif leaf in BY_INPUTS:
            plan[name] = RowwiseParallel()
        elif leaf in ("q_norm", "k_norm") and isinstance(module, RMSNorm):
            put(model, name, _NormOfSomeHeads(module, mesh.get_group()))
    parallelize_module(model, mesh, plan, src_data_rank=None)
    model.lm_head.__class__ = _CutHead
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight  # each was cut for itself, both in the same way


def check_widths(model: Qwen, size: int) -> None:
    """ValueError for a model whose widths are no multiples of `size`, or whose Linears are of a kind that is not sharded."""
    config = model.config
    widths = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
    }
    if config.moe is not None:
        widths["moe_intermediate_size"] = config.moe.intermediate_size
        widths["shared_expert_intermediate_size"] = config.moe.shared_expert_intermediate_size or 0
    for name, width in widths.items():
        if width % size:
            raise ValueError(f"tensor_parallel is {size}, but the model's {name} is {width}, no multiple of it")
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in (*BY_OUTPUTS, *BY_INPUTS) and type(module) is not nn.Linear:
            raise ValueError(
                f"tensor_parallel is {size}, but {name} is a {type(module).__name__}; allowed are the methods full and freeze"
            )


class _CutHead(nn.Linear):
    """The head, cut by rows of the vocabulary. Its forward gathers the logits; its weight alone is only a part of the head."""


class _NormOfSomeHeads(RMSNorm):
    """q_norm and k_norm: the weight is everyone's, each process norms its own heads, so their gradients are added."""

    def __init__(self, norm: RMSNorm, group: dist.ProcessGroup) -> None:
        nn.Module.__init__(self)
        self.eps = norm.eps
        self.weight = norm.weight
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, _SumGradient.apply(self.weight, self.group), self.eps)


class _SumGradient(torch.autograd.Function):
    """The identity, whose gradient is summed over a group."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
