"""Tokenizers for the text tests: the Qwen3 one (of tests/data), Qwen-1's rebuilt from it, and a tiny one."""

import base64
import json
import random
from pathlib import Path
from typing import Any

import pytest

from qwenkit.text.tokenizer import Tokenizer

FRAGMENTS = (
    *("Hello", "world ", " the quick", "don't", "I'LL", "https://example.com/?q=1", "def f(x):\n    return x ** 2\n"),
    *("你好", "，世界！", "日本語のテスト", "한국어", "Привет", " мир", "العربية", "हिन्दी", "ไทย", "𠀀"),
    *("👩‍👩‍👧", "🇨🇳", "😀", "é", "ê̄", "e\u0301", "\u0338", "\u0301", "Å", "ﬁ", "½", "≯", "ǅ", "ß", "İ"),
    *("123", "4567", "٣٤", "12,345.67", '{"a": [1, null]}', "\n", "\r\n", "\n\n\n", "   ", "\t", "  \n "),
    *("\x00", "\u200b", "\ufeff", "\ufdd0", "\U000f0001", "<|im_end|>", "<|im_start|>", "<|endoftext|>"),
    *("<|im_", "end|>", "|>", "<think>", "</think>", "<tool_call>", "</tool_response>", "<|fim_prefix|>"),
)


@pytest.fixture(scope="session")
def strings() -> list[str]:
    """1,000 strings mixing scripts, emoji, combining marks, digits, code, whitespace and control strings."""
    rng = random.Random(20240607)
    ranges = [(0x20, 0x7F), (0x80, 0x3000), (0x3000, 0xD800), (0xE000, 0x20000)]

    def fragment() -> str:
        return rng.choice(FRAGMENTS) if rng.random() < 0.8 else chr(rng.randrange(*rng.choice(ranges)))

    return ["".join(fragment() for _ in range(rng.randrange(20))) for _ in range(1000)]


@pytest.fixture(scope="session")
def tokenizer(data_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(data_folder / "tokenizer")


@pytest.fixture(scope="session")
def tokenizer_json(data_folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((data_folder / "tokenizer" / "tokenizer.json").read_text("utf-8"))
    return data


@pytest.fixture(scope="session")
def reference(data_folder: Path) -> Any:
    """transformers' tokenizer of the same folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(data_folder / "tokenizer")


@pytest.fixture(scope="session")
def qwen1_folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """qwen.tiktoken as Qwen-1 ships it: the later generations kept its 151,643 ranks."""
    folder = tmp_path_factory.mktemp("qwen1")
    lines = (base64.b64encode(tokenizer.token_bytes(rank)) + b" %d\n" % rank for rank in range(151_643))
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))
    return folder


@pytest.fixture(scope="session")
def qwen1(qwen1_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(qwen1_folder)


def byte_alphabet() -> list[str]:
    """GPT-2's stand-ins for the bytes 0 to 255."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [bytes_to_unicode()[byte] for byte in range(256)]


@pytest.fixture(scope="session")
def bytes_only() -> Tokenizer:
    """One token a byte and one control token, with no token types given."""
    return Tokenizer.from_bpe([*byte_alphabet(), "<|x|>"], [], None, "gpt-2")


@pytest.fixture(scope="session")
def tiny() -> Tokenizer:
    """256 bytes, two merges, ChatML's control tokens, and <think> as a token that is not a control token."""
    tokens = [*byte_alphabet(), "he", "hel", "<|im_start|>", "<|im_end|>", "<think>", "[PAD]"]
    return Tokenizer.from_bpe(tokens, ["h e", "he l"], [1] * 258 + [3, 3, 4, 5], "qwen2")
