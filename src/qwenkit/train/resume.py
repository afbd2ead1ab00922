"""Where a run begins: in a new folder, over an earlier run, or at one of its checkpoints.

In: the configuration and output_dir; later, what a checkpoint has saved. Out: the checkpoint to resume from, the progress to go
on with and its step in steps of this run's size, or a ValueError that says why a run cannot go on. An earlier run is deleted
only where overwrite_output_dir says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from qwenkit.train.checkpoint import Saved, checkpoints, latest_checkpoint, remove_checkpoint, remove_leftovers
from qwenkit.train.config import TrainConfig
from qwenkit.train.log import LOG
from qwenkit.train.parallel import World
from qwenkit.train.parts import Progress
from qwenkit.train.plots import FILES

RESULTS = "all_results.json"
_EARLIER = (RESULTS, "config.json", "adapter_config.json", LOG)  # what another run, or a model, is known by
_NAMES = {field.name for field in fields(TrainConfig)}


def check_folders(config: TrainConfig, folder: Path) -> None:
    """ValueError for an output_dir that cannot be one, or that holds an earlier run and nothing says what shall become of it."""
    wanted = config.resume_from_checkpoint
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir is {config.output_dir!r}, which is a file; allowed is a folder")
    if wanted not in (None, "latest") and not Path(wanted).is_dir():
        raise ValueError(
            f"resume_from_checkpoint is {wanted!r}, which is no folder; allowed are a checkpoint folder and latest"
        )
    earlier = [path.name for path in reversed(checkpoints(folder).values())]
    if wanted is None or (wanted == "latest" and not earlier):
        found = [*earlier, *(name for name in _EARLIER if (folder / name).is_file())]
        if found and not config.overwrite_output_dir:
            raise ValueError(
                f"output_dir {folder} holds {found[0]} of an earlier run; "
                + (
                    "resume_from_checkpoint=latest goes on from it, overwrite_output_dir=true deletes it"
                    if earlier
                    else "overwrite_output_dir=true replaces it"
                )
            )


def prepare_folder(config: TrainConfig, folder: Path, world: World, say: Callable[[str], None]) -> Path | None:
    """Make output_dir ready and say from which checkpoint to resume, if from one. Nothing of an earlier run is deleted.

    Raises ValueError as `check_folders` does, and where an earlier run shall be resumed and none of its checkpoints is whole;
    OSError where one cannot be read.
    """
    found = ""
    if world.is_first:
        if folder.is_dir():
            remove_leftovers(folder)
        check_folders(config, folder)
        folder.mkdir(parents=True, exist_ok=True)
        found = config.resume_from_checkpoint or ""
        if found == "latest":
            path = latest_checkpoint(folder, say)
            found = "" if path is None else str(path)
            if path is None:
                say(f"{folder} has no checkpoint; the run begins at step 0")
    found = world.broadcast(found)
    return Path(found) if found else None


def remove_earlier_run(folder: Path) -> None:
    """overwrite_output_dir: delete checkpoints and records of an earlier run, just before the first step of the new one."""
    for path in checkpoints(folder).values():
        remove_checkpoint(path)
    for name in (LOG, RESULTS, *FILES.values()):
        (folder / name).unlink(missing_ok=True)


def restore_progress(saved: Saved, new: Progress) -> Progress:
    """The progress of a checkpoint. What an older version did not save keeps the value of a new run."""
    before = saved.state.get("progress", {})
    known = asdict(new) | {"step": saved.state["step"]}
    progress = Progress(**{name: before.get(name, value) for name, value in known.items()})
    progress.tokens = saved.own.get("tokens", 0)
    return progress


def resumed_step(state: Mapping[str, Any], config: TrainConfig, world_size: int) -> tuple[int, str | None]:
    """The step of a checkpoint's `state`, counted in steps of this run's size, and a sentence where that is another one.

    Where num_train_epochs says how long the run is, steps are counted anew by the samples that were seen, so that the rest of the
    data is what is left. Where max_steps says it, they are steps, whatever their size.
    """
    step, before, now = int(state["step"]), _saved_size(state), step_size(config, world_size)
    if before is None or before == now:
        return step, None
    what = "packs" if config.packs else "samples"
    said = (
        f"a step has {now} {what} now (per_device_train_batch_size * gradient_accumulation_steps * data-parallel processes), "
        f"and had {before} before the checkpoint"
    )
    if config.max_steps is not None:
        return step, f"{said}; max_steps, warm-up and save_steps count steps whatever their size"
    counted = step * before // now
    return counted, f"{said}; the {step * before} {what} that were seen are {counted} steps of this size"


def check_end(folder: Path, saved: Saved, step: int, total_steps: int) -> int:
    """The step to resume at, `step` as `resumed_step` counts it. Raises ValueError for a checkpoint beyond the last step.

    A step that was counted anew may lie beyond it all the same, since the last step of an epoch can be a smaller one: then the
    run is at its end.
    """
    if step > total_steps and step == saved.state["step"]:
        raise ValueError(
            f"{folder} is at step {step}, but the run has {total_steps}: nothing is left to train; max_steps or "
            "num_train_epochs can make it longer"
        )
    return min(step, total_steps)


def step_size(config: TrainConfig, world_size: int) -> int:
    """Samples (with packing: packs) of one step of all processes."""
    copies = world_size // (config.tensor_parallel * config.context_parallel)
    return config.batch_size * config.gradient_accumulation_steps * max(copies, 1)


def _saved_size(state: Mapping[str, Any]) -> int | None:
    """`step_size` of the run that wrote a checkpoint; older versions saved only what it follows from, or nothing (None)."""
    if "sequences_per_step" in state:
        return int(state["sequences_per_step"])
    earlier = {key: value for key, value in dict(state.get("config") or {}).items() if key in _NAMES}
    if not earlier or "world_size" not in state:
        return None
    return step_size(TrainConfig.from_settings(earlier), int(state["world_size"]))
