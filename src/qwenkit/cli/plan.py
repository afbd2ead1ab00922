"""`qwenkit plan train`: how much memory a run will need on each device, before anything is downloaded or loaded.

In: a model (folder, config.json, or a name in a table of sizes) or a training YAML, key=value, and the machines. Out: a table, or
one JSON line; exit code 1 where it does not fit. What is predicted and how is train/plan's business.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwenkit.settings import nearest

if TYPE_CHECKING:
    from qwenkit.model.config import ModelConfig
    from qwenkit.train.config import TrainConfig
    from qwenkit.train.plan import MemoryPlan

SIZES = "sizes.yaml"
# What the name of a variant says beside the size of the model.
_VARIANT = re.compile(r"-(Instruct|Chat|Base|Thinking)(-\d{4})?$")
ROWS = ("weights", "gradients", "optimizer", "activations", "gathered", "runtime", "total")


@click.group(epilog="\b\nExample:\n  qwenkit plan train Qwen/Qwen2.5-7B method=lora cutoff_len=2048")
def plan() -> None:
    """What something will need, before it is done."""


@plan.command(
    epilog="""\b
Examples:
  qwenkit plan train models/Qwen2-7B-Instruct method=lora cutoff_len=2048
  qwenkit plan train recipes/qwen1.5-72b-finetune.yaml --gpus 32 --gpu-memory 64GiB"""
)
@click.argument("model_or_config")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--gpus", default=1, show_default=True, help="All GPUs of all nodes; 0: one process on a CPU.")
@click.option("--per-node", default=8, show_default=True, help="GPUs of a node.")
@click.option(
    "--gpu-memory", metavar="SIZE", help="Memory of a GPU, such as 80GiB: also prints the largest batch that fits."
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON; sizes in bytes.")
def train(
    model_or_config: str, settings: tuple[str, ...], gpus: int, per_node: int, gpu_memory: str | None, as_json: bool
) -> None:
    """Predict the memory of a training run of MODEL_OR_CONFIG on each device.

    It is a model folder, a config.json, a training YAML (of qwenkit or LLaMA-Factory), the name of a released model of Qwen, or a
    model that is on this disk already. Every sample is taken to be cutoff_len tokens long.
    """
    from qwenkit.compat.translate import translate
    from qwenkit.settings import parse_size
    from qwenkit.train.config import TrainConfig
    from qwenkit.train.plan import largest_batch, plan_memory
    from qwenkit.train.settings_file import find_recipe, parse_assignments, read_settings

    if gpus < 0 or per_node < 1:
        raise ValueError(f"gpus is {gpus} and per-node {per_node}, allowed are at least 0 and at least 1")
    memory = None if gpu_memory is None else parse_size("gpu-memory", gpu_memory, example="80GiB")
    path = find_recipe(model_or_config)
    own: dict[str, Any] = {"model": model_or_config}
    folder = Path()
    if path.suffix in (".yaml", ".yml"):
        own = read_settings(path)
        folder = path.parent
    translation = translate(own, parse_assignments(settings), processes=max(1, gpus))
    config = TrainConfig.from_settings(translation.settings)
    model = find_sizes(config.model, folder)
    machines: Any = {"packed": find_packed(config.model, config.method, folder), "gpus": gpus, "per_node": per_node}
    found = plan_memory(model, config, **machines)
    batch = None if memory is None else largest_batch(model, config, memory, **machines)
    if as_json:
        record = asdict(found) | {"total": found.total, "largest_batch": batch, "gpus": gpus, "gpu_memory": memory}
        click.echo(json.dumps(record))
    else:
        click.echo(_table(config, found, gpus, memory, batch))
    if memory is not None and found.total > memory:
        raise SystemExit(1)


def find_sizes(name: str, folder: Path = Path()) -> ModelConfig:
    """The ModelConfig of a folder, a config.json, a cached model, or a name in sizes.yaml of `folder` or of the recipes.

    Raises ValueError where there is none of them.
    """
    from qwenkit.model.config import ModelConfig
    from qwenkit.weights.checkpoint import open_checkpoint

    found = _find(name, folder)
    return ModelConfig.from_dict(open_checkpoint(found).config if isinstance(found, Path) else found)


def find_packed(name: str, method: str, folder: Path = Path()) -> dict[str, str]:
    """Which matrices training would keep in the bits of the file, and their types; none where only sizes are known.

    Raises ValueError as `find_sizes` does, and for a method that trains such matrices.
    """
    from qwenkit.train.methods import stays_packed
    from qwenkit.weights.checkpoint import open_checkpoint

    found = _find(name, folder)
    if not isinstance(found, Path):
        return {}
    checkpoint = open_checkpoint(found)
    try:
        return stays_packed(checkpoint, method)
    except FileNotFoundError:  # a configuration whose weights are elsewhere
        return {}


def _find(name: str, folder: Path) -> dict[str, Any] | Path:
    """A model on this disk, or else what its config.json says."""
    from qwenkit.files import has_file, read_json
    from qwenkit.hub.find import find_model
    from qwenkit.train.settings_file import RECIPES, read_settings

    path = Path(name).expanduser()
    if path.suffix == ".json" and has_file(path):
        return read_json(path)  # to YAML 1e-06 is a text
    if path.exists():
        return path
    known = read_settings(RECIPES / SIZES)
    if (folder / SIZES).is_file():
        known |= read_settings(folder / SIZES)
    try:
        return find_model(name, download=False)
    except (ValueError, FileNotFoundError):
        size = _VARIANT.sub("", re.sub(r"^(hf|ms):", "", name))
        for one in (name, size, f"Qwen/{size}"):
            if one in known:
                return dict(known[one])
        raise ValueError(
            f"{name!r} is no model folder, config.json or name in {SIZES}; {nearest(name, known)}"
        ) from None


def _table(config: TrainConfig, plan: MemoryPlan, gpus: int, memory: int | None, batch: int | None) -> str:
    where = "one process on a CPU" if gpus == 0 else f"{gpus} GPU{'s' if gpus > 1 else ''}"
    layout = ", ".join(
        f"{name} {value}"
        for name, value in (("replicate", plan.replicate), ("shard", plan.shard), ("tensor", plan.tensor))
        if value > 1
    )
    lines = [
        f"{config.model}: {plan.parameters / 1e9:.2f} B parameters, {plan.trained / 1e6:,.1f} M trained, {config.method}",
        f"{where}{': ' + layout if layout else ''}; a micro-batch of {plan.tokens} tokens",
        "",
        *(f"{name:<12}{getattr(plan, name) / 2**30:>10.2f} GiB" for name in ROWS if getattr(plan, name)),
    ]
    if memory is not None:
        verdict = "fits" if plan.total <= memory else "does not fit"
        most = "not even 1" if batch is None else str(batch)
        lines += ["", f"{verdict} into {memory / 2**30:.1f} GiB; largest per_device_train_batch_size: {most}"]
    return "\n".join(lines)
