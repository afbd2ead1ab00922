"""The paged cache of one layer's keys and values: how it lies in memory, for every implementation of the ops alike.

Keys of a block and head are [D / pack][block_size][pack] with pack = 4 bytes / element, so that a vector loaded from them holds
the same channels of successive positions; values are [block_size][D]. int8 keeps an fp32 scale for each token and head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

INT8_OFFSET = 128  # keys are stored as unsigned bytes, which the processor's dot product wants on one side


@dataclass(frozen=True)
class KVCache:
    """keys (blocks, K, D / pack, block_size, pack), values (blocks, K, block_size, D), and of an int8 cache key_scale and
    value_scale (blocks, K, block_size): value = scale * q, keys plus INT8_OFFSET.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None

    @classmethod
    def empty(
        cls, blocks: int, block_size: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> KVCache:
        """Memory for `blocks`, not initialised. dtype int8 quantizes.

        Raises ValueError where head_dim is not a multiple of what a dtype takes together (bfloat16 2, int8 4).
        """
        pack = max(1, 4 // dtype.itemsize)
        if dim % pack:
            raise ValueError(
                f"kv_cache_dtype {str(dtype)[6:]} needs a head_dim divisible by {pack}, the model's is {dim}"
            )
        quantized = dtype == torch.int8
        keys = (blocks, heads, dim // pack, block_size, pack)
        scales = (
            (torch.empty(blocks, heads, block_size, device=device) for _ in range(2)) if quantized else (None, None)
        )
        return cls(
            torch.empty(keys, dtype=torch.uint8 if quantized else dtype, device=device),
            torch.empty(blocks, heads, block_size, dim, dtype=dtype, device=device),
            *scales,
        )

    @property
    def blocks(self) -> int:
        return self.keys.shape[0]

    @property
    def nbytes(self) -> int:
        """Memory that the cache takes."""
        tensors = (self.keys, self.values, self.key_scale, self.value_scale)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def block_size(self) -> int:
        return self.keys.shape[3]

    @property
    def heads(self) -> int:
        return self.keys.shape[1]

    @property
    def head_dim(self) -> int:
        return self.values.shape[3]

    @property
    def pack(self) -> int:
        return self.keys.shape[4]

    def write(self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """Store k and v (T, K, D) at slots (T,): block number times block_size plus the place in the block."""
        block, inside = slots // self.block_size, slots % self.block_size
        if self.key_scale is not None and self.value_scale is not None:
            k, self.key_scale[block, :, inside] = _quantized(k)
            v, self.value_scale[block, :, inside] = _quantized(v)
            k = k + INT8_OFFSET
        self.keys[block, :, :, inside] = k.unflatten(-1, (-1, self.pack)).to(self.keys.dtype)
        self.values[block, :, inside] = v.to(self.values.dtype)

    def read(self, blocks: torch.Tensor, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `length` keys and values of a request that lies in `blocks`, each (length, K, D) in `dtype`."""
        keys = self.keys[blocks].permute(0, 3, 1, 2, 4).flatten(3).flatten(0, 1)[:length]
        values = self.values[blocks].transpose(1, 2).flatten(0, 1)[:length]
        if self.key_scale is None or self.value_scale is None:
            return keys.to(dtype), values.to(dtype)
        key_scale, value_scale = (
            scale[blocks].transpose(1, 2).flatten(0, 1)[:length, :, None]
            for scale in (self.key_scale, self.value_scale)
        )
        return ((keys.float() - INT8_OFFSET) * key_scale).to(dtype), (values.float() * value_scale).to(dtype)


def _quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (T, K, D) -> whole numbers from -127 to 127 as fp32, and scales (T, K). What is not finite makes the scale NaN."""
    largest = x.float().abs().amax(-1)
    lost = ~x.isfinite().all(-1)
    scale = (largest / 127).masked_fill(lost, torch.nan)
    inverse = torch.where(lost | (largest == 0), 0.0, largest.new_tensor(127.0) / largest)
    return (x.float() * inverse[..., None]).nan_to_num(0, 0, 0).round(), scale


def bytes_per_token(heads: int, dim: int, dtype: torch.dtype) -> int:
    """Keys and values of one token in one layer, scales included."""
    return 2 * heads * (dim * dtype.itemsize + (4 if dtype == torch.int8 else 0))
