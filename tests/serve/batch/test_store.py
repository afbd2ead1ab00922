"""The store: every sequence of transitions, with restarts anywhere, leaves counts, lines and files that agree."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from qwenkit.serve.batch.lines import assemble
from qwenkit.serve.batch.rows import BatchRow, Line
from qwenkit.serve.batch.store import OPEN, BatchStore
from tests.serve.batch.echo_app import add_batch, add_input, records

LINES = st.integers(1, 5)
PICK = st.integers(0, 20)


class Life(RuleBasedStateMachine):
    """What the model keeps: for each batch its state, and the results by line."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.time = 1000.0
        self.store = self.open()
        self.rows: list[BatchRow] = []
        self.state: dict[int, str] = {}
        self.total: dict[int, int] = {}
        self.results: dict[int, dict[int, bool]] = {}

    def open(self) -> BatchStore:
        return BatchStore(Path(self.folder.name), clock=lambda: self.time)

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    def pick(self, number: int) -> BatchRow | None:
        return self.rows[number % len(self.rows)] if self.rows else None

    @rule()
    def create(self) -> None:
        row = add_batch(self.store, b"x")
        self.rows.append(row)
        self.state[row.seq], self.total[row.seq], self.results[row.seq] = "validating", 0, {}

    @rule(number=PICK, count=LINES)
    def begin(self, number: int, count: int) -> None:
        if row := self.pick(number):
            lines = [Line(2 * place + 1, f"id-{place}", 0, 1) for place in range(count)]
            may = self.state[row.seq] == "validating"
            assert self.store.begin(row.seq, lines, None) is may
            if may:
                self.state[row.seq], self.total[row.seq] = "in_progress", count

    @rule(number=PICK)
    def fail(self, number: int) -> None:
        if row := self.pick(number):
            may = self.state[row.seq] == "validating"
            assert self.store.fail(row.seq, [{"line": 1}]) is may
            if may:
                self.state[row.seq] = "failed"

    @rule(number=PICK, place=st.integers(0, 5), ok=st.booleans())
    def put(self, number: int, place: int, ok: bool) -> None:
        if row := self.pick(number):
            line, done = 2 * place + 1, self.results[row.seq]
            may = self.state[row.seq] == "in_progress" and place < self.total[row.seq] and line not in done
            assert self.store.put_result(row.seq, line, ok, b'{"custom_id":"id-%d"}' % place, (3, 2)) is may
            if may:
                done[line] = ok
                if len(done) == self.total[row.seq]:
                    self.state[row.seq] = "finalizing"

    @rule(number=PICK, how=st.sampled_from(["cancel", "expire"]))
    def end_early(self, number: int, how: str) -> None:
        if row := self.pick(number):
            may = self.state[row.seq] in (("validating", "in_progress") if how == "cancel" else ("in_progress",))
            assert getattr(self.store, how)(row.seq) is may
            if may:
                self.state[row.seq] = "cancelling" if how == "cancel" else "finalizing"

    @rule(number=PICK)
    def finish(self, number: int) -> None:
        row = self.pick(number)
        if row is None or self.state[row.seq] not in ("finalizing", "cancelling"):
            return
        row = self.store.batch("", row.id)
        assert row is not None
        assert self.store.finish(row, *assemble(self.store, row), 3600)
        assert not self.store.finish(row, None, None, 3600)
        row = self.store.batch("", row.id)
        assert row is not None
        assert row.status == row.outcome
        self.state[row.seq] = row.status
        good, bad = records(self.store, row, "output"), records(self.store, row, "error")
        assert sorted(r["custom_id"] for r in good + bad) == [f"id-{place}" for place in range(self.total[row.seq])]
        assert len(good) == sum(self.results[row.seq].values())

    @rule()
    def restart(self) -> None:
        orphan = self.store.path("file-" + "0" * 24)
        orphan.write_bytes(b"left behind by a kill")
        foreign = orphan.with_name("notes.txt")
        foreign.write_bytes(b"somebody else's")
        self.store.close()
        self.store = self.open()
        assert not orphan.exists()
        assert foreign.exists()

    @invariant()
    def agrees(self) -> None:
        for row in self.rows:
            found = self.store.batch("", row.id)
            assert found is not None
            done = self.results[row.seq]
            assert found.status == self.state[row.seq]
            assert (found.total, found.completed + found.failed) == (self.total[row.seq], len(done))
            assert (found.completed, found.input_tokens) == (sum(done.values()), 3 * len(done))
            if found.status == "in_progress":
                waiting = {line.line for line in self.store.waiting(row.seq, 0, 100)}
                assert waiting == {2 * place + 1 for place in range(found.total)} - done.keys()
        assert [row.seq for row in self.store.open_batches()] == [seq for seq in self.state if self.state[seq] in OPEN]


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


def test_one_process_owns_a_folder(tmp_path: Path) -> None:
    first = BatchStore(tmp_path / "state")
    with pytest.raises(ValueError, match="another server uses"):
        BatchStore(tmp_path / "state")
    first.close()
    BatchStore(tmp_path / "state").close()


def test_files_expire_but_not_under_a_batch(tmp_path: Path) -> None:
    now = [1000.0]
    store = BatchStore(tmp_path, clock=lambda: now[0])
    batch = add_batch(store, b"x")
    used = store.file("", batch.input_file_id)
    assert used is not None
    store._db.execute("UPDATE files SET expires_at=1500")
    other = add_input(store, b"y")
    now[0] = 2000
    store.sweep()
    assert store.file("", used.id) is None, "an expired file is not shown"
    assert store.path(used.id).exists(), "but the batch still reads it"
    assert not store.delete_file("", used.id)
    assert store.file("", other.id) == other
    store.cancel(batch.seq)
    row = store.batch("", batch.id)
    assert row is not None
    store.finish(row, None, None, 10)
    store.sweep()
    assert not store.path(used.id).exists()
    assert store.held("") == (1, 1)
    store.close()


def test_the_folder_is_private(tmp_path: Path) -> None:
    store = BatchStore(tmp_path / "state")
    assert (tmp_path / "state" / "batches.sqlite3").stat().st_mode & 0o077 == 0
    assert (tmp_path / "state" / "files").stat().st_mode & 0o077 == 0
    store.close()
