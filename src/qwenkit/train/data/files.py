"""Files of records: JSON, JSON Lines, CSV, Parquet, Arrow, MindRecord, plain text.

In: a path, and a cursor from which to go on. Out: `Record`s one after another, in bounded memory whatever the size of the file.
A record that cannot be read comes out too, with its line and the reason, because what to do about it is the caller's policy.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qwenkit.files import has_file, open_file
from qwenkit.installation import install_extra
from qwenkit.train.data.csv_rows import read_rows
from qwenkit.train.data.mindrecord import MindRecordReader

KINDS = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "text",
    ".text": "text",
    ".tokens": "text",
    ".raw": "text",
}
_CHUNK = 1 << 20  # bytes read at a time
_BOM = codecs.BOM_UTF8


@dataclass(frozen=True)
class Record:
    """One entry of a file: a JSON object in `value`, or None with the reason in `error`.

    line is the line the entry begins at, or, in files without lines, its row; both count from 1. `end` and `end_line` are the
    cursor and line of the next entry: reading from there goes on exactly. A cursor is a byte, or a row where there are rows.
    """

    value: dict[str, Any] | None
    line: int
    cursor: int
    end: int
    end_line: int
    error: str | None = None


def file_kind(path: Path) -> str:
    """What a file's name says it holds; ValueError for a name that says nothing known."""
    if re.search(r"\.mindrecord\d*$", path.name):
        return "mindrecord"
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path} has an ending that is no data file's; known are {', '.join(KINDS)} and .mindrecord")
    return kind


def read_records(
    path: Path, cursor: int = 0, line: int = 1, *, blocks: bool = False, texts: bool = False
) -> Iterator[Record]:
    """The entries of a file from `cursor`, which stands at `line`: 0 and 1, or `end` and `end_line` of an earlier Record.

    A text file gives {"text": line} for each line that is not blank; with `blocks`, for each stretch of such lines. With `texts`
    a JSON entry that is a text counts as {"text": entry} too.
    Raises FileNotFoundError, and ValueError for an unknown kind of file or one that is damaged as a whole.
    """
    if not has_file(path):
        raise FileNotFoundError(f"{path} does not exist")
    kind = file_kind(path)
    if kind == "jsonl" and _is_whole_json(path):
        kind = "json"
    if kind == "json":
        with open_file(path) as file:
            yield from _JsonFile(file, path.name, texts).records(cursor, line)
    elif kind == "text" and blocks:
        yield from _read_blocks(path, cursor, line)
    elif kind in ("jsonl", "text"):
        parse = (_object_or_text_of if texts else _object_of) if kind == "jsonl" else _text_of
        yield from _read_lines(path, cursor, line, parse)
    elif kind == "csv":
        yield from _read_csv(path, cursor, line)
    else:
        rows = {"parquet": _parquet_rows, "arrow": _arrow_rows, "mindrecord": _mindrecord_rows}[kind](path, cursor)
        for row, value in enumerate(rows, start=cursor):
            yield Record(value, row + 1, row, row + 1, row + 2)


def _is_whole_json(path: Path) -> bool:
    """True for a list, or objects over several lines, in a file that is named as if each line were one."""
    with open_file(path) as file:
        for data in file:
            if begin := data.removeprefix(_BOM).strip():
                return (
                    begin == b"{" or (begin.startswith(b"[") and not begin.endswith(b"]")) or _is_one_line(begin, file)
                )
    return False


def _is_one_line(begin: bytes, file: BinaryIO) -> bool:
    """True where a list of objects is all that there is."""
    return begin.startswith(b"[{") and not file.read().strip()


