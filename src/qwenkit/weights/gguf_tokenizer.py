"""A GGUF's tokenizer as files that transformers and vLLM load: tokenizer.json and tokenizer_config.json.

In: the vocabulary, merges, token types and template of the file's metadata. Out: the same ids for the same text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, processors

from qwenkit.text import vocabulary
from qwenkit.weights.gguf_model import GgufCheckpoint

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # values of tokenizer.ggml.token_type


def write_tokenizer(folder: Path, checkpoint: GgufCheckpoint) -> None:
    """ValueError where the file has no byte-level BPE vocabulary."""
    special = checkpoint.tokenizer().special_tokens  # also checks the lists
    metadata = checkpoint.file.metadata
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type") or [_CONTROL if token in special else _NORMAL for token in tokens]
    steps = vocabulary.GGUF_SCHEMES[checkpoint.pre].steps()
    vocab = {token: id for id, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=steps.ignore_merges))
    if steps.normalizer is not None:
        tokenizer.normalizer = steps.normalizer
    tokenizer.pre_tokenizer = steps.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if checkpoint.tokenizer().prefix:
        first = [(tokens[id], id) for id in checkpoint.tokenizer().prefix]
        before = [token for token, _ in first]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A"],
            pair=[*before, "$A", *(f"{token}:1" for token in before), "$B:1"],
            special_tokens=first,
        )
    for token, kind in zip(tokens, types, strict=True):
        if kind in (_UNKNOWN, _CONTROL):
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": checkpoint.config["max_position_embeddings"]
        if "max_position_embeddings" in checkpoint.config
        else checkpoint.config["seq_length"],
    } | checkpoint.named_tokens()
    template = metadata.get("tokenizer.chat_template")
    if template:
        settings["chat_template"] = template
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
