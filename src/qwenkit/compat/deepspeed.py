"""DeepSpeed's configuration files, read as what they mean for our own sharding. DeepSpeed itself is never run.

In: the JSON file, what the command line or the YAML said, and the other trainer's defaults. Out: settings of TrainConfig and a
sentence for each thing that has no effect here. Every number in the file is taken over, compared (transformers refuses the same
contradictions), or named in a note.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenkit.files import read_text

_ZERO_KEYS = ("stage", "offload_optimizer", "offload_param")
_BETAS = ("adam_beta1", "adam_beta2")
# The file's key, and the setting that must agree with it.
_SAME = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}
_OF_ADAM = {"lr": "learning_rate", "eps": "adam_epsilon", "weight_decay": "weight_decay"}
_OF_SCHEDULE = {"warmup_max_lr": "learning_rate", "warmup_num_steps": "warmup_steps", "total_num_steps": "max_steps"}
# Sections that change what is learned, where they are switched on.
_REFUSED = {
    "curriculum_learning": "a curriculum",
    "data_efficiency": "data sampling",
    "compression_training": "compression",
    "progressive_layer_drop": "layer dropping",
    "quantize_training": "quantized training",
    "sparse_attention": "sparse attention",
}
_READ = {
    *_SAME,
    *_REFUSED,
    "zero_optimization",
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
    "bfloat16",
    "train_batch_size",
}


def read_deepspeed(
    value: Any, folder: Path, said: Mapping[str, Any], defaults: Mapping[str, Any], processes: int
) -> tuple[dict[str, Any], list[str]]:
    """Settings that follow from a DeepSpeed configuration, and notes.

    value: a path relative to `folder`, or the configuration itself; said: settings of TrainConfig that somebody wrote; defaults:
    what holds for those that nobody did. ZeRO 0 copies the model (ddp). ZeRO 1 and 2 share optimizer states and gradients: for
    adapters, whose states are small, that is ddp, else fsdp. ZeRO 3 shares weights too: fsdp. Raises FileNotFoundError, and
    ValueError for a file that cannot be read, says what is not done here, or contradicts `said`.
    """
    config, where = _open(value, folder)
    return _Reader(config, where, said, defaults, processes).read()


def _open(value: Any, folder: Path) -> tuple[dict[str, Any], str]:
    where = "the configuration"
    text = str(value)
    if not isinstance(value, Mapping):
        if not text.lstrip().startswith("{"):
            where = str(folder / text)
            text = read_text(folder / text)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"deepspeed: {where} is no JSON: {error}") from None
    if not isinstance(value, Mapping):
        raise ValueError(f"deepspeed: {where} is no JSON object")
    return dict(value), where


class _Reader:
    def __init__(
        self, config: dict[str, Any], where: str, said: Mapping[str, Any], defaults: Mapping[str, Any], processes: int
    ) -> None:
        self.config, self.where, self.said, self.defaults = config, where, said, defaults
        self.processes = processes
        self._from_batch = False
        self.found: dict[str, Any] = {}
        self.notes: list[str] = []

    def read(self) -> tuple[dict[str, Any], list[str]]:
        self._zero()
        for key, setting in _SAME.items():
            self._same(key, self.config.get(key), setting)
        self._batch()
        self._precision()
        self._optimizer()
        self._scheduler()
        for key, what in _REFUSED.items():
            section = self._section(key)
            if section.get("enabled", bool(section)):
                raise ValueError(f"deepspeed: {self.where}: {key} is given, but {what} is not supported")
        taken = {key: value for key, value in self.found.items() if key not in ("parallel", "dtype")}
        if taken:
            batch = f" (train_batch_size {self.config['train_batch_size']})" if self._from_batch else ""
            said = ", ".join(f"{key}={value}" for key, value in taken.items())
            self.notes.append(f"deepspeed: nothing else says {said}, so the file does{batch}")
        rest = [key for key, value in self.config.items() if key not in _READ and value not in (None, False, "auto")]
        if rest:
            self.notes.append(f"deepspeed: {', '.join(rest)} ha{_s(rest)} no effect: DeepSpeed itself is not used")
        return self.found, self.notes

    def _zero(self) -> None:
        zero = self.config.get("zero_optimization", {})
        stage = zero.get("stage", 0) if isinstance(zero, dict) else None
        if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
            raise ValueError(f"deepspeed: {self.where}: zero_optimization.stage is {stage!r}, allowed are 0, 1, 2, 3")
        if "parallel" not in self.said:
            method = self.said.get("method", self.defaults.get("method"))
            shares = stage == 3 or (stage > 0 and method in ("full", "freeze"))
            self.found["parallel"] = "fsdp" if shares else "ddp"
        parallel = self.said.get("parallel", self.found.get("parallel"))
        self.notes.append(f"deepspeed: ZeRO {stage} is run as parallel={parallel}; DeepSpeed itself is not used")
        for name in ("offload_optimizer", "offload_param"):
            section = zero.get(name) if isinstance(zero.get(name), dict) else {}
            device = section.get("device", "none")
            if device not in ("none", None):
                self.notes.append(f"deepspeed: {name} to {device} has no effect: everything stays on the device")
        rest = [key for key, value in zero.items() if key not in _ZERO_KEYS and value not in (None, False, "auto")]
        if rest:
            self.notes.append(
                f"deepspeed: zero_optimization's {', '.join(rest)} ha{_s(rest)} no effect: qwenkit lays its own buffers out"
            )

    def _same(self, key: str, value: Any, setting: str) -> None:
        """Take a number over, or compare it with what was said."""
        if value is None or value == "auto":
            return
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"deepspeed: {self.where}: {key} is {value!r}, allowed is a number or auto")
        if self.said.get(setting) is None:
            self.found[setting] = value
        elif not _equal(self.said[setting], value):
            raise ValueError(f"deepspeed: {self.where} says {key} {value}, but {setting} is {self.said[setting]}")

    def _batch(self) -> None:
        whole = self.config.get("train_batch_size")
        if whole is None or whole == "auto":
            return
        if type(whole) is not int or whole < 1:
            raise ValueError(
                f"deepspeed: {self.where}: train_batch_size is {whole!r}, allowed is a whole number or auto"
            )
        size, steps = (
            self.said.get(key, self.found.get(key))
            for key in ("per_device_train_batch_size", "gradient_accumulation_steps")
        )
        if steps is None:
            size = self.defaults.get("per_device_train_batch_size", 8) if size is None else size
            steps = whole / (int(size) * self.processes)
            if steps.is_integer():
                self.found["gradient_accumulation_steps"] = int(steps)
                self._from_batch = True
        elif size is None:
            size = whole / (int(steps) * self.processes)
            if size.is_integer():
                self.found["per_device_train_batch_size"] = int(size)
                self._from_batch = True
        if float(size) * float(steps) * self.processes != whole or not float(steps).is_integer():
            raise ValueError(
                f"deepspeed: {self.where} says train_batch_size {whole}, but a step has {_number(size)} samples of "
                f"per_device_train_batch_size, gradient_accumulation_steps {_number(steps)} and {self.processes} process(es)"
            )

    def _precision(self) -> None:
        rest = []
        for names, dtype in ((("bf16", "bfloat16"), "bfloat16"), (("fp16",), "float16")):
            for name in names:
                section = self._section(name)
                rest += [f"{name}.{key}" for key in section if key not in ("enabled", "loss_scale")]
                if section.get("loss_scale", 0) not in (0, "auto"):
                    rest.append(f"{name}.loss_scale")
                if section.get("enabled") is True:
                    if self.said.get("dtype", dtype) not in (dtype, "auto"):
                        raise ValueError(f"deepspeed: {self.where} enables {name}, but dtype is {self.said['dtype']}")
                    self.found["dtype"] = dtype
        if rest and "dtype" in self.found:
            self.notes.append(
                f"deepspeed: {', '.join(rest)} ha{_s(rest)} no effect: float16's loss is scaled by itself"
            )

    def _optimizer(self) -> None:
        section = self._section("optimizer")
        kind = section.get("type", "AdamW")
        if kind not in ("AdamW", "Adam"):
            raise ValueError(f"deepspeed: {self.where}: optimizer.type is {kind!r}, allowed is AdamW")
        given = section.get("params")
        params = given if isinstance(given, dict) else {}
        for key, setting in _OF_ADAM.items():
            self._same(f"optimizer.params.{key}", params.get(key), setting)
        betas = params.get("betas")
        if isinstance(betas, list) and len(betas) == 2:
            for value, setting in zip(betas, _BETAS, strict=True):
                self._same("optimizer.params.betas", value, setting)
        elif betas not in (None, "auto"):
            raise ValueError(f"deepspeed: {self.where}: optimizer.params.betas is {betas!r}, allowed are two numbers")
        if params.get("adam_w_mode") is False:
            raise ValueError(f"deepspeed: {self.where}: optimizer.params.adam_w_mode is false, allowed is AdamW")
        rest = [key for key in params if key not in (*_OF_ADAM, "betas", "torch_adam", "adam_w_mode")]
        if rest:
            self.notes.append(
                f"deepspeed: optimizer.params' {', '.join(rest)} ha{_s(rest)} no effect: AdamW is qwenkit's own"
            )

    def _scheduler(self) -> None:
        if "scheduler" not in self.config:
            return
        section = self._section("scheduler")
        given = section.get("params")
        params = given if isinstance(given, dict) else {}
        for key, setting in _OF_SCHEDULE.items():
            value = params.get(key)
            if value in (None, "auto"):
                continue
            if self.said.get(setting) is not None and not _equal(self.said[setting], value):
                raise ValueError(
                    f"deepspeed: {self.where} says scheduler.params.{key} {value}, but {setting} is {self.said[setting]}"
                )
        numbers = ", ".join(f"{key} {value}" for key, value in params.items() if value != "auto")
        self.notes.append(
            f"deepspeed: the scheduler {section.get('type')}{f' ({numbers})' if numbers else ''} has no effect: "
            "lr_scheduler_type and warm-up are the settings'"
        )

    def _section(self, name: str) -> Mapping[str, Any]:
        section = self.config.get(name, {})
        return section if isinstance(section, dict) else {}


def _equal(said: Any, value: Any) -> bool:
    try:
        return float(said) == float(value)
    except (TypeError, ValueError):
        return False


def _number(value: Any) -> str:
    return f"{float(value):g}"


def _s(names: list[str]) -> str:
    return "s" if len(names) == 1 else "ve"
