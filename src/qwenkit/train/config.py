"""TrainConfig: everything a user may decide about a training run. Flags, YAML keys and `key=value` are generated from it.

In: decoded settings, or their texts. Out: one frozen dataclass, checked field by field. Names are LLaMA-Factory's where it has
the thing; compat/ translates its other keys, and the flags of Qwen's finetune.py, before they come here.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from qwenkit.settings import nearest
from qwenkit.text.chatml import NAMED


def option(default: Any, text: str) -> Any:
    """A dataclass field with the sentence that its command-line flag shows."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Raises ValueError naming the field for a value outside its range."""

    # What is trained
    model: str = option("", "the model to train: a folder, a .gguf file, a hub id, or smollm2")
    stage: str = option("sft", "pt (plain text), sft, dpo, kto, orpo or rm (reward model)")
    method: str = option("lora", "full, freeze (some layers), lora, or qlora (LoRA over a 4-bit base)")
    adapter: str | None = option(None, "a PEFT adapter folder to go on training")
    freeze_trainable_layers: int = option(2, "freeze: how many of the last layers are trained (negative: of the first)")
    freeze_trainable_modules: tuple[str, ...] = option(("all",), "freeze: modules of those layers, such as mlp; or all")
    freeze_extra_modules: tuple[str, ...] = option((), "freeze: modules outside of the layers that are trained too")
    freeze_trainable: tuple[str, ...] = option((), "freeze: patterns of parameter names that are trained, instead")
    lora_rank: int = option(8, "LoRA's rank")
    lora_alpha: float | None = option(None, "LoRA's alpha (default: twice the rank)")
    lora_dropout: float = option(0.0, "share of inputs that LoRA does not see")
    lora_target: tuple[str, ...] = option(("all",), "names or patterns of the Linears that get LoRA; all: but the head")
    lora_bias: str = option("none", "which biases are trained too: none, all or lora_only")
    use_rslora: bool = option(False, "scale by alpha / sqrt(rank)")
    use_dora: bool = option(False, "train the lengths of the columns apart from their directions")
    modules_to_save: tuple[str, ...] = option((), "modules trained whole beside LoRA, such as embed_tokens, lm_head")
    double_quantization: bool = option(True, "qlora: quantize the scales of NF4 as well")
    # Preferences
    pref_loss: str = option("sigmoid", "dpo: sigmoid, hinge, ipo or simpo")
    pref_beta: float = option(0.1, "beta of dpo, kto and orpo")
    pref_ftx: float = option(0.0, "weight of the plain loss of the chosen answer beside dpo")
    pref_label_smoothing: float = option(0.0, "dpo: how often the preference is taken to be wrong")
    simpo_gamma: float = option(0.5, "simpo: margin of reward")
    kto_chosen_weight: float = option(1.0, "kto: weight of liked answers")
    kto_rejected_weight: float = option(1.0, "kto: weight of disliked answers")
    ref_model: str | None = option(None, "model to measure against (default: the model as it was at the start)")
    # Data
    dataset: tuple[str, ...] = option((), "names in dataset_info.json, or files")
    dataset_dir: str = option("data", "folder of dataset_info.json and the data")
    eval_dataset: tuple[str, ...] = option((), "names or files to measure the loss on")
    val_size: float = option(0.0, "samples (1 and more) or share (less than 1) split off for evaluation")
    template: str = option(
        "default",
        f"how conversations are written: default (the model's own), {', '.join(NAMED)} (where it has none), or a .jinja file",
    )
    system: str | None = option(None, "system message for conversations that have none")
    variables: tuple[str, ...] = option((), "texts for {{name}} in samples, as name=text")
    enable_thinking: bool | None = option(
        None, "thinking, as the chat template is told (default: on for answers with thoughts, off for others)"
    )
    split_special_tokens: bool = option(
        True, "pt: control tokens written in a text are plain characters; false: tokens"
    )
    cutoff_len: int = option(2048, "most tokens of a sample; with packing, of a pack")
    max_samples: int | None = option(None, "read only so many samples of each data set")
    labels: str = option("chat", "what is learned: chat (answers), qwen1 or mindformers (their older schemes)")
    train_on_prompt: bool = option(False, "learn the prompt too")
    mask_history: bool = option(False, "learn only the last answer of a conversation")
    overlong: str = option("drop", "samples above cutoff_len: error, drop, truncate or split")
    bad_samples: str = option("error", "samples that cannot be read: error or drop")
    packing: bool | None = option(None, "fill packs of cutoff_len tokens with whole samples (default: for pt)")
    mix_strategy: str = option("concat", "several data sets: concat, interleave_under or interleave_over")
    mix_weights: tuple[float, ...] = option((), "weight of each data set when interleaved (default: equal)")
    shuffle: bool = option(True, "shuffle samples, anew each epoch")
    streaming: bool = option(False, "read data while training instead of before; needs max_steps")
    buffer_size: int = option(16384, "streaming: samples in the shuffle buffer")
    preprocessing_num_workers: int = option(1, "processes that tokenize")
    cache_dir: str | None = option(None, "where tokenized data is kept (default: the user's cache folder)")
    overwrite_cache: bool = option(False, "tokenize anew")
    # Length of the run
    num_train_epochs: float = option(3.0, "passes over the data")
    max_steps: int | None = option(None, "steps, whatever the number of epochs")
    per_device_train_batch_size: int | None = option(
        None, "samples (with packing: packs) in one micro-batch (default: 8 samples, or 1 pack)"
    )
    per_device_eval_batch_size: int | None = option(None, "the same for evaluation (default: as for training)")
    gradient_accumulation_steps: int = option(1, "micro-batches in one step")
    # Optimizer
    optim: str = option("adamw", "adamw or adamw_8bit (states in 8 bit)")
    learning_rate: float = option(5e-5, "largest learning rate")
    min_lr_ratio: float = option(0.0, "the smallest, as a share of the largest, at the end of cosine, linear and wsd")
    lr_scheduler_type: str = option("cosine", "cosine, linear, constant, constant_with_warmup or wsd")
    warmup_ratio: float = option(0.0, "share of the steps in which the learning rate rises")
    warmup_steps: int | float = option(0, "the same in steps (below 1: as a share); goes before warmup_ratio")
    decay_ratio: float = option(0.2, "wsd: share of the steps in which the learning rate falls")
    weight_decay: float = option(0.0, "AdamW's weight decay; not of norms and biases")
    adam_beta1: float = option(0.9, "AdamW's beta1")
    adam_beta2: float = option(0.999, "AdamW's beta2")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0: never")
    ema: float | None = option(None, "decay of a moving average of the weights, saved beside them")
    # Arithmetic and memory
    device: str = option("auto", "auto, cpu, cuda, cuda:1, …")
    dtype: str = option(
        "auto", "arithmetic: auto, float32, bfloat16 or float16 (auto: bfloat16 on a GPU, else float32)"
    )
    master_weights: str = option(
        "float32", "bfloat16 weights that are trained: float32 (an exact copy) or stochastic (rounding)"
    )
    gradient_checkpointing: bool = option(False, "compute blocks twice instead of keeping what is inside them")
    loss_chunk: int | None = option(None, "targets whose logits exist at the same time (default: 128 MiB of logits)")
    torch_compile: bool = option(False, "compile the blocks")
    nan_policy: str = option("stop", "a loss or gradient that is not finite: stop, or skip the step")
    oom_policy: str = option("halve", "out of memory: halve the micro-batch and go on, or stop")
    # Many devices
    dp_replicate: int = option(1, "data parallel copies of the model (ddp, hsdp)")
    dp_shard: int | None = option(None, "processes that share one copy (fsdp2; default: all that are left)")
    tensor_parallel: int = option(1, "processes that share each matrix")
    context_parallel: int = option(1, "processes that share each sequence")
    parallel: str = option("auto", "auto, ddp or fsdp")
    ddp_timeout: int = option(1800, "seconds that one process waits for another")
    # Output
    output_dir: str = option("output", "folder for the trained model, checkpoints, logs")
    overwrite_output_dir: bool = option(False, "delete an earlier run in output_dir")
    resume_from_checkpoint: str | None = option(None, "latest, or a checkpoint folder: go on from there")
    save_strategy: str = option("steps", "a checkpoint each save_steps, each epoch, only of the best evaluation, or no")
    save_steps: int | float | None = option(500, "steps from checkpoint to checkpoint (below 1: as a share of all)")
    save_total_limit: int | None = option(None, "keep so many checkpoints, and the best one")
    load_best_model_at_end: bool = option(False, "what is saved at the end is the checkpoint of the lowest eval_loss")
    export_size: str = option("5GB", "largest file of a saved model, such as 5GB or 5GiB (or 5G), or a number of GB")
    logging_steps: int | float = option(10, "steps from log line to log line (below 1: as a share of all)")
    eval_strategy: str = option("steps", "an evaluation each eval_steps, each epoch, or no: only at the end")
    eval_steps: int | float | None = option(
        None, "steps from evaluation to evaluation (below 1: as a share; default: as save_steps)"
    )
    early_stopping_patience: int | None = option(None, "stop after so many evaluations without a better one")
    sample_prompts: tuple[str, ...] = option((), "prompts answered at each evaluation, for the log")
    sample_max_new_tokens: int = option(64, "longest of these answers")
    plot_loss: bool = option(False, "draw training_loss.png and training_eval_loss.png (extra plot)")
    report_to: tuple[str, ...] = option((), "also log to tensorboard, wandb, swanlab, mlflow or trackio")
    run_name: str | None = option(None, "the run's name there (default: that of output_dir)")
    seed: int = option(42, "seed of shuffling, initialisation and dropout")

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            _one_of(name, getattr(self, name), allowed)
        for reporter in self.report_to:
            _one_of("report_to", reporter, REPORTERS)
        for name, (low, high, whole) in _RANGES.items():
            _in_range(name, getattr(self, name), low, high, whole)
        for name, low in _STEPS.items():
            _steps_or_share(name, getattr(self, name), low)
        if self.stage == "kto" and self.batch_size < 2:
            raise ValueError(
                f"per_device_train_batch_size is {self.batch_size}, allowed is 2 or more for kto: "
                "its baseline comes from answers to other prompts of the same micro-batch"
            )
        for variable in self.variables:
            if "=" not in variable:
                raise ValueError(f"variables holds {variable!r}, allowed is name=text")
        for weight in self.mix_weights:
            _in_range("mix_weights", weight, 0.0, math.inf, False)
        if self.mix_weights and (len(self.mix_weights) != len(self.dataset) or sum(self.mix_weights) <= 0):
            raise ValueError(
                f"mix_weights has {len(self.mix_weights)} weights for {len(self.dataset)} data sets; "
                "allowed is one for each, not all of them 0"
            )
        if self.val_size and self.eval_dataset:
            raise ValueError("val_size and eval_dataset are both given; allowed is one of them")
        if self.streaming and self.max_steps is None:
            raise ValueError("streaming needs max_steps: the length of a stream is not known")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> TrainConfig:
        """From decoded YAML or JSON, or from texts. ValueError for an unknown key (the nearest is named) or a wrong type."""
        for key in settings:
            if key not in _hints():
                raise ValueError(f"{key} is not a setting of train; {nearest(str(key), _hints())}")
        return cls(**{key: _typed(key, _hints()[key], value) for key, value in settings.items()})

    def settings(self) -> dict[str, Any]:
        """All fields as JSON and YAML know them: `from_settings` reads them back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.settings(), sort_keys=False, allow_unicode=True)

    @property
    def alpha(self) -> float:
        return 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha

    @property
    def packs(self) -> bool:
        return self.stage == "pt" if self.packing is None else self.packing

    @property
    def batch_size(self) -> int:
        """Samples, or packs, of one micro-batch of training. A pack is full, eight samples of a chat are about as many tokens."""
        return self.per_device_train_batch_size or (1 if self.packs else 8)

    @property
    def has_eval(self) -> bool:
        return bool(self.val_size or self.eval_dataset)


REPORTERS = ("tensorboard", "wandb", "swanlab", "mlflow", "trackio")
CHOICES: dict[str, tuple[str, ...]] = {
    "stage": ("pt", "sft", "dpo", "kto", "orpo", "rm"),
    "method": ("full", "freeze", "lora", "qlora"),
    "lora_bias": ("none", "all", "lora_only"),
    "pref_loss": ("sigmoid", "hinge", "ipo", "simpo"),
    "labels": ("chat", "qwen1", "mindformers"),
    "overlong": ("error", "drop", "truncate", "split"),
    "bad_samples": ("error", "drop"),
    "mix_strategy": ("concat", "interleave_under", "interleave_over"),
    "optim": ("adamw", "adamw_8bit"),
    "lr_scheduler_type": ("cosine", "linear", "constant", "constant_with_warmup", "wsd"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "master_weights": ("float32", "stochastic"),
    "save_strategy": ("no", "steps", "epoch", "best"),
    "eval_strategy": ("no", "steps", "epoch"),
    "nan_policy": ("stop", "skip"),
    "oom_policy": ("halve", "stop"),
    "parallel": ("auto", "ddp", "fsdp"),
}
_BELOW_ONE = math.nextafter(1.0, 0.0)
# field: smallest, largest, whole numbers only
_RANGES: dict[str, tuple[float, float, bool]] = {
    **dict.fromkeys(
        (
            *("lora_rank", "cutoff_len", "max_samples", "buffer_size", "preprocessing_num_workers", "max_steps"),
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("loss_chunk", "dp_replicate", "dp_shard", "tensor_parallel", "context_parallel", "ddp_timeout"),
            *("save_total_limit", "early_stopping_patience", "sample_max_new_tokens"),
        ),
        (1, math.inf, True),
    ),
    "seed": (0, 2**63 - 1, True),
    **dict.fromkeys(
        (
            *("lora_alpha", "pref_beta", "pref_ftx", "simpo_gamma", "kto_chosen_weight", "kto_rejected_weight"),
            *("val_size", "num_train_epochs", "learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm"),
        ),
        (0.0, math.inf, False),
    ),
    **dict.fromkeys(("min_lr_ratio", "warmup_ratio", "decay_ratio", "pref_label_smoothing"), (0.0, 1.0, False)),
    **dict.fromkeys(("lora_dropout", "adam_beta1", "adam_beta2", "ema"), (0.0, _BELOW_ONE, False)),
}
# Numbers of steps, or shares of all steps; and the smallest.
_STEPS = {"warmup_steps": 0, "save_steps": 1, "logging_steps": 1, "eval_steps": 1}


@cache
def _hints() -> dict[str, Any]:
    hints = get_type_hints(TrainConfig)
    return {each.name: hints[each.name] for each in fields(TrainConfig)}


_SWITCH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_ALLOWED = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _typed(name: str, hint: Any, value: Any) -> Any:
    """`value` as the field's type; texts are read as the type that is wanted, so that YAML's `1e-4` is a number."""
    if get_origin(hint) in (Union, types.UnionType):
        is_empty = value is None or (isinstance(value, str) and value.strip().lower() in ("", "none", "null"))
        if is_empty and type(None) in get_args(hint):
            return None
        members = [member for member in get_args(hint) if member is not type(None)]
        if len(members) == 2 and _is_whole(value):  # int | float
            return value if isinstance(value, bool) else int(float(value))
        hint = members[-1]
    if get_origin(hint) is tuple:
        kind = get_args(hint)[0]
        items = [] if value is None else value
        if isinstance(items, str):
            items = _items(items, name)
        return tuple(_typed(name, kind, item) for item in (items if isinstance(items, list | tuple) else [items]))
    if isinstance(value, str) and hint is not str:
        try:
            return _SWITCH[value.strip().lower()] if hint is bool else hint(value)
        except (ValueError, KeyError):
            raise ValueError(f"{name} is {value!r}, allowed is {_ALLOWED[hint]}") from None
    if hint is float and type(value) is int:
        return float(value)
    if hint is int and type(value) is float and value.is_integer():
        return int(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if type(value) is not hint:
        raise ValueError(f"{name} is {value!r}, allowed is {_ALLOWED[hint]}")
    return value


def _is_whole(value: Any) -> bool:
    try:
        return float(value).is_integer()
    except (TypeError, ValueError, OverflowError):
        return False


_WHOLE_TEXTS = ("sample_prompts", "variables")  # a comma is part of the text; several are given as a YAML list


def _items(text: str, name: str) -> list[object]:
    """A list as words of the command line give it: a YAML list, or names with commas between them."""
    if text.startswith("[") and text.endswith("]"):
        try:
            return list(yaml.safe_load(text))
        except yaml.YAMLError:
            raise ValueError(f"{name} is {text!r}, which is not a YAML list such as [one, two]") from None
    return [text] if name in _WHOLE_TEXTS else [item.strip() for item in text.split(",") if item.strip()]


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, allowed are {', '.join(allowed)}")


def _in_range(name: str, value: object, low: float, high: float, whole: bool) -> None:
    if value is None and type(None) in get_args(_hints()[name]):
        return
    fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not fits or not low <= value <= high or math.isinf(value):  # type: ignore[operator, arg-type]
        kind = "a whole number" if whole else "a number"
        to = "or more" if math.isinf(high) else "to less than 1" if high == _BELOW_ONE else f"to {high:g}"
        raise ValueError(f"{name} is {value!r}, allowed is {kind}, {low:g} {to}")


def _steps_or_share(name: str, value: Any, low: int) -> None:
    if value is None and type(None) in get_args(_hints()[name]):
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (0 < value < 1 or (value >= low and not math.isinf(value) and value == int(value))):
        raise ValueError(
            f"{name} is {value!r}, allowed is a whole number, {low} or more, or a share of all steps between 0 and 1"
        )
