"""LoRA adapters as peft stores them. In: a folder with adapter_config.json and adapter_model.safetensors (or .bin), and the
shapes of the model's Linears. Out: one low-rank update for each Linear that the adapter changes, and the parameters that it
replaces whole.
The way back is adapter_saving.py.

The tensors say which Linears those are; a regular expression in the configuration is not run, since one can be made that never
ends. Whatever would need more than updates of Linears is refused by name. adapter_model.bin is opened by torch's weights-only
unpickler, as pytorch_model.bin is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from qwenkit.errors import FieldError, shorten
from qwenkit.files import has_file, read_json
from qwenkit.linear.lora import LowRank, lora_scaling
from qwenkit.model.config_schema import Kind, Number, Whole
from qwenkit.weights import names
from qwenkit.weights.adapter_names import is_original, plain_name, replaced_name
from qwenkit.weights.safetensors_files import read_file
from qwenkit.weights.stored import StoredTensor
from qwenkit.weights.torch_files import read_torch_file

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
TORCH_TENSORS = "adapter_model.bin"
MAX_RANK = 512
BIASES = ("none", "all", "lora_only")
_RANK = Whole()  # see `_check_rank` for what a rank may be in the end
_ALPHA = Number(-1e9, 1e9)  # a negative one takes the update away, as in peft

PREFIX = "base_model.model."
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte")  # peft writes them where one has an adapter or was resized
_LARGEST_CONFIG = 1 << 20  # bytes
_LARGEST_HEADER = 16 << 20  # bytes, added to what the matrices can take
_COMPARED_ROWS = 1024
_SERVED = "an adapter that is served"
# Settings that only training and merging understand.
_REFUSED_WHEN_SERVED = {"use_dora": "DoRA", "modules_to_save": "whole modules beside the updates"}
# Settings that change what an adapter computes; with any but these values, another kind of arithmetic is needed.
_REFUSED = {
    "lora_bias": "a bias of lora_B",
    "fan_in_fan_out": "transposed weights",
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


@dataclass(frozen=True)
class Adapter:
    """What an adapter changes: `updates` by the name of their Linear, `parameters` that it replaces by their own name, both fp32.

    `settings` is its adapter_config.json, checked.
    """

    updates: dict[str, LowRank]
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def read_adapter(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    *,
    qwen1: bool = False,
    stored: Callable[[], Iterable[StoredTensor]] = tuple,
) -> dict[str, LowRank]:
    """The updates of an adapter that changes nothing else, as serving needs it; see `read_whole_adapter`.

    An embedding or a head that peft has saved along is compared with the model's own, which `stored` gives; ValueError where
    it is another one.
    """
    found = _read(folder, shapes, None, qwen1)
    if found.parameters:
        own = {tensor.name: tensor for tensor in stored()}
        for name, tensor in found.parameters.items():
            original = own.get(name) or own.get("model.embed_tokens.weight")  # a tied head has none of its own
            if original is None or original.shape != tensor.shape or not _is_unchanged(tensor, original):
                raise ValueError(
                    f"{folder / TENSORS} replaces {name}, which is not supported in {_SERVED}: merge it with `qwenkit export`"
                )
    return found.updates


def _is_unchanged(tensor: torch.Tensor, original: StoredTensor) -> bool:
    """Whether a tensor (fp32) is the model's own, as it is or rounded to the dtype that peft had loaded it in."""
    dtypes = {torch.float32, torch.bfloat16, torch.float16}
    for start in range(0, len(tensor), _COMPARED_ROWS):
        rows = tensor[start : start + _COMPARED_ROWS]
        own = original.read(start, start + len(rows))
        dtypes = {dtype for dtype in dtypes if torch.equal(own.to(dtype).float(), rows)}
    return bool(dtypes)


def read_whole_adapter(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    parameters: Mapping[str, tuple[int, ...]],
    *,
    qwen1: bool = False,
) -> Adapter:
    """An adapter in fp32; `shapes` gives (in, out) of each Linear that there is, `parameters` the shape of all it may replace.

    `qwen1` translates names of the original Qwen-1, whose c_attn is three Linears here. Raises FileNotFoundError for a missing
    file, ValueError (one sentence) for one that is corrupt, too large, asks for what is not supported, or does not fit.
    """
    return _read(folder, shapes, parameters, qwen1)


