"""The GGUF container: a strict reader of header, metadata and tensor table. In: a path. Out: `GgufFile`, no tensor read yet.

A GGUF comes from strangers, so nothing in it is believed: every length is checked against what is left of the file before
it is used, and a corrupt or hostile file ends in one ValueError, without large allocations. Only the arithmetic of
dequantization is the gguf package's. Source of the format: docs/gguf.md of the ggml project, versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from qwenkit.errors import shorten
from qwenkit.files import has_file, open_file
from qwenkit.weights.stored import DTYPES, Bytes, StoredTensor, plain_tensor, read_bytes

_TYPES: tuple[str, ...] = (
    "F32",
    "F16",
    "BF16",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
)
_TYPES += ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS")
_TYPE_NAMES = {kind.value: kind.name for kind in GGMLQuantizationType}

# Metadata value types of the format, by number: struct codes of the fixed-size ones.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DEPTH = 4  # of arrays in arrays; no writer uses more than one
_MAX_DIMENSIONS = 4
_MAX_PARTS = 1000  # of a split model
_MAX_NAME = 1024  # of a key or a tensor; the format's own limits are 65535 and 64
_MAX_ITEMS = 1 << 23  # of all arrays together: a vocabulary has some hundred thousand, and each becomes a Python object
_SMALLEST_PAIR = 8 + 4 + 1  # a key's length, a type, one byte of value
_SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8  # a name's length, a dimension count, one dimension, a type, an offset


@dataclass(frozen=True)
class TensorEntry:
    """One line of the tensor table; `shape` is row-major (the file lists dimensions fastest first), `offset` absolute."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GgufFile:
    path: Path
    metadata: dict[str, Any]
    entries: tuple[TensorEntry, ...]
    following: tuple[GgufFile, ...] = ()
    """The other parts of a model that was split, in order."""

    @property
    def all_entries(self) -> tuple[TensorEntry, ...]:
        """The table of tensors, of the following parts too."""
        return tuple(entry for part in (self, *self.following) for entry in part.entries)

    def tensors(self) -> list[StoredTensor]:
        """Every tensor under the file's own names."""
        return [_stored(part.path, entry) for part in (self, *self.following) for entry in part.entries]


_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)


def gguf_parts(path: Path) -> list[Path]:
    """The files of a model that was split, as llama.cpp's gguf-split names them, found by any one; else the file alone."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    ending = path.name[-len(".gguf") :]
    return [
        path.with_name(f"{match[1]}-{n + 1:05}-of-{match[3]}{ending}") for n in range(min(int(match[3]), _MAX_PARTS))
    ]


def read_split_gguf(path: Path) -> GgufFile:
    """Read a file, or all parts of a model that was split; any part may be named, metadata are the first's.

    Raises FileNotFoundError naming the parts that are missing, ValueError where they do not belong together.
    """
    file = read_gguf(path)
    count = file.metadata.get("split.count", 1)
    if count in (0, 1) and type(count) is int:
        return file
    paths = gguf_parts(path)
    if count != len(paths):
        raise ValueError(
            f"{path} is one of {shorten(count)} parts of a model (split.count), which are found by their names: "
            "NAME-00001-of-00002.gguf and so on"
        )
    missing = [part for part in paths if not has_file(part)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FileNotFoundError(f"{missing[0]}{more} is missing: {path.name} is one of {count} parts of a model")
    first, *following = (file if part == path else read_gguf(part) for part in paths)
    for number, part in enumerate((first, *following)):
        found = part.metadata.get("split.no"), part.metadata.get("split.count")
        if found != (number, count):
            raise ValueError(f"{part.path}: split.no and split.count are {shorten(found)}, expected {(number, count)}")
    whole = replace(first, following=tuple(following))
    names = {entry.name for entry in whole.all_entries}
    if len(names) != len(whole.all_entries):
        raise ValueError(f"{first.path}: two parts have a tensor of the same name")
    expected = first.metadata.get("split.tensors.count", len(names))
    if expected != len(names):
        raise ValueError(f"{first.path}: split.tensors.count is {shorten(expected)}, but the parts hold {len(names)}")
    return whole


def read_gguf(path: Path) -> GgufFile:
    """Read metadata and tensor table. ValueError, naming the file, for everything that is wrong with it."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 24:
            raise ValueError(f"{path} is no GGUF file: it has only {size} bytes")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _parse(path, _Cursor(data))
            except ValueError as error:
                raise ValueError(f"{path} is no readable GGUF file: {error}") from None


