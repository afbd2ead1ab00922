"""What of a model is trained. In: the configuration and a checkpoint. Out: a model whose parameters want gradients where they are
trained, and, at the end, a folder: a whole model (full, freeze), or an adapter that peft loads (lora, qlora).

Full; some layers; LoRA or DoRA on chosen Linears, with whole modules and biases beside them; the same over a base in NF4, or over
the packed matrices of a GPTQ or AWQ checkpoint, which stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwenkit.linear.frozen import PackedBase
from qwenkit.linear.lora import LoRALinear, LowRank, features, linears, put
from qwenkit.linear.nf4 import NF4Linear
from qwenkit.linear.swap import Swap, swap_linears
from qwenkit.model.config import ModelConfig
from qwenkit.model.qwen import Qwen
from qwenkit.settings import parse_size
from qwenkit.train.config import TrainConfig
from qwenkit.train.targets import EMBEDDING, HEAD, choose_linears, freeze_names, is_router, meeting, spelled
from qwenkit.weights.adapter import Adapter, read_whole_adapter
from qwenkit.weights.adapter_saving import AdapterSettings, save_adapter
from qwenkit.weights.checkpoint import Checkpoint
from qwenkit.weights.export import SCORE, dtype_change, reward_changes
from qwenkit.weights.load import empty_and_stored, empty_model, load_model
from qwenkit.weights.pack import packed_outline, packer
from qwenkit.weights.reward import WithoutScore
from qwenkit.weights.saving import (
    Form,
    Outgoing,
    copy_tokenizer,
    fused_as_qwen1,
    into_folder,
    is_weights_file,
    write_model,
)
from qwenkit.weights.stored import StoredTensor

ADAPTERS = ("lora", "qlora")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def compute_dtype(config: TrainConfig, device: torch.device | str) -> torch.dtype:
    """What `dtype: auto` is on a device: bfloat16 on a GPU, float32 elsewhere."""
    if config.dtype == "auto":
        return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    return _DTYPES[config.dtype]


def prepare_model(
    config: TrainConfig, checkpoint: Checkpoint, device: torch.device | str, *, progress: bool = False
) -> Qwen:
    """The checkpoint's model on `device`, as `config.method` wants it; only what is trained wants gradients.

    The base has the dtype of the arithmetic, adapters are fp32. A reward model (stage rm) has a Linear `score` beside its head.
    The same seed gives the same adapter on every rank. Raises ValueError naming the field where a method, a target or an
    adapter does not fit the model.
    """
    return _prepared(config, checkpoint, device, None, progress)


def outline_model(
    config: TrainConfig, checkpoint: Checkpoint, device: torch.device | str
) -> tuple[Qwen, dict[str, StoredTensor]]:
    """The same with a base that has no memory (on the meta device), and what the checkpoint has for it: `fill_slices` reads it.

    New parameters, of an adapter or a score, have their values already, on `device`. See `can_outline`.
    """
    stored: dict[str, StoredTensor] = {}
    return _prepared(config, checkpoint, device, stored, False), stored


def can_outline(checkpoint: Checkpoint, method: str) -> bool:
    """Whether parts of a model can be read: packed matrices know their form only when they were read whole."""
    return not stays_packed(checkpoint, method)


def stays_packed(checkpoint: Checkpoint, method: str) -> dict[str, str]:
    """The matrices that stay as the checkpoint has them, and their types: those of GPTQ and AWQ, and for qlora 4-bit blocks of
    GGUF, which NF4 would round a second time. ValueError for a method that trains them.
    """
    kept = ("CODES", "Q4_0", "Q4_1") if method == "qlora" else ("CODES",)
    packed = {stored.name: stored.dtype for stored in checkpoint.tensors() if stored.dtype.startswith(kept)}
    if packed and method not in ADAPTERS:
        raise ValueError(
            f"method is {method!r}, but {checkpoint.path} is quantized by GPTQ or AWQ, whose matrices cannot be trained; "
            "allowed are lora and qlora, or the 16-bit model that it was made from"
        )
    return packed


def _prepared(
    config: TrainConfig,
    checkpoint: Checkpoint,
    device: torch.device | str,
    outlined: dict[str, StoredTensor] | None,
    progress: bool,
) -> Qwen:
    """`outlined`, where it is given, gets what the checkpoint has for a base that stays without memory."""
    packed = stays_packed(checkpoint, config.method)
    body = WithoutScore(checkpoint) if config.stage == "rm" else checkpoint
    dtype, swaps = compute_dtype(config, device), _base_swaps(config, packed)
    if outlined is None:
        model = load_model(body, dtype=dtype, device=device, swaps=swaps, progress=progress)
    else:
        model, stored = empty_and_stored(body, dtype)
        outlined |= stored
        for swap in swaps:
            swap_linears(model, swap)
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(config.seed)
        if isinstance(body, WithoutScore):
            _add_score(model, body, device)
        if config.method in ADAPTERS:
            given = _adapt(model, config, checkpoint, device)
            if outlined is not None and given is not None:
                outlined |= {
                    name: _as_stored(name, value) for name, value in given.parameters.items() if name in outlined
                }
        elif config.adapter is not None:
            raise ValueError(
                f"adapter is {config.adapter!r}, but method is {config.method!r}; allowed are lora and qlora"
            )
        elif config.method == "freeze":
            _train_only(model, freeze_names(model, config))
    if config.stage == "rm" and not model.config.tie_word_embeddings:
        model.lm_head.requires_grad_(False)  # no score comes from it
    return model.train()


def model_of_shapes(sizes: ModelConfig, config: TrainConfig, packed: Mapping[str, str] | None = None) -> Qwen:
    """What `prepare_model` makes of a model of these sizes, on the meta device: names, shapes, and what is trained.

    `packed` is what `stays_packed` says. An adapter to go on with is not read; a new one of lora_rank stands for it.
    """
    packed, config = packed or {}, replace(config, adapter=None)
    model = empty_model(sizes, compute_dtype(config, "cpu"))
    for swap in _base_swaps(config, packed):
        swap_linears(model, swap)
    for name, module in model.named_modules():
        if isinstance(module, PackedBase):
            kind = packed[f"{name}.weight"]
            module.to("meta").take(packed_outline(kind, module.out_features, module.in_features))
    if config.stage == "rm":
        model.score = nn.Linear(model.config.hidden_size, 1, bias=False, device="meta")
    if config.method in ADAPTERS:
        _adapt(model, config, None)
    elif config.method == "freeze":
        _train_only(model, freeze_names(model, config))
    return model


def check_adapter(config: TrainConfig, checkpoint: Checkpoint) -> None:
    """Raise what `prepare_model` raises for the adapter that is to be trained on; no weights of the model are read."""
    model = empty_model(ModelConfig.from_dict(checkpoint.config), torch.float32)
    if config.stage == "rm":
        model.score = nn.Linear(model.config.hidden_size, 1, bias=False, device="meta")
    _given_adapter(model, config, checkpoint)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name; a tied head is its embedding."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _base_swaps(config: TrainConfig, packed: Mapping[str, str]) -> list[Swap]:
    """What keeps the base in few bits: packed matrices as they are, else for qlora NF4 in all but embedding, head and routers."""

    def make(name: str, module: nn.Linear | nn.Embedding) -> nn.Module | None:
        if not isinstance(module, nn.Linear):
            return None
        if f"{name}.weight" in packed:
            return PackedBase(module, packer(16))
        if config.method != "qlora" or packed or name == HEAD or is_router(name):
            return None
        return NF4Linear(module, double_quantization=config.double_quantization)

    return [make] if packed or config.method == "qlora" else []


def _train_only(model: nn.Module, names: Iterable[str]) -> None:
    wanted = set(names)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in wanted:
            parameter.requires_grad_(True)


def _as_stored(name: str, value: torch.Tensor) -> StoredTensor:
    return StoredTensor(name, tuple(value.shape), "F32", lambda start, stop: value[start:stop])


def _adapt(
    model: Qwen, config: TrainConfig, checkpoint: Checkpoint | None, device: torch.device | str | None = None
) -> Adapter | None:
    """Put adapters in place, on `device` (None: where the base is). Returns the one that is gone on with, if any."""
    given = _given_adapter(model, config, checkpoint)
    model.requires_grad_(False)
    if given is None:
        for name in choose_linears(model, config.lora_target):
            linear = model.get_submodule(name)
            if config.lora_rank > min(features(linear)):
                raise ValueError(
                    f"lora_rank is {config.lora_rank}, allowed are 1 to {min(features(linear))} for {name}"
                )
            rank, alpha = config.lora_rank, config.alpha
            put(model, name, _lora(linear, config, rank, alpha, config.use_dora, config.use_rslora, device))
    else:
        for name, update in given.updates.items():
            rank, dora = update.a.shape[0], update.magnitude is not None
            lora = _lora(model.get_submodule(name), config, rank, update.scaling * rank, dora, False, device)
            _copy_update(lora, update)
            put(model, name, lora)
    whole: list[str] = []
    if given is not None:
        saved = spelled(given.settings.get("modules_to_save") or ())
        whole = [name for name in given.parameters if any(f".{module}." in f".{name}." for module in saved)]
    modules = [name for name, module in model.named_modules() if list(module.parameters(recurse=False))]
    for pattern in spelled(config.modules_to_save):
        for module in meeting(pattern, modules, "modules_to_save"):
            own = model.get_submodule(module).named_parameters()
            whole += [f"{module}.{name}".replace(".base.", ".") for name, _ in own]
    if config.stage == "rm":
        whole.append(SCORE)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    inner = {name.replace(".base.", "."): parameter for name, parameter in parameters.items()}
    for name in whole:
        parameter = inner[name]
        if (
            not parameter.is_floating_point()
            or "lora_" in name
            or (isinstance(_owner(model, name), LoRALinear) and _is_weight(name))
        ):
            raise ValueError(
                f"modules_to_save meets {name}, which is quantized or has an adapter, so it cannot be trained whole"
            )
        parameter.requires_grad_(True)
    with torch.no_grad():
        for name, value in given.parameters.items() if given is not None else ():
            inner[name].copy_(value)
    bias = given.settings.get("bias", "none") if given is not None else config.lora_bias
    for name, parameter in inner.items():
        adapted = isinstance(_owner(model, name), LoRALinear)
        if name.endswith(".bias") and (bias == "all" or (bias == "lora_only" and adapted)):
            parameter.requires_grad_(True)
    return given


def _is_weight(name: str) -> bool:
    return name.endswith(".weight")


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _lora(
    linear: nn.Module, config: TrainConfig, rank: int, alpha: float, dora: bool, rslora: bool, device: Any
) -> LoRALinear:
    return LoRALinear(linear, rank, alpha, dropout=config.lora_dropout, rslora=rslora, dora=dora, device=device)


@torch.no_grad()
def _copy_update(lora: LoRALinear, update: LowRank) -> None:
    lora.lora_A.copy_(update.a)
    lora.lora_B.copy_(update.b)
    if lora.lora_magnitude_vector is not None and update.magnitude is not None:
        lora.lora_magnitude_vector.copy_(update.magnitude)


def _given_adapter(model: Qwen, config: TrainConfig, checkpoint: Checkpoint | None) -> Adapter | None:
    """The adapter that is to be trained on: its targets, ranks and scaling are its own, whatever the configuration says."""
    if config.adapter is None:
        return None
    shapes = {name: features(linear) for name, linear in linears(model).items()}
    sizes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    qwen1 = model.config.model_type == "qwen"
    given = read_whole_adapter(Path(config.adapter).expanduser(), shapes, sizes, qwen1=qwen1)
    if model.config.tie_word_embeddings and not _same_if_tied(given):
        raise ValueError(
            f"adapter {config.adapter} has an embedding and a head that differ, but this model ties them; "
            "merge it with `qwenkit export` and train the result"
        )
    return given


def _same_if_tied(given: Adapter) -> bool:
    found = [given.parameters[name] for name in (f"{EMBEDDING}.weight", f"{HEAD}.weight") if name in given.parameters]
    return not found or (len(found) == 2 and torch.equal(*found))


def _add_score(model: Qwen, checkpoint: WithoutScore, device: torch.device | str) -> None:
    """The scalar head of a reward model, with the checkpoint's values where it has one."""
    dtype = model.model.norm.weight.dtype
    score = nn.Linear(model.config.hidden_size, 1, bias=False, device=device, dtype=dtype)
    stored = checkpoint.score()
    with torch.no_grad():
        if stored is None:
            nn.init.normal_(score.weight, std=model.config.hidden_size**-0.5)
        else:
            stored.copy_to(score.weight)
    model.score = score


