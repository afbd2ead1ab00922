"""Checkpoints of a run: everything that the next step depends on, whole or not there at all.

In: named tensors (each process its part) and JSON. Out: a folder `checkpoint-N` that appears by one rename after every byte of it
is on the disk; the newest one that is whole; which may be deleted. Tensors are safetensors, the rest is JSON, nothing is
pickled. trainer_state.json lists size and checksum of every other file, and its own checksum.
"""

from __future__ import annotations

import base64
import json
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwenkit.storage import delete, fsync, fsync_tree, rename_all, strict, write_json
from qwenkit.train.parallel.sharded import ShardedFolder, load_sharded, save_sharded
from qwenkit.train.parallel.world import World

Tensors = Mapping[str, Mapping[str, torch.Tensor]]  # folder -> name -> tensor
STATE = "trainer_state.json"
_UNFINISHED, _REPLACED, _DELETED = ".unfinished-", ".replaced-", ".deleted-"
_DAMAGED = ".damaged"


class DamagedError(ValueError):
    """A checkpoint is not what was written: a file is missing, or its size, checksum or form is wrong."""


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
        delete(unfinished)
        unfinished.mkdir(parents=True)
    world.barrier()
    for name, group in tensors.items():
        save_sharded(unfinished / name, group, world)
    if beside is not None:
        beside(unfinished)
    ours = sorted(unfinished.glob(f"*/shard-{world.rank + 1:05d}-of-*"))
    own = {**saved.own, "rng": random_state(world.device), "files": _list_files(unfinished, ours)}
    write_json(unfinished / _own_file(world.rank), own)
    world.barrier()
    if world.is_first:
        shards = [path for path in unfinished.glob("*/shard-*") if path.is_file()]
        others = sorted({path for path in unfinished.rglob("*") if path.is_file()} - set(shards))
        state = {**saved.state, "step": step, "world_size": world.world_size, "files": _list_files(unfinished, others)}
        state = strict(state)
        write_json(unfinished / STATE, {**state, "checksum": _checksum_of(state)})
        _replace_checkpoint(unfinished, final)
    world.barrier()
    return final


def _replace_checkpoint(unfinished: Path, final: Path) -> None:
    """Give a written checkpoint its name. One of the same step is deleted only when the new one has it."""
    fsync_tree(unfinished)
    replaced = final.with_name(_REPLACED + final.name)
    moves = [(unfinished, final)]
    if final.exists():
        delete(replaced)
        moves.insert(0, (final, replaced))
    rename_all(moves)
    fsync(final.parent)
    delete(replaced)


def load_checkpoint(folder: Path, tensors: Tensors, world: World) -> Saved:
    """Fill `tensors` in place and set the random numbers of this process as they were.

    A run of another number of processes reads the first one's `own`. Raises ValueError for a checkpoint that is damaged, or
    of other tensors than these (another method, rank, optimizer).
    """
    verify_checkpoint(folder)
    state = _read(folder / STATE)
    for name, group in tensors.items():
        if not (folder / name).is_dir():
            raise ValueError(f"{folder} has no {name}, which this run needs; was it made with other settings?")
        load_sharded(folder / name, group)
    same = state["world_size"] == world.world_size
    own = _read(folder / _own_file(world.rank if same else 0))
    if same:
        set_random_state(own["rng"], world.device)
    return Saved(state, own)


def verify_checkpoint(folder: Path) -> None:
    """Compare sizes and checksums of all files with what was written.

    Raises DamagedError naming the first that differs, and OSError where a file cannot be read: that is no damage, the disk or
    the network may be there again in a minute.
    """
    state = _read(folder / STATE)
    world_size = state.get("world_size")
    if not isinstance(state.get("step"), int) or not isinstance(world_size, int) or not 1 <= world_size <= 2**20:
        raise DamagedError(f"{folder / STATE} is damaged: it names no step or no number of processes")
    checksum = state.pop("checksum", None)
    if checksum is not None and checksum != _checksum_of(state):
        raise DamagedError(f"{folder / STATE} is damaged: its checksum is not the one that was written")
    if checksum is not None or "files" in state:  # checkpoints of earlier versions list only what each process wrote
        _verify_files(folder, folder / STATE, state.get("files"))
    for rank in range(world_size):
        path = folder / _own_file(rank)
        _verify_files(folder, path, _read(path).get("files"))
    for group in sorted({path.parent for path in folder.glob("*/shard-*")}):
        try:
            ShardedFolder.open(group)
        except (FileNotFoundError, ValueError) as error:
            raise DamagedError(f"{group} is damaged: {error}") from None


