"""Bytes from a hub onto the disk: several files at once, each resumed where an earlier run stopped, each checked.

In: which files a hub lists, their addresses and places. Out: the files in their places, whole and equal to the listing.
A file grows in a `.part` that outlives a cut connection, Ctrl-C and a new start; only when its checksum is right is it
renamed. huggingface_hub 2 forgets a partial file when its process ends, which at 4 GB a shard is what people wait for.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import httpx

from qwenkit.hub.verify import SUMS, KnownFile, byte_bar, compare, hash_file, is_complete, is_plain_path
from qwenkit.storage import atomic_replace, locked, write_text

logger = logging.getLogger(__name__)

_DATA = ("*.json", "*.txt", "*.tiktoken", "*.jinja")
_WORKERS = 4
_TRIES = 6  # in a row without a byte more than before
_FIRST_WAIT = 0.5  # seconds; doubles with each failure, up to a minute


@dataclass(frozen=True)
class Download:
    """One file to get: from where, to where, and the file that it grows in (on the same disk as the target)."""

    url: str
    target: Path
    part: Path
    known: KnownFile


class _StoppedError(Exception):
    """Another file's failure, or Ctrl-C, ended this download."""


def choose_files(files: list[KnownFile], repo: str, quant: str | None = None) -> list[KnownFile]:
    """The files of a repository that make up its model: weights, configuration, tokenizer; small ones first.

    With `quant` its one GGUF of that name, all parts of it in order. Only the top level counts. Pickled weights
    (`pytorch_model*.bin`) are taken where there is nothing else, code never. Raises ValueError for a listing with names that
    lead out of a folder, and for one without weights or without that GGUF.
    """
    for file in files:
        digests = re.fullmatch(r"([0-9a-fA-F]{64})?-([0-9a-fA-F]{40})?", f"{file.sha256 or ''}-{file.git_sha1 or ''}")
        if not is_plain_path(file.path) or not digests:  # a checksum names a file too, in huggingface_hub's cache
            what = "a checksum that is none" if is_plain_path(file.path) else "a file name that leads out of its folder"
            raise ValueError(f"{repo} lists {what}: {file.path!r}; nothing was downloaded")
    top = [file for file in files if "/" not in file.path]
    if quant is not None:
        names = choose_gguf([file.path for file in top], repo, quant)
        return sorted((file for file in top if file.path in names), key=lambda file: file.path)
    for weights in ("*.safetensors", "pytorch_model*.bin"):
        if any(fnmatchcase(file.path, weights) for file in top):
            chosen = [file for file in top if any(fnmatchcase(file.path, pattern) for pattern in (*_DATA, weights))]
            return sorted(chosen, key=lambda file: (file.size or 0, file.path))
    named = _quants([file.path for file in top])
    there = f"only GGUF files: name one of them, as {' or '.join(f'{repo}:{name}' for name in named)}" if named else ""
    raise ValueError(
        f"{repo} has no *.safetensors and no pytorch_model*.bin at its top level, {there or 'and no other weights'}"
    )


def choose_gguf(names: list[str], repo: str, quant: str) -> list[str]:
    """The file, or all parts, of the GGUF whose name ends in `quant` (q4_k_m, in letters of any size).

    ValueError, naming those that there are, where it is none or not all of one.
    """
    found = _quants(names)
    chosen = [each for name, each in found.items() if name.lower() == quant.lower()]
    if len(chosen) != 1:
        there = ", ".join(f"{repo}:{name}" for name in found) or "none at all"
        raise ValueError(f"{repo}:{quant} names {len(chosen)} GGUF files; there are: {there}")
    parts = [int(match[2]) for name in chosen[0] if (match := _PARTS.fullmatch(name)) and match[2]]
    if parts and len(chosen[0]) != parts[0]:
        raise ValueError(f"{repo}:{quant} comes in {parts[0]} parts, but only {len(chosen[0])} are there")
    return chosen[0]


_PARTS = re.compile(r"(.+?)(?:-\d{5}-of-(\d{5}))?\.gguf", re.IGNORECASE)


def _quants(names: list[str]) -> dict[str, list[str]]:
    """The GGUFs among file names, each with its parts in order, by the last word of its name; by all of it where two share it."""
    whole: dict[str, list[str]] = {}
    for name in sorted(names):
        if match := _PARTS.fullmatch(name):
            whole.setdefault(match[1], []).append(name)
    words = {stem: re.split(r"[-.]", stem)[-1] for stem in whole}
    counts = Counter(word.lower() for word in words.values())
    return {words[stem] if counts[words[stem].lower()] == 1 else stem: parts for stem, parts in whole.items()}


def cached_in(folder: Path, repo: str, quant: str | None) -> Path | None:
    """The folder if a whole model lies in it, or with `quant` the first file of that GGUF."""
    if quant is None:
        return folder if is_complete(folder) else None
    try:
        return folder / choose_gguf([path.name for path in folder.glob("*.gguf") if path.is_file()], repo, quant)[0]
    except ValueError:
        return None


def copy_without_hub(error: ConnectionError, cached: Path | None) -> Path:
    """The copy in the cache, with a warning, where `error` says that its hub cannot be reached; ConnectionError without one."""
    if cached is None:
        raise ConnectionError(f"{error}; no whole copy of it is in the cache") from None
    logger.warning("%s; the copy in the cache is used as it is", error)
    return cached


