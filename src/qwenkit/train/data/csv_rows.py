"""Rows of a CSV file with their places: strict where it can be, as spreadsheets read it where a quote is out of place.

In: a file and where to begin. Out: rows with the bytes and lines that they cover. A row that cannot be read is one bad row, and
reading continues with the next line.
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from qwenkit.files import open_file

_LIMIT = 1 << 30  # the module's own limit of 128 KiB is shorter than a long answer


class Row(NamedTuple):
    """fields, or None with the reason in `error`; cursor and line of its beginning and of the next row."""

    fields: list[str] | None
    cursor: int
    line: int
    end: int
    end_line: int
    error: str | None = None


class _Lines:
    """Lines for the csv module, counting bytes and lines as it takes them."""

    def __init__(self, file: BinaryIO, cursor: int, line: int) -> None:
        file.seek(cursor)
        self._file = file
        self.cursor, self.line = cursor, line

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        data = self._file.readline()
        if not data:
            raise StopIteration
        text = data.removeprefix(codecs.BOM_UTF8) if self.cursor == 0 else data
        self.cursor += len(data)
        self.line += 1
        return text.decode("utf-8")


def read_rows(path: Path, cursor: int = 0, line: int = 1) -> Iterator[Row]:
    """The rows from `cursor`, which is on `line`; blank lines are passed over."""
    csv.field_size_limit(_LIMIT)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with open_file(path) as file:
        while True:
            row = _row(file, cursor, line, delimiter)
            if row is None:
                return
            cursor, line = row.end, row.end_line
            if row.fields != []:
                yield row


def _row(file: BinaryIO, cursor: int, line: int, delimiter: str) -> Row | None:
    why = ""
    for strict in (True, False):
        lines = _Lines(file, cursor, line)
        try:
            fields = next(csv.reader(lines, delimiter=delimiter, strict=strict), None)
            return None if fields is None else Row(fields, cursor, line, lines.cursor, lines.line)
        except UnicodeDecodeError:
            why = "the row is not valid UTF-8"
            break
        except csv.Error as error:
            why = f"no valid CSV: {error}"
            if "unexpected end of data" in str(error):  # a quote that is never closed would take in the whole rest
                why = "no valid CSV: a quote that is opened here is never closed"
                break
    file.seek(cursor)
    file.readline()
    return Row(None, cursor, line, file.tell(), line + 1, why)
