"""Configurations of other trainers, run unchanged: LLaMA-Factory's YAML files, and the flags of Qwen's finetune.py.

In: decoded keys of a file, of words and of flags. They are merged first and translated once; then DeepSpeed's file is compared,
and the other trainer's defaults fill in what nobody said. Out: settings of TrainConfig, and notes for the user. What cannot be
honoured is refused by name. Keys that nobody knows are left for TrainConfig to refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qwenkit.compat.deepspeed import read_deepspeed
from qwenkit.compat.keys import FALSE, TRUE
from qwenkit.compat.mindformers import refuse_mindformers
from qwenkit.compat.sources import merge
from qwenkit.compat.table import TABLE
from qwenkit.compat.values import (
    FINETUNE_DEFAULTS,
    LLAMAFACTORY_DEFAULTS,
    OPTIMIZERS,
    TEMPLATES,
    known_reporters,
    one_adapter,
    translate_schedule,
)
from qwenkit.files import read_json
from qwenkit.train.config import CHOICES, REPORTERS, TrainConfig

_OURS = {field.name: field.default for field in fields(TrainConfig)}
_FOREIGN = ("model_name_or_path", "finetuning_type", "do_train", "do_eval", "do_predict", "data_path")


@dataclass(frozen=True)
class Translation:
    """Settings for `TrainConfig.from_settings`, and what the user should know about them."""

    settings: dict[str, Any]
    notes: list[str]


def is_foreign(settings: Mapping[str, Any]) -> bool:
    """True for a configuration of another trainer: it names the model, the method or the data as only they do."""
    return any(key in settings for key in _FOREIGN)


def translate(*sources: Mapping[str, Any], folder: Path = Path(), processes: int = 1) -> Translation:
    """Merge `sources` (later ones win) and translate keys and values.

    Values of other trainers are understood in every configuration; their defaults hold only in theirs (`is_foreign`). Paths are
    relative to `folder`, where the command runs; `processes` is how many take part. Raises ValueError, one sentence, for a key
    that asks for what qwenkit does not do.
    """
    given = [key for source in sources for key in source]
    merged = merge(sources)
    refuse_mindformers(merged)
    defaults: Mapping[str, Any] = {}
    trainer = ""
    if "data_path" in given:
        trainer, defaults = "finetune.py", FINETUNE_DEFAULTS
    elif any(key in _FOREIGN for key in given):
        trainer, defaults = "LLaMA-Factory", LLAMAFACTORY_DEFAULTS
    work = _Translator(merged, folder, processes, trainer, defaults)
    work.run()
    return Translation(work.found, work.notes)


class _Translator:
    """One translation: what was given, what it means, and what is to be said."""

    def __init__(
        self, given: dict[str, Any], folder: Path, processes: int, trainer: str, defaults: Mapping[str, Any]
    ) -> None:
        self.given, self.folder, self.processes = given, folder, processes
        self.trainer, self.defaults = trainer, defaults
        self.found: dict[str, Any] = {}
        self.notes: list[str] = []

    def run(self) -> None:
        self._check_verb()
        self._pass_over()
        deepspeed = self.given.pop("deepspeed", None)
        for key, step in self._steps().items():
            if key in self.given:
                step(self.given.pop(key))
        for key, value in self.given.items():
            if value is None and self.trainer and _OURS.get(key) is not None:
                continue  # null is a default
            self._put(key, value)
        self._schedule()
        if _is_set(deepspeed):
            more, notes = read_deepspeed(deepspeed, self.folder, self.found, self.defaults, self.processes)
            self.found |= more
            self.notes += notes
        self._fill_defaults()
        self._pair_within_micro_batches()
        self._dtype()
        self._modules_of_a_base_model()

    def _put(self, name: str, value: Any) -> None:
        if name in self.found and str(self.found[name]) != str(value):
            raise ValueError(f"{name} is {value!r}, but other keys say {self.found[name]!r}; give one of them")
        self.found[name] = value

    def _check_verb(self) -> None:
        """Raise ValueError for a file of another verb: there, without do_train, nothing is trained."""
        verbs = {
            "do_train": "",
            "do_predict": "`qwenkit generate` answers a file of prompts",
            "do_eval": "`qwenkit eval` measures a model",
        }
        given = {key: self.given.pop(key, None) for key in verbs}
        wanted = {key: _is_true(key, value) for key, value in given.items() if value is not None}
        if wanted.get("do_train") is False:
            raise ValueError("do_train is false, but `qwenkit train` only trains; `qwenkit eval` measures a model")
        for key, instead in verbs.items():
            if key != "do_train" and wanted.get(key):
                if "do_train" not in wanted:
                    raise ValueError(f"{key} is true and do_train is not given, so nothing is to be trained; {instead}")
                if key == "do_predict":
                    self.notes.append(f"{key} has no effect: {instead}")
        if _is_set(self.given.get("export_dir")) and "do_train" not in wanted and self.trainer:
            raise ValueError("export_dir is given and do_train is not: `qwenkit export` takes this file")

    def _pass_over(self) -> None:
        """Take out keys that are neutral, note those without effect, refuse those that would change what is learned."""
        passed: dict[str, list[str]] = {}
        for key in list(self.given):
            entry = TABLE.get(key)
            if entry is None or entry.kind == "translated" or (key in _OURS and not self.trainer):
                continue
            value = self.given.pop(key)
            if entry.kind == "neutral" or entry.is_neutral(value):
                continue
            if entry.kind == "refused":
                raise ValueError(f"{key} is {value!r}, but {entry.text}")
            passed.setdefault(entry.text, []).append(key)
        for reason, keys in passed.items():
            self.notes.append(f"{', '.join(keys)} ha{'s' if len(keys) == 1 else 've'} no effect: {reason}")

    def _steps(self) -> dict[str, Callable[[Any], None]]:
        """Keys whose value means something else here, in the order in which they matter."""
        return {
            "stage": self._stage,
            "finetuning_type": self._finetuning_type,
            "use_lora": lambda value: self._put("method", "lora" if _is_true("use_lora", value) else "full"),
            "q_lora": lambda value: self.found.update({"method": "qlora"} if _is_true("q_lora", value) else {}),
            "quantization_bit": self._quantization_bit,
            "lora_target_modules": self._lora_target_modules,
            "template": self._template,
            "neat_packing": lambda value: self._if_true("neat_packing", value, packing=True),
            "bf16": lambda value: self._precision("bf16", "bfloat16", value),
            "fp16": lambda value: self._precision("fp16", "float16", value),
            "pure_bf16": self._pure_bf16,
            "optim": self._optim,
            "max_steps": lambda value: self._above_zero("max_steps", value),
            "save_total_limit": lambda value: self._above_zero("save_total_limit", value),
            "report_to": self._report_to,
            "use_swanlab": self._use_swanlab,
            "resume_from_checkpoint": self._resume,
            "eval_strategy": self._eval_strategy,
            "save_strategy": self._save_strategy,
            "disable_gradient_checkpointing": lambda value: self._put(
                "gradient_checkpointing", not _is_true("disable_gradient_checkpointing", value)
            ),
            "disable_shuffling": lambda value: self._if_true("disable_shuffling", value, shuffle=False),
            "train_sampling_strategy": self._sampling,
            "fsdp": lambda value: self.found.update({"parallel": "fsdp"} if _is_set(value) else {}),
            "use_cpu": lambda value: self._if_true("use_cpu", value, device="cpu"),
            "no_cuda": lambda value: self._if_true("no_cuda", value, device="cpu"),
            "pref_loss": self._pref_loss,
            "adapter_name_or_path": self._adapter,
            "adapter": self._adapter,
            "enable_thinking": lambda value: self._put("enable_thinking", value),
            "split_special_tokens": lambda value: self._put("split_special_tokens", value),
        }

    def _if_true(self, key: str, value: Any, **settings: Any) -> None:
        if _is_true(key, value):
            for name, each in settings.items():
                self._put(name, each)

    def _stage(self, value: Any) -> None:
        if value == "ppo":
            raise ValueError("stage is 'ppo', but allowed are pt, sft, rm, dpo, kto and orpo")
        if value is not None:
            self._put("stage", value)

    def _finetuning_type(self, value: Any) -> None:
        if value is None:
            return
        if value not in CHOICES["method"]:
            raise ValueError(f"finetuning_type is {value!r}, allowed are lora, freeze and full")
        self._put("method", value)

    def _quantization_bit(self, value: Any) -> None:
        if not _is_set(value):
            return
        if str(value) != "4":
            raise ValueError(f"quantization_bit is {value!r}, allowed is 4 (NF4)")
        if self.found.get("method", "lora") not in ("lora", "qlora"):
            raise ValueError(f"quantization_bit is 4, but finetuning_type is {self.found['method']!r}; allowed is lora")
        self.found["method"] = "qlora"

    def _lora_target_modules(self, value: Any) -> None:
        names = value if isinstance(value, list) else str(value).replace(",", " ").split()
        self._put("lora_target", list(dict.fromkeys(names)))

    def _template(self, value: Any) -> None:
        name = "default" if value is None else str(value)
        self._put("template", TEMPLATES.get(name, name))
        if name != "default" and not name.endswith(".jinja") and self.trainer:
            none = f"gets {TEMPLATES[name]}" if name in TEMPLATES else f"needs one of {', '.join(TEMPLATES)}"
            self.notes.append(
                f"template {name}: a model that has a template keeps its own, the one that it is served with; "
                f"one that has none {none}"
            )

    def _precision(self, key: str, dtype: str, value: Any) -> None:
        if _is_true(key, value):
            if self.found.get("dtype", dtype) != dtype:
                raise ValueError("bf16 and fp16 are both true, allowed is one of them")
            self.found["dtype"] = dtype

    def _pure_bf16(self, value: Any) -> None:
        self._if_true("pure_bf16", value, dtype="bfloat16", master_weights="stochastic")

    def _optim(self, value: Any) -> None:
        if value is None:
            return
        if value not in OPTIMIZERS:
            raise ValueError(f"optim is {value!r}, allowed are {', '.join(OPTIMIZERS)}")
        self._put("optim", OPTIMIZERS[value])
        if value.startswith("paged"):
            self.notes.append(f"optim {value}: {OPTIMIZERS[value]} is used, whose states stay on the device")

    def _above_zero(self, name: str, value: Any) -> None:
        """A number of which the other trainer's -1 and 0 say that there is none."""
        try:
            if value is None or float(value) <= 0:
                return
        except (TypeError, ValueError):
            pass  # TrainConfig says what is allowed
        self._put(name, value)

    def _report_to(self, value: Any) -> None:
        kept, unknown = known_reporters(value, tolerant=bool(self.trainer))
        if unknown:
            said = ", ".join(unknown)
            self.notes.append(
                f"report_to {said} has no effect: allowed are {', '.join(REPORTERS)}; output_dir has a log"
            )
        self._put("report_to", kept)

    def _use_swanlab(self, value: Any) -> None:
        if _is_true("use_swanlab", value):
            self.found["report_to"] = [*self.found.get("report_to", []), "swanlab"]

    def _resume(self, value: Any) -> None:
        text = str(value)
        if text.lower() not in FALSE:
            self._put("resume_from_checkpoint", "latest" if text.lower() in TRUE else text)

    def _eval_strategy(self, value: Any) -> None:
        name = _strategy("eval_strategy", value)
        self._put("eval_strategy", name)
        if name == "no":
            self.given.pop("eval_steps", None)
            if self.given.get("val_size"):
                self.notes.append("eval_strategy is no, but there is a val_size: it is measured at the end")

    def _save_strategy(self, value: Any) -> None:
        self._put("save_strategy", _strategy("save_strategy", value))

    def _sampling(self, value: Any) -> None:
        if value not in (None, "random", "sequential", "group_by_length"):
            raise ValueError(
                f"train_sampling_strategy is {value!r}, allowed are random, sequential and group_by_length"
            )
        if value == "sequential":
            self._put("shuffle", False)

    def _pref_loss(self, value: Any) -> None:
        if value == "orpo":
            if self.found.get("stage", "dpo") not in ("dpo", "orpo"):
                raise ValueError(f"pref_loss is 'orpo', but stage is {self.found['stage']!r}; allowed is dpo")
            self.found["stage"] = "orpo"
        elif value == "kto_pair":
            raise ValueError(
                "pref_loss is 'kto_pair', allowed are sigmoid, hinge, ipo, orpo and simpo; stage kto is another"
            )
        elif value is not None:
            self._put("pref_loss", value)

    def _adapter(self, value: Any) -> None:
        if (adapter := one_adapter(value)) is not None:
            self._put("adapter", adapter)

    def _schedule(self) -> None:
        kind, arguments = self.found.get("lr_scheduler_type"), self.found.pop("lr_scheduler_kwargs", None)
        if kind is None and not arguments:
            return
        kind = kind or self.defaults.get("lr_scheduler_type", _OURS["lr_scheduler_type"])
        rate = float(self.found.get("learning_rate", _OURS["learning_rate"]))
        steps = self.found.get("max_steps")
        self.found |= translate_schedule(str(kind), arguments, rate, None if steps is None else int(steps))

    def _fill_defaults(self) -> None:
        """What the other trainer would have done where nothing is said, as far as it differs from our own."""
        added = {key: value for key, value in self.defaults.items() if key not in self.found}
        if self.found.get("method", self.defaults.get("method")) not in ("lora", "qlora"):
            added = {key: value for key, value in added.items() if not key.startswith("lora_")}
        if self.trainer == "LLaMA-Factory" and "lora_rank" in self.found:
            added.pop("lora_alpha", None)
        if self.trainer and self.found.get("eval_strategy") == "steps" and self.found.get("eval_steps") is None:
            added["eval_steps"] = self.found.get("logging_steps", added.get("logging_steps"))
        self.found |= added
        shown = {key: value for key, value in added.items() if key != "dataset_dir"}
        if shown:
            said = ", ".join(f"{key}={_text(value)}" for key, value in shown.items())
            self.notes.append(f"as {self.trainer} does where nothing is said: {said}")
        if "overlong" in added and self.trainer == "LLaMA-Factory":
            self.notes.append(
                "overlong=truncate cuts the end of a long sample, and one whose prompt fills cutoff_len is dropped with a "
                "count, where LLaMA-Factory cuts prompt and answer in proportion"
            )

    def _pair_within_micro_batches(self) -> None:
        """kto compares answers of one micro-batch: one of a single sample takes in others of the same step."""
        size, steps = (self.found.get(key, 1) for key in ("per_device_train_batch_size", "gradient_accumulation_steps"))
        if self.found.get("stage") != "kto" or str(size) != "1" or not str(steps).isdigit() or int(steps) < 2:
            return
        if "per_device_train_batch_size" not in self.found:
            return
        size = next(factor for factor in range(2, int(steps) + 1) if int(steps) % factor == 0)
        self.found |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": int(steps) // size}
        self.notes.append(
            f"kto compares answers within a micro-batch, so 1 sample, {steps} times a step, is run as {size} samples, "
            f"{int(steps) // size} times: the same step"
        )

    def _dtype(self) -> None:
        if self.found.get("dtype") != "float16" or "dtype" in self.given:  # our own name: whoever wrote it insists
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
        if self.trainer != "finetune.py" or self.found.get("method") != "lora" or "modules_to_save" in self.found:
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
            return read_json(path)
        except (OSError, ValueError):
            return {}


def _strategy(key: str, value: Any) -> str:
    """YAML reads a bare `no` as false."""
    name = "no" if value is False or value is None else str(value).strip().lower()
    if name not in CHOICES[key]:
        raise ValueError(f"{key} is {value!r}, allowed are {', '.join(CHOICES[key])}")
    return name


def _is_set(value: Any) -> bool:
    return str(value).strip().lower() not in FALSE


def _is_true(name: str, value: Any) -> bool:
    text = str(value).strip().lower()
    if text not in (*TRUE, *FALSE):
        raise ValueError(f"{name} is {value!r}, allowed is true or false")
    return text in TRUE


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
