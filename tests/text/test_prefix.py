"""What a text begins with: the ids that a tokenizer's files put before it, as transformers and llama.cpp do."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from qwenkit.text.tokenizer import Tokenizer
from qwenkit.weights.gguf_model import GgufCheckpoint
from qwenkit.weights.gguf_tokenizer import write_tokenizer as write_gguf_tokenizer
from tests.tiny_models import EOS, IM_START, write_tokenizer
from tests.weights.test_gguf_model import random_model, tiny_config, write

ENDOFTEXT = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
START = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}
SPECIAL = {
    token: {"id": token, "ids": [id], "tokens": [token]}
    for token, id in (("<|endoftext|>", EOS), ("<|im_start|>", IM_START))
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def template(*single: dict[str, Any]) -> dict[str, Any]:
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": list(single), "pair": pair, "special_tokens": SPECIAL}


@pytest.mark.parametrize(
    "processor",
    [
        None,
        BYTE_LEVEL,
        template(TEXT),
        template(ENDOFTEXT, TEXT),
        template(ENDOFTEXT, START, TEXT),
        {"type": "Sequence", "processors": [BYTE_LEVEL, template(ENDOFTEXT, TEXT)]},
        {"type": "BertProcessing", "cls": ["<|im_start|>", IM_START], "sep": ["<|endoftext|>", EOS]},
    ],
)
def test_a_document_begins_as_the_post_processor_says(tmp_path: Path, processor: Any) -> None:
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": processor}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)("in it").input_ids
    plain = tokenizer.encode("in it")
    found = tokenizer.encode_document("in it")
    assert found[-len(plain) :] == plain == theirs[len(tokenizer.prefix) :][: len(plain)]
    assert found == theirs[: len(found)]
    assert Tokenizer.from_json(json.loads(json.dumps(tokenizer.to_json()))).prefix == tokenizer.prefix


def test_the_limit_counts_what_is_put_before(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": template(ENDOFTEXT, TEXT)}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert len(tokenizer.encode_document("abc", max_tokens=4)) == 4
    with pytest.raises(ValueError, match="tokens long"):
        tokenizer.encode_document("abcd", max_tokens=4)


@pytest.mark.parametrize(
    ("add_bos_token", "bos_token", "expected"),
    [
        (True, "<|endoftext|>", True),
        (False, "<|endoftext|>", False),
        (None, "<|endoftext|>", False),
        (True, None, False),
    ],
)
def test_vocab_and_merges_obey_add_bos_token(
    tmp_path: Path, add_bos_token: Any, bos_token: Any, expected: bool
) -> None:
    write_tokenizer(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    decoder = {str(EOS): {"content": "<|endoftext|>", "special": True}}
    said = {"bos_token": bos_token, "add_bos_token": add_bos_token, "added_tokens_decoder": decoder}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    assert Tokenizer.from_folder(tmp_path).prefix == ((EOS,) if expected else ())


def gguf(path: Path, **metadata: Any) -> Path:
    alphabet = GGUF_TOKENS
    lists = {"tokens": alphabet, "merges": ["a b"], "token_type": [1] * 256 + [3] * 3 + [1]}
    config = tiny_config("qwen2", vocab_size=len(alphabet))
    named = {"model": "gpt2", "pre": "qwen2", **lists, **metadata}
    write(path, random_model(config), **{f"tokenizer__ggml__{key}": value for key, value in named.items()})
    return path


_BYTES = sorted({*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)})
GGUF_TOKENS = [*map(chr, _BYTES), *(chr(256 + i) for i in range(256 - len(_BYTES)))]
GGUF_TOKENS += ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "ab"]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"add_bos_token": True, "bos_token_id": EOS}, (EOS,)),
        ({"add_bos_token": False, "bos_token_id": EOS}, ()),
        ({"bos_token_id": EOS}, ()),
        ({"pre": "llama-bpe", "bos_token_id": EOS}, (EOS,)),
        ({"pre": "llama-bpe", "bos_token_id": EOS, "add_bos_token": False}, ()),
    ],
)
def test_a_gguf_says_by_add_bos_token(tmp_path: Path, said: dict[str, Any], expected: tuple[int, ...]) -> None:
    checkpoint = GgufCheckpoint.open(gguf(tmp_path / "m.gguf", **said))
    assert checkpoint.tokenizer().prefix == expected
    write_gguf_tokenizer(tmp_path, checkpoint)  # as a folder it means the same
    assert Tokenizer.from_folder(tmp_path).encode_document("abc") == checkpoint.tokenizer().encode_document("abc")


@pytest.mark.parametrize("said", [{"add_bos_token": True}, {"add_bos_token": True, "bos_token_id": 4000}])
def test_a_true_value_without_a_token_is_refused(tmp_path: Path, said: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="bos_token_id"):
        GgufCheckpoint.open(gguf(tmp_path / "m.gguf", **said)).tokenizer()


def test_a_value_of_another_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="add_bos_token must be true or false"):
        GgufCheckpoint.open(gguf(tmp_path / "m.gguf", add_bos_token="yes", bos_token_id=EOS)).tokenizer()
