"""The file in which a batch keeps its finished lines until all are there.

In: one JSON record at a time, in any order. Out: at the end the records in the order of their lines, put in place by one
rename. A record is one line, written at once: a run killed at any byte leaves at most one torn last line, which is dropped
when the next run goes on. The first line says what the batch is; another batch is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from qwenkit.storage import atomic_replace


class Journal:
    """Open (or go on with) the journal at `path` of the batch that `header` describes; one process at a time.

    `done` holds the lines that are finished. Raises ValueError for the journal of another batch, for a file that is no
    journal, and while another process writes it.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another run is writing {path}: wait for its end, or stop it") from None
            self._places, self._end = _scan(path, header)
            os.ftruncate(self._fd, self._end)
            if not self._end:
                self._write(_line(header))
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    @property
    def done(self) -> set[int]:
        return set(self._places)

    def append(self, line: int, record: dict[str, Any]) -> None:
        """Keep the record of a finished line; it survives the end of this process from here on."""
        assert line not in self._places
        assert record["line"] == line
        data = _line(record)
        self._places[line] = self._end, len(data)
        self._write(data)

    def _write(self, data: bytes) -> None:
        self._end += len(data)
        while data:
            data = data[os.write(self._fd, data) :]

    def finish(self, output: Path) -> None:
        """Put all records, in the order of their lines, in place as `output`, and remove the journal."""
        beside = self.path.with_name(self.path.name + ".sorted")
        with self.path.open("rb") as source, beside.open("wb") as target:
            for _, (start, length) in sorted(self._places.items()):
                source.seek(start)
                target.write(source.read(length))
        atomic_replace(beside, output)
        self.path.unlink()


def finished_lines(path: Path, header: dict[str, Any]) -> set[int]:
    """The lines that the journal at `path` holds, without touching it; none if there is no journal. Raises like Journal."""
    return set(_scan(path, header)[0]) if path.exists() else set()


def _scan(path: Path, header: dict[str, Any]) -> tuple[dict[int, tuple[int, int]], int]:
    """Where each record stands (line -> start and length in bytes), and the end of the last whole one."""
    places: dict[int, tuple[int, int]] = {}
    with path.open("rb") as file:
        first = file.readline()
        if not first.endswith(b"\n"):
            if _line(header).startswith(first):  # empty, or killed while it was begun
                return places, 0
            raise ValueError(f"{path} is no journal of this batch: move it away or delete it")
        _check_header(path, first, header)
        end = len(first)
        for data in file:
            if not data.endswith(b"\n"):
                break
            try:
                places[json.loads(data)["line"]] = end, len(data)
            except (ValueError, LookupError, TypeError):
                raise ValueError(f"{path} is damaged at byte {end}: delete it to begin again") from None
            end += len(data)
    return places, end


def _check_header(path: Path, first: bytes, header: dict[str, Any]) -> None:
    try:
        found = json.loads(first)
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.keys() != header.keys():
        raise ValueError(f"{path} is no journal of a batch: move it away or delete it")
    other = [name for name in header if found[name] != header[name]]
    if other:
        raise ValueError(
            f"{path} was begun with other {' and '.join(other)}: run it with the same, or delete it to begin again"
        )


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"
