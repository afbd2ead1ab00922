"""How a model is born. In: a checkpoint and how it should lie in memory. Out: a `Qwen` with every parameter filled.

The order is fixed here, once: build on the meta device, compare names and shapes with the checkpoint, swap Linears,
allocate, fill tensor by tensor. So a wrong checkpoint fails before anything is read, and the peak is about one model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from qwenkit.linear.frozen import Place
from qwenkit.linear.swap import Swap, swap_linears
from qwenkit.model.config import ModelConfig
from qwenkit.model.config_schema import DTYPES as CONFIG_DTYPES
from qwenkit.model.qwen import Qwen
from qwenkit.weights.checkpoint import Checkpoint, open_checkpoint
from qwenkit.weights.stored import DTYPES, StoredTensor

_NAMED = 3  # tensors that an error names before it only counts
_DTYPES = {name: getattr(torch, name) for name in CONFIG_DTYPES}


class FillsItself(Protocol):
    """A replacement of a Linear that keeps other tensors than `weight` and `bias`, and makes them from what is stored."""

    def fill(self, kind: str, stored: StoredTensor) -> None:
        """Called once for each tensor that the Linear had; `kind` is "weight" or "bias"."""


def load_model(
    source: Checkpoint | Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    swaps: Sequence[Swap] = (),
    progress: bool = False,
) -> Qwen:
    """Build the model that a checkpoint describes and fill it.

    `dtype` None keeps the checkpoint's own (fp32 for quantized ones, which only fp32 holds exactly). Each of `swaps`
    is offered every nn.Linear, in order: a replacement keeps the Linear's parameters (inside, or new ones under the same
    names), or takes what the checkpoint has for them itself: see `FillsItself`. `progress` draws a bar where there is a terminal.
    Raises FileNotFoundError for missing files, ValueError for corrupt ones, and for tensors that are missing, surplus or
    misshapen: the first few are named, with the expected and the found shape.
    """
    checkpoint = open_checkpoint(Path(source)) if isinstance(source, str | Path) else source
    model, stored = empty_and_stored(checkpoint, dtype)
    wanted = dict(model.named_parameters(remove_duplicate=False))
    for swap in swaps:
        swap_linears(model, swap)
    allocated = _allocate(model, wanted, torch.device(device))
    with torch.no_grad():
        _fill(model, wanted, allocated, stored, progress)
    return model


def fill_parts(model: nn.Module, stored: Mapping[str, StoredTensor], place: Place, *, progress: bool = False) -> None:
    """Fill a model of which this process holds only parts, and read only those: `place` says of each parameter what they are.

    `stored` is `empty_and_stored`'s. A Linear that another keeps inside as its `base` has the outer one's name there; one
    without a weight has a `fill_part(kind, stored, place)`. What the checkpoint has nothing for stays as it is.
    """
    filled: set[int] = set()
    with torch.no_grad():
        for name, tensor in tqdm(stored.items(), desc="loading", unit="tensor", disable=None if progress else True):
            prefix, _, kind = name.rpartition(".")
            owner: Any = model.get_submodule(prefix)
            while hasattr(owner, "base"):
                owner = owner.base
            parameter = getattr(owner, kind, None)
            if parameter is None:
                owner.fill_part(kind, tensor, place)
            elif id(parameter) not in filled:  # a tied head is there twice
                filled.add(id(parameter))
                part, offset = place(parameter)
                tensor.copy_part(part, offset)


def empty_and_stored(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> tuple[Qwen, dict[str, StoredTensor]]:
    """The model that a checkpoint describes, on the meta device, and what the checkpoint has for each of its parameters.

    A tied head has its embedding's tensor. Raises what `load_model` does.
    """
    config = ModelConfig.from_dict(checkpoint.config)
    stored = _by_name(checkpoint)
    _check_sizes(checkpoint.path, config, stored)
    quantized = any(tensor.dtype not in DTYPES for tensor in stored.values())
    model = empty_model(config, dtype or (torch.float32 if quantized else _own_dtype(config)))
    if config.tie_word_embeddings and "model.embed_tokens.weight" in stored:
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"]
    wanted = dict(model.named_parameters(remove_duplicate=False))
    _drop_zero_biases(stored, wanted)
    _compare(checkpoint.path, {name: tuple(p.shape) for name, p in wanted.items()}, stored)
    return model, stored


def empty_model(config: ModelConfig, dtype: torch.dtype) -> Qwen:
    """A model on the meta device: every name, shape and dtype, and no memory."""
    with torch.device("meta"), _NoInitialisation():
        model = Qwen(config)
    return model.to(dtype)


class _NoInitialisation(TorchFunctionMode):
    """Leaves torch.nn.init out: on the meta device it sets nothing, and importing what it needs there takes over a second
    and 75 MB (torch's decompositions, sympy)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else None
        return func(*args, **(kwargs or {}))


def plain_types(checkpoint: Checkpoint) -> list[str]:
    """Floating-point types of a checkpoint's matrices, routers of experts left out (they are not packed): ["float16"]."""
    found = {
        tensor.dtype
        for tensor in checkpoint.tensors()
        if len(tensor.shape) > 1 and tensor.dtype in DTYPES and not tensor.name.endswith("gate.weight")
    }
    return sorted(str(DTYPES[dtype]).removeprefix("torch.") for dtype in found if DTYPES[dtype].is_floating_point)


def _own_dtype(config: ModelConfig) -> torch.dtype:
    return torch.float32 if config.dtype is None else _DTYPES[config.dtype]


def _by_name(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    stored: dict[str, StoredTensor] = {}
    for tensor in checkpoint.tensors():
        if tensor.name in stored:
            raise ValueError(f"{checkpoint.path}: tensor {tensor.name} occurs twice")
        stored[tensor.name] = tensor
    return stored


def _check_sizes(path: Path, config: ModelConfig, stored: Mapping[str, StoredTensor]) -> None:
    """ValueError for a configuration that asks for more than the tensors could fill: building it might never end."""
    moe = config.moe
    dense = moe is None or len(moe.sparse_layers) < config.num_hidden_layers
    elements = max((math.prod(tensor.shape) for tensor in stored.values()), default=0)
    widths = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size if dense else 0,
        "num_attention_heads times head_dim": config.num_attention_heads * config.head_dim,
        "moe_intermediate_size": moe.intermediate_size if moe else 0,
        "shared_expert_intermediate_size": (moe.shared_expert_intermediate_size or 0) if moe else 0,
    }
    for name, width in widths.items():
        if width > elements:
            raise ValueError(f"{path}: {name} is {width}, but the largest tensor has only {elements} elements")
    modules = config.num_hidden_layers + (moe.num_experts * len(moe.sparse_layers) if moe else 0)
    if modules > len(stored):
        raise ValueError(
            f"{path}: num_hidden_layers is {config.num_hidden_layers}{f' of {moe.num_experts} experts' if moe else ''}, "
            f"but there are only {len(stored)} tensors"
        )


def _drop_zero_biases(stored: dict[str, StoredTensor], wanted: Mapping[str, nn.Parameter]) -> None:
    """GPTQ's tools write a bias of zeros beside matrices of models that have none there."""
    for name in [name for name in stored if name.endswith(".bias") and name not in wanted]:
        weight = stored.get(name.removesuffix("bias") + "weight")
        if weight is not None and weight.dtype not in DTYPES and not stored[name].load().any():
            del stored[name]


def _compare(path: Path, expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor]) -> None:
    misshapen = [
        f"{name} (expected {list(shape)}, found {list(stored[name].shape)})"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    integers = [f"{name} ({stored[name].dtype})" for name in expected if name in stored and stored[name].is_integer]
    missing = [f"{name} (expected {list(shape)})" for name, shape in expected.items() if name not in stored]
    surplus = [f"{name} (found {list(tensor.shape)})" for name, tensor in stored.items() if name not in expected]
    faults = [
        f"{len(tensors)} {what}: {', '.join(tensors[:_NAMED])}{', …' if len(tensors) > _NAMED else ''}"
        for what, tensors in (
            ("missing", missing),
            ("surplus", surplus),
            ("misshapen", misshapen),
            ("of whole numbers where weights are needed", integers),
        )
        if tensors
    ]
    if faults:
        raise ValueError(f"{path}: the tensors do not fit the configuration; {'; '.join(faults)}")


def _allocate(
    model: nn.Module, wanted: Mapping[str, nn.Parameter], device: torch.device
) -> dict[torch.Tensor, torch.Tensor]:
    """Give every meta tensor memory, untouched until it is filled; return what took the place of what.

    What is shared stays shared. A module that was swapped in and brings tensors that no checkpoint has sets them in its
    `reset_parameters`.
    """
    originals = set(wanted.values())
    made: dict[torch.Tensor, torch.Tensor] = {}
    for prefix, module in model.named_modules():
        brings_own = False
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            if tensor not in made:
                made[tensor] = _memory(tensor, device)
            setattr(module, name, made[tensor])
            brings_own |= tensor.is_meta and tensor not in originals and f"{prefix}.{name}" not in wanted
        if brings_own and not hasattr(module, "fill"):
            cast(nn.Linear, module).reset_parameters()
    return made


def _memory(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    # Not empty_like: of a meta tensor it imports sympy, half a second and 35 MB.
    new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device) if tensor.is_meta else None
    there = tensor.detach().to(device) if new is None else new
    return nn.Parameter(there, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there


def _fill(
    model: nn.Module,
    wanted: Mapping[str, nn.Parameter],
    allocated: Mapping[torch.Tensor, torch.Tensor],
    stored: Mapping[str, StoredTensor],
    progress: bool,
) -> None:
    """Every tensor of the checkpoint to the parameter it was meant for: the one of its name, the one that a wrapper kept
    inside, or else to the `fill` of the module that a swap put in its place."""
    current: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    filled: set[torch.Tensor] = set()
    for name, original in tqdm(wanted.items(), desc="loading", unit="tensor", disable=None if progress else True):
        prefix, _, kind = name.rpartition(".")
        owner = model.get_submodule(prefix)
        if name not in current and allocated.get(original) not in set(owner.parameters()):
            cast(FillsItself, owner).fill(kind, stored[name])
            continue
        parameter = current.get(name, allocated.get(original))
        assert parameter is not None
        if parameter not in filled:
            stored[name].copy_to(parameter)
            filled.add(parameter)
