"""Reads files that come from strangers: regular files only, sizes before contents, strict JSON.

A FIFO would block for ever, a device or a sparse file of terabytes would fill the memory, and JSON can be nested, repeated or
padded until its parser fails. Every reader of a model folder opens its files here, so that each of these is one ValueError that
names the path.
"""

from __future__ import annotations

import io
import json
import math
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from qwenkit.errors import shorten

LARGEST_JSON = (
    4 << 20
)  # bytes of a configuration; a tokenizer's settings with many added tokens take some hundred thousand
LARGEST_INDEX = 32 << 20  # bytes of a list of all tensors; a thousand experts of a hundred layers take about half
LARGEST_TEXT = 4 << 20  # bytes of a template, a list of checksums or other text that is read whole
LARGEST_TOKENIZER = 64 << 20  # bytes of a vocabulary; that of Qwen2.5 takes 7 million, the largest known 34 million
MAX_ITEMS = 1 << 20  # commas and brackets in a JSON text: they bound the objects that its parser makes
MAX_DEPTH = 64  # of objects and lists in one another

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def has_file(path: Path) -> bool:
    """True if there is a regular file, False if there is nothing. Raises ValueError, naming the path, for anything else there."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # a loop of links, a folder that may not be searched, a NUL in the name
        raise ValueError(f"{shorten(str(path))} cannot be read: {error}") from None
    _require_regular(path, mode)
    return True


def open_file(path: Path) -> io.BufferedReader:
    """Open a regular file for reading bytes. Never blocks.

    Raises FileNotFoundError, PermissionError, and ValueError for a directory, FIFO, socket or device.
    """
    _require_regular(path, path.stat().st_mode)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    file: io.BufferedReader = io.BufferedReader(io.FileIO(os.open(path, flags), "rb"))
    try:
        _require_regular(path, os.fstat(file.fileno()).st_mode)  # it may have been exchanged since
    except ValueError:
        file.close()
        raise
    return file


def read_file(path: Path, largest: int) -> bytes:
    """All bytes of a regular file of at most `largest` bytes; ValueError, naming the path, for a larger one."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise ValueError(f"{path} has {size:,} bytes, allowed are at most {largest:,}")
        data = file.read(largest + 1)
        if len(data) > largest:  # it grew, or it is a file whose size is unknown, as in /proc
            raise ValueError(f"{path} has more than {largest:,} bytes, which is all that is allowed")
        return data


def read_text(path: Path, largest: int = LARGEST_TEXT) -> str:
    """The text of a UTF-8 file, without a byte order mark. ValueError, naming the path, if it is too large or not UTF-8."""
    try:
        return read_file(path, largest).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid UTF-8: byte {error.start}") from None


def read_json(
    path: Path, largest: int = LARGEST_JSON, max_items: int = MAX_ITEMS, *, allow_nan: bool = False
) -> dict[str, Any]:
    """The object in a JSON file of a model folder; see `parse_json` for what is refused.

    Raises FileNotFoundError, and ValueError, one sentence that names the path, for everything that is wrong with it.
    """
    try:
        value = parse_json(read_file(path, largest), max_items, allow_nan=allow_nan)
    except _JsonError as error:
        raise ValueError(f"{path} {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, found {_JSON_TYPES.get(type(value), 'a number')}")
    return value


class _JsonError(ValueError):
    """What is wrong with a JSON text, without its name: "is not valid JSON: …"."""


def parse_json(data: bytes, max_items: int = MAX_ITEMS, *, allow_nan: bool = False) -> Any:
    """Parse JSON that a stranger wrote: UTF-8, every key once, finite numbers (but for `allow_nan`), at most MAX_DEPTH deep.

    Memory is bounded before anything is built: a text with more than `max_items` commas and brackets is refused. Raises
    ValueError whose text goes on after the file's name ("is not valid JSON: …").
    """
    items = sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if items > max_items:
        raise _JsonError(f"holds too many values: {items:,} commas and brackets, allowed are {max_items:,}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _JsonError(f"is not valid JSON: byte {error.start} is not UTF-8 text") from None
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except _JsonError:
        raise
    except RecursionError:
        raise _JsonError(f"is not valid JSON: it is nested more than {MAX_DEPTH} deep") from None
    except json.JSONDecodeError as error:
        raise _JsonError(f"is not valid JSON: {error}") from None
    except ValueError:  # Python converts no integers of more than some thousand digits
        raise _JsonError("is not valid JSON: a number has thousands of digits") from None
    _check(value, allow_nan)
    return value


_JSON_TYPES: dict[type, str] = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        first, second, *_ = (shorten(value) for key, value in pairs if key == twice)
        raise _JsonError(f"is not valid JSON: the key {shorten(twice)} occurs twice, as {first} and {second}")
    return fields


def _check(value: Any, allow_nan: bool) -> None:
    """Raise for nesting deeper than MAX_DEPTH and for a number that is not finite, naming the key where it is."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for item in level:
            for child in item.values() if isinstance(item, dict) else item:
                if isinstance(child, dict | list):
                    inner.append(child)
                elif type(child) is float and not (allow_nan or math.isfinite(child)):
                    keys = [key for key, each in item.items() if each is child] if isinstance(item, dict) else []
                    where = shorten(keys[0]) if keys else "an item of a list"
                    raise _JsonError(f"is not valid JSON: {where} is {child}, which is no finite number")
        level = inner
    if level:
        raise _JsonError(f"is not valid JSON: it is nested more than {MAX_DEPTH} deep")


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise ValueError(f"{path} is {kind}, but a regular file is needed")
