"""MindRecord, MindSpore's file of records (version 3.0): reading without MindSpore, and writing what MindDataset opens.

In: a path such as data.mindrecord or data.mindrecord0 (one of several partitions). Out: rows, dicts of numbers, texts, bytes and
numpy arrays. A file is a JSON header and pages: raw pages hold the small columns as MessagePack, blob pages bytes and arrays.
Layout: reference notes on the format, checked against files that MindSpore 2.10 wrote.
"""

from __future__ import annotations

import json
import os
import sqlite3
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwenkit.storage import install
from qwenkit.train.data.messagepack import pack_message, unpack_message

HEADER_SIZE = 1 << 24
PAGE_SIZE = 1 << 25
_ARRAYS = {"int32": "<i4", "int64": "<i8", "float32": "<f4", "float64": "<f8"}
_INTEGERS = ("int32", "int64")
_WIDTHS = (1, 2, 4, 8)


def partitions(path: Path) -> list[Path]:
    """The files of one data set: the path itself, or, if it is the first of several (…0), all of them in order."""
    if not path.name.endswith("0"):
        return [path]
    stem = str(path)[:-1]
    files: list[Path] = []
    while (part := Path(f"{stem}{len(files)}")).is_file():
        files.append(part)
    return files or [path]


class MindRecordReader:
    """One partition, open. ValueError naming the file where it is damaged; close it, or use it in a `with`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb")
        try:
            (length,) = struct.unpack("<Q", self._exactly(8))
            if length > os.path.getsize(path):
                raise ValueError("its header is longer than the file")
            header = json.loads(self._exactly(length))
            self.schema: dict[str, dict[str, Any]] = header["schema"][0]["schema"]
            self._blob_fields: list[str] = header["schema"][0].get("blob_fields") or []
            self._header_size, self._page_size = int(header["header_size"]), int(header["page_size"])
            pages = sorted(header["page"], key=lambda page: (page["page_type_id"], page["page_id"]))
            self._blobs = [page for page in pages if page["page_type"] == "BLOB_DATA"]
            self._raws = [page for page in pages if page["page_type"] == "RAW_DATA"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            self._file.close()
            raise ValueError(f"{path} is no MindRecord file that can be read: {error}") from None

    def __enter__(self) -> MindRecordReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def rows(self, skip: int = 0) -> Iterator[dict[str, Any]]:
        """The rows from number `skip` on: the raw columns' values, and numpy arrays of the shape the schema gives."""
        try:
            raws = self._entries(self._raws)
            if not self._blob_fields:
                for number, raw in enumerate(raws):
                    if number >= skip:
                        yield self._columns(raw)
                return
            for page in self._blobs:
                start, end = int(page["start_row_id"]), int(page["end_row_id"])
                for number, blob in zip(range(start, end), self._entries([page]), strict=True):
                    raw = next(raws)
                    if number >= skip:
                        yield self._columns(raw) | self._blob_columns(blob)
        except (ValueError, KeyError, IndexError, TypeError, StopIteration, struct.error) as error:
            raise ValueError(f"{self._path} is damaged: {error}") from None

    def _exactly(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) != count:
            raise ValueError("the file ends too early")
        return data

    def _entries(self, pages: Sequence[Mapping[str, Any]]) -> Iterator[bytes]:
        for page in pages:
            at = self._header_size + int(page["page_id"]) * self._page_size
            end = at + int(page["page_size"])
            while at < end:
                self._file.seek(at)
                (length,) = struct.unpack("<Q", self._exactly(8))
                if at + 8 + length > end:
                    raise ValueError("a row is longer than its page")
                yield self._exactly(length)
                at += 8 + length

    def _columns(self, raw: bytes) -> dict[str, Any]:
        columns = [name for name in self.schema if name not in self._blob_fields]
        values = unpack_message(raw)
        return {name: values[name] for name in columns}

    def _blob_columns(self, blob: bytes) -> dict[str, Any]:
        if len(self._blob_fields) == 1:
            return {self._blob_fields[0]: self._array(self._blob_fields[0], blob)}
        values, at = {}, 0
        for name in self._blob_fields:
            (length,) = struct.unpack_from(">Q", blob, at)
            values[name] = self._array(name, blob[at + 8 : at + 8 + length])
            at += 8 + length
        if at != len(blob):
            raise ValueError("a row's columns do not fill it")
        return values

    def _array(self, name: str, data: bytes) -> Any:
        kind = self.schema[name]["type"]
        if kind == "bytes":
            return data
        shape = [int(size) for size in self.schema[name].get("shape", [-1])]
        if kind in _INTEGERS:
            return unpack_integers(data).astype(_ARRAYS[kind]).reshape(shape)
        return np.frombuffer(data, _ARRAYS[kind]).reshape(shape)


