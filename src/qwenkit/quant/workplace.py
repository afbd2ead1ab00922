"""DIR.part, where a quantized model is made. In: what the run is, and how much it will write. Out: a folder for this run alone.

It holds the finished blocks, so that a run that was stopped can go on; a run with other settings, another model or other text is
refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenkit.quant.config import QuantConfig
from qwenkit.storage import write_json
from qwenkit.weights.checkpoint import Checkpoint
from qwenkit.weights.stored import StoredTensor, read_json

HEADER = "run.json"


class Workplace:
    """DIR.part: made with what the run is, or found to be of the same run; locked while it lasts."""

    def __init__(self, part: Path, header: dict[str, Any], needed: int) -> None:
        self.part = part
        path = part / HEADER
        if part.exists():
            found = read_json(path) if path.is_file() else None
            if found != json.loads(json.dumps(header)):
                other = [key for key in header if not found or found.get(key) != json.loads(json.dumps(header[key]))]
                raise ValueError(
                    f"{part} is left of a run with another {' and another '.join(other)}: run that again to finish it, or "
                    "delete the folder"
                )
        else:
            part.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(part.parent).free
            if free < needed:
                raise ValueError(
                    f"{part.parent} has {free / 1e9:.1f} GB free, but about {needed / 1e9:.1f} GB are needed: free some "
                    "space or write elsewhere"
                )
            part.mkdir()
            write_json(path, header)
        self._fd = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise ValueError(f"another run is writing {part}: wait for its end, or stop it") from None

    def __enter__(self) -> Workplace:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)


def estimate(stored: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]], config: QuantConfig) -> int:
    """Bytes on disk while the blocks' files are put together: twice the model."""
    assert config.group_size is not None
    count = 0
    for name, tensor in stored.items():
        size = math.prod(tensor.shape)
        if name.removeprefix("model.layers.").removesuffix(".weight") in shapes:
            group = config.group_size if config.group_size > 0 else tensor.shape[1]
            count += size * config.bits // 8 + size // group * 3
        else:
            count += 2 * size
    return 2 * count + (32 << 20)


def fingerprint(checkpoint: Checkpoint, stored: Mapping[str, StoredTensor]) -> str:
    """What tells one model from another: its configuration, its tensors, the sizes and times of its files."""
    path = checkpoint.path
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    tensors = sorted((name, tensor.shape, tensor.dtype) for name, tensor in stored.items())
    text = json.dumps([checkpoint.config, stats, tensors], default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def digest(documents: Sequence[Sequence[int]]) -> str:
    return hashlib.blake2b(json.dumps([list(each) for each in documents]).encode(), digest_size=16).hexdigest()
