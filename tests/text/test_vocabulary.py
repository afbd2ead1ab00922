"""The four layouts give the same ids; what is corrupt or of another kind is refused with the file's name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library

from qwenkit.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def merges(tokenizer_json: dict[str, Any]) -> list[str]:
    return [" ".join(merge) for merge in tokenizer_json["model"]["merges"]]


@pytest.fixture(scope="module")
def slow_folder(
    data_folder: Path, tokenizer_json: dict[str, Any], merges: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """vocab.json + merges.txt, as Qwen2's slow tokenizer has them."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "vocab.json").write_text(json.dumps(tokenizer_json["model"]["vocab"], ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    shutil.copyfile(data_folder / "tokenizer" / "tokenizer_config.json", folder / "tokenizer_config.json")
    return folder


def assert_same(one: Tokenizer, other: Tokenizer, strings: list[str]) -> None:
    assert one.vocab_size == other.vocab_size
    assert one.special_tokens == other.special_tokens
    for text in strings:
        for allow_special in (False, True):
            ids = one.encode(text, allow_special=allow_special)
            assert ids == other.encode(text, allow_special=allow_special), text
        assert one.decode(ids) == other.decode(ids)


def test_vocab_and_merges(slow_folder: Path, tokenizer: Tokenizer, strings: list[str]) -> None:
    assert_same(Tokenizer.from_folder(slow_folder), tokenizer, strings)


def test_vocab_and_merges_with_added_tokens_json(slow_folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).hardlink_to(slow_folder / name)
    with pytest.raises(ValueError, match=r"added_tokens\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 151645, "<tool_call>": 151657}))
    other = Tokenizer.from_folder(tmp_path)
    assert other.special_tokens == {"<|im_end|>": 151645}
    text = "a<|im_end|><tool_call>你好"
    assert other.encode(text) == tokenizer.encode(text)
    assert other.encode(text, allow_special=True) == tokenizer.encode(text, allow_special=True)


def test_gguf_lists(
    tokenizer_json: dict[str, Any], merges: list[str], tokenizer: Tokenizer, strings: list[str]
) -> None:
    added = tokenizer_json["added_tokens"]
    tokens = [*tokenizer_json["model"]["vocab"], *(token["content"] for token in added), "[PAD151669]"]
    types = [1] * 151_643 + [3 if token["special"] else 4 for token in added] + [5]
    other = Tokenizer.from_bpe(tokens, merges, types, "qwen2")
    assert_same(other, tokenizer, strings)
    assert other.token_bytes(151_669) == b""


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("qwen2", "a1234  5\n\n6 7'LL", ["a", "1", "2", "3", "4", " ", " ", "5", "\n\n", "6", " ", "7", "'LL"]),
        ("llama-bpe", "a1234  5\n\n6 7'LL", ["a", "123", "4", " ", " ", "5", "\n\n", "6", " ", "7", "'LL"]),
        ("gpt-2", "a1234  5\n\n6 7'LL", ["a", "1234", " ", " 5", "\n", "\n", "6", " 7", "'", "LL"]),
        ("default", "a1234  5\n\n6 7'LL", ["a", "1234", " ", " 5", "\n", "\n", "6", " 7", "'", "LL"]),
        ("smollm", "a1234  5\n\n6 7'LL", ["a", "1", "2", "3", "4", "  ", "5", "\n\n", "6", " ", "7", "'", "LL"]),
    ],
)
def test_where_a_gguf_pre_tokenizer_cuts(pre: str, text: str, pieces: list[str]) -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    # Every adjacent pair merges, so what stays apart was cut by the pre-tokenizer.
    alphabet = bytes_to_unicode()
    tokens, merges = list(alphabet.values()), []
    for _ in range(3):
        for piece in {piece for piece in pieces if len(piece) > 1} | {
            text[i:j] for i in range(16) for j in range(i + 2, 17)
        }:
            written = "".join(alphabet[byte] for byte in piece.encode())
            for split in range(1, len(written)):
                if written[:split] in tokens and written[split:] in tokens and len(written) <= 4:
                    merges.append(f"{written[:split]} {written[split:]}")
                    tokens += [written] if written not in tokens else []
    tokenizer = Tokenizer.from_bpe(tokens, merges, [1] * len(tokens), pre)
    assert [tokenizer.decode([id]) for id in tokenizer.encode(text)] == pieces


