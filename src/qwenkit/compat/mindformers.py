"""MindFormers' configurations and launch lines: recognised, and answered with the way to the same training here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Sections of its YAML files and flags of run_mindformer.py that no other trainer has.
_KEYS = (
    *("run_mode", "runner_config", "runner_wrapper", "train_dataset", "train_dataset_task", "eval_dataset_task"),
    *("load_checkpoint", "auto_trans_ckpt", "src_strategy_path_or_dir", "parallel_config", "moe_config"),
    *("recompute_config", "micro_batch_interleave_num", "use_parallel", "train_dataset_dir", "register_path"),
)


def refuse_mindformers(settings: Mapping[str, Any]) -> None:
    """Raise ValueError, one sentence, for settings that are MindFormers'."""
    found = next((key for key in _KEYS if key in settings), None)
    if found is None and isinstance(settings.get("model"), Mapping):
        found = "model"
    if found is not None:
        raise ValueError(
            f"{found} belongs to a configuration of MindFormers, which is not read: recipes/ holds the same trainings as "
            "qwenkit's own files, such as recipes/qwen1.5-7b-finetune.yaml; dataset= takes its .mindrecord files, "
            "wiki.train.tokens and alpaca_data.json without conversion, and model= the Hugging Face folder of the weights"
        )
