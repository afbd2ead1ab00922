"""Trials: what a model's files ask the libraries to do is done once in a process with limits, before it is done here.

In: the normalizer and pre-tokenizer of a tokenizer.json, or a chat template. Out: nothing, or a ValueError of one
sentence. A trial takes a tenth of a second; what is known needs none.
"""

import json
from typing import Any

from qwenkit.text.child_process import ChildProcess

CPU_SECONDS = 1.5
MEMORY = 200 << 20  # bytes
WALL_SECONDS = 30.0
MAX_GROWTH = 256  # characters that a normalizer may make of one
MAX_NORMALIZED = 16_000_000  # characters of a normalized text

# The most characters that each step makes of one (Unicode's compatibility forms have 18).
_GROWTH = {"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 3, "BertNormalizer": 12, "ByteLevel": 4}
_GROWTH |= {"Strip": 1, "StripAccents": 1, "Nmt": 1}


def try_tokenizer(steps: dict[str, Any], source: str) -> int:
    """Try the normalizer and pre-tokenizer of the file `source` on difficult texts.

    Returns how many characters a text may have. Raises ValueError for steps that the library cannot use, that take too long,
    or that make a text much longer.
    """
    growth = normalizer_growth(steps.get("normalizer"), source)
    if growth > MAX_GROWTH:
        raise ValueError(
            f"{source}: its normalizer makes up to {growth:.0f} characters of one, allowed are {MAX_GROWTH}"
        )
    _try({"kind": "tokenizer", "steps": steps, "growth": growth}, f"{source}: its normalizer or pre_tokenizer")
    return int(MAX_NORMALIZED / growth)


def try_template(template: str) -> None:
    """Compile a chat template and render a few conversations with it. Raises ValueError where that takes too much."""
    _try({"kind": "template", "template": template}, "the chat template")


def normalizer_growth(normalizer: Any, source: str) -> float:
    """The most characters that a normalizer makes of one. Raises ValueError for one that cannot be told."""
    if normalizer is None:
        return 1
    kind = normalizer.get("type") if isinstance(normalizer, dict) else None
    if kind == "Sequence" and isinstance(normalizer.get("normalizers"), list):
        growth = 1.0
        for step in normalizer["normalizers"]:
            growth = min(growth * normalizer_growth(step, source), 1e18)
        return growth
    if kind in _GROWTH:
        return _GROWTH[kind]
    if kind == "Prepend" and isinstance(normalizer.get("prepend"), str):
        return 1 + len(normalizer["prepend"])
    if kind == "Replace" and isinstance(normalizer.get("content"), str):
        pattern = normalizer.get("pattern")
        literal = pattern.get("String") if isinstance(pattern, dict) else None
        content = len(normalizer["content"])
        return (
            max(1, content / len(literal)) if literal else 1 + content
        )  # a regex may match between any two characters
    shown = kind if isinstance(kind, str) else json.dumps(normalizer)[:100]
    raise ValueError(
        f"{source}: its normalizer is {shown}, allowed are Sequence, Prepend, Replace, {', '.join(_GROWTH)}"
    )


def _try(message: dict[str, Any], what: str) -> None:
    """Raise ValueError, a sentence about `what`, unless the worker finds nothing wrong."""
    worker = ChildProcess("qwenkit.text.trial_worker")
    try:
        worker.send(message | {"cpu_seconds": CPU_SECONDS, "memory": MEMORY, "wall_seconds": WALL_SECONDS})
        answer = worker.receive(WALL_SECONDS)
    finally:
        worker.close()
    if answer is None:
        raise ValueError(f"{what} takes more than {CPU_SECONDS:g} seconds or {MEMORY >> 20} MiB on short texts")
    if answer["error"] is not None:
        raise ValueError(f"{what} {answer['error']}")
