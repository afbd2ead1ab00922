"""LoRA adapters as peft stores them. In: a folder with adapter_config.json and adapter_model.safetensors, and the shapes of the
model's Linears. Out: one low-rank update for each Linear that the adapter changes.

The tensors say which Linears those are; a regular expression in the configuration is not run, since one can be made that never
ends. Whatever would need more than updates of Linears is refused by name, and so is a pickled adapter_model.bin.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qwenkit.linear.lora import LowRank, lora_scaling
from qwenkit.weights import names
from qwenkit.weights.safetensors_files import read_file
from qwenkit.weights.stored import StoredTensor, read_json

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
MAX_RANK = 512

_PREFIX = "base_model.model."
_LARGEST_CONFIG = 1 << 20  # bytes
_LARGEST_HEADER = 16 << 20  # bytes, added to what the matrices can take
# Settings that change what an adapter computes; with any but these values, another kind of arithmetic is needed.
_REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias of lora_B",
    "fan_in_fan_out": "transposed weights",
    "modules_to_save": "whole modules beside the updates",
    "target_parameters": "updates of parameters that are no Linear",
    "trainable_token_indices": "trained token embeddings",
    "layer_replication": "repeated layers",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
_INITIALISATIONS = (
    None,
    True,
    False,
    "gaussian",
    "eva",
    "orthogonal",
    "mica",
)  # those that leave the model's weights alone


def read_adapter(folder: Path, shapes: Mapping[str, tuple[int, int]], *, qwen1: bool = False) -> dict[str, LowRank]:
    """The updates in fp32 by the name of their Linear; `shapes` gives (in, out) of each Linear that there is.

    `qwen1` translates names of the original Qwen-1, whose c_attn is three Linears here. Raises FileNotFoundError for a missing
    file, ValueError (one sentence) for one that is corrupt, too large, asks for what is not supported, or does not fit.
    """
    config = _read_config(folder)
    pairs = _read_pairs(folder, shapes)
    updates: dict[str, LowRank] = {}
    for module, (a, b) in pairs.items():
        rank = _for_module(folder, config, "rank_pattern", module, config["r"])
        alpha = _for_module(folder, config, "alpha_pattern", module, config["lora_alpha"])
        _check_target(folder, config["target_modules"], module)
        _check_rank(folder, rank)
        scaling = lora_scaling(rank, alpha, rslora=config.get("use_rslora", False))
        parts = names.from_qwen1(f"{module}.weight") if qwen1 else names.from_hugging_face(f"{module}.weight")
        for part in parts:
            name = part.name.removesuffix(".weight")
            if name not in shapes:
                raise ValueError(f"{folder / TENSORS} has an update for {module}, but the model has no such Linear")
            inputs, outputs = shapes[name]
            wanted = (rank, inputs), (outputs * part.count, rank)
            if (a.shape, b.shape) != wanted:
                raise ValueError(
                    f"{folder / TENSORS}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, "
                    f"the model and rank {rank} need {list(wanted[0])} and {list(wanted[1])}"
                )
            rows = part.index * outputs
            updates[name] = LowRank(_finite(folder, a, 0, rank), _finite(folder, b, rows, rows + outputs), scaling)
    return updates


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}, so it is no adapter")
    if path.stat().st_size > _LARGEST_CONFIG:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, allowed are {_LARGEST_CONFIG}")
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}, allowed is 'LORA'")
    for key, what in _REFUSED.items():
        if config.get(key):
            raise ValueError(f"{path}: {key} is {config[key]!r}, but {what} is not supported in an adapter")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias is {config['bias']!r}, allowed is 'none'")
    if config.get("init_lora_weights") not in _INITIALISATIONS:
        raise ValueError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}, which changes the model's own weights; allowed are "
            f"{', '.join(map(repr, _INITIALISATIONS[1:]))}"
        )
    if type(config.get("use_rslora", False)) is not bool:
        raise ValueError(f"{path}: use_rslora is {config['use_rslora']!r}, allowed are true and false")
    config["r"] = _positive(path, "r", config.get("r", 8), whole=True)
    config["lora_alpha"] = _positive(path, "lora_alpha", config.get("lora_alpha", 8))
    targets = config.setdefault("target_modules", None)
    if not (isinstance(targets, str) or (isinstance(targets, list) and all(isinstance(item, str) for item in targets))):
        raise ValueError(f"{path}: target_modules is {targets!r}, allowed is a list of names or a string")
    for key, whole in (("rank_pattern", True), ("alpha_pattern", False)):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict):
            raise ValueError(f"{path}: {key} is {pattern!r}, allowed is an object of module name to number")
        for name, value in pattern.items():
            if not re.fullmatch(r"\^?[\w.\\-]+\$?", name):
                raise ValueError(
                    f"{path}: {key} has the key {name!r}, allowed are names of modules; other regular expressions are not run"
                )
            _positive(path, f"{key}.{name}", value, whole=whole)
        config[key] = pattern
    return config


def _positive(path: Path, name: str, value: Any, *, whole: bool = False) -> Any:
    wanted = int if whole else (int, float)
    if not isinstance(value, wanted) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{path}: {name} is {value!r}, allowed is a {'whole ' if whole else ''}number above 0")
    return value


def _check_rank(folder: Path, rank: int) -> None:
    if rank > MAX_RANK:
        raise ValueError(f"{folder / CONFIG}: the rank is {rank}, allowed are 1 to {MAX_RANK}")


def _for_module(folder: Path, config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """The value of the first name that is the module's, or its end; a leading ^ means the whole name."""
    for pattern, value in config[key].items():
        name = pattern.removesuffix("$").replace("\\", "")
        if module == name.removeprefix("^") or module.endswith(f".{name}"):
            return value
    return default


