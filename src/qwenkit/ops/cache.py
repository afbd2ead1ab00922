"""The paged cache of one layer's keys and values: how it lies in memory, for every implementation of the ops alike.

Keys of a block and head are [D / pack][block_size][4 bytes] with pack channels in 4 bytes, so that a vector loaded from them
holds the same channels of successive positions; values are [block_size][D]. int8 keeps a bf16 scale for each token and head,
int4 two: scale and offset. A quantized cache may keep keys without the model's key bias (`KeyBias`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

INT8_OFFSET = 128  # keys are stored as unsigned bytes, which the processor's dot product wants on one side
LEVELS = 15  # steps between the smallest and the largest of four bits
INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # torch has it, its stubs do not
QUANTIZED = (torch.int8, INT4)


@dataclass(frozen=True)
class KeyBias:
    """A key bias that stays out of a quantized cache. Rotation is linear, R(k + b) = R(k) + R(b), so R(b) comes off what is
    written and is added to what is read; scales then follow the keys, not a bias that may be a hundred times as large.

    bias (K, D) fp32. table (R, N) fp32: the cosines of the R / 2 angles of each place, then their sines. A place is a position,
    plus `length` times the number of the rotary stretch in `stretches`; `length` is a multiple of 32.
    """

    bias: torch.Tensor
    table: torch.Tensor
    length: int
    stretches: tuple[float, ...] = (1.0,)

    def place(self, position: int, stretch: float = 1.0) -> int:
        """Where a position of a request with a rotary stretch stands in the table."""
        return self.stretches.index(stretch) * self.length + position

    def at(self, places: torch.Tensor) -> torch.Tensor:
        """The rotated bias (T, K, D) at places (T,), fp32."""
        cos, sin = self.table[:, places].T[:, None].chunk(2, -1)  # (T, 1, R / 2)
        rotating, rest = self.bias[None].split((self.table.shape[0], self.bias.shape[1] - self.table.shape[0]), -1)
        a, b = rotating.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest.expand(len(places), -1, -1)), -1)


@dataclass(frozen=True)
class KVCache:
    """keys (blocks, K, D / pack, block_size, elements in 4 bytes), values (blocks, K, block_size, D) in `dtype`.

    int8: values (blocks, K, block_size / 4, D, 4), four positions side by side; key_scale and value_scale (blocks, K, block_size)
    bf16, value = scale * q, keys plus INT8_OFFSET. int4: values
    (blocks, K, block_size, D / 2) bytes, channel d low and d + D / 2 high; of keys the channels 8 i .. 8 i + 3 low and the next
    four high; scales (blocks, K, block_size, 2) bf16, value = scale * q + offset with q from 0 to 15.
    """

    dtype: torch.dtype
    keys: torch.Tensor
    values: torch.Tensor
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None
    key_bias: KeyBias | None = None

    @classmethod
    def empty(
        cls,
        blocks: int,
        block_size: int,
        heads: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        key_bias: KeyBias | None = None,
    ) -> KVCache:
        """Memory for `blocks`, not initialised. dtype int8 or int4 quantizes; only those may have a `key_bias`.

        Raises ValueError where head_dim is not a multiple of what a dtype takes together (bfloat16 2, int8 4, int4 8).
        """
        assert key_bias is None or dtype in QUANTIZED
        pack = _pack(dtype)
        if dim % pack:
            raise ValueError(
                f"kv_cache_dtype {str(dtype)[6:]} needs a head_dim divisible by {pack}, the model's is {dim}"
            )
        elements = torch.uint8 if dtype in QUANTIZED else dtype
        keys = (blocks, heads, dim // pack, block_size, max(1, 4 // elements.itemsize))
        values: tuple[int, ...] = (blocks, heads, block_size, dim // 2 if dtype == INT4 else dim)
        if dtype == torch.int8:
            values = (blocks, heads, -(-block_size // 4), dim, 4)
        key_scale = value_scale = None
        if dtype in QUANTIZED:
            scales = (blocks, heads, block_size, 2) if dtype == INT4 else (blocks, heads, block_size)
            key_scale, value_scale = (torch.empty(scales, dtype=torch.bfloat16, device=device) for _ in range(2))
        return cls(
            dtype,
            torch.empty(keys, dtype=elements, device=device),
            torch.empty(values, dtype=torch.int8 if dtype == torch.int8 else elements, device=device),
            key_scale,
            value_scale,
            key_bias,
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
        return self.keys.shape[2] * self.pack

    @property
    def pack(self) -> int:
        """Channels in 4 bytes, or 1."""
        return _pack(self.dtype)

    def write(self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, places: torch.Tensor | None = None) -> None:
        """Store k and v (T, K, D) at slots (T,): block number times block_size plus the place in the block.

        places (T,): see KeyBias, needed where there is one.
        """
        block, inside = slots // self.block_size, slots % self.block_size
        if self.key_bias is not None:
            assert places is not None
            k = k.float() - self.key_bias.at(places)
        if self.key_scale is not None and self.value_scale is not None:
            quantize = _bytes if self.dtype == torch.int8 else _nibbles
            k, self.key_scale[block, :, inside] = quantize(k)
            v, self.value_scale[block, :, inside] = quantize(v)
        if self.dtype == torch.int8:
            k = k + INT8_OFFSET
        elif self.dtype == INT4:
            low, high = k.unflatten(-1, (-1, 2, 4)).unbind(-2)
            k = (low + 16 * high).flatten(-2)
            low, high = v.chunk(2, -1)
            v = low + 16 * high
        lanes = k.unflatten(-1, (-1, self.keys.shape[4]))
        self.keys[block, :, :, inside] = lanes.to(self.keys.dtype)
        if self.dtype == torch.int8:
            self.values[block, :, inside // 4, :, inside % 4] = v.to(torch.int8)
        else:
            self.values[block, :, inside] = v.to(self.values.dtype)

    def read(
        self, blocks: torch.Tensor, length: int, dtype: torch.dtype, first_place: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `length` keys and values of a request that lies in `blocks`, each (length, K, D) in `dtype`.

        `first_place` is the KeyBias place of position 0.
        """
        keys = self.keys[blocks].permute(0, 3, 1, 2, 4).flatten(0, 1)[:length]  # (length, K, D / pack, 4 bytes)
        values = self.values[blocks]
        if self.dtype == torch.int8:
            values = values.transpose(-1, -2).flatten(2, 3)[:, :, : self.block_size]
        values = values.transpose(1, 2).flatten(0, 1)[:length]
        if self.key_scale is None or self.value_scale is None:
            return keys.flatten(2).to(dtype), values.to(dtype)
        key_scale, value_scale = (
            scale[blocks].transpose(1, 2).flatten(0, 1)[:length, :, None].float()
            for scale in (self.key_scale, self.value_scale)
        )
        if self.dtype == torch.int8:
            keys = (keys.flatten(2).float() - INT8_OFFSET) * key_scale
            values = values.float() * value_scale
        else:
            keys = torch.cat((keys & 15, keys >> 4), -1).flatten(2) * key_scale[..., 0] + key_scale[..., 1]
            values = torch.cat((values & 15, values >> 4), -1) * value_scale[..., 0] + value_scale[..., 1]
        if self.key_bias is not None:
            keys = keys + self.key_bias.at(torch.arange(first_place, first_place + length, device=keys.device))
        return keys.to(dtype), values.to(dtype)


