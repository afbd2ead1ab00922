"""Memory for the results of ops, used again as soon as nobody holds the last result in it.

New memory costs a page fault for every 4 KiB, which for the activations of a long prompt takes longer than some of the ops that
fill them, and a recorded step that uses a few buffers in turn stays in the cache.
"""

from __future__ import annotations

import math

import torch

_holders = getattr(torch._C, "_storage_Use_Count", None)
SPARE = 8  # a buffer may be this many times larger than what is asked for


class Buffers:
    """Flat buffers of one pool. `keep`: never let one go, because recorded programs know its address."""

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._buffers: list[_Buffer] = []

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Like torch.empty. The result, and views of it, may be held as long as one likes."""
        count = math.prod(shape)
        free = [buffer for buffer in self._buffers if buffer.flat.dtype == dtype and buffer.is_free()]
        fitting = [buffer for buffer in free if count <= buffer.flat.numel() <= SPARE * max(count, 1)]
        if fitting:
            return min(fitting, key=lambda buffer: buffer.flat.numel()).shaped(shape)
        smaller = [buffer for buffer in free if buffer.flat.numel() < count]
        if smaller and not self._keep:
            self._buffers.remove(max(smaller, key=lambda buffer: buffer.flat.numel()))
        self._buffers.append(_Buffer(count, dtype))
        return self._buffers[-1].shaped(shape)

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in one of the buffers."""
        address = tensor.untyped_storage().data_ptr()
        return any(buffer.storage.data_ptr() == address for buffer in self._buffers)


class _Buffer:
    def __init__(self, count: int, dtype: torch.dtype) -> None:
        self.flat = torch.empty(count, dtype=dtype)
        self.storage = self.flat.untyped_storage()
        self._idle = 0 if _holders is None else _holders(self.storage._cdata)

    def is_free(self) -> bool:
        """Whether no tensor but our own lies in this memory. A torch that does not tell never gives memory twice."""
        return _holders is not None and _holders(self.storage._cdata) == self._idle

    def shaped(self, shape: tuple[int, ...]) -> torch.Tensor:
        strides = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
        return self.flat.as_strided(shape, strides)