def write_mindrecord(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    schema: Mapping[str, Mapping[str, Any]],
    *,
    num_partitions: int = 1,
    header_size: int = HEADER_SIZE,
    page_size: int = PAGE_SIZE,
) -> list[Path]:
    """Write rows as one file, or as `num_partitions` files (…0, …1, …), each with its index FILE.db. Returns the files.

    schema: {"input_ids": {"type": "int32", "shape": [-1]}, "name": {"type": "string"}, …}; types int32, int64, float32, float64,
    string and bytes; a column is an array if it has a shape. Files are written beside and renamed at the end. ValueError for a
    value that does not fit its type or a row longer than a page.
    """
    blob_fields = sorted(name for name, field in schema.items() if "shape" in field or field["type"] == "bytes")
    names = [f"{path.name}{i}" for i in range(num_partitions)] if num_partitions > 1 else [path.name]
    share = -(-len(rows) // num_partitions)
    shape = {"header_size": header_size, "page_size": page_size, "schema": dict(schema), "blob_fields": blob_fields}
    written = [path.with_name(name) for name in names]
    shards = [_Shard(shard_path, number, names, shape) for number, shard_path in enumerate(written)]
    try:
        for number, shard in enumerate(shards):
            shard.write_rows(rows[number * share : (number + 1) * share])
        for shard in shards:
            shard.write_header(sum(each.saved for each in shards))
    except BaseException:
        for shard_path in written:
            Path(f"{shard_path}.part").unlink(missing_ok=True)
            Path(f"{shard_path}.part.db").unlink(missing_ok=True)
        raise
    install(
        [
            (Path(f"{shard_path}.part{kind}"), Path(f"{shard_path}{kind}"))
            for shard_path in written
            for kind in (".db", "")
        ]
    )
    return written


class _Shard:
    """Lays rows out in pages: a blob page and, growing beside it, raw pages with one row group for each blob page."""

    def __init__(self, path: Path, shard: int, names: Sequence[str], shape: dict[str, Any]) -> None:
        self._path, self._shard, self._names = path, shard, names
        self._schema, self._blob_fields = shape["schema"], shape["blob_fields"]
        self._header_size, self._page_size = shape["header_size"], shape["page_size"]
        self._pages: list[dict[str, Any]] = []
        self.saved = 0  # bytes that packing integers saved, which the headers note for all partitions together

    def write_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        index: list[tuple[int, ...]] = []
        raw_page = blob_page = None
        with open(f"{self._path}.part", "wb") as file:
            for number, row in enumerate(rows):
                raw, blob = self._encode(row)
                opened = False
                if self._blob_fields and (blob_page is None or blob_page["page_size"] + len(blob) > self._page_size):
                    blob_page, opened = self._new_page("BLOB_DATA", number, len(blob)), True
                if raw_page is None or raw_page["page_size"] + len(raw) > self._page_size:
                    raw_page, opened = self._new_page("RAW_DATA", 0, len(raw)), True
                if opened:
                    groups = raw_page["row_group_ids"]
                    groups.append({"id": len(groups), "offset": raw_page["page_size"]})
                group = raw_page["row_group_ids"][-1]["id"]
                place = [number, raw_page["page_id"], raw_page["page_size"], raw_page["page_size"] + len(raw), group]
                self._put(file, raw_page, raw)
                if blob_page is not None:
                    start = blob_page["page_size"]
                    place += [blob_page["page_id"], start, start + len(blob)]
                    self._put(file, blob_page, blob)
                    blob_page["end_row_id"] = number + 1
                else:
                    place += [0, 0, 0]
                index.append(tuple(place))
        self._write_index(index)

    def write_header(self, saved: int) -> None:
        header = self._header(saved)
        if 8 + len(header) > self._header_size:
            raise ValueError(f"{self._path} needs a header of more than header_size {self._header_size} bytes")
        with open(f"{self._path}.part", "r+b") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(max(self._header_size, file.seek(0, os.SEEK_END)))

    def _new_page(self, kind: str, start: int, length: int) -> dict[str, Any]:
        if length > self._page_size:
            raise ValueError(f"{self._path}: a row of {length} bytes does not fit a page of {self._page_size}")
        page = {
            "end_row_id": start,
            "page_id": len(self._pages),
            "page_size": 0,
            "page_type": kind,
            "page_type_id": sum(page["page_type"] == kind for page in self._pages),
            "row_group_ids": [{"id": 0, "offset": 0}] if kind == "BLOB_DATA" else [],
            "shard_id": self._shard,
            "start_row_id": start,
        }
        self._pages.append(page)
        return page

    def _put(self, file: Any, page: dict[str, Any], data: bytes) -> None:
        file.seek(self._header_size + page["page_id"] * self._page_size + page["page_size"])
        file.write(data)
        page["page_size"] += len(data)

    def _encode(self, row: Mapping[str, Any]) -> tuple[bytes, bytes]:
        """The two parts of a row, each with its length before it."""
        if set(row) != set(self._schema):
            raise ValueError(f"a row has the columns {sorted(row)}, the schema has {sorted(self._schema)}")
        small = {
            name: _checked(name, field, row[name])
            for name, field in self._schema.items()
            if name not in self._blob_fields
        }
        raw = pack_message(small or {"id": 0})
        parts = [self._blob(name, row[name]) for name in self._blob_fields]
        if len(parts) > 1:
            parts = [struct.pack(">Q", len(part)) + part for part in parts]
        blob = b"".join(parts)
        return struct.pack("<Q", len(raw)) + raw, struct.pack("<Q", len(blob)) + blob

    def _blob(self, name: str, value: Any) -> bytes:
        kind = self._schema[name]["type"]
        if kind == "bytes":
            return bytes(value)
        if kind not in _ARRAYS:
            raise ValueError(f"the column {name} is an array of {kind}; allowed are {', '.join(_ARRAYS)}")
        array = np.asarray(value)
        if kind in _INTEGERS:
            limits = np.iinfo(_ARRAYS[kind])
            fits = array.dtype.kind in "iu" or array.size == 0
            if not fits or (array.size and not limits.min <= array.min() <= array.max() <= limits.max):
                raise ValueError(f"the column {name} has a value that is no {kind}")
            packed = pack_integers(array.reshape(-1))
            self.saved += array.size * np.dtype(_ARRAYS[kind]).itemsize - len(packed)
            return packed
        return array.astype(_ARRAYS[kind]).tobytes()

    def _header(self, saved: int) -> bytes:
        schema = {"blob_fields": self._blob_fields, "desc": "", "schema": self._schema}
        header = {
            "header_size": self._header_size,
            "index_fields": None,
            "page": self._pages,
            "page_size": self._page_size,
            "compression_size": max(0, saved),
            "schema": [schema],
            "shard_addresses": list(self._names),
            "shard_id": self._shard,
            "statistics": None,
            "version": "3.0",
        }
        return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()

    def _write_index(self, index: Sequence[tuple[int, ...]]) -> None:
        columns = (
            *("ROW_ID", "PAGE_ID_RAW", "PAGE_OFFSET_RAW", "PAGE_OFFSET_RAW_END", "ROW_GROUP_ID"),
            *("PAGE_ID_BLOB", "PAGE_OFFSET_BLOB", "PAGE_OFFSET_BLOB_END"),
        )
        path = Path(f"{self._path}.part.db")
        path.unlink(missing_ok=True)
        database = sqlite3.connect(path)
        try:
            with database:
                fields = ", ".join(f"{name} INT NOT NULL" for name in columns)
                database.execute(f"CREATE TABLE INDEXES({fields}, PRIMARY KEY(ROW_ID))")
                database.execute("CREATE TABLE SHARD_NAME(NAME TEXT NOT NULL)")
                database.execute("INSERT INTO SHARD_NAME VALUES (?)", (self._path.name,))
                marks = ", ".join("?" * len(columns))
                database.executemany(f"INSERT INTO INDEXES VALUES ({marks})", index)
        finally:
            database.close()


def pack_integers(values: np.ndarray) -> bytes:
    """MindRecord's form of integers: count (big-endian u32), two bits for each one's width, then each in 1, 2, 4 or 8 bytes."""
    numbers = values.astype(np.int64)
    codes = np.zeros(len(numbers), np.uint8)
    for bits in (8, 16, 32):
        codes += (numbers < -(1 << bits - 1)) | (numbers >= 1 << bits - 1)
    padded = np.zeros(-(-len(codes) // 4) * 4, np.uint8)
    padded[: len(codes)] = codes
    quads = padded.reshape(-1, 4)
    widths = quads[:, 0] << 6 | quads[:, 1] << 4 | quads[:, 2] << 2 | quads[:, 3]
    kept = np.arange(8) < (1 << codes.astype(np.int64))[:, None]
    body = numbers.astype("<i8").view(np.uint8).reshape(-1, 8)[kept]
    return struct.pack(">I", len(numbers)) + widths.astype(np.uint8).tobytes() + body.tobytes()


def unpack_integers(data: bytes) -> np.ndarray:
    """The inverse of `pack_integers`: (n,) int64. ValueError where the bytes do not fit together."""
    (count,) = struct.unpack_from(">I", data)
    at = 4 + -(-count // 4)
    quads = np.frombuffer(data, np.uint8, at - 4, 4)
    codes = np.stack([quads >> 6, quads >> 4 & 3, quads >> 2 & 3, quads & 3], axis=1).reshape(-1)[:count]
    widths = 1 << codes.astype(np.int64)
    if len(data) != at + int(widths.sum()):
        raise ValueError("packed integers have another length than their widths say")
    body = np.frombuffer(data, np.uint8, offset=at)
    starts = np.cumsum(widths) - widths
    values = np.zeros(count, np.int64)
    for code, width in enumerate(_WIDTHS):
        chosen = np.flatnonzero(codes == code)
        places = starts[chosen][:, None] + np.arange(width)
        values[chosen] = body[places].reshape(-1).view(f"<i{width}")
    return values


def _checked(name: str, field: Mapping[str, Any], value: Any) -> Any:
    kind = field["type"]
    if kind == "string" and isinstance(value, str):
        return value
    if kind in _INTEGERS and isinstance(value, int | np.integer) and not isinstance(value, bool):
        limits = np.iinfo(_ARRAYS[kind])
        if limits.min <= value <= limits.max:
            return int(value)
    if kind in ("float32", "float64") and isinstance(value, float | int | np.floating):
        return float(value)
    raise ValueError(f"the column {name} has the value {value!r}, which is no {kind}")
