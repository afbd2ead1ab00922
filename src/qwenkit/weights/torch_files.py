"""`pytorch_model.bin`: one file, or shards with an index. In: a folder. Out: its tensors, memory-mapped.

Such a file is a pickle inside a zip archive. It is opened only by torch's weights-only unpickler, which builds tensors and
plain containers and refuses everything else: no code of a model folder ever runs.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch

from qwenkit.weights.stored import DTYPE_NAMES, DTYPES, StoredTensor, check_shard, shards

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


def has_torch_files(folder: Path) -> bool:
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def read_torch_files(folder: Path) -> list[StoredTensor]:
    """Every tensor of `pytorch_model.bin`, or of the shards that its index lists.

    Raises FileNotFoundError for a missing shard, ValueError (naming the file) for one that is no torch file, holds code,
    holds something other than tensors, or lacks a tensor the index promised.
    """
    if (folder / SINGLE).is_file():
        return read_torch_file(folder / SINGLE)
    tensors: list[StoredTensor] = []
    for shard, expected in shards(folder / INDEX).items():
        found = read_torch_file(folder / shard)
        check_shard(folder / shard, expected, {tensor.name for tensor in found})
        tensors += found
    return tensors


def read_torch_file(path: Path) -> list[StoredTensor]:
    """Every tensor of one file, as `read_torch_files` reads it."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is truncated, or no file that torch.save (1.6 or later) wrote")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError:
        raise ValueError(f"{path} holds code or objects other than tensors, which are never loaded") from None
    except Exception as error:  # a corrupt archive or pickle fails in any of a dozen ways inside torch
        raise ValueError(f"{path} is corrupt: {error}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} must hold a dictionary of tensors, found a {type(state).__name__}")
    return [_stored(path, name, value) for name, value in state.items()]


def _stored(path: Path, name: object, value: object) -> StoredTensor:
    if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        raise ValueError(f"{path} must hold a dictionary of tensors, but {name!r} is no plain tensor")
    if value.dtype not in DTYPE_NAMES:
        raise ValueError(f"{path}: tensor {name} has type {value.dtype}; known types are {', '.join(DTYPES)}")
    tensor = value.detach()

    def read(start: int, stop: int) -> torch.Tensor:
        return tensor[start:stop].clone() if tensor.dim() else tensor.clone()

    return StoredTensor(name, tuple(tensor.shape), DTYPE_NAMES[tensor.dtype], read)
