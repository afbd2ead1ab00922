"""Configurations of other trainers, run unchanged: LLaMA-Factory's YAML files, and the flags of Qwen's finetune.py.

In: decoded keys, or the words of a command line. Out: settings of TrainConfig, and sentences for the user: what was accepted
without effect and why, and which of the other trainer's defaults hold. What cannot be honoured is refused by name. Keys that
are TrainConfig's own pass as they are; keys that nobody knows are left for TrainConfig to refuse.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenkit.train.deepspeed import read_deepspeed
from qwenkit.train.foreign_keys import (
    FINETUNE_DEFAULTS,
    LLAMAFACTORY_DEFAULTS,
    OPTIMIZERS,
    QWEN1_TARGETS,
    REFUSED,
    RENAMED,
    TEMPLATES,
    WITHOUT_EFFECT,
)

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0", "none", "null", "")


@dataclass(frozen=True)
class Translation:
    """Settings for `TrainConfig.from_settings`, and what the user should know about them."""

    settings: dict[str, Any]
    notes: list[str]


def is_foreign(settings: Mapping[str, Any]) -> bool:
    """Whether a configuration is another trainer's: it names the model, the method or the data as only they do."""
    return any(key in settings for key in ("model_name_or_path", "finetuning_type", "do_train", "data_path"))


def translate(settings: Mapping[str, Any], *, folder: Path = Path()) -> Translation:
    """Translate keys and values. Paths in them are relative to `folder`, where the command runs.

    Raises ValueError, one sentence, for a key that asks for what qwenkit does not do.
    """
    if not is_foreign(settings):
        return Translation(dict(settings), [])
    work = _Work(dict(settings), folder)
    work.run()
    return Translation(work.found, work.notes)


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


