"""Files that outlive a crash: written to a temporary path, flushed to the disk, renamed; and the folder of qwenkit's caches.

Every writer of the package goes through here. Rules: a name is given only to what is whole and on the disk (fsync of files and of
directory entries); nothing is deleted before what replaces it has its name; when a rename fails, or Ctrl-C comes between two, the
old files are put back and the new ones are kept and named.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The root of everything that qwenkit keeps for itself: $QWENKIT_CACHE, else $XDG_CACHE_HOME/qwenkit, else ~/.cache/qwenkit.

    Below it: models/, packed/ (quantized weights), tokenized/ (training data), serve/ (files and batches), chat_history.
    """
    if own := os.environ.get("QWENKIT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qwenkit"


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems have no fsync for directories.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)


def fsync_tree(path: Path) -> None:
    """`fsync` of a file, or of all files and directories below a directory, itself last. Symbolic links are left out."""
    if path.is_symlink():
        return
    if path.is_dir():
        for entry in sorted(path.iterdir()):
            fsync_tree(entry)
    fsync(path)


def atomic_replace(source: Path, target: Path) -> None:
    """Flush a file or folder and give it the name `target`, in the same directory tree. A file there is replaced, atomically."""
    fsync_tree(source)
    os.replace(source, target)
    fsync(target.parent)


def temporary_path(path: Path, kind: str = "part") -> Path:
    """A hidden name next to `path` that no other process or thread takes."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.{kind}")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path to write a file to. After the block it is flushed and renamed to `path`; after an error it is deleted."""
    part = temporary_path(path)
    try:
        yield part
        atomic_replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_bytes(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Have `write` fill a binary file, which appears as `path` whole or not at all."""
    with new_file(path) as part, part.open("wb") as file:
        write(file)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file that appears whole or not at all."""
    with new_file(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any, *, indent: int = 1) -> None:
    """Write strict JSON: numbers that are not finite become null."""
    write_text(path, json.dumps(strict(value), ensure_ascii=False, indent=indent, allow_nan=False) + "\n")


def strict(value: Any) -> Any:
    """The same value with null for each NaN and infinity, which JSON has no way to write."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [strict(each) for each in value]
    return value


def rename_all(pairs: Sequence[tuple[Path, Path]]) -> None:
    """Rename each source to its target, which does not exist, in order; all or none.

    On any exception, KeyboardInterrupt included, the renames that were done are undone before it is raised again.
    """
    begun: list[tuple[Path, Path]] = []
    try:
        for source, target in pairs:
            begun.append((source, target))
            os.replace(source, target)
    except BaseException as error:
        for source, target in reversed(begun):
            if os.path.lexists(target) and not os.path.lexists(source):
                try:
                    os.replace(target, source)
                except OSError as again:
                    raise OSError(again.errno, f"{source} is now {target}: it could not be renamed back") from error
        raise


def install(pairs: Sequence[tuple[Path, Path]], stale: Iterable[Path] = ()) -> None:
    """Let new files or folders take the places of their targets, and `stale` ones go: all or nothing.

    pairs: (new, target) in the order in which they appear. What is there already is renamed aside first, `stale` before the rest,
    and deleted only when every new one has its name. On an error all old ones are back in their places, the new ones where they
    were.
    """
    for new, _ in pairs:
        fsync_tree(new)
    old = [path for path in (*stale, *(target for _, target in pairs)) if os.path.lexists(path)]
    aside = [(path, temporary_path(path, "old")) for path in dict.fromkeys(old)]
    rename_all([*aside, *pairs])
    for folder in dict.fromkeys(target.parent for _, target in pairs):
        fsync(folder)
    for _, path in aside:
        delete(path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes and threads; the system frees that of a process that dies.

    The lock's file is removed by its holder. Whoever waited then holds the lock of a file without a name, while others lock a
    new file: so the name is compared after locking, and waiting begins anew where it is another file. Without locks in the file
    system nothing is excluded.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    while True:
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
                    raise
                yield
                return
            if not _is_file_at(path, file):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)  # while it is locked
            return


def _is_file_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def delete(path: Path) -> None:
    """Delete a file or a folder with all that is in it; what cannot be deleted is left and named in a warning."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
    if os.path.lexists(path):
        logger.warning("%s could not be deleted", path)


@contextmanager
def kept_on_error(new: Path) -> Iterator[None]:
    """Around the renames of finished work: an OSError says that `new` is kept; so does a warning when Ctrl-C comes."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; what was written is whole and kept as {new}") from error
    except BaseException:
        logger.warning("what was written is whole and kept as %s", new)
        raise
