"""Refusals of a run before weights are loaded: settings, packages, folders, processes, targets. `--check` and a run share them.

In: the configuration, and a checkpoint whose tensors are not read. Out: nothing, or a ValueError or OSError of one sentence.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

from qwenkit.hub.find import find_model
from qwenkit.model.config import ModelConfig
from qwenkit.train.checkpoint import checkpoints, verify_checkpoint
from qwenkit.train.config import TrainConfig
from qwenkit.train.methods import ADAPTERS, check_adapter, model_of_shapes, stays_packed
from qwenkit.train.parallel.tensor import check_widths
from qwenkit.train.parallel.world import parallel_sizes
from qwenkit.train.reporters import check_reporters
from qwenkit.weights.checkpoint import Checkpoint, open_checkpoint


def check_settings(config: TrainConfig) -> None:
    """Settings that do not go together, and packages that are not installed."""
    if not config.model:
        raise ValueError("model is missing: a folder, a .gguf file, a hub id, or smollm2")
    if not config.dataset:
        raise ValueError("dataset is missing: names of dataset_info.json in dataset_dir, or files")
    for name in ("early_stopping_patience", "load_best_model_at_end"):
        if getattr(config, name) and not config.has_eval:
            raise ValueError(f"{name} needs evaluation data: val_size or eval_dataset")
    if config.mix_weights and config.mix_strategy == "concat":
        raise ValueError("mix_weights need mix_strategy interleave_under or interleave_over")
    check_reporters(config)
    if config.plot_loss and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plot_loss needs the extra plot: pip install 'qwenkit[plot]'")


def check_folder(config: TrainConfig) -> None:
    """An output_dir that is a file, or that an earlier run has used and nothing says what shall become of it."""
    folder, wanted = Path(config.output_dir), config.resume_from_checkpoint
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir is {config.output_dir!r}, which is a file; allowed is a folder")
    earlier = checkpoints(folder)
    if wanted is None and earlier and not config.overwrite_output_dir:
        raise ValueError(
            f"output_dir {folder} holds {earlier[max(earlier)].name} of an earlier run; "
            "resume_from_checkpoint=latest goes on from it, overwrite_output_dir=true deletes it"
        )
    if wanted not in (None, "latest") and not Path(str(wanted)).is_dir():
        raise FileNotFoundError(f"resume_from_checkpoint is {wanted!r}, but there is no such folder")


def check_model(config: TrainConfig, checkpoint: Checkpoint, processes: int) -> None:
    """Whatever the method, its targets, an adapter, the reference model or the layout of processes do not allow."""
    sizes = ModelConfig.from_dict(checkpoint.config)
    parallel_sizes(config, processes)
    if config.adapter is not None and config.method not in ADAPTERS:
        raise ValueError(f"adapter is {config.adapter!r}, but method is {config.method!r}; allowed are lora and qlora")
    chosen = config if config.adapter is None else replace(config, lora_target=("all",), lora_rank=1)  # the adapter's
    model = model_of_shapes(sizes, chosen, stays_packed(checkpoint, config.method))
    if config.tensor_parallel > 1:
        check_widths(model, config.tensor_parallel)
    if config.adapter is not None:
        check_adapter(config, checkpoint)
    if config.ref_model is not None:
        open_checkpoint(find_model(config.ref_model))
    if config.resume_from_checkpoint not in (None, "latest"):
        verify_checkpoint(Path(str(config.resume_from_checkpoint)))
