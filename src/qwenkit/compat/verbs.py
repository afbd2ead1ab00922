"""LLaMA-Factory's files for export, chat and api, as settings of `qwenkit export`, `chat` and `serve`.

In: decoded keys of a YAML file; there one parser reads all of them, so a training file with one key more is such a file too. Out:
settings of the verb and notes. Keys of training say nothing here; those that change the model's own arithmetic are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenkit.compat.keys import FALSE, TRUE
from qwenkit.compat.llamafactory_keys import MODEL
from qwenkit.compat.mindformers import refuse_mindformers
from qwenkit.compat.sources import fill_variables
from qwenkit.compat.table import TABLE
from qwenkit.compat.values import TEMPLATES
from qwenkit.settings import nearest
from qwenkit.train.settings_file import read_settings

EXPORT_KEYS = {
    "model_name_or_path": "model",
    "adapter_name_or_path": "adapter",
    "export_dir": "output",
    "export_size": "shard_size",
    "export_device": "device",
    "export_legacy_format": "legacy",
    "export_quantization_bit": "quantize",
    "export_quantization_dataset": "data",
    "export_quantization_nsamples": "samples",
    "export_quantization_maxlen": "length",
    "infer_dtype": "dtype",
    "template": "template",
}
_EXPORT_REFUSED = {
    "export_hub_model_id": "nothing is uploaded; use huggingface_hub's `hf upload` with the exported folder",
    "quantization_bit": "adapters are merged into float weights: leave it out",
}
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "max_new_tokens": "max_tokens",
    "repetition_penalty": "repetition_penalty",
}
_WITHOUT_EFFECT = {
    "infer_backend": "qwenkit runs the model itself",
    "quantization_bit": "--weights int4 or int8 keeps weights in few bits on a CPU",
    "vllm_maxlen": "the context is the model's own; --max-model-len makes it shorter",
    "sglang_maxlen": "the context is the model's own; --max-model-len makes it shorter",
    "vllm_gpu_util": "--kv-memory says how much memory keys and values get",
    "sglang_mem_fraction": "--kv-memory says how much memory keys and values get",
    "length_penalty": "answers are not searched by beams",
    "num_beams": "answers are not searched by beams",
    "max_length": "max_new_tokens is the length of an answer",
}
_NEUTRAL = {"infer_backend": "huggingface", "length_penalty": 1, "num_beams": 1}


@dataclass(frozen=True)
class Inference:
    """A file of chat or api: the model, one adapter, and what the verb's flags would say."""

    model: str
    adapter: str | None = None
    template: str = "default"
    system: str | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    """Settings of EngineConfig."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """Settings of SamplingParams."""
    variables: dict[str, Any] = field(default_factory=dict)
    """For the chat template."""
    notes: tuple[str, ...] = ()


def is_settings_file(name: str | None) -> bool:
    """True for a word that names a YAML or JSON file where a model could stand."""
    return name is not None and name.lower().endswith((".yaml", ".yml", ".json")) and Path(name).is_file()


def read_inference(path: Path) -> Inference:
    """A file of LLaMA-Factory's chat, webchat and api.

    Raises ValueError, one sentence that names the file, for a key that nobody knows or that asks for what is not done here.
    """
    given = _open(path, "chat or serve", ("model",))
    notes = []
    for key, reason in _WITHOUT_EFFECT.items():
        value = given.get(key)
        if not _is_neutral(value) and str(value) not in (str(_NEUTRAL.get(key)), "EngineName.HF", "hf"):
            notes.append(f"{key} has no effect: {reason}")
    sampling = {ours: given[key] for key, ours in _SAMPLING.items() if given.get(key) is not None}
    if str(given.get("do_sample", True)).lower() in FALSE:
        sampling["temperature"] = 0.0
    adapters = _adapters(path, given.get("adapter_name_or_path"))
    if len(adapters) > 1:
        raise ValueError(
            f"{path}: adapter_name_or_path names {len(adapters)} adapters, allowed is one; `qwenkit export` merges several"
        )
    model = given.get("model_name_or_path", given.get("model"))
    if not isinstance(model, str) or not model:
        raise ValueError(f"{path} has no model_name_or_path, which says what to run")
    dtype = given.get("infer_dtype")
    thinking = given.get("enable_thinking")
    return Inference(
        model,
        adapters[0] if adapters else None,
        _template(given),
        None if given.get("default_system") is None else str(given["default_system"]),
        {} if dtype in (None, "auto") else {"dtype": dtype},
        _numbers(path, sampling),
        {} if thinking is None else {"enable_thinking": str(thinking).lower() in TRUE},
        tuple(notes),
    )


def read_export(path: Path, own: Iterable[str]) -> dict[str, Any]:
    """A file of LLaMA-Factory's export, or one with our flags' names (`own`) as keys, as settings of `qwenkit export`.

    Raises ValueError as `read_inference` does.
    """
    given = _open(path, "export", own)
    for key, reason in _EXPORT_REFUSED.items():
        if not _is_neutral(given.get(key)):
            raise ValueError(f"{path}: {key} is {given[key]!r}, which export does not do: {reason}")
    settings = {EXPORT_KEYS.get(key, key): value for key, value in given.items() if key in EXPORT_KEYS or key in own}
    settings["adapter"] = _adapters(path, settings.get("adapter"))
    if settings.get("template") is not None:
        settings["template"] = _template(settings)
    if not isinstance(settings.get("legacy", False), bool):
        raise ValueError(f"{path}: export_legacy_format is {settings['legacy']!r}, allowed are true and false")
    return settings


def _open(path: Path, verb: str, own: Iterable[str]) -> dict[str, Any]:
    """The file's keys, `${…}` filled in, without those at null; only keys that are known."""
    given = fill_variables(read_settings(path))
    refuse_mindformers({key: value for key, value in given.items() if key != "model" or not isinstance(value, str)})
    known = {*TABLE, *own}
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{path}: {key} is not a setting of {verb}; {_near(key, known)}")
        entry = MODEL.get(key)
        if entry is not None and entry.kind == "refused" and not entry.is_neutral(value):
            raise ValueError(f"{path}: {key} is {value!r}, but {entry.text}")
    return {key: value for key, value in given.items() if value is not None}


def _near(key: str, known: Iterable[str]) -> str:
    said = nearest(key, known)
    return said if said.startswith("did you mean") else "docs/train.md lists the keys of LLaMA-Factory"


def _is_neutral(value: Any) -> bool:
    return str(value).strip().lower() in FALSE


def _template(given: Mapping[str, Any]) -> str:
    name = str(given.get("template", "default"))
    return TEMPLATES.get(name, name)


def _adapters(path: Path, value: Any) -> tuple[str, ...]:
    adapters = value or ()
    if isinstance(adapters, str):
        adapters = [name.strip() for name in adapters.split(",") if name.strip()]
    if not isinstance(adapters, list | tuple) or not all(isinstance(name, str) for name in adapters):
        raise ValueError(f"{path}: adapter is {adapters!r}, allowed is a folder or a list of folders")
    return tuple(adapters)


def _numbers(path: Path, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, as YAML writes them or as texts such as 1e-1."""
    found: dict[str, Any] = {}
    for name, value in sampling.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{path}: {name} is {value!r}, allowed is a number") from None
        found[name] = int(number) if name in ("top_k", "max_tokens") else number
    return found