def _check_target(folder: Path, targets: str | list[str], module: str) -> None:
    if isinstance(targets, list) and not any(module == name or module.endswith(f".{name}") for name in targets):
        raise ValueError(f"{folder / TENSORS} has an update for {module}, which target_modules does not name")


def _read_pairs(folder: Path, shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """lora_A and lora_B of every module in the file, under the module's own name."""
    path = folder / TENSORS
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise ValueError(
                f"{folder} has its weights in adapter_model.bin, allowed is only {TENSORS}: convert it with peft"
            )
        raise FileNotFoundError(f"{folder} has no {TENSORS}")
    largest = _LARGEST_HEADER + 4 * MAX_RANK * sum(map(sum, shapes.values()))
    if path.stat().st_size > largest:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, but an adapter of this model has at most {largest}")
    halves: dict[str, dict[str, StoredTensor]] = {}
    for tensor in read_file(path):
        match = re.fullmatch(r"(.+)\.lora_(A|B)\.weight", tensor.name.removeprefix(_PREFIX))
        if match is None or not tensor.name.startswith(_PREFIX):
            raise ValueError(
                f"{path}: tensor {tensor.name} is not supported, allowed are "
                f"{_PREFIX}….lora_A.weight and {_PREFIX}….lora_B.weight"
            )
        if tensor.dtype not in ("F32", "F16", "BF16", "F64"):
            raise ValueError(f"{path}: tensor {tensor.name} is {tensor.dtype}, allowed are F32, F16, BF16 and F64")
        halves.setdefault(match[1], {})[match[2]] = tensor
    if not halves:
        raise ValueError(f"{path} has no tensors")
    for module, half in halves.items():
        if len(half) < 2:
            raise ValueError(f"{path} has lora_{min(half)} of {module} but not the other half of its update")
    return {module: (half["A"], half["B"]) for module, half in halves.items()}


def _finite(folder: Path, stored: StoredTensor, start: int, stop: int) -> torch.Tensor:
    tensor = stored.read(start, stop).float()
    if not tensor.isfinite().all():
        raise ValueError(f"{folder / TENSORS}: tensor {stored.name} has values that are not finite")
    return tensor
