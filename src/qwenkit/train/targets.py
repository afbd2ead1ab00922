"""Which parts of a model a method means.

In: a model and the patterns of a configuration. Out: names of Linears and parameters.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from qwenkit.linear.lora import linears
from qwenkit.model.qwen import Qwen
from qwenkit.train.config import TrainConfig
from qwenkit.weights.export import SCORE

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
# Names that users of the original Qwen-1 know.
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
    """Names of the parameters that method freeze trains: those that a pattern of `freeze_trainable` meets, else the last
    `freeze_trainable_layers` layers (negative: the first), as LLaMA-Factory counts them."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if config.freeze_trainable:
        return sorted(
            {name for pattern in config.freeze_trainable for name in meeting(pattern, names, "freeze_trainable")}
        )
    count, layers = config.freeze_trainable_layers, model.config.num_hidden_layers
    if count == 0 or abs(count) > layers:
        raise ValueError(f"freeze_trainable_layers is {count}, allowed are 1 to {layers}, or -1 to -{layers}")
    chosen = range(layers - count, layers) if count > 0 else range(-count)
    prefixes = tuple(f"model.layers.{layer}." for layer in chosen)
    score = [SCORE] if config.stage == "rm" else []
    return [name for name in names if name.startswith(prefixes)] + score


def meeting(pattern: str, names: Iterable[str], field: str) -> list[str]:
    """Names that a pattern means: whole, their end or middle between dots, or with * and ? as in file names."""
    names = list(names)
    if any(sign in pattern for sign in "*?["):
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    else:
        found = [name for name in names if f".{pattern}." in f".{name}."]
    if not found:
        leaves = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
        raise ValueError(
            f"{field} has {pattern!r}, which meets nothing in this model; its names are made of {', '.join(leaves)}"
        )
    return found


def spelled(patterns: Iterable[str], model: Qwen) -> list[str]:
    """Qwen-1's names for Linears as ours; all other patterns as they are."""
    known = _QWEN1_TARGETS if model.config.model_type == "qwen" else {}
    return [name for pattern in patterns for name in known.get(pattern, (pattern,))]


def choose_linears(model: Qwen, targets: Iterable[str]) -> list[str]:
    """Names of the Linears that get an adapter. `all` is every one but head, score and routers of experts."""
    known = linears(model)
    found: set[str] = set()
    for target in spelled(targets, model):
        if target == "all":
            found |= {name for name in known if name not in (HEAD, "score") and not is_router(name)}
            continue
        if target in ("embed_tokens", EMBEDDING):
            raise ValueError("lora_target has embed_tokens, which is no Linear; train it whole by modules_to_save")
        found |= set(meeting(target, known, "lora_target"))
    return [name for name in known if name in found]
