"""What a tensor on disk is, and which files of a folder hold them.

In: paths. Out: `StoredTensor`, a name, a shape and a way to read rows of it; the shards that an index lists; JSON files.
Whatever the format, a tensor is read in runs of rows of its first dimension: so a model is filled with a few megabytes of
scratch memory, and a part of a foreign tensor (a third of a fused projection, one expert of a stack) is read without the rest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qwenkit import files
from qwenkit.errors import shorten

Bytes = npt.NDArray[np.uint8]

# The names that safetensors gives to torch's types; every format reports its plain types by these.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_CHUNK_ELEMENTS = 1 << 20
_LARGEST_OWN = 1 << 30  # bytes


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, not read yet.

    `dtype` is the file's word for it ("BF16", "Q4_1"). `read(start, stop)` gives those rows of the first dimension,
    (stop - start, *shape[1:]); blocks of a quantized type come dequantized to fp32. `read_raw`, only where the type is
    quantized, gives the same rows as they lie in the file: uint8, the last dimension in bytes. `read_box(start, stop, left,
    right)`, only of plain matrices, reads some columns of those rows and nothing else.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[int, int], torch.Tensor]
    read_raw: Callable[[int, int], Bytes] | None = None
    read_box: Callable[[int, int, int, int], torch.Tensor] | None = None

    def load(self) -> torch.Tensor:
        """The whole tensor, in memory of its own. ValueError when the file turns out shorter than its header said."""
        return self.read(0, self.shape[0] if self.shape else 1)

    def raw(self) -> Bytes | None:
        """All quantized blocks as they lie in the file, (*shape[:-1], bytes of a row); None for a plain type."""
        return self.read_raw(0, self.shape[0]) if self.read_raw is not None else None

    def copy_to(self, out: torch.Tensor) -> None:
        """Fill `out` (same shape, any dtype and device) a few rows at a time."""
        assert out.shape == self.shape
        self.copy_part(out, (0,) * len(self.shape))

    def copy_part(self, out: torch.Tensor, offset: tuple[int, ...]) -> None:
        """Fill `out` (any dtype and device) with the part of its shape that begins at `offset`, a few rows at a time.

        Only rows of that part are read; of a matrix's columns only those of the part, where `read_box` can.
        """
        if not self.shape:
            out.copy_(self.load())
            return
        ends = (begin + size for begin, size in zip(offset, out.shape, strict=True))
        cut = [slice(begin, end) for begin, end in zip(offset, ends, strict=True)]
        cut[0] = slice(None)
        rows = max(1, _CHUNK_ELEMENTS // max(1, math.prod(self.shape[1:])))
        for start in range(0, out.shape[0], rows):
            stop = min(start + rows, out.shape[0])
            low, high = offset[0] + start, offset[0] + stop
            if out.shape[1:] == self.shape[1:]:
                out[start:stop].copy_(self.read(low, high))
            elif self.read_box is not None:
                out[start:stop].copy_(self.read_box(low, high, cut[1].start, cut[1].stop))
            else:
                out[start:stop].copy_(self.read(low, high)[tuple(cut)])

    @property
    def is_integer(self) -> bool:
        return self.dtype in DTYPES and not DTYPES[self.dtype].is_floating_point


def plain_tensor(path: Path, name: str, shape: tuple[int, ...], dtype: str, offset: int) -> StoredTensor:
    """A tensor whose elements lie in order from byte `offset` of the file, in one of `DTYPES`."""
    row_bytes = math.prod(shape[1:]) * DTYPES[dtype].itemsize

    def read(start: int, stop: int) -> torch.Tensor:
        rows_shape = (stop - start, *shape[1:]) if shape else ()
        if 0 in rows_shape:
            return torch.empty(rows_shape, dtype=DTYPES[dtype])
        data = read_bytes(path, offset + start * row_bytes, (stop - start) * row_bytes)
        return torch.from_numpy(data).view(DTYPES[dtype]).reshape(rows_shape)

    def read_box(start: int, stop: int, left: int, right: int) -> torch.Tensor:
        item = DTYPES[dtype].itemsize
        first = offset + start * row_bytes + left * item
        data = read_lines(path, first, (right - left) * item, row_bytes, stop - start)
        return torch.from_numpy(data).view(DTYPES[dtype]).reshape(stop - start, right - left)

    return StoredTensor(name, shape, dtype, read, read_box=read_box if len(shape) == 2 else None)


def read_lines(path: Path, offset: int, length: int, stride: int, count: int) -> Bytes:
    """`count` pieces of `length` bytes, whose beginnings lie `stride` apart from `offset` on, one after the other."""
    data = np.empty(count * length, dtype=np.uint8)
    with path.open("rb", buffering=0) as file:
        for line in range(count):
            _read_into(path, file, offset + line * stride, data.data[line * length : (line + 1) * length])
    return data


def read_bytes(path: Path, offset: int, count: int) -> Bytes:
    """`count` bytes of a file from `offset`, in memory of their own.

    A plain read rather than a memory map: pages of a map count as the process's memory, and a file that is cut while it
    is mapped kills the process.
    """
    data = np.empty(count, dtype=np.uint8)
    with path.open("rb", buffering=0) as file:
        _read_into(path, file, offset, data.data)
    return data


def _read_into(path: Path, file: FileIO, offset: int, into: memoryview) -> None:
    file.seek(offset)
    done = 0
    while done < len(into):
        got = file.readinto(into[done:])
        if not got:
            raise ValueError(f"{path} is truncated: {len(into)} bytes expected at offset {offset}, found {done}")
        done += got


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that this package wrote, such as a training run's state: large, and a loss in it may be NaN.

    Raises FileNotFoundError, and ValueError naming the file.
    """
    return files.read_json(path, _LARGEST_OWN, _LARGEST_OWN, allow_nan=True)