def save_trained(
    model: Qwen, config: TrainConfig, checkpoint: Checkpoint, folder: Path, *, writes: bool = True
) -> None:
    """Write what was trained into `folder`, which may hold other files: a model that loads by itself, or an adapter.

    Sharded parameters are gathered one at a time; all ranks must call this, and those that are not to write say `writes=False`.
    """
    whole: Callable[[torch.Tensor], torch.Tensor] = lambda p: p.full_tensor() if hasattr(p, "full_tensor") else p  # noqa: E731
    if config.method in ADAPTERS:
        _save_adapter(model, config, checkpoint, folder, whole, writes)
    else:
        _save_model(model, config, checkpoint, folder, whole, writes)


def _save_model(
    model: Qwen, config: TrainConfig, checkpoint: Checkpoint, folder: Path, whole: Callable[..., Any], writes: bool
) -> None:
    parameters = dict(model.named_parameters())
    if SCORE in parameters:
        parameters.pop(f"{HEAD}.weight", None)
    dtype = model.model.norm.weight.dtype
    tensors = [
        Outgoing(name, tuple(parameter.shape), dtype, lambda parameter=parameter: whole(parameter))  # type: ignore[misc]
        for name, parameter in parameters.items()
    ]
    if not writes:
        for tensor in fused_as_qwen1(tensors) if model.config.model_type == "qwen" else tensors:
            tensor.make()
        return
    changes = dtype_change(checkpoint, dtype) | (reward_changes(checkpoint) if SCORE in parameters else {})
    with into_folder(folder, replaces=is_weights_file) as beside:
        write_model(
            beside,
            tensors,
            checkpoint,
            changes,
            Form(parse_size("export_size", config.export_size, unit="GB", example="4GB")),
        )


