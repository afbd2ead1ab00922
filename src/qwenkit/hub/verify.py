"""Is a model's folder whole? What can be known without a network, and what checksums say.

In: a folder, and what is known about its files: a hub's listing, a SHA256SUMS file, or what huggingface_hub left beside them.
Out: a `Report`: the problems, one line each, and what was checked.
Without checksums the folder still has to be consistent: every shard of an index there, every safetensors file as long as
its own header says, every JSON file readable.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from qwenkit import files

SUMS = "SHA256SUMS"

_CHUNK = 4 << 20
_MAX_HEADER = 32 << 20  # bytes of a safetensors header, and the commas and brackets in it
_MAX_HEADER_ITEMS = 1 << 21
_MAX_ITEMS = 1 << 22  # commas and brackets in any other JSON file; a tokenizer.json has some hundred thousand
_LARGEST = {"config.json": files.LARGEST_JSON, "generation_config.json": files.LARGEST_JSON}
_LARGEST |= {"tokenizer_config.json": files.LARGEST_JSON, "adapter_config.json": files.LARGEST_JSON}
_LARGEST |= {"tokenizer.json": files.LARGEST_TOKENIZER, "vocab.json": files.LARGEST_TOKENIZER}
_TOKENIZERS = ("tokenizer.json", "vocab.json", "*.tiktoken")
_READ = (
    "*.json",
    "*.safetensors",
    "*.bin",
    "*.gguf",
    "*.txt",
    "*.tiktoken",
    "*.jinja",
)  # what a folder's files are called


@dataclass(frozen=True)
class KnownFile:
    """What a file should be. A hub knows the sha256 of large files and the git blob sha1 of small ones."""

    path: str
    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one file, in words."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


@dataclass(frozen=True)
class Report:
    """What `verify_folder` found: the problems, how many files of how many bytes lie there, how many checksums were compared."""

    problems: list[Problem]
    files: int
    size: int
    hashed: int


def verify_folder(folder: Path, *, against: Iterable[KnownFile] | None = None, progress: bool = True) -> Report:
    """Check a model's folder: its consistency, then every file whose checksum is known.

    `against` is a hub's listing; without it the folder's own SHA256SUMS file (as sha256sum writes it) and the traces of
    huggingface_hub's downloads serve. Raises FileNotFoundError when there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--verify needs the folder of a model; {str(folder)!r} is not a folder")
    unreadable: list[Problem] = []
    if against is None:
        against = [*_traces(folder), *_sums(folder, unreadable)]
    known = {file.path: file for file in against}
    structure = [*unreadable, *check_structure(folder, totals=not known)]
    present = [file for file in known.values() if (folder / file.path).is_file()]
    wrong: dict[str, str] = {}
    with byte_bar(sum((folder / file.path).stat().st_size for file in present), "Checking", progress) as bar:
        for file in present:
            difference = compare(folder / file.path, file, bar.update)
            if difference is not None:
                wrong[file.path] = difference
    explained = {problem.file for problem in structure}
    absent = sorted(known.keys() - {file.path for file in present} - explained)
    problems = [
        *(problem for problem in structure if problem.file not in wrong),  # a checksum says more than the structure
        *(Problem(name, "is missing") for name in absent),
        *(Problem(name, difference) for name, difference in wrong.items()),
    ]
    hashed = sum(1 for file in present if file.sha256 or file.git_sha1)
    there = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    return Report(problems, len(there), sum(path.stat().st_size for path in there), hashed)


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a whole model by all that can be told without hashing: configuration, tokenizer, every shard."""
    return (
        folder.is_dir()
        and (folder / "config.json").is_file()
        and any(path.is_file() for pattern in _TOKENIZERS for path in folder.glob(pattern))
        and not check_structure(folder)
    )


def check_structure(folder: Path, *, totals: bool = False) -> list[Problem]:
    """What is wrong with a folder by its own account.

    With `totals` the sum of the shards is compared with the index's `total_size` too; some published indexes are wrong
    there, so that this is evidence only where nothing better is known.
    """
    problems = _irregular(folder)
    skipped = {problem.file for problem in problems}
    weights = [path for pattern in ("*.safetensors", "*.bin", "*.gguf") for path in folder.glob(pattern)]
    if not weights:
        problems.append(Problem("model.safetensors", "is missing, and there are no other weights"))
    if not (folder / "config.json").exists() and not any(folder.glob("*.gguf")):
        problems.append(Problem("config.json", "is missing"))
    headers: dict[str, tuple[int, set[str]]] = {}  # of each sound safetensors file: bytes of tensors, their names
    for path in sorted(path for path in weights if path.name not in skipped):
        try:
            if path.suffix == ".safetensors":
                headers[path.name] = read_safetensors_header(path)
            elif path.suffix == ".bin" and _starts_as_zip(path) and not zipfile.is_zipfile(path):
                problems.append(
                    Problem(path.name, f"is truncated: its end is missing, found {path.stat().st_size:,} bytes")
                )
        except zipfile.BadZipFile as error:
            problems.append(Problem(path.name, f"is no archive that can be read: {error}"))
        except ValueError as error:
            problems.append(Problem(path.name, _without_path(error, path)))
    for path in sorted(path for path in folder.glob("*.json") if path.name not in skipped):
        is_index = path.name.endswith(".index.json")
        largest = files.LARGEST_INDEX if is_index else _LARGEST.get(path.name)
        if largest is None and path.stat().st_size > files.LARGEST_TOKENIZER:
            continue  # none of those that a model is read from
        try:
            data = files.read_file(path, largest or files.LARGEST_TOKENIZER)
            content = files.parse_json(data, _MAX_ITEMS, allow_nan=True)
        except ValueError as error:
            problems.append(Problem(path.name, _without_path(error, path)))
            continue
        if is_index:
            problems += _check_index(folder, path.name, content, headers, totals)
    return problems


def _irregular(folder: Path) -> list[Problem]:
    """Everything in a folder that should be a file and is a FIFO, socket, device or directory: reading it might never end."""
    problems = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not any(path.match(pattern) for pattern in _READ):
            continue
        try:
            files.has_file(path)
        except ValueError as error:
            problems.append(Problem(path.name, _without_path(error, path)))
    return problems


def _without_path(error: ValueError, path: Path) -> str:
    """A sentence that begins with the path, without it: a `Problem` names the file itself."""
    return str(error).removeprefix(f"{path} ")


def read_safetensors_header(path: Path) -> tuple[int, set[str]]:
    """How many bytes of tensors a safetensors file holds, and their names, from its header alone.

    Raises ValueError when the file is shorter or longer than its header says, or has no readable header.
    """
    with files.open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _MAX_HEADER:
            raise ValueError(f"is no safetensors file: {size:,} bytes, of which a header of {length:,}")
        if 8 + length > size:
            raise ValueError(f"is truncated: expected more than {8 + length:,} bytes, found {size:,}")
        try:
            header = files.parse_json(file.read(length), _MAX_HEADER_ITEMS)
            header.pop("__metadata__", None)
            end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        except (ValueError, AttributeError, KeyError, IndexError, TypeError, OverflowError):
            raise ValueError("has a safetensors header that cannot be read") from None
    if 8 + length + end != size:
        what = "is truncated" if size < 8 + length + end else "is too long"
        raise ValueError(f"{what}: expected {8 + length + end:,} bytes, found {size:,}")
    return end, set(header)


def compare(path: Path, known: KnownFile, advance: Callable[[int], Any] = lambda count: None) -> str | None:
    """What distinguishes a file from what it should be, with expected and found; None when nothing does.

    `advance` is told how many bytes have been dealt with, the file's size in all.
    """
    size = path.stat().st_size
    if known.size is not None and size != known.size:
        advance(size)
        return f"expected {known.size:,} bytes, found {size:,}"
    if known.sha256 is not None:
        found, expected, kind = hash_file(path, hashlib.sha256(), advance), known.sha256, "sha256"
    elif known.git_sha1 is not None:
        start = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        found, expected, kind = hash_file(path, start, advance), known.git_sha1, "git sha1"
    else:
        advance(size)
        return None
    return None if found == expected.lower() else f"expected {kind} {expected.lower()}, found {found}"


def hash_file(path: Path, digest: Any, advance: Callable[[int], Any] = lambda count: None) -> str:
    """The hexadecimal digest of a file's bytes, read in pieces; `digest` is a hashlib object, perhaps already begun."""
    with files.open_file(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return str(digest.hexdigest())


def byte_bar(total: int, title: str, progress: bool) -> tqdm[Any]:
    """A progress bar over bytes, on stderr; it leaves nothing behind, the caller's result says how it ended."""
    return tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=not progress, leave=False)


