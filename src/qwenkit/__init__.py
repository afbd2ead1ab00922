"""qwenkit: one package for the whole life of a Qwen model.

The names below are the whole public interface. They are loaded when first used, so that `import qwenkit` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwenkit.engine.config import EngineConfig
    from qwenkit.engine.grammar import Grammar
    from qwenkit.engine.llm import LLM, Score
    from qwenkit.engine.request import Completion, Delta, RequestOutput, TokenLogprob
    from qwenkit.engine.sampling import SamplingParams
    from qwenkit.model.config import ModelConfig
    from qwenkit.text.tokenizer import Tokenizer
    from qwenkit.weights.load import load_model

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "Completion",
    "Delta",
    "EngineConfig",
    "Grammar",
    "ModelConfig",
    "RequestOutput",
    "SamplingParams",
    "Score",
    "TokenLogprob",
    "Tokenizer",
    "load_model",
]

_HOME = {
    "LLM": "engine.llm",
    "Completion": "engine.request",
    "Delta": "engine.request",
    "EngineConfig": "engine.config",
    "Grammar": "engine.grammar",
    "ModelConfig": "model.config",
    "RequestOutput": "engine.request",
    "SamplingParams": "engine.sampling",
    "Score": "engine.llm",
    "TokenLogprob": "engine.request",
    "Tokenizer": "text.tokenizer",
    "load_model": "weights.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