def _save_adapter(
    model: Qwen, config: TrainConfig, checkpoint: Checkpoint, folder: Path, whole: Callable[..., Any], writes: bool
) -> None:
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    updates = {}
    for name, module in found.items():
        magnitude = module.lora_magnitude_vector
        lengths = None if magnitude is None else whole(magnitude)
        updates[name] = LowRank(whole(module.lora_A), whole(module.lora_B), module.scaling, lengths)
    parameters = {
        name.replace(".base.", "."): whole(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad and ".lora_" not in name
    }
    if not writes:
        return
    biases = {name.removesuffix(".bias") for name in parameters if name.endswith(".bias")}
    bias = "none" if not biases else "lora_only" if biases <= updates.keys() else "all"
    kept = {name.rpartition(".")[0] for name in parameters if not name.endswith(".bias")}
    settings = AdapterSettings(
        base=config.model or str(checkpoint.path),
        dropout=config.lora_dropout,
        rslora=config.use_rslora and config.adapter is None,
        bias=bias,
        modules_to_save=tuple(sorted(kept)),
        task="SEQ_CLS" if config.stage == "rm" else "CAUSAL_LM",
    )
    with into_folder(folder) as part:
        save_adapter(part, updates, parameters, linears(model), settings, qwen1=model.config.model_type == "qwen")
        copy_tokenizer(part, checkpoint)
