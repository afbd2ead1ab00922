"""`pytorch_model.bin`: one file, or shards with an index. In: a folder. Out: its tensors, memory-mapped.

Such a file is a pickle inside a zip archive. It is opened only by torch's weights-only unpickler, which builds tensors and
plain containers and refuses everything else: no code of a model folder ever runs.
"""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch

from qwenkit.files import has_file, open_file
from qwenkit.weights.stored import DTYPE_NAMES, DTYPES, StoredTensor, check_shard, has_shards, shards

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
_LARGEST_DIRECTORY = 8 << 20  # bytes of an archive's list of members, about a hundred for each tensor
_LARGEST_PICKLE = 64 << 20  # bytes; a tensor takes some hundred of them


def has_torch_files(folder: Path) -> bool:
    return has_file(folder / SINGLE) or has_shards(folder / INDEX)


def read_torch_files(folder: Path) -> list[StoredTensor]:
    """Every tensor of `pytorch_model.bin`, or of the shards that its index lists.

    Raises FileNotFoundError for a missing shard, ValueError (naming the file) for one that is no torch file, holds code,
    holds something other than tensors, or lacks a tensor the index promised.
    """
    if has_file(folder / SINGLE):
        return read_torch_file(folder / SINGLE)
    tensors: list[StoredTensor] = []
    for shard, expected in shards(folder / INDEX).items():
        found = read_torch_file(folder / shard)
        check_shard(folder / shard, expected, {tensor.name for tensor in found})
        tensors += found
    return tensors


def read_torch_file(path: Path) -> list[StoredTensor]:
    """Every tensor of one file, as `read_torch_files` reads it."""
    _check_archive(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError:
        raise ValueError(f"{path} holds code or objects other than tensors, which are never loaded") from None
    except Exception as error:  # a corrupt archive or pickle fails in any of a dozen ways inside torch
        raise ValueError(f"{path} is corrupt: {error}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} must hold a dictionary of tensors, found a {type(state).__name__}")
    return [_stored(path, name, value) for name, value in state.items()]


def _check_archive(path: Path) -> None:
    """ValueError for a file that is no zip archive as torch.save writes it: on one disk, its members stored as they are.

    A compressed member could fill the memory, so can an archive whose list of members is said to be huge.
    """
    try:
        with _BoundedFile(path) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OverflowError, UnicodeDecodeError, ValueError, OSError) as error:
        raise ValueError(f"{path} is truncated, or no file that torch.save (1.6 or later) wrote: {error}") from None
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{path} has compressed members, which torch.save does not write")
        if member.filename.endswith(".pkl") and member.file_size > _LARGEST_PICKLE:
            raise ValueError(f"{path} has a pickle of {member.file_size} bytes, allowed are {_LARGEST_PICKLE}")


class _BoundedFile(io.FileIO):
    """A regular file of which at most _LARGEST_DIRECTORY bytes are read at once: zipfile believes what the archive says."""

    def __init__(self, path: Path) -> None:
        with open_file(path) as file:
            super().__init__(os.dup(file.fileno()), "rb")

    def read(self, size: int | None = -1, /) -> bytes:
        rest = os.fstat(self.fileno()).st_size - self.tell()
        count = rest if size is None or size < 0 else min(size, max(rest, 0))
        if count > _LARGEST_DIRECTORY:
            raise ValueError(f"its list of members takes {count} bytes, allowed are {_LARGEST_DIRECTORY}")
        return super().read(count) or b""


def _stored(path: Path, name: object, value: object) -> StoredTensor:
    if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        raise ValueError(f"{path} must hold a dictionary of tensors, but {name!r} is no plain tensor")
    if value.dtype not in DTYPE_NAMES:
        raise ValueError(f"{path}: tensor {name} has type {value.dtype}; known types are {', '.join(DTYPES)}")
    tensor = value.detach()

    def read(start: int, stop: int) -> torch.Tensor:
        return tensor[start:stop].clone() if tensor.dim() else tensor.clone()

    return StoredTensor(name, tuple(tensor.shape), DTYPE_NAMES[tensor.dtype], read)
