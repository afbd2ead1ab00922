"""The ops of `ops/reference.py` by the native kernels, on contiguous fp32 CPU tensors that need no gradient.

Shapes are those of the reference. Each function allocates its result, says which tensors it reads and writes, and submits one
operation (packed linears: two, since activations are quantized first).
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import TypeAlias

import torch

from qwenkit.ops.cache import INT4, KVCache
from qwenkit.ops.cpu.program import Executor, Kind
from qwenkit.ops.packed import PackedWeight

MAX_HEAD_DIM, MAX_GROUP = 256, 128  # cache.h: MAX_DIM; attention.h: heads that share a key head within MAX_PASS
PEAK_PARTS = 64  # sample.h
PART_KEYS, ACCUMULATOR, MOST_SHARED_PARTS = 256, 32, 4096  # attention.h: the first two
CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.int8, INT4)


Quantized: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class _LastQuantized(threading.local):
    """The activations that this Python thread quantized last: a key, the tensor, and the result."""

    value: tuple[tuple[object, ...], torch.Tensor, Quantized] | None = None


class NativeOps:
    """The ops on an executor. Python threads may call them at the same time."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self._counters = torch.zeros(8 * (os.cpu_count() or 1), dtype=torch.int32)  # all 0 between programs
        self._last = _LastQuantized()

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y = self.executor.empty(*x.shape)
        dim = x.shape[-1]
        self.executor.submit(Kind.RMS_NORM, (y, x, weight, None, None), (x.numel() // dim, dim), writes=(y,), x=eps)
        return y

    def add_rms_norm(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total, normed = self.executor.empty(*x.shape), self.executor.empty(*x.shape)
        dim = x.shape[-1]
        pointers = (normed, x, weight, y, total)
        self.executor.submit(Kind.RMS_NORM, pointers, (x.numel() // dim, dim), writes=(normed, total), x=eps)
        return total, normed

    def silu_mul(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        y = self.executor.empty(*gate.shape)
        self.executor.submit(Kind.SILU_MUL, (y, gate, up), (gate.numel(),), writes=(y,))
        return y

    def add(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = self.executor.empty(*a.shape)
        self.executor.submit(Kind.ADD, (y, a, b), (a.numel(),), writes=(y,))
        return y

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        y = self.executor.empty(*x.shape)
        tokens, heads, dim = x.shape
        numbers = (tokens, heads, dim, cos.shape[-1])
        self.executor.submit(Kind.ROTATE, (y, x, cos, sin), numbers, writes=(y,))
        return y

    def embedding(self, ids: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        y = self.executor.empty(ids.shape[0], weight.cols)
        numbers = (ids.shape[0], weight.rows, weight.cols, weight.group, weight.bits)
        pointers = (y, weight.q, weight.scale, weight.offset, weight.row_scale, ids)
        self.executor.submit(Kind.EMBED, pointers, numbers, writes=(y,))
        return y

    def packed_linear(self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        """`bias`, where there is one, is padded to the weight's padded rows."""
        tokens = x.shape[0]
        y = self.executor.empty(tokens, weight.rows)
        numbers = (tokens, weight.rows, weight.cols, weight.group, weight.bits)
        if weight.bits == 16:
            pointers = (y, weight.q, None, None, None, x, None, None, bias)
            self.executor.submit(Kind.LINEAR_BF16, pointers, numbers, writes=(y,))
            return y
        q, scale, total = self._quantized(x, weight.group)
        weights = (weight.q, weight.scale, weight.offset, weight.row_scale)
        self.executor.submit(Kind.LINEAR, (y, *weights, q, scale, total, bias), numbers, writes=(y,))
        return y

    def _quantized(self, x: torch.Tensor, group: int) -> Quantized:
        """int8 activations with a scale and a sum for each group; shared by linears that read the same x one after the other."""
        # Inference tensors do not count their changes; those that the model gives are results of ops, which nothing changes.
        key = (id(self.executor.recording), group, None if x.is_inference() else x._version)
        last = self._last.value
        if last is not None and last[1] is x and last[0] == key:
            return last[2]
        tokens, dim = x.shape
        q = self.executor.empty(tokens, dim, dtype=torch.int8)
        scale, total = self.executor.empty(tokens, dim // group), self.executor.empty(tokens, dim // group)
        self.executor.submit(Kind.QUANTIZE, (q, scale, total, x), (tokens, dim, group), writes=(q, scale, total))
        self._last.value = key, x, (q, scale, total)
        return q, scale, total

    def write_cache(
        self, k: torch.Tensor, v: torch.Tensor, cache: KVCache, slots: torch.Tensor, places: torch.Tensor | None = None
    ) -> None:
        memory = (cache.keys, cache.values, cache.key_scale, cache.value_scale)
        pointers: tuple[torch.Tensor | None, ...] = (k, v, *memory, slots)
        numbers: tuple[int, ...] = (k.shape[0], cache.heads, cache.head_dim, cache.block_size, cache.pack)
        if cache.key_bias is not None:
            table = cache.key_bias.table
            pointers = (*pointers, cache.key_bias.bias, table, places)
            numbers = (*numbers, table.shape[1], table.shape[0] // 2)
        writes = [tensor for tensor in memory if tensor is not None]
        self.executor.submit(Kind.WRITE_CACHE, pointers, numbers, writes=writes)

    def paged_attention(
        self,
        q: torch.Tensor,
        cache: KVCache,
        query_starts: torch.Tensor,
        context_lengths: torch.Tensor,
        block_tables: torch.Tensor,
        window: int | None,
        places: torch.Tensor | None = None,
    ) -> torch.Tensor:
        out = self.executor.empty(*q.shape)
        rows, max_blocks = block_tables.shape
        dim, items = cache.head_dim, rows * cache.heads
        slots = self._shared_parts(items, -(-max_blocks * cache.block_size // PART_KEYS))
        meeting = self.executor.empty(max(slots, 1), q.shape[1] // cache.heads, dim + ACCUMULATOR)
        numbers = (rows, q.shape[1], cache.heads, dim, cache.block_size, max_blocks, window or 0, cache.pack, slots)
        memory = (cache.keys, cache.values, cache.key_scale, cache.value_scale)
        also: tuple[torch.Tensor, ...] = ()
        key_bias = None
        if cache.key_bias is not None:
            assert places is not None
            bias, table = cache.key_bias.bias, cache.key_bias.table
            also = (bias, table, places)
            addresses = [tensor.data_ptr() for tensor in also]
            key_bias = _int64([*addresses, table.shape[1], table.shape[0] // 2])  # cache.h: KeyBias
        pointers = (out, q, *memory, block_tables, query_starts, context_lengths, key_bias, meeting, self._counters)
        self.executor.submit(Kind.ATTEND, pointers, numbers, writes=(out, meeting), also=also, x=dim**-0.5)
        return out

    def _shared_parts(self, items: int, parts: int) -> int:
        """How many parts of items may be dealt to threads one by one: none where the items alone keep all threads busy."""
        return min(items * parts, MOST_SHARED_PARTS) if parts > 1 and items <= self._counters.shape[0] else 0

    def penalize(
        self,
        logits: torch.Tensor,
        ids: torch.Tensor,
        counts: torch.Tensor,
        lengths: torch.Tensor,
        penalties: torch.Tensor,
    ) -> None:
        numbers = (*logits.shape, ids.shape[1])
        self.executor.submit(Kind.PENALIZE, (logits, ids, counts, lengths, penalties), numbers, writes=(logits,))

    def sample(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
        uniform: torch.Tensor,
    ) -> torch.Tensor:
        rows = logits.shape[0]
        tokens, peaks = torch.empty(rows, dtype=torch.int64), torch.empty(rows, PEAK_PARTS)
        self.executor.submit(Kind.PEAKS, (peaks, logits), tuple(logits.shape), writes=(peaks,))
        pointers = (tokens, logits, temperature, top_k, top_p, min_p, uniform, peaks)
        self.executor.submit(Kind.SAMPLE, pointers, tuple(logits.shape), writes=(tokens,))
        return tokens

    @staticmethod
    def can_cache(cache: KVCache) -> bool:
        return cache.dtype in CACHE_DTYPES and cache.keys.device.type == "cpu" and cache.head_dim <= MAX_HEAD_DIM

    @staticmethod
    def can_attend(q: torch.Tensor, cache: KVCache) -> bool:
        return q.shape[1] // cache.heads <= MAX_GROUP


def _int64(values: list[int]) -> torch.Tensor:
    """For a kernel. Written past torch: whoever watches a recording would take torch.tensor for arithmetic of the model."""
    memory = torch.empty(len(values), dtype=torch.int64)
    ctypes.memmove(memory.data_ptr(), (ctypes.c_int64 * len(values))(*values), memory.nbytes)
    return memory
