"""What the batch API remembers: files, batches and every line of a batch, in one SQLite database in the data folder.

In: transitions asked for by the routes and the worker. Out: rows as FileRow and BatchRow. Each transition is one
transaction that checks the state it starts from, so a kill at any moment leaves the state before or after it, and a line
gets one result however often it was tried. Contents of files lie beside the database under names made here; a file on disk
without a row is what a kill left behind and is deleted at start. One process at a time owns a data folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwenkit.serve.batch.rows import BatchRow, FileRow, Line, NewFile, new_id

DATABASE = "batches.sqlite3"
OPEN = ("validating", "in_progress", "finalizing", "cancelling")
RETENTION = 90 * 86400  # seconds that a finished batch stays listed

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files(
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, purpose TEXT NOT NULL,
    filename TEXT NOT NULL, bytes INTEGER NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER);
CREATE INDEX IF NOT EXISTS files_by_owner ON files(owner, seq);
CREATE TABLE IF NOT EXISTS batches(
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, owner_name TEXT NOT NULL,
    endpoint TEXT NOT NULL, input_file_id TEXT NOT NULL, completion_window TEXT NOT NULL, metadata TEXT, output_seconds INTEGER,
    status TEXT NOT NULL, outcome TEXT, errors TEXT, model TEXT, output_file_id TEXT, error_file_id TEXT,
    created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL, in_progress_at INTEGER, finalizing_at INTEGER,
    cancelling_at INTEGER, completed_at INTEGER, failed_at INTEGER, expired_at INTEGER, cancelled_at INTEGER,
    total INTEGER NOT NULL DEFAULT 0, completed INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0,
    result_bytes INTEGER NOT NULL DEFAULT 0, input_tokens INTEGER NOT NULL DEFAULT 0,
    output_tokens INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS batches_by_owner ON batches(owner, seq);
CREATE INDEX IF NOT EXISTS batches_open ON batches(status)
    WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling');
CREATE TABLE IF NOT EXISTS lines(
    batch INTEGER NOT NULL, line INTEGER NOT NULL, custom_id TEXT NOT NULL, start INTEGER NOT NULL,
    length INTEGER NOT NULL, ok INTEGER, record BLOB, PRIMARY KEY(batch, line));
CREATE INDEX IF NOT EXISTS lines_waiting ON lines(batch, line) WHERE ok IS NULL;
"""


_OWN_NAME = re.compile(r"file-[0-9A-Za-z]+(\.part)?")


