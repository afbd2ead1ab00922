"""Runner: owns the model and the memory of the key/value cache. Rows go in, logits of the rows that sample come out.

A step in which every row decodes is replayed from a recording where that is possible (graphs.py); any other, and any with a
row that uses an adapter, is run as the model's code says.
"""

from __future__ import annotations

import torch

from qwenkit import ops
from qwenkit.engine.adapters import Adapters
from qwenkit.engine.batch import Batch, Computed
from qwenkit.engine.graphs import DecodeGraphs
from qwenkit.engine.key_bias import key_biases
from qwenkit.engine.scheduler import Row
from qwenkit.model.config import ModelConfig
from qwenkit.model.qwen import Qwen
from qwenkit.ops.cache import QUANTIZED, KeyBias, KVCache, bytes_per_token


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers."""
    return config.num_hidden_layers * bytes_per_token(config.num_key_value_heads, config.head_dim, dtype)


class Runner:
    """`caches[layer]` has num_blocks + 1 blocks in cache_dtype (by default the model's dtype); the last block is spare.

    The memory is reserved at once and, on a CPU, becomes resident as blocks are first written. `split_key_bias`: a quantized
    cache holds keys without the model's key bias (ops.cache.KeyBias).
    """

    def __init__(
        self,
        model: Qwen,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        graphs: bool = True,
        cache_dtype: torch.dtype | None = None,
        split_key_bias: bool = True,
    ) -> None:
        self.model = model.eval()
        self.num_blocks, self.block_size = num_blocks, block_size
        norm = model.model.norm.weight
        self.device = norm.device
        config = model.config
        heads, dim = config.num_key_value_heads, config.head_dim
        dtype = cache_dtype or norm.dtype
        biases: list[KeyBias | None] = [None] * config.num_hidden_layers
        if split_key_bias and dtype in QUANTIZED:
            biases = key_biases(model, dtype, max_model_len)
        self.caches = [
            KVCache.empty(num_blocks + 1, block_size, heads, dim, dtype, self.device, key_bias=bias) for bias in biases
        ]
        self.adapters = Adapters(model)
        native = ops.native()
        self.graphs: DecodeGraphs | None = None
        if graphs and native is not None and self.device.type == "cpu" and norm.dtype == torch.float32:
            max_blocks = -(-max_model_len // block_size)
            self.graphs = DecodeGraphs(model, self.caches, max_blocks=max_blocks, native=native)

    def run(self, rows: list[Row]) -> Computed:
        """Compute the rows' tokens."""
        adapted = any(row.sequence.adapter is not None for row in rows)
        if self.graphs is not None and not adapted:
            replayed = self.graphs.run(rows)
            if replayed is not None:
                return replayed
        return self._compute(rows)

    @torch.inference_mode()
    def _compute(self, rows: list[Row]) -> Computed:
        batch = Batch.of(rows, self.caches, self.device)
        with self.adapters.routed((row.sequence.adapter, row.num_tokens) for row in rows):
            hidden = self.model(batch.ids, batch.positions, batch.ctx)
        with self.adapters.routed((row.sequence.adapter, 1) for row in rows if row.samples):
            return Computed(self.model.logits(hidden[batch.last_rows]), hidden)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, adapter: str | None = None) -> torch.Tensor:
        """hidden (N, hidden_size) -> fp32 logits (N, vocab_size), with the head's update of the adapter of that key."""
        with self.adapters.routed([(adapter, hidden.shape[0])]):
            return self.model.logits(hidden)
