"""Sources of settings as one: a file, key=value words, and flags.

In: decoded keys of each source, the weakest first. Out: one mapping in which a later source wins, whatever name it uses for a
setting, with `${key}` filled in. Nothing is translated yet but names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwenkit.compat.table import canonical

# Our settings, and the keys of other trainers that say the same in another way.
_SAME_SETTING = {
    "method": ("finetuning_type", "use_lora", "q_lora", "quantization_bit"),
    "dtype": ("bf16", "fp16", "pure_bf16"),
    "master_weights": ("pure_bf16",),
    "gradient_checkpointing": ("disable_gradient_checkpointing",),
    "packing": ("neat_packing",),
    "device": ("use_cpu", "no_cuda"),
    "shuffle": ("disable_shuffling", "train_sampling_strategy"),
    "lora_target": ("lora_target_modules",),
    "adapter": ("adapter_name_or_path",),
    "min_lr_ratio": ("lr_scheduler_kwargs",),
    "decay_ratio": ("lr_scheduler_kwargs",),
    "parallel": ("fsdp",),
    "warmup_steps": ("warmup_ratio",),
    "warmup_ratio": ("warmup_steps",),
}
_TEXTS = ("system", "sample_prompts", "variables")  # where ${…} may be meant as it is written


def read_flags(words: Sequence[str]) -> dict[str, Any]:
    """`--name value`, `--name=value`, `--name` alone (true) and `--name a b c` (a list), as transformers' parser reads them.

    Raises ValueError for a word that belongs to no flag, and for a flag that is given twice.
    """
    settings: dict[str, Any] = {}
    name: str | None = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if name in settings:
                raise ValueError(f"--{name} is given twice")
            settings[name] = value if equals else True
        elif name is None:
            raise ValueError(f"{word!r} belongs to no flag; allowed are --name value and --name=value")
        elif settings[name] is True:
            settings[name] = word
        else:
            before = settings[name]
            settings[name] = [*(before if isinstance(before, list) else [before]), word]
    return settings


def merge(sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All sources together, under the names that the keys have here; a later source wins over an earlier one.

    Raises ValueError where one source gives a setting under two names with two values, and for a `${…}` that stands for nothing.
    """
    merged: dict[str, Any] = {}
    for source in sources:
        named: dict[str, Any] = {}
        given_as: dict[str, str] = {}
        for key, value in source.items():
            name = canonical(key)
            if name in named and str(named[name]) != str(value):
                raise ValueError(
                    f"{given_as[name]} is {named[name]!r}, but {key}, which means the same, is {value!r}; give one of them"
                )
            named[name], given_as[name] = value, key
        for ours, others in _SAME_SETTING.items():
            if ours in named:
                for other in others:
                    if other not in named:
                        merged.pop(other, None)
            if any(other in named for other in others) and ours not in named:
                merged.pop(ours, None)
        merged |= named
    return fill_variables(merged)


def fill_variables(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`${key}` in values replaced by the value of that key. ValueError for one that is no key, or refers to itself."""
    return {key: value if key in _TEXTS else _filled(key, value, settings, (key,)) for key, value in settings.items()}


def _filled(key: str, value: Any, settings: Mapping[str, Any], seen: tuple[str, ...]) -> Any:
    if isinstance(value, list):
        return [_filled(key, item, settings, seen) for item in value]
    if isinstance(value, dict):
        return {name: _filled(key, item, settings, seen) for name, item in value.items()}
    if not isinstance(value, str) or "${" not in value:
        return value

    def of(name: str) -> Any:
        wanted = canonical(name.strip())
        if wanted not in settings or wanted in seen:
            why = "stands for itself" if wanted in seen else "is no key of this configuration"
            raise ValueError(f"{key} is {value!r}, but ${{{name}}} {why}; write its value")
        return _filled(wanted, settings[wanted], settings, (*seen, wanted))

    whole = re.fullmatch(r"\$\{([^${}]*)\}", value)
    if whole:
        return of(whole[1])
    filled = re.sub(r"\$\{([^${}]*)\}", lambda match: str(of(match[1])), value)
    if "${" in filled:
        raise ValueError(f"{key} is {value!r}, whose ${{ has no end that can be read; write its value")
    return filled
