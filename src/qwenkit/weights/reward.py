"""A reward model's checkpoint: a body with a scalar head `score` in place of the vocabulary's.

In: any checkpoint. Out: the same without its score, so that it loads as the language model it was; and the score.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwenkit.text.chat import ChatFormat
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.weights.checkpoint import Checkpoint
from qwenkit.weights.stored import StoredTensor

SCORE, HEAD = "score.weight", "lm_head.weight"


class WithoutScore:
    """A `Checkpoint`. One that has a score and no head ties the head to the embedding: nothing is read from it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.path: Path = checkpoint.path
        self.generation_config = checkpoint.generation_config
        self.eos_token_ids = checkpoint.eos_token_ids
        names = {stored.name for stored in checkpoint.tensors()}
        headless = SCORE in names and HEAD not in names
        self.config: dict[str, Any] = checkpoint.config | ({"tie_word_embeddings": True} if headless else {})

    def tensors(self) -> Iterator[StoredTensor]:
        return (stored for stored in self._checkpoint.tensors() if stored.name != SCORE)

    def score(self) -> StoredTensor | None:
        return next((stored for stored in self._checkpoint.tensors() if stored.name == SCORE), None)

    def tokenizer(self) -> Tokenizer:
        return self._checkpoint.tokenizer()

    def named_tokens(self) -> dict[str, str]:
        return self._checkpoint.named_tokens()

    def chat(self) -> ChatFormat | None:
        return self._checkpoint.chat()