class BatchStore:
    """The database in `folder` and the contents beside it. Methods block and may be called from any thread.

    Raises ValueError when another process owns the folder, OSError or sqlite3.Error when it cannot be written.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self.folder, self._clock, self._lock = folder, clock, threading.RLock()
        self._contents = folder / "files"
        self._contents.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._owned = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._owned, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._owned)
            raise ValueError(f"data_dir is {str(folder)!r}, which another server uses: give each its own") from None
        self._db = sqlite3.connect(folder / DATABASE, check_same_thread=False, isolation_level=None)
        os.chmod(folder / DATABASE, 0o600)
        self._db.row_factory = sqlite3.Row
        for pragma in ("auto_vacuum = INCREMENTAL", "journal_mode = WAL", "synchronous = FULL"):
            self._db.execute(f"PRAGMA {pragma}").fetchall()
        self._db.executescript(_SCHEMA)
        self._remove_orphans()

    def close(self) -> None:
        with self._lock:
            self._db.close()
            os.close(self._owned)

    @property
    def now(self) -> int:
        return int(self._clock())

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.rollback()
                raise
            self._db.commit()

    def _rows(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    def _remove_orphans(self) -> None:
        known = {row["id"] for row in self._rows("SELECT id FROM files")}
        for path in self._contents.iterdir():
            if path.name not in known and _OWN_NAME.fullmatch(path.name):  # other files are somebody else's
                path.unlink()

    # -- files -----------------------------------------------------------------------------------------------------

    def path(self, file_id: str) -> Path:
        """Where a file's bytes lie; the id is one that this store made."""
        assert file_id.startswith("file-")
        assert file_id[5:].isalnum()
        return self._contents / file_id

    def add_file(self, owner: str, purpose: str, new: NewFile, seconds: int | None) -> FileRow:
        """The row of a file whose bytes are in place; it expires after `seconds`."""
        with self._transaction():
            self._insert_file(owner, purpose, new, seconds)
        row = self.file(owner, new.id)
        assert row is not None
        return row

    def _insert_file(self, owner: str, purpose: str, new: NewFile, seconds: int | None) -> None:
        self._db.execute(
            "INSERT INTO files(id, owner, purpose, filename, bytes, created_at, expires_at) VALUES(?,?,?,?,?,?,?)",
            (new.id, owner, purpose, new.filename, new.bytes, self.now, seconds and self.now + seconds),
        )

    def file(self, owner: str, file_id: str) -> FileRow | None:
        """The file of that id if it is this owner's and has not expired."""
        found = self._rows(
            "SELECT * FROM files WHERE id=? AND owner=? AND (expires_at IS NULL OR expires_at > ?)",
            *(file_id, owner, self.now),
        )
        return FileRow(**dict(found[0])) if found else None

    def files(
        self, owner: str, purpose: str | None, after: int | None, limit: int, newest_first: bool
    ) -> list[FileRow]:
        """Up to `limit` files of an owner beyond the one with seq `after`."""
        order, beyond = ("DESC", "<") if newest_first else ("ASC", ">")
        rows = self._rows(
            f"SELECT * FROM files WHERE owner=? AND (? IS NULL OR purpose=?) AND (? IS NULL OR seq {beyond} ?)"
            f" AND (expires_at IS NULL OR expires_at > ?) ORDER BY seq {order} LIMIT ?",
            *(owner, purpose, purpose, after, after, self.now, limit),
        )
        return [FileRow(**dict(row)) for row in rows]

    def delete_file(self, owner: str, file_id: str) -> bool:
        """Delete row and bytes. False, and nothing is deleted, while an unfinished batch reads the file."""
        with self._transaction() as db:
            used = "SELECT 1 FROM batches WHERE input_file_id=? AND status IN (?,?,?,?)"
            if db.execute(used, (file_id, *OPEN)).fetchone():
                return False
            deleted = db.execute("DELETE FROM files WHERE id=? AND owner=?", (file_id, owner)).rowcount
        if deleted:
            self.path(file_id).unlink(missing_ok=True)
        return True

    def held(self, owner: str | None = None) -> tuple[int, int]:
        """Bytes and files that an owner (None: everybody) keeps on disk, results of unfinished batches included."""
        mine = "(? IS NULL OR owner=?)"
        size, count = self._rows(f"SELECT COALESCE(SUM(bytes), 0), COUNT(*) FROM files WHERE {mine}", owner, owner)[0]
        results = f"SELECT COALESCE(SUM(result_bytes), 0) FROM batches WHERE {mine} AND status IN (?,?,?,?)"
        return size + self._rows(results, owner, owner, *OPEN)[0][0], count

    # -- batches ---------------------------------------------------------------------------------------------------

    def create_batch(
        self,
        file: FileRow,
        endpoint: str,
        window: str,
        seconds: int,
        *,
        owner_name: str = "",
        metadata: str | None = None,
        output_seconds: int | None = None,
    ) -> BatchRow:
        """A new batch over `file`, of the file's owner, that expires after `seconds`.

        Raises LookupError if the file is gone.
        """
        name, now = new_id("batch_"), self.now
        with self._transaction() as db:
            if not db.execute("SELECT 1 FROM files WHERE id=?", (file.id,)).fetchone():
                raise LookupError(file.id)
            db.execute(
                "INSERT INTO batches(id, owner, owner_name, endpoint, input_file_id, completion_window, metadata,"
                " output_seconds, status, created_at, expires_at) VALUES(?,?,?,?,?,?,?,?,'validating',?,?)",
                (name, file.owner, owner_name, endpoint, file.id, window, metadata, output_seconds, now, now + seconds),
            )
        row = self.batch(file.owner, name)
        assert row is not None
        return row

    def batch(self, owner: str, batch_id: str) -> BatchRow | None:
        found = self._rows("SELECT * FROM batches WHERE id=? AND owner=?", batch_id, owner)
        return BatchRow(**dict(found[0])) if found else None

    def batches(self, owner: str, after: int | None, limit: int) -> list[BatchRow]:
        """Up to `limit` batches of an owner, newest first, older than the one with seq `after`."""
        sql = "SELECT * FROM batches WHERE owner=? AND (? IS NULL OR seq < ?) ORDER BY seq DESC LIMIT ?"
        return [BatchRow(**dict(row)) for row in self._rows(sql, owner, after, after, limit)]

    def open_batches(self, owner: str | None = None) -> list[BatchRow]:
        """Batches that are not finished, oldest first; of one owner, or of all."""
        sql = "SELECT * FROM batches WHERE status IN (?,?,?,?) AND (? IS NULL OR owner=?) ORDER BY seq"
        return [BatchRow(**dict(row)) for row in self._rows(sql, *OPEN, owner, owner)]

    def _move(self, seq: int, start: tuple[str, ...], end: str, **values: Any) -> bool:
        """Inside a transaction: from one of the states `start` to `end`; False, nothing changed, from another state."""
        changes = {"status": end, f"{end}_at": self.now, **values}
        return (
            self._db.execute(
                f"UPDATE batches SET {', '.join(f'{name}=?' for name in changes)} WHERE seq=?"
                f" AND status IN ({','.join('?' * len(start))})",
                (*changes.values(), seq, *start),
            ).rowcount
            == 1
        )

    def begin(self, seq: int, lines: Iterable[Line], model: str | None) -> bool:
        """validating -> in_progress, with all lines of the input file."""
        with self._transaction() as db:
            rows = [(seq, line.line, line.custom_id, line.start, line.length) for line in lines]
            if not self._move(seq, ("validating",), "in_progress", total=len(rows), model=model):
                return False
            db.executemany("INSERT INTO lines(batch, line, custom_id, start, length) VALUES(?,?,?,?,?)", rows)
            return True

    def fail(self, seq: int, errors: list[dict[str, Any]]) -> bool:
        """validating -> failed, for an input file that is no batch."""
        with self._transaction():
            return self._move(seq, ("validating",), "failed", errors=json.dumps(errors))

    def waiting(self, seq: int, after: int, limit: int) -> list[Line]:
        """Up to `limit` lines beyond line `after` that have no result."""
        sql = "SELECT line, custom_id, start, length FROM lines WHERE batch=? AND line>? AND ok IS NULL ORDER BY line LIMIT ?"
        return [Line(**dict(row)) for row in self._rows(sql, seq, after, limit)]

    def put_result(self, seq: int, line: int, ok: bool, record: bytes, tokens: tuple[int, int] = (0, 0)) -> bool:
        """The result of a line of a batch in progress; the last one moves it to finalizing.

        False, and nothing is kept, if the line has a result or the batch has been cancelled or has expired.
        """
        with self._transaction() as db:
            counts = "completed" if ok else "failed"
            changed = db.execute(
                f"UPDATE batches SET {counts}={counts}+1, result_bytes=result_bytes+?, input_tokens=input_tokens+?,"
                " output_tokens=output_tokens+? WHERE seq=? AND status='in_progress'"
                " AND EXISTS(SELECT 1 FROM lines WHERE batch=? AND line=? AND ok IS NULL)",
                (len(record), *tokens, seq, seq, line),
            ).rowcount
            if not changed:
                return False
            db.execute("UPDATE lines SET ok=?, record=? WHERE batch=? AND line=?", (int(ok), record, seq, line))
            if db.execute("SELECT completed + failed = total FROM batches WHERE seq=?", (seq,)).fetchone()[0]:
                self._move(seq, ("in_progress",), "finalizing", outcome="completed")
            return True

    def cancel(self, seq: int) -> bool:
        """validating or in_progress -> cancelling. False in any other state."""
        with self._transaction():
            return self._move(seq, ("validating", "in_progress"), "cancelling", outcome="cancelled")

    def expire(self, seq: int) -> bool:
        """in_progress -> finalizing with what there is. False in any other state."""
        with self._transaction():
            return self._move(seq, ("in_progress",), "finalizing", outcome="expired")

    def results(self, seq: int, after: int, limit: int) -> list[tuple[Line, bool | None, bytes]]:
        """Up to `limit` lines beyond line `after` with their results; ok is None for a line that has none."""
        rows = self._rows("SELECT * FROM lines WHERE batch=? AND line>? ORDER BY line LIMIT ?", seq, after, limit)
        return [
            (
                Line(row["line"], row["custom_id"], row["start"], row["length"]),
                None if row["ok"] is None else bool(row["ok"]),
                row["record"] or b"",
            )
            for row in rows
        ]

    def finish(self, batch: BatchRow, output: NewFile | None, error: NewFile | None, seconds: int | None) -> bool:
        """finalizing or cancelling -> its outcome, with the files written for it, which live for `seconds`; lines go."""
        assert batch.outcome is not None
        with self._transaction() as db:
            names = {"output_file_id": output and output.id, "error_file_id": error and error.id}
            if not self._move(batch.seq, ("finalizing", "cancelling"), batch.outcome, **names):
                return False
            for new in (output, error):
                if new is not None:
                    self._insert_file(batch.owner, "batch_output", new, seconds)
            db.execute("DELETE FROM lines WHERE batch=?", (batch.seq,))
        with self._lock:
            self._db.execute("PRAGMA incremental_vacuum").fetchall()
        return True

    def sweep(self) -> None:
        """Delete files that have expired, unless an unfinished batch reads them, and batches finished long ago."""
        for row in self._rows("SELECT id, owner FROM files WHERE expires_at <= ?", self.now):
            self.delete_file(row["owner"], row["id"])
        with self._transaction() as db:
            db.execute(
                "DELETE FROM batches WHERE created_at < ? AND status NOT IN (?,?,?,?)", (self.now - RETENTION, *OPEN)
            )
