"""Models of the Hugging Face hub, or of a mirror named by HF_ENDPOINT.

In: a repository's id. Out: its listing with checksums, or a local folder with its files, each compared with the listing.
Without a folder of the user's choice the files go into huggingface_hub's own cache, which other programs share; the bytes
are fetched by `fetch` (it resumes), then linked as huggingface_hub links them.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from qwenkit.hub.fetch import Download, cached_in, choose_files, copy_without_hub, fetch, write_sums
from qwenkit.hub.verify import KnownFile
from qwenkit.storage import atomic_replace, write_text

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Listing:
    """All files of a repository at one commit."""

    commit: str
    files: list[KnownFile]


def find_cached(name: str, revision: str | None, quant: str | None = None) -> Path | None:
    """The snapshot of a repository in huggingface_hub's cache if a whole model lies there; no network."""
    storage = _storage(name)
    commit = revision or constants.DEFAULT_REVISION
    if not _COMMIT.fullmatch(commit):
        ref = storage / "refs" / commit
        if not ref.is_file():
            return None
        commit = ref.read_text("utf-8").strip()
    folder = storage / "snapshots" / commit
    return cached_in(folder, name, quant)


def list_files(name: str, revision: str | None) -> list[KnownFile]:
    """What the hub has under this id now. Errors as in `pull`."""
    return _list(name, revision).files


def _list(name: str, revision: str | None) -> Listing:
    with _explained(name, revision):
        api = HfApi(endpoint=_endpoint())
        commit = api.model_info(name, revision=revision).sha
        if commit is None or not _COMMIT.fullmatch(commit):
            raise ValueError(f"{name} at {_endpoint()} is listed without a commit: this is no Hugging Face hub")
        files = []
        for entry in api.list_repo_tree(name, recursive=True, revision=commit):
            if isinstance(entry, huggingface_hub.RepoFile):
                if entry.lfs is not None:
                    files.append(KnownFile(entry.path, entry.lfs.size, sha256=entry.lfs.sha256))
                else:
                    files.append(KnownFile(entry.path, entry.size, git_sha1=entry.blob_id))
        return Listing(commit, files)


def pull(name: str, revision: str | None, into: Path | None, *, progress: bool, quant: str | None = None) -> Path:
    """Bring a model here, or bring it up to date, and compare every file with the hub's checksums.

    Files already there are compared too, and fetched again where they differ. When the hub cannot be reached a whole copy
    in the cache serves, with a warning. Raises, one sentence each: ConnectionError without connection and copy; ValueError or
    FileNotFoundError for an unknown id or revision, a model that asks for a token, checksums that do not match, a hostile
    listing.
    """
    try:
        listing = _list(name, revision)
    except ConnectionError as error:
        return copy_without_hub(error, find_cached(name, revision, quant) if into is None else None)
    chosen = choose_files(listing.files, name, quant)
    if into is not None:
        places = {file: into / file.path for file in chosen}
    else:
        places = {file: _blob(name, listing.commit, file) for file in chosen}
    downloads = [
        Download(
            hf_hub_url(name, file.path, revision=listing.commit, endpoint=_endpoint()),
            target=place,
            part=place.with_name(place.name + ".part"),
            known=file,
        )
        for file, place in places.items()
    ]
    fetch(downloads, build_hf_headers(), title=name, progress=progress)
    if into is None:
        into = _link(name, revision, listing.commit, places)
    else:
        write_sums(into, chosen)
    return into if quant is None else into / chosen[0].path


def _link(name: str, revision: str | None, commit: str, places: dict[KnownFile, Path]) -> Path:
    """Give the blobs their names in a snapshot as huggingface_hub does, without asking the hub: a mirror may redirect requests
    for files without saying which commit they are of. The bytes were compared with the listing."""
    folder = _storage(name) / "snapshots" / commit
    for file, place in places.items():
        named = folder / file.path
        if named == place:
            continue
        named.parent.mkdir(parents=True, exist_ok=True)
        beside = named.with_name(f"{named.name}.{os.getpid()}.part")
        beside.unlink(missing_ok=True)
        try:
            beside.symlink_to(os.path.relpath(place, named.parent))
        except OSError:  # a file system, or a user of Windows, without links
            shutil.copyfile(place, beside)
        atomic_replace(beside, named)
    if not _COMMIT.fullmatch(revision or constants.DEFAULT_REVISION):
        ref = _storage(name) / "refs" / (revision or constants.DEFAULT_REVISION)
        ref.parent.mkdir(parents=True, exist_ok=True)
        write_text(ref, commit)
    return folder


def _blob(name: str, commit: str, file: KnownFile) -> Path:
    """Where a file's bytes belong in the cache: a blob named by its checksum; the snapshot itself where no links exist."""
    storage = _storage(name)
    named = storage / "snapshots" / commit / file.path
    return (
        named if named.is_file() and not named.is_symlink() else storage / "blobs" / str(file.sha256 or file.git_sha1)
    )


def _storage(name: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


@contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
    """Turn huggingface_hub's errors into one sentence each; ConnectionError where the hub was not reached at all."""
    at = f"{name} at {_endpoint()}"
    try:
        yield
    except GatedRepoError:
        raise ValueError(
            f"{at} is given out on request only: ask for access on its page, then set HF_TOKEN to a token of that account"
        ) from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{at} does not exist, or is private: check the name, or set HF_TOKEN to a token of an account that may read it"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"{at} has no revision {revision!r}: name a branch, a tag or a commit of it") from None
    except HFValidationError as error:
        raise ValueError(f"{name!r} is no id of a model: {error}") from None
    except OfflineModeIsEnabled:
        raise ConnectionError(f"{at} is not reached, because HF_HUB_OFFLINE is set") from None
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ConnectionError(f"{at} cannot be read: {_first_line(error)}") from None
    except Exception as error:
        # The client's own errors: httpx in huggingface_hub 1, httpx2 in 2.
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2") and not isinstance(
            error, (ConnectionError, TimeoutError)
        ):
            raise
        raise ConnectionError(f"{at} cannot be reached (HF_ENDPOINT can name a mirror): {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
