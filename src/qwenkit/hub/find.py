"""From what a user types to a model on this disk.

In: a folder, a `.gguf` file, `smollm2`, `hf:org/name` (or plain `org/name`), `ms:org/name`. Out: the path of a folder or file.
`find_model` takes what is there and goes to a hub only for what is not; `pull_model` always asks the hub and compares all
checksums; `check_model` looks at a folder that came some other way. The hubs' clients are imported where a hub is needed: they
take 0.2 s and 20 MB, which whoever opens a folder can do without.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from qwenkit.files import has_file
from qwenkit.hub import smollm2
from qwenkit.hub.verify import KnownFile, verify_folder
from qwenkit.settings import near
from qwenkit.storage import new_file

_PART = r"[A-Za-z0-9_][\w.-]{0,95}"
_FORMS = (
    f"the folder of a model, a .gguf file, {smollm2.ALIAS} (the small default model), "
    "or a hub id: org/name or hf:org/name (Hugging Face), ms:org/name (ModelScope), with :q4_k_m one GGUF of a repository"
)


@dataclass(frozen=True)
class _Repo:
    """A repository on one of the two hubs."""

    on_modelscope: bool
    name: str
    quant: str | None = None
    """The one GGUF of the repository that is meant; None: all of its model."""

    @property
    def hub(self) -> ModuleType:
        """What talks to the hub: a module with find_cached, pull and list_files."""
        from qwenkit.hub import huggingface, modelscope

        return modelscope if self.on_modelscope else huggingface

    def find_cached(self, revision: str | None) -> Path | None:
        found: Path | None = self.hub.find_cached(self.name, revision, self.quant)
        return found

    def pull(self, revision: str | None, into: Path | None, progress: bool) -> Path:
        pulled: Path = self.hub.pull(self.name, revision, into, progress=progress, quant=self.quant)
        return pulled

    def list_files(self, revision: str | None) -> list[KnownFile]:
        files: list[KnownFile] = self.hub.list_files(self.name, revision)
        return files


def find_model(name: str, *, download: bool = True, revision: str | None = None, progress: bool = True) -> Path:
    """The folder or .gguf file that `name` stands for, downloaded if it is not on this disk and `download` allows it.

    A model that is already in a cache is used without asking its hub. Raises ValueError or FileNotFoundError, one sentence:
    what was given and what could be, no such path, or why a hub did not deliver.
    """
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if name and has_file(path):
        if path.suffix.lower() == ".gguf":
            return path
        raise ValueError(f"{name!r} is a file, but no .gguf file; a model is named by {_FORMS}")
    if name == smollm2.ALIAS:
        _no_revision(revision)
        with _told():
            return smollm2.find(download=download, progress=progress)
    repo = _parse(name)
    cached = repo.find_cached(revision)
    if cached is not None:
        return cached
    if not download:
        raise FileNotFoundError(f"{name!r} is not on this disk: get it with `qwenkit pull {name}`")
    with _told():
        return repo.pull(revision, None, progress)


def pull_model(name: str, *, into: Path | None = None, revision: str | None = None, progress: bool = True) -> Path:
    """Get a model from its hub, or bring it up to date, every file compared with the hub's checksum.

    Without `into` it goes into the hub's own cache. A folder `into` gets plain files and a SHA256SUMS file, with which
    `sha256sum -c` or `check_model` can check it anywhere. Raises ValueError or FileNotFoundError, one sentence each.
    """
    if into is not None and into.exists() and not into.is_dir():
        raise ValueError(f"--into needs a folder; {str(into)!r} is a file")
    if name == smollm2.ALIAS:
        _no_revision(revision)
        with _told():
            path = smollm2.find(download=True, progress=progress)
            if into is None:
                return path
            from qwenkit.hub.fetch import write_sums

            _copy(path, into / path.name)
            write_sums(into, [KnownFile(path.name, sha256=smollm2.SHA256)])
        return into / path.name
    repo = _parse(name)
    with _told():
        return repo.pull(revision, into, progress)


def check_model(folder: Path, name: str | None = None, *, revision: str | None = None, progress: bool = True) -> str:
    """Check the files of a folder, against hub `name` where one is given, and say in one line that all is good.

    Raises ValueError with one line for every problem: the file, what was expected and what was found.
    """
    against = None
    if name is not None:
        from qwenkit.hub.fetch import choose_files

        repo = _parse(name)
        with _told():
            against = choose_files(repo.list_files(revision), name, repo.quant)
    elif revision is not None:
        raise ValueError("--revision names a version on a hub: give the hub's id after the folder too")
    report = verify_folder(folder, against=against, progress=progress)
    if report.problems:
        raise ValueError("\n".join(str(problem) for problem in report.problems))
    if report.hashed:
        how = f"{report.hashed} checksum{'s'[: report.hashed != 1]} compared" + (f" with {name}" if name else "")
    else:
        how = "by lengths and names only; no checksums are known here, name the model's hub id to compare with those"
    return f"{report.files} files, {report.size / 1e9:.2f} GB: all good ({how})"


def _parse(name: str) -> _Repo:
    """A hub's repository from `hf:org/name`, `ms:org/name` or `org/name`; what is plainly a path never gets that far."""
    path_like = name.startswith(("/", "./", "../", "~")) or name in (".", "..") or "\\" in name
    if path_like or Path(name).is_absolute() or name.endswith(("/", ".gguf")):
        if Path(name).expanduser().exists():
            raise ValueError(f"{name!r} is on this disk already; a hub's model is named org/name or ms:org/name")
        raise FileNotFoundError(f"there is no file or folder {name!r}; a model is named by {_FORMS}")
    match = re.fullmatch(rf"(?:(hf|ms):)?({_PART}/{_PART})(?::({_PART}))?", name, re.ASCII)
    if match:
        return _Repo(match[1] == "ms", match[2], match[3])
    meant = near(name.lower(), [smollm2.ALIAS])
    hint = "" if meant is None else f" (did you mean {meant}?)"
    raise ValueError(f"{name!r} names no model{hint}: a model is named by {_FORMS}")


def _no_revision(revision: str | None) -> None:
    if revision is not None:
        raise ValueError(f"--revision {revision}: {smollm2.ALIAS} comes in one version only")


@contextmanager
def _told() -> Iterator[None]:
    """The errors of network and disk as those that the command line shows."""
    try:
        yield
    except FileNotFoundError:
        raise
    except ConnectionError as error:
        raise FileNotFoundError(str(error)) from None
    except OSError as error:
        raise ValueError(f"cannot write the model: {error}") from error
    except ImportError as error:  # httpx with a SOCKS proxy and without socksio
        raise ValueError(str(error)) from None


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_file(target) as part:
        shutil.copyfile(source, part)
