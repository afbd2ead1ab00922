"""Target modules of a training method.

In: a model and the patterns of a configuration. Out: names of Linears and parameters.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

from qwenkit.linear.lora import linears
from qwenkit.model.qwen import Qwen
from qwenkit.train.config import TrainConfig
from qwenkit.weights.export import SCORE

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
_ALL = ("all", "all-linear")  # LLaMA-Factory's word and PEFT's
# Names of the original Qwen-1, whose parameters have Hugging Face's names here. No other family uses them.
_QWEN1_TARGETS = {
    "c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "c_proj": ("self_attn.o_proj", "mlp.down_proj"),
    "w1": ("mlp.up_proj",),
    "w2": ("mlp.gate_proj",),
    "wte": (EMBEDDING,),
    "ln_f": ("model.norm",),
}


def is_router(name: str) -> bool:
    """Of a mixture of experts; choosing experts is not what adapters or four bits are for."""
    return name.endswith((".gate", "shared_expert_gate"))


def freeze_names(model: Qwen, config: TrainConfig) -> list[str]:
    """Names of the parameters that method freeze trains, as LLaMA-Factory counts them.

    They are those that a pattern of `freeze_trainable` matches, else `freeze_trainable_modules` of the last
    `freeze_trainable_layers` layers (negative: the first) and `freeze_extra_modules` outside of the layers. A reward model's new
    head is always trained. ValueError naming the field for a pattern that matches nothing.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    score = [SCORE] if config.stage == "rm" else []
    if config.freeze_trainable:
        patterns = spelled(config.freeze_trainable)
        return sorted({name for pattern in patterns for name in meeting(pattern, names, "freeze_trainable")} | {*score})
    count, layers = config.freeze_trainable_layers, model.config.num_hidden_layers
    if count == 0 or abs(count) > layers:
        raise ValueError(f"freeze_trainable_layers is {count}, allowed are 1 to {layers}, or -1 to -{layers}")
    chosen = range(layers - count, layers) if count > 0 else range(-count)
    prefixes = tuple(f"model.layers.{layer}." for layer in chosen)
    inside = [name for name in names if name.startswith(prefixes)]
    outside = [name for name in names if not name.startswith("model.layers.")]
    found: set[str] = set()
    for module in spelled(config.freeze_trainable_modules):
        found |= set(inside if module == "all" else meeting(module, inside, "freeze_trainable_modules"))
    for module in spelled(config.freeze_extra_modules):
        found |= set(meeting(module, outside, "freeze_extra_modules"))
    return [name for name in names if name in found] + score


def meeting(pattern: str, names: Iterable[str], field: str) -> list[str]:
    """Names that a pattern means: whole, their end or middle between dots, with * and ? as in file names, or all of a name by a
    regular expression, as PEFT reads a text. ValueError where it means none."""
    names = list(names)
    if re.search(r"[\\^$|()+]|^\.\*", pattern):
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{field} has {pattern!r}, which is no regular expression: {error}") from None
        found = [name for name in names if expression.fullmatch(name)]
    elif any(sign in pattern for sign in "*?["):
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    else:
        found = [name for name in names if f".{pattern}." in f".{name}."]
    if not found:
        leaves = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
        raise ValueError(
            f"{field} has {pattern!r}, which meets nothing in this model; its names are made of {', '.join(leaves)}"
        )
    return found


def spelled(patterns: Iterable[str]) -> list[str]:
    """Qwen-1's names for Linears as ours; all other patterns unchanged."""
    return [name for pattern in patterns for name in _QWEN1_TARGETS.get(pattern, (pattern,))]


def choose_linears(model: Qwen, targets: Iterable[str]) -> list[str]:
    """Names of the Linears that get an adapter. `all` (`all-linear`) is every one but head, score and routers of experts."""
    known = linears(model)
    found: set[str] = set()
    for target in spelled(targets):
        if target in _ALL:
            found |= {name for name in known if name not in (HEAD, "score") and not is_router(name)}
            continue
        if target in ("embed_tokens", EMBEDDING):
            raise ValueError("lora_target has embed_tokens, which is no Linear; train it whole by modules_to_save")
        found |= set(meeting(target, known, "lora_target"))
    return [name for name in known if name in found]
