"""Checkpoints that every process writes its own part of, and that any number of processes can read.

In: tensors by name, plain or DTensor. Out: a folder with one safetensors file a process, in the form that
torch.distributed.checkpoint's HuggingFaceStorageReader reads (a file's metadata says where in the whole tensor its pieces begin),
and index.json, written last. No process holds what others hold, nothing is sent between them, nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qwenkit.storage import new_file, write_json
from qwenkit.train.parallel.world import World, is_cut, local
from qwenkit.weights.stored import DTYPES

INDEX = "index.json"
_SHARDING = "DCP_SHARDING_INFO"  # the name and the layout are torch's, which reads these files too


def save_sharded(folder: Path, tensors: Mapping[str, torch.Tensor], world: World) -> None:
    """Write this process's part of `tensors` into `folder`. To be called by all processes, with the same names in one order.

    What several processes hold alike is written by one of them. The folder is complete when index.json is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pieces: dict[str, torch.Tensor] = {}
    offsets: dict[str, dict[str, list[int]]] = {}
    for place, (name, tensor) in enumerate(tensors.items()):
        offset = _offset(tensor, place, world)
        if offset is not None and (local(tensor).numel() or not tensor.numel()):
            pieces[name] = local(tensor).detach().to("cpu").contiguous().clone()
            offsets[name] = {"saved_offsets": offset}
    metadata = {"format": "pt", "DCP_VERSION": "1.0", _SHARDING: json.dumps(offsets)}
    with new_file(folder / _file_name(world.rank, world.world_size)) as part:
        save_file(pieces, part, metadata=metadata)
    world.barrier()
    if world.is_first:
        index = {
            "files": [_file_name(rank, world.world_size) for rank in range(world.world_size)],
            "tensors": {name: {"shape": list(tensor.shape)} for name, tensor in tensors.items()},
        }
        write_json(folder / INDEX, index)
    world.barrier()


def load_sharded(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill `tensors` in place from a folder that any number of processes wrote, each with the part that it holds.

    Raises FileNotFoundError for a folder that is not complete, ValueError for names or shapes that differ.
    """
    stored = ShardedFolder.open(folder)
    missing = tensors.keys() - stored.shapes.keys()
    surplus = stored.shapes.keys() - tensors.keys()
    if missing or surplus:
        what, names = ("lacks", missing) if missing else ("has, but nobody wants,", surplus)
        raise ValueError(f"{folder} {what} {len(names)} tensors, the first is {min(names)}")
    for name, tensor in tensors.items():
        if stored.shapes[name] != tuple(tensor.shape):
            raise ValueError(
                f"{folder}: {name} has shape {list(stored.shapes[name])}, but {list(tensor.shape)} is needed"
            )
        part = local(tensor).detach()
        stored.read(name, part, begin_of(tensor))


@dataclass(frozen=True)
class _Piece:
    file: Path
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ShardedFolder:
    """What lies in such a folder: of each tensor its shape, and where its pieces are."""

    folder: Path
    shapes: Mapping[str, tuple[int, ...]]
    pieces: Mapping[str, list[_Piece]]

    @classmethod
    def open(cls, folder: Path) -> ShardedFolder:
        """Read the headers. FileNotFoundError where index.json or a file is missing, ValueError for corrupt ones."""
        path = folder / INDEX
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {INDEX}, so the checkpoint was never finished")
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            files = [folder / Path(name).name for name in index["files"]]
            shapes = {name: tuple(entry["shape"]) for name, entry in index["tensors"].items()}
            pieces: dict[str, list[_Piece]] = {name: [] for name in shapes}
            for file in files:
                for name, piece in _pieces(file):
                    pieces[name].append(piece)
        except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise ValueError(f"{folder} is no checkpoint that can be read: {error}") from None
        for name, shape in shapes.items():
            held = sum(_count(piece.shape) for piece in pieces[name])
            if held != _count(shape):
                raise ValueError(f"{folder}: of {name} there are {held} elements, expected {_count(shape)}")
        return cls(folder, shapes, pieces)

    def read(self, name: str, into: torch.Tensor, offset: tuple[int, ...]) -> None:
        """Fill `into` with the part of the tensor that begins at `offset`."""
        for piece in self.pieces[name]:
            begin = [max(a, b) for a, b in zip(offset, piece.offset, strict=True)]
            end = [min(a + n, b + m) for a, n, b, m in zip(offset, into.shape, piece.offset, piece.shape, strict=True)]
            if any(a >= b for a, b in zip(begin, end, strict=True)):
                continue
            with safe_open(piece.file, framework="pt") as file:
                if not begin:
                    into.copy_(file.get_tensor(name))
                    continue
                there = tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, piece.offset, strict=True))
                here = tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, offset, strict=True))
                into[here].copy_(file.get_slice(name)[there])

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor whole, on the CPU: what an export reads, one after the other."""
        with safe_open(self.pieces[name][0].file, framework="pt") as file:
            dtype = DTYPES[file.get_slice(name).get_dtype()]
        whole = torch.empty(self.shapes[name], dtype=dtype)
        self.read(name, whole, (0,) * whole.dim())
        return whole


def _pieces(file: Path) -> Iterator[tuple[str, _Piece]]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    with safe_open(file, framework="pt") as opened:
        offsets: dict[str, Any] = json.loads((opened.metadata() or {})[_SHARDING])
        for name in opened.keys():  # noqa: SIM118 - no mapping
            yield name, _Piece(file, tuple(offsets[name]["saved_offsets"]), tuple(opened.get_slice(name).get_shape()))


def begin_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Where this process's part of a tensor begins."""
    if not is_cut(tensor):
        return (0,) * tensor.dim()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offset)


def _offset(tensor: torch.Tensor, place: int, world: World) -> list[int] | None:
    """Where this process's part begins, or None where another process writes the same.

    Whole tensors go round, so that all processes write about as much. Of a DTensor those write who stand first in every
    dimension of the world that does not cut it.
    """
    if not is_cut(tensor):
        return [0] * tensor.dim() if place % world.world_size == world.rank else None
    assert world.mesh is not None
    names = tensor.device_mesh.mesh_dim_names or ()
    cuts = {name for name, placement in zip(names, tensor.placements, strict=True) if not placement.is_replicate()}
    coordinate = world.mesh.get_coordinate()
    assert coordinate is not None
    assert world.mesh.mesh_dim_names is not None
    for name, position in zip(world.mesh.mesh_dim_names, coordinate, strict=True):
        if name not in cuts and position:
            return None
    return list(begin_of(tensor))


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _file_name(rank: int, world_size: int) -> str:
    return f"shard-{rank + 1:05d}-of-{world_size:05d}.safetensors"