def _pack(dtype: torch.dtype) -> int:
    return 8 if dtype == INT4 else max(1, 4 // dtype.itemsize)


def _bytes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (T, K, D) -> whole numbers from -127 to 127 as fp32, and scales (T, K) bf16.

    Scales are rounded first and the numbers follow them. What is not finite makes its scale NaN.
    """
    lost = ~x.isfinite().all(-1)
    scale = (x.float().abs().amax(-1) / 127).masked_fill(lost, torch.nan).bfloat16()
    inverse = torch.where(lost | (scale == 0), 0.0, 1.0 / scale.float())
    return (x.float() * inverse[..., None]).nan_to_num(0, 0, 0).round().clamp(-127, 127), scale


def _nibbles(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (T, K, D) -> whole numbers from 0 to 15 as fp32, and (T, K, 2) bf16: the step, and what 0 stands for.

    Step and offset are rounded first and the numbers follow them. What is not finite makes both NaN.
    """
    low, high = x.float().aminmax(dim=-1)
    lost = ~x.isfinite().all(-1)
    offset = low.masked_fill(lost, torch.nan).bfloat16()
    scale = ((high - offset.float()) / LEVELS).clamp(min=0).bfloat16()
    inverse = torch.where(lost | (scale == 0), 0.0, 1.0 / scale.float())
    steps = (x.float() - offset.float()[..., None]) * inverse[..., None]
    return steps.nan_to_num(0, 0, 0).round().clamp(0, LEVELS), torch.stack((scale, offset), -1)


def bytes_per_token(heads: int, dim: int, dtype: torch.dtype) -> int:
    """Keys and values of one token in one layer, scales included."""
    if dtype not in QUANTIZED:
        return 2 * heads * dim * dtype.itemsize
    return 2 * heads * (dim * 4 // _pack(dtype) + (4 if dtype == INT4 else 2))