def is_plain_path(path: str) -> bool:
    """Whether a path from a listing stays inside the folder that it is put in."""
    parts = PurePosixPath(path).parts
    return bool(parts) and ".." not in parts and not path.startswith("/") and not re.search(r"[\\:\x00-\x1f]", path)


def _check_index(
    folder: Path, name: str, content: Any, headers: dict[str, tuple[int, set[str]]], totals: bool
) -> list[Problem]:
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        return [Problem(name, "has no weight_map from tensors to files")]
    problems: list[Problem] = []
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not is_plain_path(shard):
            problems.append(Problem(name, f"names a file outside of the folder: {shard!r}"))
        elif not (folder / shard).is_file():
            problems.append(Problem(shard, f"is missing; {name} names it"))
        elif shard in headers:
            lacking = sorted({tensor for tensor, file in weight_map.items() if file == shard} - headers[shard][1])
            if lacking:
                problems.append(Problem(shard, f"lacks {len(lacking)} tensors of {name}, the first is {lacking[0]!r}"))
    total = content.get("metadata", {}).get("total_size") if isinstance(content.get("metadata"), dict) else None
    if totals and not problems and isinstance(total, (int, float)) and all(shard in headers for shard in shards):
        held = sum(headers[shard][0] for shard in shards)
        if held != total:
            problems.append(Problem(name, f"expected {total:,} bytes of tensors in all shards, found {held:,}"))
    return problems