def shards(index_path: Path) -> dict[str, set[str]]:
    """Read a `*.index.json`: for each shard's file name, the tensors that must be in it.

    Without an index the shards are all files NAME-00001-of-0000N of the same kind, and nothing is known of what is in them.
    Raises ValueError for a malformed index or a shard outside the folder, FileNotFoundError for a shard that is not there.
    """
    if not files.has_file(index_path):
        return {name: set() for name in _numbered(index_path)}
    weight_map = files.read_json(index_path, files.LARGEST_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index_path}: weight_map must be an object of tensor name to file name")
    found: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard:
            where = f"{index_path}: tensor {shorten(tensor)}"
            raise ValueError(f"{where} is said to be in {shorten(shard)}, which is no plain file name")
        found.setdefault(shard, set()).add(tensor)
    missing = [shard for shard in sorted(found) if not files.has_file(index_path.parent / shard)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FileNotFoundError(f"{index_path.parent / missing[0]}{more} is missing, but {index_path.name} lists it")
    return dict(sorted(found.items()))


def has_shards(index_path: Path) -> bool:
    """Whether there is an index, or a shard that is numbered as one of those it would list."""
    return files.has_file(index_path) or bool(_found(index_path))


def _found(index_path: Path) -> list[re.Match[str]]:
    base, suffix = index_path.name.removesuffix(".index.json").rsplit(".", 1)
    form = re.compile(rf"{re.escape(base)}-(\d{{5}})-of-(\d{{5}})\.{re.escape(suffix)}")
    names = sorted(path.name for path in index_path.parent.glob(f"*-of-*.{suffix}"))
    return [match for name in names if (match := form.fullmatch(name)) and files.has_file(index_path.parent / name)]


def _numbered(index_path: Path) -> list[str]:
    """FileNotFoundError where a number is missing, ValueError where shards count differently."""
    found = _found(index_path)
    counts = {int(match[2]) for match in found}
    if len(counts) != 1:
        raise ValueError(f"{index_path} is missing, and the shards beside it are numbered of {sorted(counts)}")
    missing = sorted({*range(1, counts.pop() + 1)} - {int(match[1]) for match in found})
    if missing:
        names = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        raise FileNotFoundError(f"{index_path} is missing, and of the shards beside it these numbers: {names}")
    return [match[0] for match in found]


def check_shard(shard: Path, expected: set[str], found: set[str]) -> None:
    """ValueError when a shard lacks tensors that its index promised."""
    absent = sorted(expected - found)
    if absent:
        raise ValueError(f"{shard} lacks {len(absent)} tensors that the index places in it, the first is {absent[0]}")
