"""MindRecord: files that MindSpore wrote are read; what is written here has the same bytes and is read back."""

import json
import sqlite3
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenkit.train.data.files import read_records
from qwenkit.train.data.messagepack import pack_message, unpack_message
from qwenkit.train.data.mindrecord import (
    MindRecordReader,
    pack_integers,
    partitions,
    unpack_integers,
    write_mindrecord,
)

IDS = {"type": "int32", "shape": [-1]}


def rows_of(path: Path) -> list[dict[str, Any]]:
    with MindRecordReader(path) as reader:
        return list(reader.rows())


def test_a_file_of_several_pages(data_folder: Path) -> None:
    rows = rows_of(data_folder / "mindspore" / "mp.mindrecord")
    assert len(rows) == 40
    assert all(set(row) == {"input_ids", "target_ids"} for row in rows)
    values = np.concatenate([row["input_ids"] for row in rows])
    assert {-128, -129, 32767, -32769} <= {int(value) for value in values} | {
        int(value) for row in rows for value in row["target_ids"]
    }


def test_columns_of_every_kind(data_folder: Path) -> None:
    first = data_folder / "mindspore" / "bulk.mindrecord0"
    assert [path.name for path in partitions(first)] == ["bulk.mindrecord0", "bulk.mindrecord1"]
    rows = [row for path in partitions(first) for row in rows_of(path)]
    assert [row["label"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["name"] for row in rows] == ["s0", "s1", "s2", "s3", "s4"]
    assert rows[0]["raw"] == b"ab0"
    assert rows[0]["f"].tolist() == [1.5, 2.5]
    assert rows[1]["input_ids"].tolist() == [1, 2, 3]
    assert rows[0]["l"].tolist() == [[1, -2], [3, 2**40]] or rows[0]["l"].shape == (2, 2)


@pytest.mark.parametrize("name", ["mp.mindrecord", "two.mindrecord0"])
def test_writing_gives_mindspores_bytes(data_folder: Path, tmp_path: Path, name: str) -> None:
    """Pages, index and header, apart from the order of the header's keys, are those of the file that was read."""
    files = partitions(data_folder / "mindspore" / name)
    with MindRecordReader(files[0]) as reader:
        schema = reader.schema
    rows = [row for path in files for row in rows_of(path)]
    if len(files) == 1:
        written = write_mindrecord(tmp_path / name, rows, schema, header_size=16384, page_size=32768)
    else:  # MindSpore fills partitions unevenly, so each is written by itself here, and its header knows only itself
        written = [
            write_mindrecord(tmp_path / path.name, rows_of(path), schema, header_size=16384, page_size=32768)[0]
            for path in files
        ]
    for ours, theirs in zip(written, files, strict=True):
        new, old = ours.read_bytes(), theirs.read_bytes()
        assert new[16384:] == old[16384:]
        headers = [json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]) for data in (new, old)]
        for header in headers:
            if len(files) > 1:
                header["shard_addresses"] = header["shard_id"] = header["compression_size"] = None
                for page in header["page"]:
                    page["shard_id"] = 0
        assert headers[0] == headers[1]
        tables = []
        for path in (ours, theirs):
            database = sqlite3.connect(f"file:{path}.db?mode=ro&immutable=1", uri=True)
            tables.append([database.execute(f"SELECT * FROM {t}").fetchall() for t in ("INDEXES", "SHARD_NAME")])
            database.close()
        assert tables[0] == tables[1]


def test_partitions_and_small_columns_are_written(tmp_path: Path) -> None:
    schema = {"input_ids": IDS, "name": {"type": "string"}, "score": {"type": "float64"}, "n": {"type": "int64"}}
    rows = [
        {"input_ids": np.arange(i), "name": "é" * 40 * i, "score": i / 3, "n": (-1) ** i * 10 ** (2 * i)}
        for i in range(8)
    ]
    written = write_mindrecord(
        tmp_path / "x.mindrecord", rows, schema, num_partitions=3, header_size=1 << 14, page_size=1 << 15
    )
    assert [path.name for path in written] == ["x.mindrecord0", "x.mindrecord1", "x.mindrecord2"]
    back = [row for path in written for row in rows_of(path)]
    for row, given_row in zip(back, rows, strict=True):
        assert row["input_ids"].tolist() == list(given_row["input_ids"])
        assert {k: row[k] for k in ("name", "score", "n")} == {k: given_row[k] for k in ("name", "score", "n")}
    assert not list(tmp_path.glob("*.part*"))
    records = list(read_records(written[1], cursor=1))
    assert [record.line for record in records] == [2, 3]


@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-40000, 40000), max_size=50))
def test_integers_there_and_back(values: list[int]) -> None:
    assert unpack_integers(pack_integers(np.array(values, np.int64))).tolist() == values


@given(st.dictionaries(st.text(max_size=40), st.integers(-(2**63), 2**64 - 1) | st.text() | st.floats(allow_nan=False)))
def test_messages_there_and_back(values: dict[str, Any]) -> None:
    assert unpack_message(pack_message(values)) == values


def test_damaged_files_are_named(data_folder: Path, tmp_path: Path) -> None:
    data = (data_folder / "mindspore" / "mp.mindrecord").read_bytes()
    path = tmp_path / "x.mindrecord"
    for broken in (b"", data[:100], data[:20000], data[:16390] + b"\xff" * 20 + data[16410:]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"x\.mindrecord"):
            rows_of(path)


def test_wrong_rows_are_refused(tmp_path: Path) -> None:
    for row, message in (
        ({"input_ids": [2**31]}, "no int32"),
        ({"input_ids": [0.5]}, "no int32"),
        ({"ids": [1]}, "columns"),
    ):
        with pytest.raises(ValueError, match=message):
            write_mindrecord(tmp_path / "x.mindrecord", [row], {"input_ids": IDS})
    with pytest.raises(ValueError, match="does not fit a page"):
        write_mindrecord(tmp_path / "x.mindrecord", [{"input_ids": [0] * 99}], {"input_ids": IDS}, page_size=64)
    assert not (tmp_path / "x.mindrecord").exists()