class _Work:
    """One translation: what is still to do, what was found, what is to be said."""

    def __init__(self, given: dict[str, Any], folder: Path) -> None:
        self.given = given
        self.folder = folder
        self.found: dict[str, Any] = {}
        self.notes: list[str] = []
        self.is_finetune = "data_path" in given
        self.insists = "dtype" in given  # our own name for it, so whoever wrote it knows

    def run(self) -> None:
        for key, value in self.given.items():
            if key in REFUSED and _is_set(value):
                raise ValueError(f"{key} is {value!r}, but {REFUSED[key]}")
        for key, reason in WITHOUT_EFFECT.items():
            if key in self.given:
                self.given.pop(key)
                self.notes.append(f"{key} has no effect: {reason}")
        for key in REFUSED:
            self.given.pop(key, None)
        deepspeed = self.given.pop("deepspeed", None)
        for key, step in self._steps().items():
            if key in self.given:
                step(self.given.pop(key))
        for key, value in self.given.items():
            self.found.setdefault(RENAMED.get(key, key), value)
        self._defaults()
        if _is_set(deepspeed):
            more, notes = read_deepspeed(self.folder / str(deepspeed), self.found)
            self.found |= more
            self.notes += notes
        self._dtype()
        self._modules_of_a_base_model()

    def _steps(self) -> dict[str, Callable[[Any], None]]:
        """Keys whose value means something else here, in the order in which they matter."""
        return {
            "stage": self._stage,
            "do_train": self._do_train,
            "finetuning_type": lambda value: self.found.update(method=value),
            "use_lora": lambda value: self.found.update(method="lora" if _is_true("use_lora", value) else "full"),
            "q_lora": lambda value: self.found.update({"method": "qlora"} if _is_true("q_lora", value) else {}),
            "quantization_bit": self._quantization_bit,
            "lora_target_modules": self._lora_target,
            "template": self._template,
            "neat_packing": lambda value: self.found.update(
                {"packing": True} if _is_true("neat_packing", value) else {}
            ),
            "bf16": lambda value: self._precision("bf16", "bfloat16", value),
            "fp16": lambda value: self._precision("fp16", "float16", value),
            "pure_bf16": self._pure_bf16,
            "optim": self._optim,
            "max_steps": lambda value: self.found.update({} if int(value) < 0 else {"max_steps": value}),
            "report_to": self._report_to,
            "resume_from_checkpoint": self._resume,
            "evaluation_strategy": self._eval_strategy,
            "eval_strategy": self._eval_strategy,
            "save_strategy": self._save_strategy,
            "disable_gradient_checkpointing": lambda value: self.found.update(
                gradient_checkpointing=not _is_true("disable_gradient_checkpointing", value)
            ),
            "fsdp": lambda value: self.found.update({"parallel": "fsdp"} if _is_set(value) else {}),
            "use_cpu": lambda value: self.found.update({"device": "cpu"} if _is_true("use_cpu", value) else {}),
            "no_cuda": lambda value: self.found.update({"device": "cpu"} if _is_true("no_cuda", value) else {}),
            "pref_loss": self._pref_loss,
        }

    def _stage(self, value: Any) -> None:
        if value == "ppo":
            raise ValueError("stage is 'ppo', but allowed are pt, sft, rm, dpo, kto and orpo")
        self.found["stage"] = value

    def _do_train(self, value: Any) -> None:
        if not _is_true("do_train", value):
            raise ValueError("do_train is false, but `qwenkit train` only trains; `qwenkit eval` measures a model")

    def _quantization_bit(self, value: Any) -> None:
        if not _is_set(value):
            return
        if str(value) != "4":
            raise ValueError(f"quantization_bit is {value!r}, allowed is 4 (NF4)")
        self.found["method"] = "qlora"

    def _lora_target(self, value: Any) -> None:
        names = value if isinstance(value, list) else str(value).replace(",", " ").split()
        self.found["lora_target"] = list(
            dict.fromkeys(target for name in names for target in QWEN1_TARGETS.get(name, (name,)))
        )

    def _template(self, value: Any) -> None:
        name = "default" if value is None else str(value)
        if name not in TEMPLATES and not name.endswith(".jinja"):
            raise ValueError(f"template is {value!r}, allowed are {', '.join(TEMPLATES)} and a .jinja file")
        self.found["template"] = TEMPLATES.get(name, name)
        if name in TEMPLATES and name != "default":
            self.notes.append(
                f"template {name}: a model that has a template keeps its own, the one that it is served with; "
                f"one that has none gets {self.found['template']}"
            )

    def _precision(self, key: str, dtype: str, value: Any) -> None:
        if _is_true(key, value):
            if self.found.get("dtype", dtype) != dtype:
                raise ValueError("bf16 and fp16 are both true, allowed is one of them")
            self.found["dtype"] = dtype

    def _pure_bf16(self, value: Any) -> None:
        if _is_true("pure_bf16", value):
            self.found |= {"dtype": "bfloat16", "master_weights": "stochastic"}

    def _optim(self, value: Any) -> None:
        if value not in OPTIMIZERS:
            raise ValueError(f"optim is {value!r}, allowed are {', '.join(OPTIMIZERS)}")
        self.found["optim"] = OPTIMIZERS[value]

    def _report_to(self, value: Any) -> None:
        names = value if isinstance(value, list) else str(value).split(",")
        self.found["report_to"] = [name for name in names if name not in ("none", "None", "")]

    def _resume(self, value: Any) -> None:
        text = str(value)
        if text.lower() not in _FALSE:
            self.found["resume_from_checkpoint"] = "latest" if text.lower() in _TRUE else text

    def _eval_strategy(self, value: Any) -> None:
        if value is False or value == "no":
            if self.found.get("val_size") or self.given.get("val_size"):
                self.notes.append("eval_strategy is no, but there is a val_size: it is measured with each checkpoint")
            self.given.pop("eval_steps", None)
        elif value != "steps":
            raise ValueError(f"eval_strategy is {value!r}, allowed are no and steps")

    def _save_strategy(self, value: Any) -> None:
        if value is False or value == "no":
            self.given.pop("save_steps", None)
            self.found["save_steps"] = None
        elif value != "steps":
            raise ValueError(f"save_strategy is {value!r}, allowed are no and steps")

    def _pref_loss(self, value: Any) -> None:
        if value == "orpo":
            self.found["stage"] = "orpo"
        elif value == "kto_pair":
            raise ValueError(
                "pref_loss is 'kto_pair', allowed are sigmoid, hinge, ipo, orpo and simpo; stage kto is another"
            )
        else:
            self.found["pref_loss"] = value

    def _defaults(self) -> None:
        """What the other trainer would have done where nothing is said, as far as it differs from our own."""
        name, defaults = (
            ("finetune.py", FINETUNE_DEFAULTS) if self.is_finetune else ("LLaMA-Factory", LLAMAFACTORY_DEFAULTS)
        )
        added = {key: value for key, value in defaults.items() if key not in self.found}
        if self.found.get("method", defaults["method"]) not in ("lora", "qlora"):
            added = {key: value for key, value in added.items() if not key.startswith("lora_")}
        if "lora_rank" in self.found and not self.is_finetune:
            added.pop("lora_alpha", None)
        self.found |= added
        shown = {key: value for key, value in added.items() if key != "dataset_dir"}
        if shown:
            said = ", ".join(f"{key}={_text(value)}" for key, value in shown.items())
            self.notes.append(f"as {name} does where nothing is said: {said}")

    def _dtype(self) -> None:
        if self.found.get("dtype") != "float16" or self.insists:
            return
        kind = self._model_config().get("model_type")
        if kind == "qwen":
            return
        self.found["dtype"] = "bfloat16"
        self.notes.append(
            f"fp16: the activations of {kind or 'Qwen2'} models leave float16's range (a loss of 0 or NaN is known from it), "
            "so bfloat16 is used, as they were trained; dtype=float16 on the command line insists"
        )

    def _modules_of_a_base_model(self) -> None:
        """finetune.py trains embedding and head of models whose name lacks `chat`: base models do not know ChatML's tokens."""
        if not self.is_finetune or self.found.get("method") != "lora" or "modules_to_save" in self.found:
            return
        if "chat" not in str(self.found.get("model", "")).lower():
            self.found["modules_to_save"] = ["embed_tokens", "lm_head"]
            self.notes.append(
                "the model's name lacks 'chat', so embed_tokens and lm_head are trained and saved too, as finetune.py means to; "
                "modules_to_save= leaves them as they are"
            )

    def _model_config(self) -> dict[str, Any]:
        path = self.folder / str(self.found.get("model", "")) / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return config if isinstance(config, dict) else {}


def _is_set(value: Any) -> bool:
    return str(value).strip().lower() not in _FALSE


def _is_true(name: str, value: Any) -> bool:
    text = str(value).strip().lower()
    if text not in (*_TRUE, *_FALSE):
        raise ValueError(f"{name} is {value!r}, allowed is true or false")
    return text in _TRUE


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ",".join(value) if isinstance(value, list) else str(value)
