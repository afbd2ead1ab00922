"""Checkpoints of a run: everything that the next step depends on, whole or not there at all.

In: named tensors (each process its part) and JSON. Out: a folder `checkpoint-N` that appears by one rename after every byte of it
is on the disk; which of them can be trusted; which may be deleted. Tensors are safetensors, the rest is JSON, nothing is pickled.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwenkit.train.parallel.sharded import load_sharded, save_sharded
from qwenkit.train.parallel.world import World
from qwenkit.weights.stored import read_json

Tensors = Mapping[str, Mapping[str, torch.Tensor]]  # folder -> name -> tensor
STATE = "trainer_state.json"
_UNFINISHED, _DELETED = ".unfinished-", ".deleted-"


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says beside its tensors: `state` is the same for all processes, `own` is this one's."""

    state: dict[str, Any]
    own: dict[str, Any]


def save_checkpoint(
    output_dir: Path,
    step: int,
    tensors: Tensors,
    saved: Saved,
    world: World,
    *,
    beside: Callable[[Path], None] | None = None,
) -> Path:
    """Write `output_dir/checkpoint-{step}`. To be called by all processes; `output_dir` is one folder that all of them see.

    `beside` writes more into the same folder (an adapter that others can load) and is called by all processes too. A
    checkpoint of the same step is replaced.
    """
    final, unfinished = output_dir / f"checkpoint-{step}", output_dir / f"{_UNFINISHED}checkpoint-{step}"
    if world.is_first:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    world.barrier()
    for name, group in tensors.items():
        save_sharded(unfinished / name, group, world)
    if beside is not None:
        beside(unfinished)
    ours = sorted(unfinished.glob(f"*/shard-{world.rank + 1:05d}-of-*"))
    own = {
        **saved.own,
        "rng": random_state(world.device),
        "files": {str(path.relative_to(unfinished)): [path.stat().st_size, _checksum(path)] for path in ours},
    }
    write_json(unfinished / _own_file(world.rank), own)
    world.barrier()
    if world.is_first:
        write_json(unfinished / STATE, {**saved.state, "step": step, "world_size": world.world_size})
        for path in (*unfinished.rglob("*"), unfinished):
            sync(path)
        if final.exists():
            _delete(final)
        unfinished.rename(final)
        sync(output_dir)
    world.barrier()
    return final


def load_checkpoint(folder: Path, tensors: Tensors, world: World) -> Saved:
    """Fill `tensors` in place and set the random numbers of this process as they were.

    A run of another number of processes reads the first one's `own`. Raises ValueError for a checkpoint that is damaged, or
    of other tensors than these (another method, rank, optimizer).
    """
    verify_checkpoint(folder)
    state = read_json(folder / STATE)
    for name, group in tensors.items():
        if not (folder / name).is_dir():
            raise ValueError(f"{folder} has no {name}, which this run needs; was it made with other settings?")
        load_sharded(folder / name, group)
    same = state["world_size"] == world.world_size
    own = read_json(folder / _own_file(world.rank if same else 0))
    if same:
        set_random_state(own["rng"], world.device)
    return Saved(state, own)


def verify_checkpoint(folder: Path) -> None:
    """Compare sizes and checksums of all files with what was written. ValueError naming the first that differs."""
    state = read_json(folder / STATE)
    world_size = state.get("world_size")
    if not isinstance(state.get("step"), int) or not isinstance(world_size, int) or not 1 <= world_size <= 2**20:
        raise ValueError(f"{folder / STATE} is damaged: it names no step or no number of processes")
    for rank in range(world_size):
        files = read_json(folder / _own_file(rank)).get("files")
        if not isinstance(files, dict):
            raise ValueError(f"{folder / _own_file(rank)} is damaged: it lists no files")
        for name, (size, checksum) in files.items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                raise ValueError(
                    f"{path} is damaged: expected {size} bytes, found {'none' if found is None else found}"
                )
            if _checksum(path) != checksum:
                raise ValueError(f"{path} is damaged: its checksum is not the one that was written")


def checkpoints(output_dir: Path) -> dict[int, Path]:
    """The checkpoints of a run by step, in order; whether they are whole is not looked at."""
    found = {
        int(match[1]): path
        for path in (output_dir.iterdir() if output_dir.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    }
    return dict(sorted(found.items()))


def latest_checkpoint(output_dir: Path, say: Callable[[str], None] = lambda text: None) -> Path | None:
    """The newest one that is whole; each newer one that is not is said."""
    for path in reversed(checkpoints(output_dir).values()):
        try:
            verify_checkpoint(path)
        except (ValueError, OSError) as error:
            say(f"{path.name} is passed over: {error}")
            continue
        return path
    return None


def remove_old(output_dir: Path, keep: int | None, best: int | None) -> None:
    """Delete all checkpoints but the `keep` newest (None: keep all) and the best."""
    steps = checkpoints(output_dir)
    for step in [] if keep is None else list(steps)[:-keep]:
        if step != best:
            _delete(steps[step])


def remove_leftovers(output_dir: Path) -> None:
    """What a killed run has left half written or half deleted."""
    for path in output_dir.glob(".*"):
        if path.name.startswith((_UNFINISHED, _DELETED)):
            shutil.rmtree(path, ignore_errors=True)


def _delete(folder: Path) -> None:
    """Gone by its name at once, then byte by byte, so that a half deleted one is never taken for a checkpoint."""
    doomed = folder.with_name(_DELETED + folder.name)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def random_state(device: torch.device) -> dict[str, str]:
    """The state of torch's random numbers, of the CPU and of the device that is used."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {kind: base64.b64encode(bytes(state.tolist())).decode() for kind, state in states.items()}


def set_random_state(states: Mapping[str, str], device: torch.device) -> None:
    for kind, text in states.items():
        state = torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
        if kind == "cpu":
            torch.set_rng_state(state)
        elif device.type == kind:
            torch.cuda.set_rng_state(state, device)


def write_json(path: Path, value: Any) -> None:
    """Beside, to the disk, then renamed: the file is there whole or not at all."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
    sync(beside)
    beside.replace(path)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _own_file(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _checksum(path: Path) -> int:
    """CRC-32: against disks that lose bytes, not against people."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            value = zlib.crc32(block, value)
    return value
