"""Writing: on the disk before it has its name, all or nothing, and whatever fails, nothing is lost."""

import ast
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from qwenkit import storage
from qwenkit.weights.saving import into_folder, is_weights_file, new_folder
from tests.conftest import ROOT


class Disk:
    """Records what the process asks of the disk, and can fail at the n-th rename."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.synced: list[str] = []
        self.events: list[tuple[str, str]] = []
        self.fails_at: int | None = None
        self.error: Callable[[], BaseException] = lambda: OSError(5, "Input/output error")
        self.after = False  # fail when the rename is done, as Ctrl-C may come
        self._replace, self._fsync = os.replace, os.fsync
        patch.setattr(os, "fsync", self.fsync)
        patch.setattr(os, "replace", self.replace)

    def fsync(self, descriptor: int) -> None:
        self._fsync(descriptor)
        self.events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))

    def replace(self, source: Path, target: Path) -> None:
        number = sum(kind == "rename" for kind, _ in self.events)
        self.events.append(("rename", f"{source} -> {target}"))
        if number == self.fails_at and not self.after:
            raise self.error()
        self._replace(source, target)
        if number == self.fails_at:
            raise self.error()

    @property
    def num_renames(self) -> int:
        return sum(kind == "rename" for kind, _ in self.events)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def write_files(folder: Path, text: str, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


NEW = ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json")
OLD = ("config.json", "model.safetensors", "tokenizer.json", "checkpoint-4/state.json")


def save_over(out: Path) -> None:
    with new_folder(out, overwrite=True) as part:
        write_files(part, "new", *NEW)


def save_into(out: Path) -> None:
    with into_folder(out, replaces=is_weights_file) as part:
        write_files(part, "new", *NEW)


def save_tree(out: Path) -> None:
    """What a cache of data sets does: one folder for another."""
    part = out.with_name("part")
    write_files(part, "new", *NEW)
    storage.install([(part, out)])


def test_files_and_entries_are_flushed_before_and_after_the_rename(tmp_path: Path, disk: Disk) -> None:
    """A new folder: each file and the folder's entries, then the name, then the entry of the name."""
    with new_folder(tmp_path / "out") as part:
        write_files(part, "new", *NEW)
    kinds = [kind for kind, _ in disk.events]
    assert kinds == ["fsync"] * (len(NEW) + 1) + ["rename", "fsync"]
    flushed = [Path(path) for kind, path in disk.events if kind == "fsync"]
    assert {path.name for path in flushed[:-2]} == set(NEW)
    assert flushed[-2].parent == flushed[-1] == tmp_path


@pytest.mark.parametrize("save", [save_over, save_into, save_tree])
def test_all_files_are_flushed_before_the_first_rename(
    tmp_path: Path, disk: Disk, save: Callable[[Path], None]
) -> None:
    out = tmp_path / "out"
    write_files(out, "old", *OLD)
    save(out)
    first = next(number for number, (kind, _) in enumerate(disk.events) if kind == "rename")
    assert {Path(path).name for _, path in disk.events[:first]} >= set(NEW)
    assert disk.events[-1][0] == "fsync"
    assert {name: text for name, text in contents(out).items() if name in NEW} == dict.fromkeys(NEW, "new")
    assert "model.safetensors" not in contents(out)
    assert ("checkpoint-4/state.json" in contents(out)) is (save is not save_tree)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("save", [save_over, save_into, save_tree])
def test_whichever_rename_fails_old_and_new_are_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    save: Callable[[Path], None],
    error: type[BaseException],
    after: bool,
) -> None:
    """Ctrl-C or a refused rename at any point: the old files have their names, the new ones lie next to them and are named."""
    write_files(tmp_path / "count" / "out", "old", *OLD)
    with monkeypatch.context() as patch:
        counting = Disk(patch)
        save(tmp_path / "count" / "out")
    assert counting.num_renames >= 2
    for number in range(counting.num_renames):
        folder = tmp_path / str(number)
        out = folder / "out"
        write_files(out, "old", *OLD)
        with monkeypatch.context() as patch:
            disk = Disk(patch)
            disk.fails_at, disk.after = number, after
            disk.error = lambda: OSError(5, "Input/output error") if error is OSError else KeyboardInterrupt()
            with pytest.raises(error) as caught:
                save(out)
        assert {name: text for name, text in contents(out).items() if text == "old"} == dict.fromkeys(OLD, "old")
        kept = [path.parent for path in folder.rglob(NEW[1])]
        assert len(kept) == 1
        assert contents(kept[0]) == dict.fromkeys(NEW, "new")
        if save is not save_tree:
            said = str(caught.value) if error is OSError else caplog.text
            assert f"is whole and kept as {kept[0]}" in said