def _read(
    folder: Path, shapes: Mapping[str, tuple[int, int]], parameters: Mapping[str, tuple[int, ...]] | None, qwen1: bool
) -> Adapter:
    config = _read_config(folder, served=parameters is None)
    modules, whole = _read_tensors(folder, shapes, parameters, config)
    translate = names.from_qwen1 if qwen1 else names.from_hugging_face
    updates: dict[str, LowRank] = {}
    for module, tensors in modules.items():
        a, b, magnitude = tensors["A"], tensors["B"], tensors.get("magnitude")
        rank = _for_module(folder, config, "rank_pattern", module, config["r"])
        alpha = _for_module(folder, config, "alpha_pattern", module, config["lora_alpha"])
        _check_target(folder, config["target_modules"], module)
        _check_rank(folder, rank)
        scaling = lora_scaling(rank, alpha, rslora=config.get("use_rslora", False))
        for part in translate(f"{module}.weight"):
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
            if magnitude is not None and magnitude.shape != (outputs * part.count,):
                raise ValueError(
                    f"{folder / TENSORS}: {module} has lora_magnitude_vector {list(magnitude.shape)}, "
                    f"the model needs {[outputs * part.count]}"
                )
            rows = part.index * outputs, (part.index + 1) * outputs
            lengths = None if magnitude is None else _finite(folder, magnitude, *rows)
            updates[name] = LowRank(_finite(folder, a, 0, rank), _finite(folder, b, *rows), scaling, lengths)
    replaced: dict[str, torch.Tensor] = {}
    for stored in whole:
        for part in translate(stored.name):
            of_model = names.apply(part, stored)
            wanted_shape = of_model.shape if parameters is None else parameters.get(part.name)
            if of_model.shape != wanted_shape:
                has = "no such parameter" if wanted_shape is None else f"one of shape {list(wanted_shape)}"
                raise ValueError(
                    f"{folder / TENSORS} has {stored.name} of shape {list(stored.shape)}, but the model has {has}"
                )
            replaced[part.name] = _finite(folder, of_model, 0, of_model.shape[0])
    return Adapter(updates, replaced, config)


def _read_config(folder: Path, *, served: bool) -> dict[str, Any]:
    path = folder / CONFIG
    if not has_file(path):
        raise FileNotFoundError(f"{folder} has no {CONFIG}, so it is no adapter")
    config = read_json(path, _LARGEST_CONFIG)
    config = {key: value for key, value in config.items() if value is not None}  # null is peft's default
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {shorten(config.get('peft_type'))}, allowed is 'LORA'")
    for key, what in _REFUSED_WHEN_SERVED.items():
        if served and config.get(key):
            raise ValueError(
                f"{path}: {key} is {shorten(config[key])}, but {what} is not supported in {_SERVED}: "
                "merge it with `qwenkit export`"
            )
    for key, what in _REFUSED.items():
        if config.get(key):
            raise ValueError(f"{path}: {key} is {shorten(config[key])}, but {what} is not supported in an adapter")
    biases = ("none",) if served else BIASES
    if config.get("bias", "none") not in biases:
        allowed = f"allowed {'is' if served else 'are'} {', '.join(map(repr, biases))}"
        raise ValueError(f"{path}: bias is {shorten(config['bias'])}, {allowed}")
    if config.get("init_lora_weights") not in _INITIALISATIONS:
        raise ValueError(
            f"{path}: init_lora_weights is {shorten(config['init_lora_weights'])}, which changes the model's own weights; "
            f"allowed are {', '.join(map(repr, _INITIALISATIONS[1:]))}"
        )
    for key in ("use_rslora", "use_dora"):
        if type(config.get(key, False)) is not bool:
            raise ValueError(f"{path}: {key} is {shorten(config[key])}, allowed are true and false")
    config["r"] = _checked(path, "r", config.get("r", 8), _RANK)
    config["lora_alpha"] = _checked(path, "lora_alpha", config.get("lora_alpha", 8), _ALPHA)
    targets = config.setdefault("target_modules", None)
    if not (targets is None or isinstance(targets, str) or _is_texts(targets)):
        raise ValueError(f"{path}: target_modules is {shorten(targets)}, allowed is a list of names or a string")
    if config.get("modules_to_save") is not None and not _is_texts(config["modules_to_save"]):
        raise ValueError(f"{path}: modules_to_save is {shorten(config['modules_to_save'])}, allowed is a list of names")
    for key, kind in (("rank_pattern", _RANK), ("alpha_pattern", _ALPHA)):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict):
            raise ValueError(f"{path}: {key} is {shorten(pattern)}, allowed is an object of module name to number")
        for name, value in pattern.items():
            if not re.fullmatch(r"\^?[\w.\\-]+\$?", name):
                raise ValueError(
                    f"{path}: {key} has the key {shorten(name)}, allowed are names of modules; "
                    "other regular expressions are not run"
                )
            _checked(path, f"{key}.{name}", value, kind)
        config[key] = pattern
    return config


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _checked(path: Path, name: str, value: Any, kind: Kind) -> Any:
    if not kind.accepts(value):
        raise FieldError(name, value, kind.words, source=path)
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


