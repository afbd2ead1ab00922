"""EngineConfig: what a user may decide about how a model is run. Flags of the command line are generated from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qwenkit.settings import parse_size

DTYPES = ("auto", "float32", "bfloat16", "float16")
CACHE_DTYPES = ("auto", "float32", "bfloat16", "float16", "int8", "int4")
WEIGHTS = ("auto", "float", "bf16", "int8", "int4")


def option(default: Any, text: str) -> Any:
    """A dataclass field with the sentence that its command-line flag shows."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class EngineConfig:
    """How a model is run. Raises ValueError naming the field for a value outside its range."""

    dtype: str = option("auto", "arithmetic: auto, float32, bfloat16 or float16 (auto: what the device does well)")
    weights: str = option("auto", "how weights lie in a CPU's memory: auto, float (as dtype says), bf16, int8 or int4")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ... (auto: the first GPU, else the CPU)")
    max_model_len: int | None = option(
        None, "longest prompt plus answer, in tokens (default: what model and memory allow)"
    )
    kv_memory: str | None = option(
        None, "memory for keys and values, such as 2GiB or 2G (default: a share of what is free)"
    )
    kv_cache_dtype: str = option(
        "auto",
        "keys and values in memory: auto (int8 with --weights int8 or int4), float32, bfloat16, float16, int8 or int4",
    )
    max_num_seqs: int = option(64, "how many requests run at the same time")
    max_batch_tokens: int = option(
        512, "most tokens in one step; longer prompts are read in chunks (more need more memory; GPUs like 2048)"
    )
    block_size: int = option(16, "tokens in one block of the key/value cache")
    prefix_cache: bool = option(True, "reuse keys and values of prompts that begin alike")
    chat_template: str | None = option(
        None,
        "how conversations are written: a file with a Jinja template, chatml or qwen (default: as the model's files say)",
    )
    graphs: bool = option(True, "record a decode step once and replay it")
    seed: int | None = option(None, "seed for requests that name none (default: a new one each start)")

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, allowed are {', '.join(DTYPES)}")
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights is {self.weights!r}, allowed are {', '.join(WEIGHTS)}")
        if self.kv_cache_dtype not in CACHE_DTYPES:
            raise ValueError(f"kv_cache_dtype is {self.kv_cache_dtype!r}, allowed are {', '.join(CACHE_DTYPES)}")
        for name in ("max_num_seqs", "max_batch_tokens", "block_size"):
            _at_least_one(name, getattr(self, name))
        if self.max_model_len is not None:
            _at_least_one("max_model_len", self.max_model_len)
        if self.kv_memory is not None:
            parse_size("kv_memory", self.kv_memory)


def _at_least_one(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}, allowed is a whole number of at least 1")
