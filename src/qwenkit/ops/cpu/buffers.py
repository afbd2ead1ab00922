"""Memory for the results of ops, used again as soon as nobody holds the last result in it.

New memory costs a page fault for every 4 KiB, which for the activations of a long prompt takes longer than some of the ops that
fill them, and a recorded step that uses a few buffers in turn stays in the cache.
"""

from __future__ import annotations

import math
import sys

import numpy as np
import torch

SPARE = 8  # a buffer may be this many times larger than what is asked for
ALIGNMENT = 64  # bytes: a cache line, and a vector register
DTYPES = {torch.float32: np.float32, torch.int8: np.int8}


class Buffers:
    """Flat buffers of one pool, for one Python thread at a time; results may be used and released by others.

    `keep`: never let one go, because recorded programs know its address.
    """

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._buffers: list[_Buffer] = []

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Like torch.empty, for the dtypes of DTYPES. The result, and views of it, may be held as long as one likes."""
        count = math.prod(shape)
        free = [buffer for buffer in self._buffers if buffer.dtype == dtype and buffer.is_free()]
        fitting = [buffer for buffer in free if count <= buffer.flat.size <= SPARE * max(count, 1)]
        if fitting:
            return min(fitting, key=lambda buffer: buffer.flat.size).shaped(shape)
        smaller = [buffer for buffer in free if buffer.flat.size < count]
        if smaller and not self._keep:
            self._buffers.remove(max(smaller, key=lambda buffer: buffer.flat.size))
        self._buffers.append(_Buffer(count, dtype))
        return self._buffers[-1].shaped(shape)

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in one of the buffers."""
        address = tensor.untyped_storage().data_ptr()
        return any(buffer.address == address for buffer in self._buffers)


class _Buffer:
    """Memory that is owned by a numpy array. Each result is a tensor over it with a storage of its own, which holds a reference
    to the array until the last view of the result is gone: the array's reference count shows if the memory is in use.
    """

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        size = count * dtype.itemsize
        self._owner = np.empty(size + ALIGNMENT, dtype=np.uint8)
        start = -self._owner.ctypes.data % ALIGNMENT
        self.dtype, self.address = dtype, self._owner.ctypes.data + start
        self.flat = self._owner[start : start + size].view(DTYPES[dtype])
        self._idle = sys.getrefcount(self._owner)

    def is_free(self) -> bool:
        """True if no result uses this memory."""
        return sys.getrefcount(self._owner) == self._idle

    def shaped(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.from_numpy(self.flat[: math.prod(shape)].reshape(shape))
