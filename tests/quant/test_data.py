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
    {"query": "Why?", "response": "Because."},
    {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
    {"messages": [
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]}, {"role": "assistant", "content": "Because."}
    ]},
]  # fmt: skip


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
    with pytest.raises(ValueError, match="is no Parquet file that can be read"):
        read(checkpoint, path)


def test_a_text_is_one_record_whatever_is_in_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('"one\u2028two\x85{three}"\n{"text": ""}\n{"text": "[4]"}\n', encoding="utf-8")
    (found,) = texts(checkpoint, read(checkpoint, path, length=22))
    assert sorted(found.split("<|endoftext|>")) == ["[4]", "one\u2028two\x85{three}"]


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
        ("data.csv", "a,b", "holds no text"),
        ("data.pdf", "a,b", r"has an ending that is no data file's; known are \.json, \.jsonl"),
        ("data.json", "[{", r"data\.json:1: no valid JSON"),
        ("data.json", '[{"x": 1}]', r"data\.json:1: no known format has these fields: x"),
        ("data.json", "[7]", r"data\.json:1: the entry is a number, not an object"),
        ("data.json", '[{"messages": "hi"}]', r"data\.json:1: messages is 'hi', a list of messages is needed"),
        (
            "data.json",
            '[\n{"messages": [{"role": "cat", "content": "x"}]}]',
            r"data\.json:2: .*role is 'cat', allowed are",
        ),
        ("data.jsonl", '{"text": "a b c"}\n{broken\n', r"data\.jsonl:2: the line is no valid JSON"),
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
