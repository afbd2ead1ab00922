"""Token ids against transformers and tiktoken; decoding; the rule that text never becomes a control token."""

import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenkit.text.tokenizer import Tokenizer
from qwenkit.text.vocabulary import QWEN_PATTERN


def test_ids_equal_transformers(tokenizer: Tokenizer, reference: Any, strings: list[str]) -> None:
    for text in strings:
        assert tokenizer.encode(text, allow_special=True) == reference.encode(text, add_special_tokens=False), text


def test_plain_ids_equal_transformers_with_split_special_tokens(
    tokenizer: Tokenizer, data_folder: Path, strings: list[str]
) -> None:
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(
        tokenizer_file=str(data_folder / "tokenizer" / "tokenizer.json"), split_special_tokens=True
    )
    for text in strings:
        ids = tokenizer.encode(text)
        assert ids == plain.encode(text), text
        assert not any(map(tokenizer.is_special, ids))


@pytest.mark.parametrize("skip_special", [True, False])
def test_decode_equals_transformers(
    tokenizer: Tokenizer, reference: Any, strings: list[str], skip_special: bool
) -> None:
    for text in strings:
        ids = reference.encode(text)[::-1]  # backwards, so that characters break in the middle
        assert tokenizer.decode(ids, skip_special=skip_special) == reference.decode(
            ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
        )


def test_what_it_knows(tokenizer: Tokenizer, reference: Any) -> None:
    assert tokenizer.vocab_size == len(reference) == 151_669
    assert len(tokenizer.special_tokens) == 14
    assert tokenizer.special_tokens["<|im_end|>"] == tokenizer.token_id("<|im_end|>") == 151_645
    assert "<think>" not in tokenizer.special_tokens
    assert tokenizer.token_id("<think>") == 151_667
    assert not tokenizer.is_special(151_667)
    assert tokenizer.encode("<think>") == [151_667]
    assert tokenizer.token_id(" the") == 279
    assert tokenizer.token_id("no such token") is None
    assert tokenizer.token_bytes(279) == b" the"


def test_ids_beyond_the_vocabulary_are_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([151_669, 151_935, 10**9, -1, 108_386]) == "你好"
    assert tokenizer.token_bytes(151_935) == tokenizer.token_bytes(-1) == b""


def test_lone_surrogates_become_replacement_characters(tiny: Tokenizer, qwen1: Tokenizer) -> None:
    for tokenizer in (tiny, qwen1):
        assert tokenizer.decode(tokenizer.encode("a\ud800b\udc00")) == "a\ufffdb\ufffd"
        assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "😀"


@settings(deadline=None)
@given(text=st.text())
def test_round_trip_without_normalisation(bytes_only: Tokenizer, text: str) -> None:
    assert bytes_only.decode(bytes_only.encode(text), skip_special=False) == text


def test_split_control(tiny: Tokenizer) -> None:
    assert list(tiny.split_control("a<|im_end|><think>b<|im_start|>")) == ["a", 259, "<think>b", 258]
    assert list(tiny.split_control("")) == []


def test_qwen1_equals_tiktoken(qwen1: Tokenizer, strings: list[str]) -> None:
    ranks = {qwen1.token_bytes(rank): rank for rank in range(151_643)}
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
    specials = {name: 151_643 + i for i, name in enumerate(names)}
    reference = tiktoken.Encoding("reference", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    for text in [*strings, "<|extra_0|><|extra_204|>x<|extra_205|>", "<|im_end|>\u0338"]:
        normal = unicodedata.normalize("NFC", text)
        assert qwen1.encode(text) == reference.encode(normal, allowed_special=set(), disallowed_special=())
        assert qwen1.encode(text, allow_special=True) == reference.encode(normal, allowed_special="all")
    assert qwen1.special_tokens == specials
    assert qwen1.vocab_size == 151_851


def test_qwen1_check_values(qwen1: Tokenizer) -> None:
    values = {
        "\n": [198],
        "\n\n": [271],
        ":\n": [510],
        "system": [8948],
        "user": [872],
        "assistant": [77091],
        "You are a helpful assistant.": [2610, 525, 264, 10950, 17847, 13],
        "Human:": [33975, 25],
        "你好": [108386],
    }
    for text, ids in values.items():
        assert qwen1.encode(text) == ids
        assert qwen1.decode(ids) == text
    assert qwen1.token_id("<|extra_204|>") == 151_850
    assert qwen1.decode([151_644, 872, 151_850]) == "user"
    assert qwen1.decode([151_644, 872], skip_special=False) == "<|im_start|>user"