def test_control_tokens_within_the_vocabulary_never_come_out_of_text() -> None:
    """Even where merges lead to one, as after somebody marked an ordinary word as a control token."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*bytes_to_unicode().values(), "st", "stop", "op", "stops"]
    merges = ["s t", "o p", "st op", "stop s"]
    plain = Tokenizer.from_bpe(tokens, merges, [1] * 260, "gpt-2")
    assert plain.encode("stops") == [259]
    marked = Tokenizer.from_bpe(tokens, merges, [1] * 257 + [3, 1, 1], "gpt-2")
    assert marked.encode("stops") == [256, 258, marked.token_id("s")]
    assert marked.encode("stops", allow_special=True) == [257, marked.token_id("s")]
    assert marked.decode(marked.encode("stops")) == "stops"
    user_defined = Tokenizer.from_bpe(tokens, merges, [1] * 257 + [4, 1, 1], "gpt-2")
    assert user_defined.encode("stops") == [257, user_defined.token_id("s")]


def test_tokens_looked_for_after_normalisation(tokenizer_json: dict[str, Any], tmp_path: Path) -> None:
    """A token that a user added is normalized by default; the control tokens of Qwen are not."""
    tokens = [
        {"id": 151643, "content": "<|x>", "special": True, "normalized": False},
        {"id": 151644, "content": "cafe\u0301", "special": False, "normalized": True},
    ]
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    data = tokenizer_json | {"added_tokens": [token | flags for token in tokens]}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data))
    library, tokenizer = Library.from_file(str(path)), Tokenizer.from_folder(tmp_path)
    for text in ("café", "cafe\u0301 cafés", "a<|x>café<|x>", "<|x>\u0338café", "cafe<|x>\u0301"):
        assert tokenizer.encode(text, allow_special=True) == library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, allow_special=False).count(151643) == 0


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (
            (["a"], [], [1], "bert"),
            r"tokenizer\.ggml\.pre is 'bert', known are deepseek-r1-qwen, default, f2llmv2, gpt-2",
        ),
        ((["a"], [], [1, 1], "qwen2"), r"token_type has 2 entries for 1 tokens"),
        ((["a", "b"], ["ab"], [1, 1], "qwen2"), r"merge 1 is 'ab', not a pair"),
        ((["a", "b"], ["a b"], [1, 1], "qwen2"), r"tokens: the merge of 'a' and 'b' is not between"),
    ],
)
def test_bad_gguf_lists(lists: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_bpe(*lists)


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError) as caught:
            Tokenizer.from_folder(folder)
        for word in (str(folder), "tokenizer.json", "vocab.json with merges.txt", "qwen.tiktoken"):
            assert word in str(caught.value)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model": {', "not valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[]", "a JSON object was expected, found list"),
        (b"{}", "no model"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "a WordPiece tokenizer; only byte-level BPE"),
        ({"model": {"type": "Unigram", "vocab": []}}, "a Unigram tokenizer; only byte-level BPE"),
        (
            {"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": {"type": "Metaspace"}},
            "sentencepiece",
        ),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": None}, "sentencepiece"),
        ({"model": {"type": "BPE", "vocab": [], "merges": []}, "pre_tokenizer": BYTE_LEVEL}, "model.vocab"),
        ({"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}, "pre_tokenizer": BYTE_LEVEL}, "token 'a'"),
        ({"model": {"type": "BPE", "vocab": {"a": 10**12}, "merges": []}, "pre_tokenizer": BYTE_LEVEL}, "token 'a'"),
        ({"model": {"type": "BPE", "vocab": {"a": 1}, "merges": [["a"]]}, "pre_tokenizer": BYTE_LEVEL}, "merge 1"),
        ({"model": {"type": "BPE", "vocab": {"a": 1}, "merges": ["a b"]}, "pre_tokenizer": BYTE_LEVEL}, "the merge of"),
        (
            {
                "model": {"type": "BPE", "vocab": {"a": 1}, "merges": []},
                "pre_tokenizer": BYTE_LEVEL,
                "normalizer": {"type": "None such"},
            },
            "its normalizer is None such, allowed are Sequence",
        ),
        (
            {
                "model": {"type": "BPE", "vocab": {"a": 1}, "merges": []},
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "None such"}, BYTE_LEVEL]},
            },
            "makes its library fail",
        ),
        (
            {
                "model": {"type": "BPE", "vocab": {"a": 1}, "merges": []},
                "pre_tokenizer": BYTE_LEVEL,
                "added_tokens": [{"id": None, "content": "<x>"}],
            },
            "token '<x>'",
        ),
        (
            {
                "model": {"type": "BPE", "vocab": {"a": 1}, "merges": []},
                "pre_tokenizer": BYTE_LEVEL,
                "added_tokens": {"<x>": 1},
            },
            "added tokens",
        ),
    ],
)
def test_bad_tokenizer_json(content: bytes | dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(path) in str(caught.value)


def test_bad_vocab_and_merges(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n")
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 2}')
    with pytest.raises(ValueError, match=r"merges\.txt: merge 1 is 'a b c'"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(ValueError, match=r"tokenizer_class is 'GPT2Tokenizer'.*needs its tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_bad_tiktoken(qwen1_folder: Path, tmp_path: Path) -> None:
    path, whole = tmp_path / "qwen.tiktoken", (qwen1_folder / "qwen.tiktoken").read_bytes()
    lines = whole.split(b"\n")
    for content, message in (
        (b"\n".join(lines[:1000]), "expected the ranks 0 to 151642 once each, found 1000 tokens"),
        (whole + b"!!! 3\n", "line 151644 is not a base64 token and its rank"),
        (whole + b"YWJj\n", "line 151644 is not"),
        (whole.replace(b" 151642\n", b" 151643\n"), "expected the ranks"),
        (b"", "found 0 tokens"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            Tokenizer.from_folder(tmp_path)
        assert str(path) in str(caught.value)
