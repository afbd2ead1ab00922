"""PackedWeight: one internal layout for weights of 4, 8 and 16 bits, made so that a vector's 16 lanes are 16 rows.

In: integer codes with scales and offsets from any quantization (round-to-nearest, GGUF blocks, GPTQ, AWQ), or bf16 values.
Out: tensors in the order in which the kernels read them (ops/cpu/linear.h describes it byte by byte), and the way back, which is
the specification: `dequantize`. Packing loses nothing: scales and offsets stay fp16 as those formats store them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

LANES = 16
ROWS = 32  # rows are padded to a multiple of this: kernels take two blocks of lanes at a time


@dataclass(frozen=True)
class PackedWeight:
    """A matrix (rows, cols), bits 4, 8 or 16.

    q (blocks, cols * 2 * bits) uint8, blocks of 16 rows. Of 4 and 8 bits, with `zero` = 8 or 128:
    per channel, w = row_scale[row] * (q - zero) with row_scale (padded rows,) fp32; else, for each group of `group` inputs,
    w = scale * (q - zero), or scale * q + offset where there is one, scale and offset (blocks, groups, 16) fp16.
    """

    bits: int
    rows: int
    cols: int
    group: int
    q: torch.Tensor
    scale: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    row_scale: torch.Tensor | None = None

    @property
    def zero(self) -> int:
        return 1 << (self.bits - 1)


def can_pack(rows: int, cols: int, bits: int) -> bool:
    """Whether a matrix has a shape that the layout can hold: whole groups of inputs (pairs for bf16)."""
    return rows >= 1 and cols % (2 if bits == 16 else 32) == 0


def group_for(cols: int) -> int:
    """The group of inputs that share a scale when nothing else decides: 128 where it divides cols, else 64 or 32."""
    return next(group for group in (128, 64, 32) if cols % group == 0)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes (rows, cols) -> (blocks, cols * 2 * bits) uint8; rows beyond the last are zeros."""
    padded = F.pad(codes, (0, 0, 0, -codes.shape[0] % ROWS))
    if bits == 8:
        lanes = padded.unflatten(0, (-1, LANES)).unflatten(2, (-1, 4))  # (blocks, 16, cols / 4, 4)
        return lanes.transpose(1, 2).flatten(1).contiguous()
    lanes = padded.unflatten(0, (-1, LANES)).unflatten(2, (-1, 2, 4))  # (blocks, 16, cols / 8, low or high, 4)
    return (lanes[:, :, :, 0] | lanes[:, :, :, 1] << 4).transpose(1, 2).flatten(1).contiguous()


def unpack_codes(q: torch.Tensor, bits: int, rows: int, cols: int) -> torch.Tensor:
    """The inverse of `pack_codes`."""
    if bits == 8:
        lanes = q.unflatten(1, (cols // 4, LANES, 4)).transpose(1, 2)
        return lanes.reshape(-1, cols)[:rows]
    lanes = q.unflatten(1, (cols // 8, LANES, 4)).transpose(1, 2)  # (blocks, 16, cols / 8, 4)
    return torch.stack((lanes & 15, lanes >> 4), dim=3).reshape(-1, cols)[:rows]


def pack_groups(values: torch.Tensor) -> torch.Tensor:
    """Scales or offsets (rows, groups) -> (blocks, groups, 16) fp16."""
    padded = F.pad(values, (0, 0, 0, -values.shape[0] % ROWS))
    return padded.unflatten(0, (-1, LANES)).transpose(1, 2).to(torch.float16).contiguous()


def pack_bfloat16(weight: torch.Tensor) -> PackedWeight:
    """A matrix in bf16, two inputs of each of 16 rows together."""
    rows, cols = weight.shape
    padded = F.pad(weight.to(torch.bfloat16), (0, 0, 0, -rows % ROWS))
    pairs = padded.unflatten(0, (-1, LANES)).unflatten(2, (-1, 2)).transpose(1, 2)  # (blocks, cols / 2, 16, 2)
    return PackedWeight(16, rows, cols, cols, pairs.contiguous().view(torch.uint8).flatten(1))


def quantize(weight: torch.Tensor, bits: int, group: int | None = None) -> PackedWeight:
    """Round to the nearest: 8 bits with one scale a row, 4 bits symmetric with one a group (by default that of `group_for`).

    Activations are rounded in the same groups, those for weights of 8 bits too.
    """
    rows, cols = weight.shape
    group = group or group_for(cols)
    weight = weight.float()
    zero, most = 1 << (bits - 1), (1 << (bits - 1)) - 1
    if bits == 8:
        row_scale = weight.abs().amax(1) / most
        codes = _rounded(weight, row_scale[:, None], zero)
        return PackedWeight(8, rows, cols, group, pack_codes(codes, 8), row_scale=F.pad(row_scale, (0, -rows % ROWS)))
    grouped = weight.unflatten(1, (-1, group))
    # The value of largest magnitude takes the one code without a positive partner, -8, so that all 16 codes are used.
    extreme = grouped.gather(2, grouped.abs().argmax(2, keepdim=True))[..., 0]
    scale = (extreme / -zero).to(torch.float16).float()
    codes = _rounded(grouped, scale[..., None], zero).flatten(1)
    return PackedWeight(bits, rows, cols, group, pack_codes(codes, bits), scale=pack_groups(scale))


def _rounded(weight: torch.Tensor, scale: torch.Tensor, zero: int) -> torch.Tensor:
    steps = torch.where(scale == 0, 0.0, weight / scale)
    return (steps.round() + zero).clamp(0, 2 * zero - 1).to(torch.uint8)


def dequantize(weight: PackedWeight) -> torch.Tensor:
    """The matrix (rows, cols) in fp32: what every kernel computes with."""
    if weight.bits == 16:
        pairs = weight.q.view(torch.bfloat16).unflatten(1, (weight.cols // 2, LANES, 2))
        return pairs.transpose(1, 2).reshape(-1, weight.cols)[: weight.rows].float()
    codes = unpack_codes(weight.q, weight.bits, weight.rows, weight.cols).float()
    # In place: under training each matrix of a step's two passes is made here, and every copy would leave a hole in the heap.
    if weight.row_scale is not None:
        return codes.sub_(weight.zero).mul_(weight.row_scale[: weight.rows, None])
    assert weight.scale is not None
    grouped = codes.unflatten(1, (-1, weight.group))
    scale = _by_row(weight.scale, weight.rows)
    if weight.offset is None:
        return grouped.sub_(weight.zero).mul_(scale).flatten(1)
    return grouped.mul_(scale).add_(_by_row(weight.offset, weight.rows)).flatten(1)


def _by_row(groups: torch.Tensor, rows: int) -> torch.Tensor:
    """(blocks, groups, 16) fp16 -> (rows, groups, 1) fp32."""
    return groups.transpose(1, 2).flatten(0, 1)[:rows, :, None].float()
