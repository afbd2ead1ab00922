"""Decode without Python in the loop: a step in which every row computes one token is recorded once for each batch size, and
replayed as one native call.

In: the rows of a step. Out: their logits, and their next tokens where nothing but penalties changes the logits first. The model's
own code is recorded while it runs on fixed input tensors; a replay writes new ids, positions, slots and block tables into the
same tensors. Whatever is not a native op cannot be replayed, so recording watches for it: such a model is run the ordinary way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qwenkit import ops
from qwenkit.engine.batch import Computed, Paged
from qwenkit.engine.sampler import Limits, Penalties, is_plain
from qwenkit.engine.scheduler import Row
from qwenkit.model.positions import Positions
from qwenkit.model.qwen import Qwen
from qwenkit.ops.cache import KVCache
from qwenkit.ops.cpu.buffers import Buffers
from qwenkit.ops.cpu.native import NativeOps

# Torch calls that a replay need not repeat: they make memory, or look at the same memory again.
_MAKES_MEMORY = {"empty", "empty_like"}
_MAKES_VIEWS = {"lift_fresh", "to", "view", "unflatten", "flatten", "unsqueeze", "select", "unbind"}


Angles: TypeAlias = tuple[np.ndarray, np.ndarray]  # cosines and sines of every position, each (length, rotary_dim / 2)


class _NotRecordableError(Exception):
    """The model computed something that the native library did not."""


class _Watch(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would import its compiler, for seconds in the first step, to say that it must not compile this."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _MAKES_VIEWS:
            first = result[0] if isinstance(result, list | tuple) else result
            if first.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr():
                return result
        elif name in _MAKES_MEMORY:
            return result
        raise _NotRecordableError(str(func))


class DecodeGraphs:
    """`caches` have one block more than the pool gives out: rows that fill up a batch size write there.

    `max_blocks` is the longest block table.
    """

    def __init__(self, model: Qwen, caches: Sequence[KVCache], *, max_blocks: int, native: NativeOps) -> None:
        self._model = model
        self._caches = caches
        self._native = native
        self._max_blocks = max_blocks
        self._steps: dict[int, _Step] = {}
        # Steps of one model run one after the other, and results of each are used before the next one runs. Another model may
        # run in another thread at the same time.
        self._buffers = Buffers(keep=True)
        self._recordable = model.config.moe is None and model.config.logn_length is None
        length = max_blocks * caches[0].block_size
        self._angles: Angles | None = None
        if self._recordable:
            positions = Positions.of(model.config, torch.arange(length), None)
            self._angles = positions.cos.numpy(), positions.sin.numpy()

    def run(self, rows: list[Row]) -> Computed | None:
        """What N rows compute, or None where the step has to be run the ordinary way."""
        if not self._recordable or not all(row.num_tokens == 1 and row.samples for row in rows):
            return None
        if any(row.sequence.rope_alpha is not None for row in rows):
            return None
        size = _size_for(len(rows))
        step = self._steps.get(size)
        if step is None:
            try:
                step = _Step(self._model, self._caches, size, self._max_blocks, self._native, self._buffers)
            except _NotRecordableError:
                self._recordable = False
                return None
            self._steps[size] = step
        assert self._angles is not None
        return step.run(rows, self._angles)


def _size_for(rows: int) -> int:
    """Recorded sizes: every one to 4, every even one to 8, then multiples of 4 (what the kernels take at a time)."""
    if rows <= 4:
        return rows
    step = 2 if rows <= 8 else 4
    return -(-rows // step) * step


class _Step:
    """One recorded decode step of a fixed number of rows."""

    def __init__(
        self,
        model: Qwen,
        caches: Sequence[KVCache],
        size: int,
        max_blocks: int,
        native: NativeOps,
        buffers: Buffers,
    ) -> None:
        spare, self._block_size = caches[0].blocks - 1, caches[0].block_size
        half = model.config.rope.rotary_dim // 2
        ids = torch.zeros(size, dtype=torch.int64)
        slots = torch.full((size,), spare * self._block_size)
        lengths = torch.ones(size, dtype=torch.int64)
        tables = torch.full((size, max_blocks), spare, dtype=torch.int32)
        cos, sin = torch.zeros(size, half), torch.zeros(size, half)
        places = torch.zeros(size, dtype=torch.int64)  # are positions: requests with a rotary stretch are not replayed
        ctx = Paged(caches, slots, torch.arange(size + 1), lengths, tables, places=places)
        positions = Positions(cos, sin, None)
        self._limits, self._penalties = Limits(size), Penalties(size, max_blocks * self._block_size)
        with torch.inference_mode(), native.executor.record(buffers) as program, _Watch():
            self._logits = model.logits(model.model(ids, positions, ctx))
            self._to_logits = len(program)
            ops.penalize(self._logits, *self._penalties.tensors)
            tokens = ops.sample(self._logits, *self._limits.tensors)
        self._tokens = tokens.numpy()
        self._replay = program.finish(native.executor.library)
        # the same memory as numpy sees it, which is quicker to write from lists
        self._ids, self._slots, self._lengths = ids.numpy(), slots.numpy(), lengths.numpy()
        self._tables, self._spare, self._places = tables.numpy(), spare, places.numpy()
        self._cos, self._sin = cos.numpy(), sin.numpy()

    def run(self, rows: list[Row], angles: Angles) -> Computed:
        count, block_size = len(rows), self._block_size
        positions = [row.sequence.num_computed for row in rows]
        for place, (row, position) in enumerate(zip(rows, positions, strict=True)):
            blocks = row.sequence.block_table
            self._ids[place] = row.sequence.tokens[position]
            self._slots[place] = blocks[position // block_size] * block_size + position % block_size
            self._lengths[place] = position + 1
            self._places[place] = position
            self._tables[place, : len(blocks)] = blocks
        self._slots[count:] = self._spare * block_size
        self._lengths[count:] = 1
        self._places[count:] = 0
        self._tables[count:, 0] = self._spare
        for table, rotated in zip(angles, (self._cos, self._sin), strict=True):
            table.take(positions, axis=0, out=rotated[:count], mode="clip")  # any other mode writes to a copy first
        sequences = [row.sequence for row in rows]
        logits = self._logits if count == self._logits.shape[0] else self._logits[:count]
        if not all(map(is_plain, sequences)):
            self._replay(self._to_logits)
            return Computed(logits)
        self._penalties.write(sequences)
        self._limits.write(sequences)
        self._replay()
        return Computed(logits, tokens=self._tokens[:count].tolist())
