"""From what a checkpoint stores to packed weights: which bits, and the arithmetic of each format's blocks.

In: a `StoredTensor` and the user's choice of weights. Out: a `PackedWeight`, made a part at a time so that the peak is little
more than the packed model. GGUF's Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 blocks and the codes of GPTQ and AWQ are regrouped bit for bit
and keep their own values, whatever was chosen; other quantized types become bf16; plain types are rounded as chosen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from qwenkit.linear.packed import Matrix, PackedEmbedding, PackedLinear
from qwenkit.linear.swap import Swap
from qwenkit.model.config import ModelConfig
from qwenkit.ops.packed import ROWS, PackedWeight, can_pack, pack_bfloat16, pack_codes, pack_groups, quantize
from qwenkit.weights.stored import DTYPES, Bytes, StoredTensor

BITS = {"bf16": 16, "int8": 8, "int4": 4}
CHUNK_ELEMENTS = 1 << 21  # packed at once: its arithmetic needs some tens of megabytes beside the model
BLOCK = 32  # weights in a block of GGUF's simple types
# Where all weights have 8 bits, activations lose as much as they do: few share a scale, fewer before the head. And the weights of
# values keep 16 bits where many query heads share a value head, so that they are few. docs/quantize.md has what each brings.
FINE_GROUP, FINEST_GROUP = 32, 16
SHARED_VALUES = 3

Blocks = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # codes (rows, cols), scales and offsets (rows, groups)


def packing(config: ModelConfig, weights: str) -> Swap:
    """A swap that packs every Linear of a model in the way that `weights` (bf16, int8 or int4) names.

    The head keeps 8 bits where the rest has 4, and shares its matrix with a tied embedding; an embedding that is not tied is only
    looked up and lies in bf16, as do values where the rest has 8 bits and they are few. Routers of experts, and shapes that the
    layout cannot hold, stay as they are.
    """
    bits = BITS[weights]
    head_bits = max(bits, 8)
    group, head_group = (FINE_GROUP, FINEST_GROUP) if bits == 8 else (None, None)
    few_values = bits == 8 and config.num_attention_heads >= SHARED_VALUES * config.num_key_value_heads
    head = Matrix()

    def make(name: str, module: nn.Linear | nn.Embedding) -> nn.Module | None:
        rows, cols = module.weight.shape
        tied_head = config.tie_word_embeddings and name in ("lm_head", "model.embed_tokens")
        if name.endswith("gate") or not can_pack(rows, cols, head_bits if tied_head else bits):
            return None
        if isinstance(module, nn.Embedding):
            return PackedEmbedding(head if tied_head else Matrix(), packer(head_bits if tied_head else 16, head_group))
        if name == "lm_head":
            return PackedLinear(module, head if tied_head else Matrix(), packer(head_bits, head_group))
        if name.endswith("v_proj") and few_values:
            return PackedLinear(module, Matrix(), packer(16))
        return PackedLinear(module, Matrix(), packer(bits, group))

    return make


def packer(bits: int, group: int | None = None) -> Callable[[StoredTensor], PackedWeight]:
    """How a tensor is packed when `bits`, and for rounding to them a group, were chosen."""
    return lambda stored: pack_stored(stored, bits, group)


def pack_stored(stored: StoredTensor, bits: int, group: int | None = None) -> PackedWeight:
    """Pack one matrix; a quantized one keeps its own values and groups."""
    if stored.read_raw is not None:
        if stored.dtype in _READ_BLOCKS:
            blocks = _chunks(stored, stored.read_raw)
            return _joined(stored.shape[0], (_pack_blocks(stored.dtype, raw) for raw in blocks))
        if codes := _CODES.fullmatch(stored.dtype):
            bits, run, symmetric = int(codes[1]), int(codes[2]), bool(codes[3])
            runs = _chunks(stored, stored.read_raw)
            return _joined(stored.shape[0], (_pack_runs(raw, bits, run, symmetric) for raw in runs))
    plain = stored.dtype in DTYPES
    packed = (
        quantize(rows, bits, group) if plain and bits < 16 else pack_bfloat16(rows)
        for rows in _chunks(stored, stored.read)
    )
    return _joined(stored.shape[0], packed)


def packed_outline(kind: str, rows: int, cols: int) -> PackedWeight:
    """What `pack_stored` makes of a matrix of a quantized type that it keeps, on the meta device: shapes, and no memory."""
    codes = _CODES.fullmatch(kind)
    assert codes or kind in _READ_BLOCKS
    bits, group = (int(codes[1]), int(codes[2])) if codes else (_block_bits(kind), BLOCK)
    symmetric = bool(codes[3]) if codes else not kind.endswith("_1")
    scale = torch.empty(rows, cols // group, dtype=torch.float16, device="meta")
    return _packed((scale.new_empty(rows, cols, dtype=torch.uint8), scale, None if symmetric else scale), bits, group)


def _chunks(stored: StoredTensor, read: Callable[[int, int], torch.Tensor] | Callable[[int, int], Bytes]) -> Iterator:
    rows, cols = stored.shape
    step = max(CHUNK_ELEMENTS // cols // ROWS, 1) * ROWS  # whole blocks, so that only the last is padded
    for start in range(0, rows, step):
        yield read(start, min(start + step, rows))


def _joined(rows: int, parts: Iterator[PackedWeight]) -> PackedWeight:
    """Parts of a matrix of `rows`, each written to its place as it comes, so that the matrix is in memory only once."""
    whole: dict[str, torch.Tensor] = {}
    done = 0
    for part in parts:
        for name in ("q", "scale", "offset", "row_scale"):
            tensor: torch.Tensor | None = getattr(part, name)
            if tensor is None:
                continue
            lines = _padded(part.rows) // tensor.shape[0]  # rows of the matrix in one of the tensor
            if name not in whole:
                whole[name] = tensor.new_empty(_padded(rows) // lines, *tensor.shape[1:])
            whole[name][done // lines :][: tensor.shape[0]] = tensor
        done += part.rows
    scale, offset, row_scale = (whole.get(name) for name in ("scale", "offset", "row_scale"))
    return PackedWeight(part.bits, rows, part.cols, part.group, whole["q"], scale, offset, row_scale)


def _padded(rows: int) -> int:
    return -(-rows // ROWS) * ROWS


def _pack_blocks(kind: str, raw: Bytes) -> PackedWeight:
    """Raw blocks (rows, bytes of a row) of a GGUF type."""
    codes, scale, offset = _READ_BLOCKS[kind](raw.reshape(raw.shape[0], -1, _BLOCK_BYTES[kind]))
    return _packed((codes, scale, offset), _block_bits(kind), BLOCK)


def _block_bits(kind: str) -> int:
    return 4 if kind.startswith("Q4") else 8


def _pack_runs(raw: Bytes, bits: int, run: int, symmetric: bool) -> PackedWeight:
    """Raw rows of `gptq_awq`. Without `symmetric` the offset, -scale * zero, is rounded to fp16: by at most 2^-11 of itself,
    less than a hundredth of a step of 4 bits, or an eighth of one of 8.
    """
    blocks = raw.reshape(raw.shape[0], -1, 4 + run)
    scale = _half(blocks, 0)
    zero = torch.from_numpy(np.ascontiguousarray(blocks[..., 2:4]).view(np.int16)[..., 0].copy())
    codes = torch.from_numpy(np.ascontiguousarray(blocks[..., 4:])).flatten(1)
    return _packed((codes, scale, None if symmetric else -scale.float() * zero), bits, run)


def _packed(blocks: Blocks, bits: int, group: int) -> PackedWeight:
    codes, scale, offset = blocks
    rows, cols = codes.shape
    packed_offset = None if offset is None else pack_groups(offset)
    return PackedWeight(bits, rows, cols, group, pack_codes(codes, bits), pack_groups(scale), packed_offset)


def _half(blocks: Bytes, start: int) -> torch.Tensor:
    """The fp16 at byte `start` of each block, (rows, blocks)."""
    return torch.from_numpy(np.ascontiguousarray(blocks[..., start : start + 2]).view(np.float16)[..., 0].copy())


def _nibbles(blocks: Bytes, start: int) -> torch.Tensor:
    """32 codes of 4 bits from byte `start`: the low nibbles are the first 16 weights, the high ones the last 16."""
    packed = blocks[..., start : start + 16]
    return torch.from_numpy(np.concatenate((packed & 15, packed >> 4), axis=-1))


def _fifth_bits(blocks: Bytes, start: int) -> torch.Tensor:
    """32 single bits from byte `start`, moved to where a fifth bit counts."""
    bits = np.unpackbits(np.ascontiguousarray(blocks[..., start : start + 4]), axis=-1, bitorder="little")
    return torch.from_numpy(bits << 4)


def _q4_0(blocks: Bytes) -> Blocks:
    return _nibbles(blocks, 2).flatten(1), _half(blocks, 0), None


def _q4_1(blocks: Bytes) -> Blocks:
    return _nibbles(blocks, 4).flatten(1), _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Blocks:
    codes = _nibbles(blocks, 6) | _fifth_bits(blocks, 2)  # zero 16 of 5 bits becomes zero 128 of 8
    return codes.add(128 - 16).flatten(1), _half(blocks, 0), None


def _q5_1(blocks: Bytes) -> Blocks:
    return (_nibbles(blocks, 8) | _fifth_bits(blocks, 4)).flatten(1), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Blocks:
    return torch.from_numpy(blocks[..., 2:34] ^ 128).flatten(1), _half(blocks, 0), None


_READ_BLOCKS: dict[str, Callable[[Bytes], Blocks]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
}
_BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}
_CODES = re.compile(r"CODES([48])G(\d+)(S?)")