def fetch(downloads: list[Download], headers: Mapping[str, str], *, title: str, progress: bool) -> None:
    """Get every file that is not there yet or differs from what it should be.

    Raises ValueError when a hub's bytes do not match the hub's own checksum, when the disk is too small, or the hub
    refuses; FileNotFoundError when it cannot be reached any more: what has arrived stays, and the next call goes on.
    """
    downloads = list({download.target: download for download in downloads}.values())
    _check_space(downloads)
    stop, turn = threading.Event(), threading.Lock()
    total = sum(download.known.size or 0 for download in downloads)
    with (
        byte_bar(total, title, progress) as bar,
        httpx.Client(headers=dict(headers), follow_redirects=True, timeout=httpx.Timeout(20)) as client,
        ThreadPoolExecutor(_WORKERS, thread_name_prefix="fetch") as workers,
    ):

        def advance(count: int) -> None:
            if stop.is_set():
                raise _StoppedError
            with turn:
                bar.update(count)

        try:
            for done in as_completed([workers.submit(_get, client, item, advance, stop) for item in downloads]):
                done.result()
        except BaseException:
            stop.set()
            workers.shutdown(wait=True, cancel_futures=True)
            raise


def write_sums(folder: Path, files: list[KnownFile]) -> None:
    """Write the sha256 of these files of a folder as sha256sum does, so that `sha256sum -c` can check them anywhere."""
    lines = [
        f"{file.sha256 or hash_file(folder / file.path, hashlib.sha256())}  {file.path}\n"
        for file in sorted(files, key=lambda file: file.path)
    ]
    write_text(folder / SUMS, "".join(lines))


def _get(client: httpx.Client, item: Download, advance: Callable[[int], None], stop: threading.Event) -> None:
    item.part.parent.mkdir(parents=True, exist_ok=True)
    item.target.parent.mkdir(parents=True, exist_ok=True)
    # Another process may be at the same file; then it is there once the lock is free.
    with locked(item.part.with_name(f"{item.part.name}.lock")):
        if not _is_there(item, advance):
            _get_anew(client, item, advance, stop)


def _is_there(item: Download, advance: Callable[[int], None]) -> bool:
    if not item.target.is_file():
        return False
    wrong = compare(item.target, item.known, advance)
    if wrong is not None:
        advance(-item.target.stat().st_size)
        logger.warning("%s is not what the hub has (%s): it is fetched again", item.target, wrong)
    return wrong is None


def _get_anew(client: httpx.Client, item: Download, advance: Callable[[int], None], stop: threading.Event) -> None:
    for attempt in (1, 2):
        _receive(client, item, advance, stop)
        wrong = compare(item.part, item.known)
        if wrong is None:
            atomic_replace(item.part, item.target)
            return
        advance(-item.part.stat().st_size)
        item.part.unlink()
        if attempt == 1:
            logger.warning("%s: %s: it is fetched again", item.known.path, wrong)
    raise ValueError(f"{item.known.path}: {wrong}, twice: the hub's copy, or the way from it, is corrupt")


def _receive(client: httpx.Client, item: Download, advance: Callable[[int], None], stop: threading.Event) -> None:
    """Append to the part until it has the length that the hub lists, through as many connections as that takes."""
    size = item.known.size
    have = item.part.stat().st_size if item.part.exists() else 0
    advance(have)
    furthest, failures = have, 0
    while size is None or have < size or not item.part.exists():
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        try:
            with client.stream("GET", item.url, headers=headers) as response:
                _refuse(response, item)
                resumed = response.status_code == 206 and _range_start(response) == have
                if not resumed and (response.is_success or response.status_code == 416):
                    advance(-have)  # the whole file comes, whatever was asked; or the part is longer than the file
                    have = 0
                response.raise_for_status()
                with item.part.open("ab" if have else "wb") as file:
                    for chunk in response.iter_bytes():  # as it comes: a fixed size would hold back, and lose, a rest
                        file.write(chunk)
                        have += len(chunk)
                        advance(len(chunk))
                        if size is not None and have > size:
                            return  # the comparison with the listing says what is wrong
            if size is None:
                return
            reason = f"the hub sent {have:,} of {size:,} bytes"
        except httpx.HTTPError as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
        if have > furthest:
            furthest, failures = have, 0
        if size is None or have < size:
            failures += 1
            if failures == _TRIES:
                raise FileNotFoundError(
                    f"{item.known.path}: the download stopped ({reason}); the same command goes on from where it stopped"
                )
            if stop.wait(min(60.0, _FIRST_WAIT * 2 ** (failures - 1))):
                raise _StoppedError


def _range_start(response: httpx.Response) -> int | None:
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def _refuse(response: httpx.Response, item: Download) -> None:
    """Errors that another try will not mend."""
    if response.status_code in (401, 403):
        raise ValueError(
            f"{item.known.path}: the hub refuses it ({response.status_code}): it needs an account that has been granted "
            f"access, and its token (HF_TOKEN, or MODELSCOPE_API_TOKEN)"
        )
    if response.status_code in (404, 410):
        raise ValueError(f"{item.known.path}: the hub lists it but does not have it ({response.status_code})")


def _check_space(downloads: list[Download]) -> None:
    missing = sum(
        max(0, (item.known.size or 0) - (item.part.stat().st_size if item.part.exists() else 0))
        for item in downloads
        if not item.target.exists()
    )
    if downloads:
        folder = next(parent for parent in downloads[0].target.absolute().parents if parent.exists())
        free = shutil.disk_usage(folder).free
        if missing > free:
            raise ValueError(
                f"{missing / 1e9:.1f} GB are to be downloaded, but {folder} has room for {free / 1e9:.1f} GB"
            )
