"""Values of other trainers' keys, as qwenkit's: optimizers, templates, schedules, and what holds where nothing is said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qwenkit.train.config import REPORTERS

# Implementations of AdamW, and of AdamW with states in 8 bits; any other algorithm is refused.
OPTIMIZERS = {
    **dict.fromkeys(("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_torch_xla"), "adamw"),
    **dict.fromkeys(("adamw_torch_npu_fused", "adamw_apex_fused", "paged_adamw", "paged_adamw_32bit"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_8bit"), "adamw_8bit"),
}

# LLaMA-Factory's templates, and what a model without one gets for them; a model that has one keeps it.
TEMPLATES = {"qwen": "qwen", "qwen2": "qwen", "qwen3": "chatml", "qwen3_nothink": "chatml", "chatml": "chatml"}

# What holds where a file says nothing, as far as it is not what TrainConfig does.
LLAMAFACTORY_DEFAULTS: dict[str, Any] = {
    "method": "lora",
    "cutoff_len": 1024,
    "overlong": "truncate",
    "bad_samples": "drop",
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "linear",
    "logging_steps": 500,
    "gradient_checkpointing": True,
}
FINETUNE_DEFAULTS: dict[str, Any] = {
    "method": "full",
    "model": "Qwen/Qwen-7B",
    "labels": "qwen1",
    "cutoff_len": 8192,
    "overlong": "truncate",
    "bad_samples": "drop",
    "dataset_dir": ".",
    "lora_rank": 64,
    "lora_alpha": 16.0,
    "lora_dropout": 0.05,
    "lora_target": ["c_attn", "c_proj", "w1", "w2"],
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "linear",
    "logging_steps": 500,
}

_SCHEDULES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    # name: what it is here, keyword arguments that are understood, and those that must have one value
    "cosine_with_restarts": ("cosine", (), {"num_cycles": 1}),
    "cosine_with_min_lr": ("cosine", ("min_lr", "min_lr_rate"), {"num_cycles": 0.5}),
    "cosine_warmup_with_min_lr": ("cosine", ("min_lr", "min_lr_rate"), {"num_cycles": 0.5, "warmup_lr_rate": 0}),
    "polynomial": ("linear", ("lr_end",), {"power": 1}),
    "warmup_stable_decay": (
        "wsd",
        ("num_decay_steps", "min_lr_ratio"),
        {"warmup_type": "linear", "decay_type": "linear", "num_cycles": 0.5},
    ),
    "cosine": ("cosine", (), {"num_cycles": 0.5}),
}


def translate_schedule(kind: str, arguments: Any, learning_rate: float, max_steps: int | None) -> dict[str, Any]:
    """Settings for transformers' `lr_scheduler_type` with `lr_scheduler_kwargs` (a mapping, or its JSON).

    Names that qwenkit shares pass unchanged. Raises ValueError for arguments that bend a schedule in a way that is not known.
    """
    given = _arguments(arguments)
    nothing: tuple[str, tuple[str, ...], dict[str, Any]] = (kind, (), {})
    name, understood, fixed = _SCHEDULES.get(kind, nothing)
    settings: dict[str, Any] = {"lr_scheduler_type": name}
    for key, value in given.items():
        if value is None:
            continue
        if key in fixed:
            if value != fixed[key]:
                raise ValueError(f"lr_scheduler_kwargs: {key} is {value!r}, allowed for {kind} is {fixed[key]!r} only")
        elif key == "num_stable_steps" and name == "wsd":
            continue  # what is left between warm-up and decay
        elif key not in understood:
            known = ", ".join((*understood, *fixed)) or "none"
            raise ValueError(f"lr_scheduler_kwargs has {key!r}, allowed for {kind} are {known}")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"lr_scheduler_kwargs: {key} is {value!r}, allowed is a number")
    if kind == "warmup_stable_decay":
        return settings | _stable(given, max_steps)
    for key in ("min_lr_rate", "min_lr_ratio"):
        if given.get(key) is not None:
            settings["min_lr_ratio"] = float(given[key])
    lowest = given.get("min_lr", given.get("lr_end", 1e-7 if kind == "polynomial" else None))
    if lowest is not None:
        if not learning_rate > 0:
            raise ValueError(f"lr_scheduler_type is {kind!r}, but learning_rate is {learning_rate:g}")
        settings["min_lr_ratio"] = float(lowest) / learning_rate
    if "min_lr" in kind and "min_lr_ratio" not in settings:
        raise ValueError(f"lr_scheduler_type is {kind!r}, which needs min_lr or min_lr_rate in lr_scheduler_kwargs")
    return settings


def known_reporters(value: Any, *, tolerant: bool) -> tuple[list[str], list[str]]:
    """`report_to` as a list without `none`; and, where `tolerant`, the names that are not known here, `all` among them."""
    names = value if isinstance(value, list | tuple) else str(value).split(",")
    names = [name.strip() for name in map(str, names)]
    kept = [name for name in names if name.lower() not in ("none", "")]
    unknown = [name for name in kept if tolerant and name not in REPORTERS]
    return [name for name in kept if name not in unknown], unknown


def one_adapter(value: Any) -> str | None:
    """`adapter_name_or_path`, a list or names with commas between them. ValueError for more than one."""
    names = value if isinstance(value, list | tuple) else str(value).split(",") if value is not None else []
    names = [name.strip() for name in map(str, names) if name.strip()]
    if len(names) > 1:
        raise ValueError(
            f"adapter is {', '.join(names)}, but one adapter is allowed: merge the others into the model with "
            "`qwenkit export` and go on training the last"
        )
    return names[0] if names else None


def _stable(given: Mapping[str, Any], max_steps: int | None) -> dict[str, Any]:
    if given.get("decay_type") != "linear":
        raise ValueError(
            "lr_scheduler_type is 'warmup_stable_decay', whose decay is a cosine where nothing is said; "
            "allowed is decay_type linear in lr_scheduler_kwargs, or lr_scheduler_type wsd"
        )
    if given.get("num_decay_steps") is None or not max_steps:
        raise ValueError(
            "warmup_stable_decay needs num_decay_steps and max_steps; or lr_scheduler_type wsd, decay_ratio"
        )
    settings = {"decay_ratio": given["num_decay_steps"] / max_steps}
    return settings | ({"min_lr_ratio": given["min_lr_ratio"]} if given.get("min_lr_ratio") is not None else {})


def _arguments(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else {}
        except (ValueError, RecursionError):
            raise ValueError(f"lr_scheduler_kwargs is {value!r}, allowed is an object in JSON") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"lr_scheduler_kwargs is {value!r}, allowed is an object")
    return {str(key): each for key, each in value.items()}
