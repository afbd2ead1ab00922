"""DeepSpeed's configuration files, read as what they mean for our own sharding. DeepSpeed itself is never run.

In: the JSON file, and the settings that the command line or the YAML gave. Out: settings of TrainConfig and a sentence for each
thing that has no effect here. A number in the file that contradicts the settings is refused, as transformers refuses it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SAME = {  # the file's key, and the setting that must agree with it
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}


def read_deepspeed(path: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings that follow from a DeepSpeed file, and notes. `settings` are TrainConfig's, `method` among them.

    ZeRO 0 copies the model (ddp). ZeRO 1 and 2 share optimizer states and gradients: for adapters, whose states are small, that
    is ddp, else fsdp. ZeRO 3 shares weights too: fsdp. Raises FileNotFoundError, ValueError for a file that cannot be read.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"deepspeed: {path} is no JSON: {error}") from None
    zero = config.get("zero_optimization", {}) if isinstance(config, dict) else None
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ValueError(f"deepspeed: {path}: zero_optimization.stage is {stage!r}, allowed are 0, 1, 2, 3")
    assert isinstance(zero, dict)
    shares = stage == 3 or (stage > 0 and settings.get("method") in ("full", "freeze"))
    found: dict[str, Any] = {"parallel": "fsdp" if shares else "ddp"}
    notes = [f"deepspeed: ZeRO {stage} is run as parallel={found['parallel']}; DeepSpeed itself is not used"]
    for key, setting in _SAME.items():
        value = config.get(key, "auto")
        if value == "auto":
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"deepspeed: {path}: {key} is {value!r}, allowed is a number or auto")
        if setting in settings and float(settings[setting]) != value:
            raise ValueError(f"deepspeed: {path} says {key} {value}, but {setting} is {settings[setting]}")
        found[setting] = value
    found |= _dtype(config, settings)
    for name in ("offload_optimizer", "offload_param"):
        device = _section(zero, name).get("device", "none")
        if device != "none":
            notes.append(f"deepspeed: {name} to {device} has no effect: everything stays on the device")
    if "scheduler" in config:
        kind = _section(config, "scheduler").get("type")
        notes.append(f"deepspeed: the scheduler {kind} has no effect: lr_scheduler_type and warm-up are the settings'")
    kind = _section(config, "optimizer").get("type", "AdamW")
    if kind not in ("AdamW", "Adam"):
        raise ValueError(f"deepspeed: {path}: optimizer.type is {kind!r}, allowed is AdamW")
    return found, notes


def _dtype(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, str]:
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if _section(config, name).get("enabled") is True and "dtype" not in settings:
            return {"dtype": dtype}
    return {}


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name, {})
    return section if isinstance(section, dict) else {}
