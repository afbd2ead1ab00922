"""Writes LoRA adapters as peft stores them. In: updates by the name of their Linear, what is replaced whole, settings.
Out: adapter_config.json and adapter_model.safetensors, which peft, vLLM and adapter.py load.

Names are Hugging Face's, or the original Qwen-1's, in which updates of q, k and v are one of c_attn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qwenkit.linear.lora import LowRank
from qwenkit.storage import new_file, write_json
from qwenkit.weights import names
from qwenkit.weights.adapter import CONFIG, PREFIX, TENSORS


@dataclass(frozen=True)
class AdapterSettings:
    """What adapter_config.json says beside ranks and targets, which follow from the updates."""

    base: str
    dropout: float = 0.0
    rslora: bool = False
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    task: str = "CAUSAL_LM"


def save_adapter(
    folder: Path,
    updates: Mapping[str, LowRank],
    parameters: Mapping[str, torch.Tensor],
    linears: Iterable[str],
    settings: AdapterSettings,
    *,
    qwen1: bool = False,
) -> None:
    """Write what peft loads: `updates` by the name of their Linear, `parameters` that are replaced whole by their own name.

    `linears` names all that the model has, so that target_modules can be short. With `qwen1` the names are those of the original
    Qwen-1: updates of q, k and v become one of c_attn, exact, of their ranks' sum. Each file appears whole or not at all.
    """
    linears = set(linears)
    if qwen1:
        updates, parameters = _fused(updates), _fused_rows(parameters)
        linears = {_qwen1_module(name) for name in linears}
    tensors: dict[str, torch.Tensor] = {}
    for module, update in updates.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = update.a
        tensors[f"{PREFIX}{module}.lora_B.weight"] = update.b
        if update.magnitude is not None:
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = update.magnitude
    for name, parameter in parameters.items():
        module, _, kind = name.rpartition(".")
        wrapped = kind == "bias" and module in updates
        tensors[f"{PREFIX}{module}.{'base_layer.' if wrapped else ''}{kind}"] = parameter
    folder.mkdir(parents=True, exist_ok=True)
    own = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    config = _config(updates, linears, settings) | {"use_dora": any(u.magnitude is not None for u in updates.values())}
    with new_file(folder / TENSORS) as part:
        save_file(own, part, metadata={"format": "pt"})
    write_json(folder / CONFIG, config, indent=2)


def _config(updates: Mapping[str, LowRank], linears: set[str], settings: AdapterSettings) -> dict[str, Any]:
    ranks = {name: update.a.shape[0] for name, update in updates.items()}
    alphas = {name: updates[name].scaling * (math.sqrt(r) if settings.rslora else r) for name, r in ranks.items()}
    rank = max(set(ranks.values()), key=list(ranks.values()).count, default=8)
    alpha = max(set(alphas.values()), key=list(alphas.values()).count, default=16.0)
    leaves = {name.rpartition(".")[2] for name in ranks}
    short = all(name in ranks for name in linears if name.rpartition(".")[2] in leaves)
    return {
        "peft_type": "LORA",
        "task_type": settings.task,
        "base_model_name_or_path": settings.base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": settings.dropout,
        "target_modules": sorted(leaves if short else ranks),
        "modules_to_save": list(settings.modules_to_save) or None,
        "bias": settings.bias,
        "use_rslora": settings.rslora,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: _whole(a) for name, a in alphas.items() if a != alpha},
    }


def _whole(number: float) -> int | float:
    return round(number) if math.isclose(number, round(number), rel_tol=1e-12) else number


def _qwen1_module(name: str) -> str:
    return names.to_qwen1(f"{name}.weight").name.removesuffix(".weight")


def _fused(updates: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Updates by Qwen-1's names. Those of q, k and v stand side by side in one; a part without any has rows of zeros."""
    parts: dict[str, dict[int, LowRank]] = {}
    counts: dict[str, int] = {}
    for name, update in updates.items():
        part = names.to_qwen1(f"{name}.weight")
        module = part.name.removesuffix(".weight")
        parts.setdefault(module, {})[part.index] = update
        counts[module] = part.count
    fused: dict[str, LowRank] = {}
    for module, found in parts.items():
        first = next(iter(found.values()))
        if counts[module] == 1:
            fused[module] = first
            continue
        if first.magnitude is not None and len(found) < counts[module]:
            raise ValueError(
                f"DoRA of a part of {module} cannot be written: it needs all {counts[module]} of its parts"
            )
        a = torch.cat([update.a for _, update in sorted(found.items())])
        rows = first.b.shape[0]
        b = first.b.new_zeros(counts[module] * rows, a.shape[0])
        column = 0
        for index, update in sorted(found.items()):
            rank = update.a.shape[0]
            b[index * rows : (index + 1) * rows, column : column + rank] = update.b * (update.scaling / first.scaling)
            column += rank
        lengths = [update.magnitude for _, update in sorted(found.items()) if update.magnitude is not None]
        fused[module] = LowRank(a, b, first.scaling, torch.cat(lengths) if lengths else None)
    return fused


def _fused_rows(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole parameters by Qwen-1's names, q, k and v in one."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for name, parameter in parameters.items():
        part = names.to_qwen1(name)
        parts.setdefault(part.name, {})[part.index] = parameter
    for name, found in parts.items():
        if name.endswith("c_attn.bias") and len(found) != 3:
            raise ValueError(f"a part of {name} cannot be written: it needs all 3 of its parts")
    return {name: torch.cat([part for _, part in sorted(found.items())]) for name, found in parts.items()}
