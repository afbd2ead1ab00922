"""What a model on disk is, whatever its format. In: a folder or a .gguf file. Out: a `Checkpoint`.

A Checkpoint knows the configuration, the tensors (under Hugging Face's names, none of them read yet), the tokenizer, the
way of writing conversations, and where an answer ends. Files of a model folder are data: nothing in them is executed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from qwenkit.errors import FieldError, shorten
from qwenkit.files import has_file, read_json, read_text
from qwenkit.text.chat import ChatFormat, JinjaChat
from qwenkit.text.chat_qwen1 import Qwen1Chat
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.weights import names
from qwenkit.weights.gguf_model import QWEN1_WINDOW, GgufCheckpoint
from qwenkit.weights.gptq_awq import Quantization, with_weights
from qwenkit.weights.safetensors_files import has_safetensors, read_safetensors
from qwenkit.weights.stored import StoredTensor
from qwenkit.weights.torch_files import has_torch_files, read_torch_files

__all__ = ["Checkpoint", "StoredTensor", "open_checkpoint"]

_READ_LATER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "qwen.tiktoken",
    "chat_template.jinja",
)
_MAX_TOKEN_ID = 2**31 - 1


class Checkpoint(Protocol):
    @property
    def path(self) -> Path:
        """The folder or file."""

    @property
    def config(self) -> dict[str, Any]:
        """config.json, or what it would be."""

    @property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json; empty where there is none."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: all that any file of the model names, and those that end one in every Qwen."""

    def tensors(self) -> Iterator[StoredTensor]:
        """Every tensor, named as Hugging Face names it. Reads names and shapes only."""

    def tokenizer(self) -> Tokenizer:
        """Read once, then the same one. ValueError or FileNotFoundError when there is none that can be read."""

    def named_tokens(self) -> dict[str, str]:
        """What a template may call bos_token, eos_token, …"""

    def chat(self) -> ChatFormat | None:
        """How conversations are written for this model; None for one that has no such form."""


def open_checkpoint(path: Path) -> Checkpoint:
    """A model folder or a .gguf file.

    Raises FileNotFoundError when the path, its config.json or a shard is missing, ValueError when a file is corrupt.
    """
    if path.is_dir():
        return FolderCheckpoint.open(path)
    if not has_file(path):
        raise FileNotFoundError(f"{path} does not exist")
    if path.suffix.lower() != ".gguf":
        raise ValueError(f"{path} is neither a model folder nor a .gguf file")
    return GgufCheckpoint.open(path)


@dataclass(frozen=True)
class FolderCheckpoint:
    """A folder as Hugging Face lays it out: config.json, weights in safetensors or torch files, tokenizer files."""

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> FolderCheckpoint:
        if not has_file(path / "config.json"):
            inside = sorted(path.glob("*.gguf"))
            hint = f"; it holds {inside[0].name}, which can be named itself" if inside else ""
            raise FileNotFoundError(f"{path} has no config.json, so it is no model folder{hint}")
        for name in _READ_LATER:
            has_file(path / name)  # refuses what is no regular file now, rather than to pass it over
        generation = path / "generation_config.json"
        return cls(path, read_json(path / "config.json"), read_json(generation) if has_file(generation) else {})

    @property
    def _is_qwen1(self) -> bool:
        return self.config.get("model_type") == "qwen"

    @property
    def _is_qwen1_chat(self) -> bool:
        return self._is_qwen1 and self.generation_config.get("chat_format") != "raw"

    @cached_property
    def _tokenizer_config(self) -> dict[str, Any]:
        path = self.path / "tokenizer_config.json"
        return read_json(path) if has_file(path) else {}

    def tensors(self) -> Iterator[StoredTensor]:
        """See `Checkpoint.tensors`. safetensors are preferred where a folder has both kinds.

        Raises ValueError for a quantization that cannot be read.
        """
        quantization = Quantization.of(self.path, self.config)
        base = "model" if quantization is None else quantization.base
        if has_safetensors(self.path, base):
            stored = read_safetensors(self.path, base)
        elif has_torch_files(self.path):
            stored = read_torch_files(self.path)
        else:
            raise FileNotFoundError(f"{self.path} has no weights: neither model.safetensors nor pytorch_model.bin")
        if quantization is not None:
            stored = with_weights(self.path, stored, quantization)
        translate = names.from_qwen1 if self._is_qwen1 else names.from_hugging_face
        for tensor in stored:
            for part in translate(tensor.name):
                yield names.apply(part, tensor)

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.path)

    def chat(self) -> ChatFormat | None:
        """The template of chat_template.jinja or tokenizer_config.json; Qwen-1, which has none, its own ChatML.

        Raises ValueError naming the file when the template has an unknown form.
        """
        template = self._template()
        if template is not None:
            return JinjaChat(self.tokenizer(), template, variables=self.named_tokens())
        if not self._is_qwen1_chat:
            return None
        window = self.generation_config.get("max_window_size", QWEN1_WINDOW)
        if type(window) is not int or not 1 <= window <= _MAX_TOKEN_ID:
            where = self.path / "generation_config.json"
            raise FieldError("max_window_size", window, "a whole number of at least 1", source=where)
        return Qwen1Chat(self.tokenizer(), max_window_size=window)

    def named_tokens(self) -> dict[str, str]:
        named = {key: _content(value) for key, value in self._tokenizer_config.items() if key.endswith("_token")}
        return {key: value for key, value in named.items() if isinstance(value, str)}

    def _template(self) -> str | None:
        path = self.path / "chat_template.jinja"
        if has_file(path):
            return read_text(path)
        where = self.path / "tokenizer_config.json"
        template = self._tokenizer_config.get("chat_template")
        if isinstance(template, list):
            named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
            if "default" not in named:
                raise ValueError(f"{where}: chat_template lists {sorted(map(str, named))}, but none is named 'default'")
            template = named["default"]
        if template is not None and not isinstance(template, str):
            raise ValueError(f"{where}: chat_template must be a string or a list of named templates")
        return template

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """See `Checkpoint.eos_token_ids`: those of generation_config.json, config.json, tokenizer_config.json, and
        `Tokenizer.end_ids`, in this order."""
        ids = _token_ids(self.path / "generation_config.json", self.generation_config)
        ids += _token_ids(self.path / "config.json", self.config)
        try:
            tokenizer = self.tokenizer()
        except FileNotFoundError:  # such a folder is run with prompts of ids
            return tuple(dict.fromkeys(ids))
        named = _content(self._tokenizer_config.get("eos_token"))
        token = tokenizer.token_id(named) if isinstance(named, str) else None
        ids += () if token is None else (token,)
        return tuple(dict.fromkeys(ids + tokenizer.end_ids()))


def _content(token: Any) -> Any:
    """tokenizer_config.json writes a token as its text, or as an object with the text in "content"."""
    return token.get("content") if isinstance(token, dict) else token


def _token_ids(path: Path, config: dict[str, Any]) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and 0 <= token <= _MAX_TOKEN_ID for token in ids):
        raise ValueError(f"{path}: eos_token_id must be a token id or a list of them, found {shorten(value)}")
    return tuple(ids)
