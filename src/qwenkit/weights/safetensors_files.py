"""safetensors: one file, or shards with an index. In: a folder. Out: its tensors, nothing of them read yet.

The header is checked whole before anything is believed: its length against the file, every type, shape and range, and that
the ranges cover the data exactly, without holes or overlaps, as the format demands.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, TypeGuard

from qwenkit.errors import shorten
from qwenkit.files import has_file, open_file, parse_json
from qwenkit.weights.stored import DTYPES, StoredTensor, check_shard, has_shards, plain_tensor, shards

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_HEADER = 32 << 20  # bytes; two hundred thousand tensors take about as many
_MAX_ITEMS = 1 << 21  # commas and brackets in a header: some nine for each tensor
_MAX_DIMENSIONS = 16
_LARGEST_SIZE = 2**63


def has_safetensors(folder: Path, base: str = "model") -> bool:
    return has_file(folder / f"{base}.safetensors") or has_shards(folder / f"{base}.safetensors.index.json")


def read_safetensors(folder: Path, base: str = "model") -> list[StoredTensor]:
    """Every tensor of `model.safetensors`, or of its shards; of files that are called `base` instead.

    Raises FileNotFoundError for a missing shard, ValueError (naming the file) for one that is truncated or corrupt, or
    that lacks a tensor the index promised.
    """
    if has_file(folder / f"{base}.safetensors"):
        return read_file(folder / f"{base}.safetensors")
    tensors: dict[str, StoredTensor] = {}
    for shard, expected in shards(folder / f"{base}.safetensors.index.json").items():
        found = {tensor.name: tensor for tensor in read_file(folder / shard)}
        check_shard(folder / shard, expected, set(found))
        twice = tensors.keys() & found.keys()
        if twice:
            raise ValueError(f"{folder / shard}: tensor {min(twice)} is also in another shard")
        tensors |= found
    return list(tensors.values())


def read_file(path: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file. ValueError naming it when it is truncated or corrupt."""
    header, data_start, size = _header(path)
    spans: list[tuple[int, int, StoredTensor]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (begin, end) = _entry(path, name, entry)
        expected = math.prod(shape) * DTYPES[dtype].itemsize
        if end - begin != expected:
            raise ValueError(
                f"{path}: tensor {name} of shape {list(shape)} and type {dtype} needs {expected} bytes, "
                f"the header gives it {end - begin}"
            )
        spans.append((begin, end, plain_tensor(path, name, shape, dtype, data_start + begin)))
    spans.sort(key=lambda span: span[:2])
    position = 0
    for begin, end, tensor in spans:
        if begin != position:
            raise ValueError(f"{path}: tensor {tensor.name} starts at byte {begin} of the data, expected {position}")
        position = end
    if data_start + position != size:
        what = "is truncated" if size < data_start + position else "has bytes after its last tensor"
        raise ValueError(f"{path} {what}: expected {data_start + position} bytes, found {size}")
    return [tensor for _, _, tensor in spans]


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The parsed header, where the data starts, and the size of the file."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{path} is truncated or no safetensors file: a header of {length} bytes in a file of {size}"
            )
        if length > _MAX_HEADER:
            raise ValueError(f"{path}: the safetensors header has {length} bytes, allowed are at most {_MAX_HEADER}")
        try:
            header = parse_json(file.read(length), _MAX_ITEMS)
        except ValueError as error:
            raise ValueError(f"{path}: the safetensors header is corrupt: it {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the safetensors header is corrupt: it holds no JSON object")
    return header, 8 + length, size


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not _sizes(shape) or not _sizes(span) or len(span) != 2 or span[0] > span[1]:
        raise ValueError(f"{path}: the header of tensor {_short(name)} is corrupt")
    if len(shape) > _MAX_DIMENSIONS:
        raise ValueError(
            f"{path}: tensor {_short(name)} has {len(shape)} dimensions, allowed are at most {_MAX_DIMENSIONS}"
        )
    if dtype not in DTYPES:
        raise ValueError(f"{path}: tensor {_short(name)} has type {_short(dtype)}; known types are {', '.join(DTYPES)}")
    return dtype, tuple(shape), (span[0], span[1])


def _sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < _LARGEST_SIZE for item in value)


def _short(name: str) -> str:
    """A tensor's name as it is, unless it would spoil a sentence."""
    return name if len(name) <= 200 and name.isprintable() else shorten(name)
