"""A checkpoint with another chat template: a base model that learns to converse, or one that shall be spoken to differently.

In: any checkpoint, and what the user calls the template. Out: the same checkpoint, which renders with it; where it is saved, the
template is saved too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwenkit.files import has_file, read_text
from qwenkit.text.chat import ChatFormat, JinjaChat
from qwenkit.text.chatml import NAMED
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.weights.checkpoint import Checkpoint
from qwenkit.weights.stored import StoredTensor

OWN = "default"
_END = "<|im_end|>"


class Templated:
    """A `Checkpoint` whose conversations are written by `template`, the text of a Jinja template."""

    def __init__(self, inner: Checkpoint, template: str) -> None:
        self.inner = inner
        self.template = template
        self.path: Path = inner.path
        self.config: dict[str, Any] = inner.config
        self.generation_config: dict[str, Any] = inner.generation_config
        if self.is_chatml and inner.config.get("model_type") == "qwen":
            self.generation_config = inner.generation_config | {"chat_format": "chatml"}

    @property
    def is_chatml(self) -> bool:
        return _END in self.template

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The checkpoint's own, and before them the token that ends an answer of this template."""
        end = self.tokenizer().token_id(_END) if self.is_chatml else None
        return tuple(dict.fromkeys(((end,) if end is not None else ()) + self.inner.eos_token_ids))

    def tensors(self) -> Iterator[StoredTensor]:
        return self.inner.tensors()

    def tokenizer(self) -> Tokenizer:
        return self.inner.tokenizer()

    def named_tokens(self) -> dict[str, str]:
        return self.inner.named_tokens()

    def chat(self) -> ChatFormat:
        """ValueError where the template needs control tokens that the vocabulary lacks, or is none."""
        missing = [token for token in ("<|im_start|>", _END) if token in self.template and not self._has(token)]
        if missing:
            raise ValueError(f"the template writes {missing[0]}, which is no control token of {self.path}")
        return JinjaChat(self.tokenizer(), self.template, variables=self.named_tokens())

    def _has(self, token: str) -> bool:
        return token in self.tokenizer().special_tokens


def with_template(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """`default`: as it is. A .jinja file replaces the template; `qwen` and `chatml` are what a model without one gets.

    Raises ValueError for another name where the model has none, FileNotFoundError for a file that is not there.
    """
    if name == OWN:
        return checkpoint
    if name.endswith(".jinja"):
        path = Path(name).expanduser()
        if not has_file(path):
            raise FileNotFoundError(f"template: there is no file {name!r}")
        return Templated(checkpoint, read_text(path))
    if checkpoint.chat() is not None:
        return checkpoint
    if name not in NAMED:
        raise ValueError(
            f"template is {name!r}, and the model has none; allowed are {', '.join(NAMED)} and .jinja files"
        )
    return Templated(checkpoint, NAMED[name])


def replaced_template(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """The checkpoint with the template of a file, or with `qwen` or `chatml`, whatever its own says.

    Raises FileNotFoundError for a name that is neither, ValueError for a template that the vocabulary or Jinja cannot do with.
    """
    if name in NAMED:
        replaced = Templated(checkpoint, NAMED[name])
    else:
        path = Path(name).expanduser()
        if not has_file(path):
            raise FileNotFoundError(
                f"chat_template is {name!r}, which is no file; allowed are {', '.join(NAMED)} and a file with a Jinja template"
            )
        replaced = Templated(checkpoint, read_text(path))
    replaced.chat()
    return replaced


def can_use_chatml(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary has ChatML's control tokens."""
    return {"<|im_start|>", _END} <= tokenizer.special_tokens.keys()