def test_an_error_while_writing_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    write_files(tmp_path / "out", "old", *OLD)
    for save in (lambda: new_folder(tmp_path / "out", overwrite=True), lambda: into_folder(tmp_path / "out")):
        with pytest.raises(OSError, match="full"), save() as part:
            fill(part)
    assert contents(tmp_path) == {f"out/{name}": "old" for name in OLD}


def fill(part: Path) -> None:
    (part / "config.json" if part.is_dir() else part).write_text("half")
    raise OSError("the disk is full")


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    write_files(tmp_path / "disk" / "out", "old", *OLD)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    save_over(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert contents(tmp_path / "disk" / "out")["config.json"] == "new"


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / "a.json"
    storage.write_json(path, {"loss": float("nan"), "best": [float("inf"), 1.5], "n": 3})
    assert json.loads(path.read_text()) == {"loss": None, "best": [None, 1.5], "n": 3}
    assert "NaN" not in path.read_text()
    assert [kind for kind, _ in disk.events] == ["fsync", "rename", "fsync"]
    disk.fails_at = disk.num_renames
    with pytest.raises(OSError, match="Input/output"):
        storage.write_json(path, {})
    with pytest.raises(OSError, match="full"), storage.new_file(path) as part:
        fill(part)
    assert json.loads(path.read_text())["n"] == 3
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]


def test_file_systems_that_cannot_flush_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(descriptor: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuses)
    storage.fsync(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Invalid argument"):
        storage.fsync(tmp_path / "file")


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One root for everything; no other file of the package looks for a home or cache folder of its own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("QWENKIT_CACHE", "~/own")
    assert storage.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("QWENKIT_CACHE")
    assert storage.cache_folder() == tmp_path / "xdg" / "qwenkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert storage.cache_folder() == tmp_path / ".cache" / "qwenkit"
    words = ("XDG_CACHE_HOME", "QWENKIT_CACHE", "Path.home(", '"~/')
    found = {path.name for path in sources() if any(word in path.read_text("utf-8") for word in words)}
    assert found == {"storage.py", "modelscope.py"}  # ModelScope's own cache, which its client shares


def test_renames_and_flushes_are_in_one_place() -> None:
    """No other file of the package renames over something or flushes by itself, except the writer of the packed cache; and none
    forks, except the grammar worker, which has one thread.
    """
    wrong = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "os.replace",
                "os.fsync",
                "os.rename",
                "os.fork",
            ):
                wrong.append(path.name)
    assert set(wrong) <= {"storage.py", "repacked.py", "export.py", "grammar_worker.py"}


def sources() -> list[Path]:
    return sorted((ROOT / "src" / "qwenkit").rglob("*.py"))


def test_what_cannot_be_deleted_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    write_files(tmp_path / "old", "", "a")
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    with suppress(OSError):
        storage.delete(tmp_path / "old")
    assert f"{tmp_path / 'old'} could not be deleted" in caplog.text
    storage.delete(tmp_path / "never was")


def test_a_lock_excludes_although_its_file_is_removed(tmp_path: Path) -> None:
    """Many threads take the lock again and again; a waiter that got the lock of a removed file would be inside with another."""
    lock, inside, most = tmp_path / "x.lock", 0, 0
    starts = threading.Barrier(8)

    def take() -> None:
        nonlocal inside, most
        starts.wait()
        for _ in range(40):
            with storage.locked(lock):
                inside += 1
                most = max(most, inside)
                time.sleep(0)
                inside -= 1

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert list(tmp_path.iterdir()) == []


def test_a_waiter_does_not_take_a_removed_file_for_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the race: a waiter opens the file, its holder removes it and leaves, a third makes a new one and locks it."""
    lock, events, third_is_in, may_leave = tmp_path / "x.lock", [], threading.Event(), threading.Event()
    flock = fcntl.flock

    def third() -> None:
        with storage.locked(lock):
            events.append("third in")
            third_is_in.set()
            may_leave.wait(30)
            events.append("third out")

    other = threading.Thread(target=third)

    def after_opening(file: Any, operation: int) -> None:
        if threading.current_thread() is not other and not events:
            lock.unlink()
            other.start()
            assert third_is_in.wait(30)
            threading.Timer(0.05, may_leave.set).start()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", after_opening)
    with storage.locked(lock):
        events.append("waiter in")
    other.join()
    assert events == ["third in", "third out", "waiter in"]