class _JsonFile:
    """A list of objects, or objects one after another (JSON Lines named .json), decoded a window at a time."""

    def __init__(self, file: BinaryIO, name: str, texts: bool = False) -> None:
        self._file, self._name, self._texts = file, name, texts
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._at = 0  # read so far, within _text
        self._ended = False
        self._cursor = 0  # of _text[_at], in bytes
        self._line = 1
        self._decoder = json.JSONDecoder()

    def records(self, cursor: int, line: int) -> Iterator[Record]:
        try:
            yield from self._records(cursor, line)
        except UnicodeDecodeError:
            yield self._broken("the file is not valid UTF-8 from here on, and is not read further")

    def _records(self, cursor: int, line: int) -> Iterator[Record]:
        if self._file.read(len(_BOM)) == _BOM:
            self._cursor = len(_BOM)
        self._file.seek(self._cursor)
        is_list = self._next() == "["
        if cursor:
            self._seek(cursor, line)
        elif is_list:
            self._advance(self._at + 1)
        # An entry's own cursor stands at its beginning, the end of the one before at a comma.
        first = cursor == 0 or self._next() not in (",", "]")
        while (sign := self._next()) is not None:
            if is_list and sign == "]":
                self._advance(self._at + 1)
                if self._next() is not None:
                    yield self._broken("something follows the end of the list, and is not read")
                return
            if is_list and not first:
                if sign != ",":
                    yield self._broken("a comma or the end of the list is missing; the rest of the file is not read")
                    return
                self._advance(self._at + 1)
                if self._next() is None:
                    break
            first = False
            start, start_line = self._cursor, self._line
            try:
                value = self._value()
            except (ValueError, RecursionError) as error:
                yield self._broken(
                    f"no valid JSON from here on, the rest of the file is not read: {error}", start, start_line
                )
                return
            if self._texts and isinstance(value, str):
                value = {"text": value}
            wrong = None if isinstance(value, dict) else f"the entry is {_kind_of(value)}, not an object"
            yield Record(None if wrong else value, start_line, start, self._cursor, self._line, wrong)
        if is_list:
            yield self._broken("the file ends inside the list")

    def _seek(self, cursor: int, line: int) -> None:
        self._file.seek(cursor)
        self._utf8.reset()
        self._text, self._at, self._ended, self._cursor, self._line = "", 0, False, cursor, line

    def _broken(self, reason: str, cursor: int | None = None, line: int | None = None) -> Record:
        cursor, line = self._cursor if cursor is None else cursor, self._line if line is None else line
        return Record(None, line, cursor, cursor, line, reason)

    def _fill(self) -> None:
        """Forget what was read, and read on: at least as much again as is waiting."""
        data = self._file.read(max(_CHUNK, len(self._text) - self._at))
        self._ended = not data
        self._text = self._text[self._at :] + self._utf8.decode(data, final=self._ended)
        self._at = 0

    def _advance(self, to: int) -> None:
        passed = self._text[self._at : to]
        self._cursor += len(passed) if passed.isascii() else len(passed.encode())
        self._line += passed.count("\n")
        self._at = to

    def _next(self) -> str | None:
        """Skip white space; the character that stands there, None at the end of the file."""
        while True:
            at = self._at
            while at < len(self._text) and self._text[at] in " \t\r\n":
                at += 1
            self._advance(at)
            if at < len(self._text):
                return self._text[at]
            if self._ended:
                return None
            self._fill()

    def _value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended:
                    raise ValueError(error.msg) from None
            else:
                # A number may go on behind the window's end.
                if end < len(self._text) or self._ended:
                    self._advance(end)
                    return value
            self._fill()


def _read_lines(path: Path, cursor: int, line: int, parse: Any) -> Iterator[Record]:
    with open_file(path) as file:
        file.seek(cursor)
        for data in file:
            end = cursor + len(data)
            body = data.removeprefix(_BOM) if cursor == 0 else data
            if body.strip():
                value, error = parse(body)
                yield Record(value, line, cursor, end, line + 1, error)
            cursor, line = end, line + 1


def _text_of(data: bytes) -> tuple[dict[str, Any] | None, str | None]:
    try:
        return {"text": data.decode("utf-8").rstrip("\r\n")}, None
    except UnicodeDecodeError:
        return None, "the line is not valid UTF-8"


