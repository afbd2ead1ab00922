"""What of a model's key biases stays out of a quantized key/value cache.

Qwen1 to 2.5 add a bias to keys that in some layers is a hundred times as large as what varies from token to token; a cache of few
bits then holds little but the bias. In: a loaded model. Out: a `KeyBias` for each layer, None where there is nothing to gain.
"""

from __future__ import annotations

import math

import torch

from qwenkit.model.attention import Attention
from qwenkit.model.qwen import Qwen
from qwenkit.model.rope import cos_sin, ntk_alpha
from qwenkit.ops.cache import INT4, KeyBias

# Rounding a bias of this size costs as much in a cache of each type. What is smaller stays with the keys: taking it out would
# gain little, and slows attention down by each pair of channels.
WORTHWHILE = {torch.int8: 8.0, INT4: 0.5}


def key_biases(model: Qwen, dtype: torch.dtype, max_model_len: int) -> list[KeyBias | None]:
    """Of each layer the pairs of channels whose bias is large enough for a cache in `dtype` (int8 or int4), one table for all."""
    config = model.config
    biases: list[torch.Tensor | None] = [None] * config.num_hidden_layers
    if not config.qk_norm:  # a norm after the bias is not linear
        layers = [module for module in model.modules() if isinstance(module, Attention)]
        biases = [_large(attention.k_proj.bias, model, dtype) for attention in layers]
    if all(bias is None for bias in biases):
        return [None] * config.num_hidden_layers
    length = -(-max_model_len // 32) * 32
    stretches = [1.0]
    if config.rope.dynamic_ntk_length is not None:
        doublings = math.ceil(math.log2(max(max_model_len / config.rope.dynamic_ntk_length, 1)))
        trained = config.rope.dynamic_ntk_length
        stretches = sorted({float(ntk_alpha(trained * 2**power, trained)) for power in range(doublings + 1)})
    positions = torch.arange(length, device=model.model.norm.weight.device)
    tables = []
    for stretch in stretches:
        alpha = (
            None if config.rope.dynamic_ntk_length is None else torch.full((length,), stretch, device=positions.device)
        )
        tables.append(torch.cat(cos_sin(config.rope, positions, alpha), dim=1).T)  # (R, length)
    table = torch.cat(tables, dim=1).contiguous()
    return [None if bias is None else KeyBias(bias, table, length, tuple(stretches)) for bias in biases]


def _large(bias: torch.Tensor | None, model: Qwen, dtype: torch.dtype) -> torch.Tensor | None:
    """A layer's key bias (K, D) fp32 with 0 where it is small; channels that rotate together are kept together."""
    if bias is None:
        return None
    heads, dim, rotary = model.config.num_key_value_heads, model.config.head_dim, model.config.rope.rotary_dim
    kept = bias.detach().float()[: heads * dim].unflatten(0, (heads, dim)).clone()  # packed Linears pad their bias
    a, b = kept[:, :rotary].chunk(2, -1)
    small = torch.hypot(a, b) < WORTHWHILE[dtype]
    kept[:, :rotary][torch.cat((small, small), -1)] = 0
    return kept.contiguous() if bool(kept.any()) else None
