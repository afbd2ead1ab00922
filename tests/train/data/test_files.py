"""Every kind of file: records with their lines, reading on from any place, damage told with its line."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenkit.train.data import files
from qwenkit.train.data.files import read_records

from .conftest import Write

ROWS = [{"text": f"line {i} 你好\n“{'x' * i}”", "n": str(i)} for i in range(7)]


def values(path: Path, **place: int) -> list[Any]:
    return [record.value for record in read_records(path, **place)]


def write_rows(folder: Path, kind: str) -> Path:
    path = folder / f"data.{kind}"
    if kind == "json":
        path.write_text(json.dumps(ROWS, ensure_ascii=False, indent=1), "utf-8")
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n", "utf-8")
    elif kind in ("csv", "tsv"):
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, ["text", "n"], delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        table = pyarrow.Table.from_pylist(ROWS)
        if kind == "parquet":
            from pyarrow import parquet

            parquet.write_table(table, path, row_group_size=3)
        elif kind == "arrow":
            with pyarrow.ipc.new_stream(path, table.schema) as stream:
                stream.write_table(table, max_chunksize=3)
        else:
            with pyarrow.ipc.new_file(path, table.schema) as file:
                file.write_table(table, max_chunksize=3)
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv", "parquet", "arrow", "feather"])
@pytest.mark.parametrize("window", [3, 1 << 20])
def test_all_rows_and_every_place_to_go_on_from(
    tmp_path: Path, kind: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_CHUNK", window)
    path = write_rows(tmp_path, kind)
    records = list(read_records(path))
    assert [record.value for record in records] == ROWS
    for index, record in enumerate(records):
        assert values(path, cursor=record.cursor, line=record.line) == ROWS[index:]
        rest = list(read_records(path, cursor=record.end, line=record.end_line))
        assert [(r.value, r.line, r.cursor) for r in rest] == [
            (r.value, r.line, r.cursor) for r in records[index + 1 :]
        ]


def test_lines_are_those_an_editor_shows(write: Write) -> None:
    array = write("a.json", '[\n {"a": "x",\n  "b": 1},\n\n {"a": 2}, {"a": 3}]\n')
    assert [record.line for record in read_records(array)] == [2, 5, 5]
    table = write("a.csv", 'q,a\n"two\nlines",1\nx,2\n')
    assert [record.line for record in read_records(table)] == [2, 4]


def test_json_lines_under_the_wrong_name(write: Write) -> None:
    path = write("alpaca-data-conversation.json", '{"a": 1}\n{"a": 2}\n')
    assert values(path) == [{"a": 1}, {"a": 2}]


def test_text(write: Write) -> None:
    path = write("a.txt", "\ufeffone\r\n\n two \n\nthree")
    assert [(r.value, r.line) for r in read_records(path)] == [
        ({"text": "one"}, 1),
        ({"text": " two "}, 3),
        ({"text": "three"}, 5),
    ]
    blocks = write("b.tokens", " \n = T = \n \n a \n b \n \n c")
    found = list(read_records(blocks, blocks=True))
    assert [(r.value, r.line) for r in found] == [({"text": "= T ="}, 2), ({"text": "a\nb"}, 4), ({"text": "c"}, 7)]
    for index, record in enumerate(found):
        rest = list(read_records(blocks, record.end, record.end_line, blocks=True))
        assert [r.value for r in rest] == [r.value for r in found[index + 1 :]]


@pytest.mark.parametrize(
    ("name", "content", "good", "line", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n{"a": 3}\n', 2, 2, "no valid JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', 1, 2, "a list, not an object"),
        ("a.json", '[{"a": 1},\n{"a": 2,}]', 1, 2, "no valid JSON from here on"),
        ("a.json", '[{"a": 1}\n{"a": 2}]', 1, 2, "a comma"),
        ("a.json", '[{"a": 1},\n', 1, 2, "ends inside the list"),
        ("a.json", '[{"a": 1}]\nx', 1, 2, "follows the end"),
        ("a.json", '[{"a": 1},\n 5]', 1, 2, "a number, not an object"),
        ("a.csv", "q,a\n1,2\n3\n", 1, 3, "1 fields, the header has 2"),
        ("a.csv", 'q,a\n1,2\n"3', 1, 3, "no valid CSV"),
    ],
)
def test_damage_has_a_line(write: Write, name: str, content: str, good: int, line: int, message: str) -> None:
    records = list(read_records(write(name, content)))
    assert sum(record.value is not None for record in records) == good
    (bad,) = (record for record in records if record.value is None)
    assert bad.line == line
    assert message in str(bad.error)


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    for name in ("a.json", "a.jsonl", "a.txt"):
        (tmp_path / name).write_bytes(b'{"a": "\xff\xfe"}\n')
        (record,) = read_records(tmp_path / name)
        assert record.value is None
        assert "UTF-8" in str(record.error)


def test_files_that_are_none(tmp_path: Path, write: Write) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        list(read_records(tmp_path / "no.json"))
    with pytest.raises(ValueError, match="known are"):
        list(read_records(write("a.docx", "x")))
    for name in ("a.parquet", "a.arrow"):
        with pytest.raises(ValueError, match=name):
            list(read_records(write(name, "no such file")))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=3), max_size=5), st.booleans(), st.integers(1, 9))
def test_any_json(tmp_path_factory: pytest.TempPathFactory, rows: list[Any], indented: bool, window: int) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=2 if indented else None), "utf-8", "surrogatepass")
    expected = list(rows)
    chunk, files._CHUNK = files._CHUNK, window
    try:
        records = list(read_records(path))
    finally:
        files._CHUNK = chunk
    if "\\ud" in json.dumps(rows) and any(record.error for record in records):
        return  # half a surrogate pair is no UTF-8
    assert [record.value for record in records] == expected