def _object_of(data: bytes) -> tuple[dict[str, Any] | None, str | None]:
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        return None, "the line is not valid UTF-8"
    except (ValueError, RecursionError) as error:
        return None, f"the line is no valid JSON: {error}"
    return (value, None) if isinstance(value, dict) else (None, f"the entry is {_kind_of(value)}, not an object")


def _object_or_text_of(data: bytes) -> tuple[dict[str, Any] | None, str | None]:
    value, error = _object_of(data)
    if value is None and data.lstrip()[:1] == b'"':
        with contextlib.suppress(ValueError):
            return {"text": str(json.loads(data))}, None
    return value, error


def _read_blocks(path: Path, cursor: int, line: int) -> Iterator[Record]:
    """Lines up to a blank one together, each without the blanks around it."""
    lines: list[str] = []
    first: tuple[int, int] | None = None
    error: str | None = None
    end, end_line = cursor, line
    with open_file(path) as file:
        file.seek(cursor)
        for data in file:
            start, start_line = end, end_line
            end, end_line = end + len(data), end_line + 1
            value, wrong = _text_of(data.removeprefix(_BOM) if start == 0 else data)
            error = error or wrong
            if wrong or (value is not None and value["text"].strip()):
                first = first or (start, start_line)
                lines.append("" if value is None else value["text"].strip())
            elif first is not None:
                yield Record(None if error else {"text": "\n".join(lines)}, first[1], first[0], end, end_line, error)
                lines, first, error = [], None, None
    if first is not None:
        yield Record(None if error else {"text": "\n".join(lines)}, first[1], first[0], end, end_line, error)


def _read_csv(path: Path, cursor: int, line: int) -> Iterator[Record]:
    header = next(read_rows(path), None)
    if header is None:
        return
    if header.fields is None:
        raise ValueError(f"{path} has no header that can be read: {header.error}")
    start = (cursor, line) if cursor else (header.end, header.end_line)
    for row in read_rows(path, *start):
        error = row.error
        if row.fields is not None and len(row.fields) != len(header.fields):
            error = f"the row has {len(row.fields)} fields, the header has {len(header.fields)}"
        value = None if error or row.fields is None else dict(zip(header.fields, row.fields, strict=True))
        yield Record(value, row.line, row.cursor, row.end, row.end_line, error)


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise ValueError(f"{path} needs pyarrow to be read: {install_extra('data')}") from None
    return pyarrow


def _parquet_rows(path: Path, skip: int) -> Iterator[dict[str, Any]]:
    pyarrow = _pyarrow(path)
    from pyarrow import parquet  # type: ignore[import-untyped, unused-ignore]

    try:
        with parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if skip >= rows:
                    skip -= rows
                    continue
                for batch in file.iter_batches(batch_size=256, row_groups=[group]):
                    yield from batch.to_pylist()[skip:]
                    skip = max(0, skip - batch.num_rows)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is no Parquet file that can be read: {error}") from None


def _arrow_rows(path: Path, skip: int) -> Iterator[dict[str, Any]]:
    pyarrow = _pyarrow(path)
    try:
        with pyarrow.memory_map(str(path)) as source:
            try:
                file = pyarrow.ipc.open_file(source)
                batches: Any = (file.get_batch(index) for index in range(file.num_record_batches))
            except pyarrow.ArrowInvalid:  # the other of the two Arrow forms, which datasets writes
                source.seek(0)
                batches = pyarrow.ipc.open_stream(source)
            for batch in batches:
                for start in range(min(skip, batch.num_rows), batch.num_rows, 256):
                    yield from batch.slice(start, 256).to_pylist()
                skip = max(0, skip - batch.num_rows)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is no Arrow file that can be read: {error}") from None


def _mindrecord_rows(path: Path, skip: int) -> Iterator[dict[str, Any]]:
    with MindRecordReader(path) as reader:
        yield from reader.rows(skip)


def _kind_of(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list"}
    return names.get(type(value), "an object")
