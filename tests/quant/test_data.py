"""Calibration text: every format that fine-tuning knows, and files that hold too little or nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwenkit.quant.data import calibration_documents
from qwenkit.weights.checkpoint import Checkpoint, open_checkpoint
from tests.tiny_models import write_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_model(tmp_path_factory.mktemp("model")))


def read(checkpoint: Checkpoint, path: Path | None, **changes: Any) -> list[list[int]]:
    return calibration_documents(checkpoint, path, **({"samples": 4, "length": 200, "seed": 0} | changes))


def texts(checkpoint: Checkpoint, documents: list[list[int]]) -> list[str]:
    return [checkpoint.tokenizer().decode(ids, skip_special=False) for ids in documents]


TURNS = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause.<|im_end|>\n"
RECORDS = [
    {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]},
    {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
    {"id": "0", "conversations": [{"from": "user", "value": "Why?"}, {"from": "assistant", "value": "Because."}]},
    {"instruction": "Why?", "input": "", "output": "Because."},
]


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("lines", [False, True])
def test_conversations(record: dict[str, Any], lines: bool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text("\n".join([json.dumps(record)] * 2) if lines else json.dumps([record] * 2))
    assert texts(checkpoint, read(checkpoint, path)) == [TURNS] * 2
    (short,) = read(checkpoint, path, length=10, samples=1)
    assert len(short) == 10


def test_plain_text_is_cut_into_pieces(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text("".join(chr(97 + i % 26) for i in range(1030)))
    found = read(checkpoint, path, samples=99)
    assert [len(ids) for ids in found] == [200] * 5
    assert sorted(texts(checkpoint, found)) == sorted(path.read_text()[i : i + 200] for i in range(0, 1000, 200))
    assert read(checkpoint, path) == read(checkpoint, path)
    assert read(checkpoint, path, seed=1) != read(checkpoint, path)


def test_texts_of_records_lie_end_to_end(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"text": letter * 30}) for letter in "abc"))
    (found,) = texts(checkpoint, read(checkpoint, path, length=92))
    assert sorted(found.split("<|endoftext|>")) == ["a" * 30, "b" * 30, "c" * 30]


def test_parquet(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """As wikitext is published: a line a row."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.table({"text": ["", " = Title = \n", "", " Some words .\n"]}), path)
    (found,) = texts(checkpoint, read(checkpoint, path, length=25))
    assert found == "\n = Title = \n\n Some words .\n"[:25]
    path.write_text("no")
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        read(checkpoint, path)


def test_the_built_in_text(checkpoint: Checkpoint) -> None:
    found = read(checkpoint, None, samples=100)
    assert len(found) >= 40
    assert any("会议" in text or "茶馆" in text for text in texts(checkpoint, found))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("data.txt", " \n", "holds no text: give a file with more text"),
        ("data.json", "[]", "holds no text"),
        ("data.txt", "short", "holds only 5 tokens, but a sample needs 200: give a file with more text, or a smaller"),
        ("data.csv", "a,b", "is no calibration file that is known: allowed are .json, .jsonl"),
        ("data.json", "[{", "is not valid JSON"),
        ("data.json", '[{"x": 1}]', "record 1 has none of messages, .* found the fields x, one of them is needed"),
        ("data.json", "[7]", "record 1 has none of .* found a int"),
        ("data.json", '[{"messages": "hi"}]', "record 1: messages is no list of objects"),
        ("data.json", '[{"messages": [{"role": "cat", "content": "x"}]}]', "the role 'cat' is not known, allowed are"),
    ],
)
def test_bad_files(name: str, content: str, sentence: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=sentence):
        read(checkpoint, tmp_path / name)


def test_a_file_that_is_no_text(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match="is not UTF-8 text: byte 3"):
        read(checkpoint, tmp_path / "data.txt")
