"""Tokenizer, template and licence of a model for a new folder. In: a checkpoint. Out: files that every loader reads.

Those of a folder are copied as they are. A .gguf file has a vocabulary inside, which is written as tokenizer.json.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models

from qwenkit.text.chat import JinjaChat
from qwenkit.text.vocabulary import GGUF_SCHEMES
from qwenkit.weights.checkpoint import Checkpoint
from qwenkit.weights.gguf_model import GgufCheckpoint

_SUFFIXES = (".json", ".txt", ".tiktoken", ".jinja", ".model", ".py")
_LICENCES = ("LICENSE", "NOTICE")
_OWN = ("config.json", "generation_config.json", "quantize_config.json")  # written by those who know better
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


def write_tokenizer(folder: Path, checkpoint: Checkpoint) -> None:
    """Copy or write them. Code that a Qwen-1 folder brings along is copied too, for others to use; here it is never run."""
    if isinstance(checkpoint, GgufCheckpoint):
        _write_gguf(folder, checkpoint)
        return
    for path in sorted(checkpoint.path.iterdir()):
        wanted = path.suffix in _SUFFIXES or path.name.startswith(_LICENCES)
        if path.is_file() and wanted and path.name not in _OWN and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)


def _write_gguf(folder: Path, checkpoint: GgufCheckpoint) -> None:
    metadata = checkpoint.file.metadata
    checkpoint.tokenizer()  # checks all that is read below
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    kinds = metadata.get("tokenizer.ggml.token_type")
    if kinds is None:
        kinds = [_CONTROL if token.startswith("<|") and token.endswith("|>") else 1 for token in tokens]
    steps = GGUF_SCHEMES[metadata.get("tokenizer.ggml.pre", "default")].steps()
    vocabulary = {token: number for number, token in enumerate(tokens)}
    written = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=steps.ignore_merges))
    if steps.normalizer is not None:
        written.normalizer = steps.normalizer
    written.pre_tokenizer = steps.pre_tokenizer
    written.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            written.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False)])
    written.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": checkpoint.config["max_position_embeddings"],
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(number) is int and 0 <= number < len(tokens):
            settings[f"{name}_token"] = tokens[number]
    chat = checkpoint.chat()
    if isinstance(chat, JinjaChat):
        settings["chat_template"] = chat.source
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