def _check_target(folder: Path, targets: str | list[str] | None, module: str) -> None:
    if isinstance(targets, list) and not any(module == name or module.endswith(f".{name}") for name in targets):
        raise ValueError(f"{folder / TENSORS} has an update for {module}, which target_modules does not name")


def _read_tensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    parameters: Mapping[str, tuple[int, ...]] | None,
    config: Mapping[str, Any],
) -> tuple[dict[str, dict[str, StoredTensor]], list[StoredTensor]]:
    """lora_A, lora_B and the lengths of every module under the module's own name; and what the adapter replaces whole."""
    path = folder / TENSORS
    if not has_file(path):
        path = folder / TORCH_TENSORS
    if not has_file(path):
        raise FileNotFoundError(f"{folder} has no {TENSORS} and no {TORCH_TENSORS}")
    # float64 is the widest type of either kind
    largest = _LARGEST_HEADER + 4 * MAX_RANK * sum(map(sum, shapes.values()))
    # of an adapter that is served the embedding and the head, where peft has saved them along
    sizes = parameters.values() if parameters is not None else 2 * [shapes.get("lm_head", (0, 0))]
    largest += 8 * sum(map(math.prod, sizes))
    if path.stat().st_size > largest:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, but an adapter of this model has at most {largest}")
    kinds = {"lora_A.weight": "A", "lora_B.weight": "B"}
    if parameters is not None and config.get("use_dora"):
        kinds |= {"lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude"}
    modules: dict[str, dict[str, StoredTensor]] = {}
    whole: list[StoredTensor] = []
    for tensor in read_file(path) if path.name == TENSORS else read_torch_file(path):
        name = plain_name(tensor.name)
        if is_original(name):
            continue
        match = re.fullmatch(r"(.+)\.(lora_.+)", name)
        kind = kinds.get(match[2]) if match else None
        replaces = match is None and (_is_embedding(name) if parameters is None else _replaces(config, name))
        if not (kind or replaces):
            raise ValueError(
                f"{path}: tensor {tensor.name} is not supported, allowed are "
                f"{PREFIX}….lora_A.weight and {PREFIX}….lora_B.weight"
                + ("" if parameters is None else ", and what use_dora, bias and modules_to_save name")
            )
        if tensor.dtype not in ("F32", "F16", "BF16", "F64"):
            raise ValueError(f"{path}: tensor {tensor.name} is {tensor.dtype}, allowed are F32, F16, BF16 and F64")
        if match and kind:
            if kind in modules.setdefault(match[1], {}):
                raise ValueError(f"{path} has lora_{kind} of {match[1]} twice; allowed is one adapter")
            modules[match[1]][kind] = tensor
        else:
            whole.append(replace(tensor, name=replaced_name(name)))
    if not modules and not whole:
        raise ValueError(f"{path} has no tensors")
    for module, parts in modules.items():
        if len(parts.keys() & {"A", "B"}) < 2:
            raise ValueError(f"{path} has lora_{min(parts)} of {module} but not the other half of its update")
        if "magnitude" in kinds.values() and "magnitude" not in parts:
            raise ValueError(f"{path} has no lora_magnitude_vector of {module}, which use_dora asks for")
    return modules, whole


def _is_embedding(name: str) -> bool:
    """Whether a tensor is the weight of the embedding or the head, which peft saves along where one has an adapter."""
    module, _, kind = replaced_name(name).rpartition(".")
    return module.rpartition(".")[2] in _EMBEDDINGS and (kind == "weight")


def _replaces(config: Mapping[str, Any], name: str) -> bool:
    """Whether a tensor is one that the configuration says is replaced whole, or one of those that peft adds of its own accord."""
    module, _, kind = replaced_name(name).rpartition(".")
    if _is_embedding(name):
        return True
    if kind == "bias" and config.get("bias", "none") != "none":
        return True
    # peft takes each name as the end of a module's name, dots or not: "norm" is input_layernorm too
    parts = module.split(".")
    around = [".".join(parts[: count + 1]) for count in range(len(parts))]
    return any(name.endswith(each) for each in config.get("modules_to_save") or () for name in around)


def _finite(folder: Path, stored: StoredTensor, start: int, stop: int) -> torch.Tensor:
    tensor = stored.read(start, stop).float()
    if not tensor.isfinite().all():
        raise ValueError(f"{folder / TENSORS}: tensor {stored.name} has values that are not finite")
    return tensor