def _sums(folder: Path, problems: list[Problem]) -> list[KnownFile]:
    """The lines of the folder's SHA256SUMS file or files, in the format of sha256sum: checksum, blank, blank or star, name."""
    known = []
    for path in sorted(folder.iterdir()):
        if not path.is_file() or not re.fullmatch(r"sha256sums?(\.txt)?", path.name, re.IGNORECASE):
            continue
        try:
            text = files.read_file(path, files.LARGEST_TEXT).decode("utf-8", errors="replace")
        except ValueError as error:
            problems.append(Problem(path.name, _without_path(error, path)))
            continue
        for number, line in enumerate(text.splitlines(), 1):
            match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)", line)
            if match and is_plain_path(match[2]):
                known.append(KnownFile(match[2], sha256=match[1].lower()))
            elif line.strip() and not line.startswith("#"):
                problems.append(Problem(path.name, f"line {number} is not a checksum and the name of a file here"))
    return known


def _traces(folder: Path) -> list[KnownFile]:
    """What huggingface_hub remembers of the files that it downloaded: by `.metadata` files beside a plain folder, by the
    names of the blobs that the links of its cache lead to. Both are the hub's ETag: a sha256, or a git blob's sha1."""
    etags: dict[str, str] = {}
    metadata = folder / ".cache" / "huggingface" / "download"
    for path in metadata.rglob("*.metadata") if metadata.is_dir() else []:
        if not path.is_file() or path.stat().st_size > files.LARGEST_TEXT:
            continue
        lines = files.read_file(path, files.LARGEST_TEXT).decode("utf-8", errors="replace").splitlines()
        if len(lines) >= 2:
            etags[path.relative_to(metadata).as_posix().removesuffix(".metadata")] = lines[1].strip()
    for path in folder.iterdir():
        if path.is_symlink() and path.resolve().parent.name == "blobs":
            etags[path.name] = path.resolve().name
    return [
        KnownFile(name, sha256=etag if len(etag) == 64 else None, git_sha1=etag if len(etag) == 40 else None)
        for name, etag in sorted(etags.items())
        if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag)
    ]


def _starts_as_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"
