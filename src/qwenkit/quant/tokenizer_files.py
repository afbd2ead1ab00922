"""Tokenizer, template and licence of a model for a new folder. In: a checkpoint. Out: files that every loader reads.

Those of a folder are copied as they are. A .gguf file has a vocabulary inside, which is written as tokenizer.json.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from qwenkit.weights import gguf_tokenizer
from qwenkit.weights.checkpoint import Checkpoint
from qwenkit.weights.gguf_model import GgufCheckpoint

_SUFFIXES = (".json", ".txt", ".tiktoken", ".jinja", ".model", ".py")
_LICENCES = ("LICENSE", "NOTICE")
_OWN = ("config.json", "generation_config.json", "quantize_config.json")  # written by those who know better


def write_tokenizer(folder: Path, checkpoint: Checkpoint) -> None:
    """Copy or write them. Code that a Qwen-1 folder brings along is copied too, for others to use; here it is never run."""
    if isinstance(checkpoint, GgufCheckpoint):
        gguf_tokenizer.write_tokenizer(folder, checkpoint)
        return
    for path in sorted(checkpoint.path.iterdir()):
        wanted = path.suffix in _SUFFIXES or path.name.startswith(_LICENCES)
        if path.is_file() and wanted and path.name not in _OWN and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
