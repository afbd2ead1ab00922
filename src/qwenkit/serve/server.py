"""Server: everything a route needs, in one place, and how a route gets it.

Built once by `qwenkit serve` (or by a test around a scripted engine) and put at app.state.server. Routes write
`server: Annotated[Server, Depends(the_server)]`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fastapi import Request

from qwenkit.serve.config import ServeConfig
from qwenkit.serve.driver import Driver
from qwenkit.serve.errors import ApiError
from qwenkit.serve.executor import FairExecutor
from qwenkit.serve.metrics import Metrics
from qwenkit.text.chat import ChatFormat
from qwenkit.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qwenkit.engine.grammar_compiler import GrammarCompiler
    from qwenkit.text.answer import AnswerFormat


@dataclass
class Server:
    """`model_names[0]` is what answers say; `adapters` maps the names of loaded LoRA adapters to their folders."""

    config: ServeConfig
    tokenizer: Tokenizer
    chat_format: ChatFormat | None
    driver: Driver
    model_names: tuple[str, ...]
    max_model_len: int
    metrics: Metrics
    compiler: GrammarCompiler | None = None
    answer_format: AnswerFormat | None = None
    adapters: dict[str, str] = field(default_factory=dict)
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    started: int = field(default_factory=lambda: int(time.time()))
    prompts: FairExecutor = field(default_factory=lambda: FairExecutor(2, "prompts"))

    @property
    def model_name(self) -> str:
        return self.model_names[0]

    @property
    def max_counted(self) -> int:
        """Tokens up to which a text is tokenized at all: more than the context, so that errors can say how many there are."""
        return 4 * self.max_model_len

    @cached_property
    def max_prompt_chars(self) -> int:
        """Characters of a text that may fit the context: each of its tokens as long as the longest of the vocabulary."""
        tokenizer = self.tokenizer
        return self.max_model_len * max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.num_ids))

    def adapter_of(self, model: str | None) -> str | None:
        """The adapter that a request's `model` names, None for the model itself (also when it names none).

        Raises ApiError 404 for a model that is not served.
        """
        if model is None or model == "" or model in self.model_names:
            return None
        if model in self.adapters:
            return model
        known = ", ".join((*self.model_names, *self.adapters))
        raise ApiError(
            404, f"model {model!r} is not served here, known are {known}", param="model", code="model_not_found"
        )


def the_server(request: Request) -> Server:
    """The server that a request came to."""
    server = request.app.state.server
    assert isinstance(server, Server)
    return server