def _verify_files(folder: Path, listing: Path, files: object) -> None:
    if not isinstance(files, dict):
        raise DamagedError(f"{listing} is damaged: it lists no files")
    for name, entry in files.items():
        if not isinstance(entry, list) or len(entry) != 2:
            raise DamagedError(f"{listing} is damaged: it gives {name} no size and checksum")
        path, (size, checksum) = folder / name, entry
        found = _size(path)
        if found != size:
            raise DamagedError(f"{path} is damaged: expected {size} bytes, found {'none' if found is None else found}")
        if _checksum(path) != checksum:
            raise DamagedError(f"{path} is damaged: its checksum is not the one that was written")


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise DamagedError(f"{path} must hold a JSON object, found a {type(value).__name__}")
    return value


def _size(path: Path) -> int | None:
    """Bytes of a file; None where there is none. OSError where that cannot be known."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def checkpoints(output_dir: Path) -> dict[int, Path]:
    """The checkpoints of a run by step, in order; whether they are whole is not looked at."""
    found = {
        int(match[1]): path
        for path in (output_dir.iterdir() if output_dir.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    }
    return dict(sorted(found.items()))


def latest_checkpoint(output_dir: Path, say: Callable[[str], None] = lambda text: None) -> Path | None:
    """The newest checkpoint that is whole, every file of it checked; None where there is no checkpoint at all.

    Newer ones that are damaged are renamed to `checkpoint-N.damaged`, so that they are neither taken for the newest nor deleted,
    and said. Raises ValueError where all are damaged and OSError where one cannot be read: nothing is renamed then, and the
    caller must not begin anew over them.
    """
    damaged: list[tuple[Path, ValueError]] = []
    for path in reversed(checkpoints(output_dir).values()):
        try:
            verify_checkpoint(path)
        except DamagedError as error:
            damaged.append((path, error))
        except OSError as error:
            raise OSError(
                error.errno,
                f"{path} cannot be read ({error.strerror or error}), which need not be damage: try again, or name another "
                "checkpoint in resume_from_checkpoint",
            ) from error
        else:
            for each, why in damaged:
                say(f"{each.name} is damaged and renamed to {_set_aside(each).name}: {why}")
            return path
    if not damaged:
        return None
    others = f", nor is any of the {len(damaged) - 1} before it" if len(damaged) > 1 else ""
    raise ValueError(
        f"resume_from_checkpoint is latest, but {damaged[0][0]} is not whole ({damaged[0][1]}){others}; nothing was "
        "changed: another output_dir begins at step 0, and so does overwrite_output_dir=true in place of "
        "resume_from_checkpoint, which deletes what is there"
    )


def _set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint to a name that nothing has."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}{_DAMAGED}{f'-{number}' if number > 1 else ''}")).exists():
        number += 1
    folder.rename(aside)
    fsync(folder.parent)
    return aside


def remove_old(output_dir: Path, keep: int | None, best: int | None, step: int) -> None:
    """After `step` was saved, delete the checkpoints up to it but the `keep` newest (None: keep all) and the best.

    Those of later steps are another run's, which this one has gone back behind: they stay until a new one of the same step.
    """
    steps = {number: path for number, path in checkpoints(output_dir).items() if number <= step}
    for number in [] if keep is None else list(steps)[:-keep]:
        if number != best:
            remove_checkpoint(steps[number])


def remove_leftovers(output_dir: Path) -> None:
    """Finish or undo what a killed run was about to do, then delete what it has left half written or half deleted.

    A whole checkpoint that only lacked its name gets it; one that was about to be replaced is put back.
    """
    for prefix in (_UNFINISHED, _REPLACED, _DELETED):
        for path in output_dir.glob(f"{prefix}checkpoint-*"):
            final = path.with_name(path.name.removeprefix(prefix))
            if prefix == _DELETED or final.exists() or not _is_whole(path):
                delete(path)
            else:
                path.rename(final)
                fsync(output_dir)


def _is_whole(folder: Path) -> bool:
    """True for a whole checkpoint, and for one that cannot be read now."""
    try:
        verify_checkpoint(folder)
    except DamagedError:
        return False
    except OSError:
        return True
    return True


def remove_checkpoint(folder: Path) -> None:
    """Gone by its name at once, then byte by byte, so that a half deleted one is never taken for a checkpoint."""
    doomed = folder.with_name(_DELETED + folder.name)
    delete(doomed)
    folder.rename(doomed)
    delete(doomed)


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


def _own_file(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _checksum(path: Path) -> int:
    """CRC-32: against disks that lose bytes, not against people."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            value = zlib.crc32(block, value)
    return value


def _checksum_of(state: Mapping[str, Any]) -> int:
    """The same of trainer_state.json itself, whatever its white space."""
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def _list_files(folder: Path, paths: Iterable[Path]) -> dict[str, list[int]]:
    return {str(path.relative_to(folder)): [path.stat().st_size, _checksum(path)] for path in paths}