class _Cursor:
    """A position in the file that cannot leave it."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.size = len(data)
        self.position = 0
        self.num_items = 0

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.position:
            raise ValueError(
                f"{what} at byte {self.position} needs {count} bytes, {self.size - self.position} are left"
            )
        start, self.position = self.position, self.position + count
        return self.data[start : self.position]

    def integer(self, num_bytes: int, what: str) -> int:
        return int.from_bytes(self.take(num_bytes, what), "little")

    def count(self, what: str, smallest: int) -> int:
        """A 64-bit number of items, each of which takes at least `smallest` bytes of the rest of the file."""
        count = self.integer(8, what)
        if count > (self.size - self.position) // smallest:
            raise ValueError(f"{what} is {count}, more than the rest of the file can hold")
        return count

    def string(self, what: str) -> str:
        text = self.take(self.count(f"length of {what}", 1), what)
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{what} at byte {self.position - len(text)} is not valid UTF-8") from None

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind in _SCALARS:
            code = "<" + _SCALARS[kind]
            return struct.unpack(code, self.take(struct.calcsize(code), what))[0]
        if kind != _ARRAY:
            raise ValueError(f"{what} has the unknown value type {kind}")
        if depth == _MAX_DEPTH:
            raise ValueError(f"{what} is an array nested more than {_MAX_DEPTH} deep")
        item = self.integer(4, what)
        item_code = _SCALARS.get(item)
        item_bytes = struct.calcsize("<" + item_code) if item_code else 8
        count = self.count(f"length of {what}", item_bytes)
        self.num_items += count
        if self.num_items > _MAX_ITEMS:
            raise ValueError(f"{what} brings the arrays to {self.num_items} items, more than the {_MAX_ITEMS} allowed")
        if item_code:
            return list(struct.unpack(f"<{count}{item_code}", self.take(count * item_bytes, what)))
        return [self.value(item, what, depth + 1) for _ in range(count)]


def _parse(path: Path, cursor: _Cursor) -> GgufFile:
    if cursor.take(4, "the magic") != b"GGUF":
        raise ValueError("it does not start with the letters GGUF")
    version = cursor.integer(4, "the version")
    if version not in (2, 3):
        big_endian = " (a big-endian file)" if version and version & 0xFFFF == 0 else ""
        raise ValueError(f"its version is {version}{big_endian}; versions 2 and 3, little-endian, are known")
    num_tensors = cursor.count("the number of tensors", _SMALLEST_TENSOR)
    num_pairs = cursor.count("the number of metadata keys", _SMALLEST_PAIR)
    metadata: dict[str, Any] = {}
    for _ in range(num_pairs):
        key = cursor.string("a metadata key")
        if key in metadata or len(key) > _MAX_NAME:
            raise ValueError(f"metadata key {key[:80]!r} occurs twice or is too long")
        metadata[key] = cursor.value(cursor.integer(4, f"the type of {key}"), key)
    raw = [_table_line(cursor) for _ in range(num_tensors)]
    if len({entry.name for entry in raw}) != len(raw):
        raise ValueError("two tensors have the same name")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}, but a power of two is needed")
    data_start = -(-cursor.position // alignment) * alignment
    return GgufFile(path, metadata, _place(raw, data_start, alignment, cursor.size))


def _table_line(cursor: _Cursor) -> TensorEntry:
    """One line of the table, its offset still relative to the data."""
    name = cursor.string("a tensor name")
    if len(name) > _MAX_NAME:
        raise ValueError(f"a tensor has a name of {len(name)} characters")
    what = f"the table entry of tensor {name[:80]!r}"
    num_dimensions = cursor.integer(4, what)
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise ValueError(f"tensor {name} has {num_dimensions} dimensions; 1 to {_MAX_DIMENSIONS} are known")
    dimensions = [cursor.integer(8, what) for _ in range(num_dimensions)]
    number = cursor.integer(4, what)
    kind = _TYPE_NAMES.get(number, f"number {number}")
    if kind not in _TYPES:
        raise ValueError(f"tensor {name} has type {kind}; known types are {', '.join(_TYPES)}")
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    if min(dimensions) < 1 or dimensions[0] % block:
        raise ValueError(f"tensor {name} of type {kind} has the impossible dimensions {dimensions}")
    num_bytes = math.prod(dimensions) // block * block_bytes
    return TensorEntry(name, tuple(reversed(dimensions)), kind, cursor.integer(8, what), num_bytes)


def _place(raw: list[TensorEntry], data_start: int, alignment: int, size: int) -> tuple[TensorEntry, ...]:
    """Check that every tensor lies aligned inside the file and apart from the others; make offsets absolute."""
    end_of_previous = 0
    for entry in sorted(raw, key=lambda entry: entry.offset):
        if entry.offset % alignment:
            raise ValueError(f"tensor {entry.name} is not aligned to {alignment} bytes")
        if entry.offset < end_of_previous:
            raise ValueError(f"tensor {entry.name} overlaps another tensor")
        end_of_previous = entry.offset + entry.num_bytes
        if data_start + end_of_previous > size:
            raise ValueError(
                f"it is truncated: tensor {entry.name} ends at byte {data_start + end_of_previous}, the file has {size}"
            )
    return tuple(TensorEntry(e.name, e.shape, e.type, data_start + e.offset, e.num_bytes) for e in raw)


def _stored(path: Path, entry: TensorEntry) -> StoredTensor:
    if entry.type in DTYPES:
        return plain_tensor(path, entry.name, entry.shape, entry.type, entry.offset)
    kind = GGMLQuantizationType[entry.type]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    # Blocks lie along the last dimension, so a vector is one row: it can be read only whole.
    shape = entry.shape if len(entry.shape) > 1 else (1, *entry.shape)
    raw_shape = (*shape[1:-1], shape[-1] // block * block_bytes)
    row_bytes = math.prod(raw_shape)

    def read_raw(start: int, stop: int) -> Bytes:
        data = read_bytes(path, entry.offset + start * row_bytes, (stop - start) * row_bytes)
        return data.reshape(stop - start, *raw_shape)

    def dequantized(start: int, stop: int) -> torch.Tensor:
        # As one long row: the package works through an array sixteen rows at a time.
        # A scale may be infinite or not a number in a damaged file; that is no reason to print warnings.
        with np.errstate(all="ignore"):
            values = dequantize(read_raw(start, stop).reshape(1, -1), kind)
        return torch.from_numpy(values).reshape(stop - start, *shape[1:])

    if len(entry.shape) == 1:
        return StoredTensor(entry.name, entry.shape, entry.type, lambda start, stop: dequantized(0, 1)[0, start:stop])
    return StoredTensor(entry.name, entry.shape, entry.type, dequantized, read_raw)
