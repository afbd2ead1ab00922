"""Refusals of a run before weights are loaded: settings, packages, processes, targets. `--check` and a run share them.

In: the configuration, and a checkpoint whose tensors are not read. Out: nothing, or a ValueError or OSError of one sentence.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

from qwenkit.hub.find import find_model
from qwenkit.installation import install_extra
from qwenkit.model.config import ModelConfig
from qwenkit.settings import parse_size
from qwenkit.train.checkpoint import verify_checkpoint
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
    # else refused when the trained model is saved
    parse_size("export_size", config.export_size, unit="GB", example="4GB")
    check_reporters(config)
    if config.plot_loss and importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"plot_loss needs the extra plot: {install_extra('plot')}")


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
