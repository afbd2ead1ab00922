"""Models of ModelScope, or of the site named by MODELSCOPE_ENDPOINT.

In: a repository's id. Out: its listing with checksums, or a local folder with its files, each compared with the listing.
The light client `modelscope-hub`, an optional extra, knows the site's addresses, listing and log-in; the bytes are fetched
by `fetch`. Without a folder of the user's choice they lie where that client keeps its own downloads.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from qwenkit.hub.fetch import Download, cached_in, choose_files, copy_without_hub, fetch, write_sums
from qwenkit.hub.verify import KnownFile
from qwenkit.installation import install_extra


def find_cached(name: str, revision: str | None, quant: str | None = None) -> Path | None:
    """A whole model of this id among ModelScope's downloads, those of its older client included; no network."""
    owner, _, model = name.partition("/")
    older = model.replace(".", "___")  # clients up to modelscope 1.37 wrote dots so, and kept no revisions apart
    candidates = [_snapshot(name, revision)]
    if revision is None:
        candidates += [_cache() / "models" / owner / older, _cache() / "hub" / "models" / owner / older]
    found = (cached_in(folder, f"ms:{name}", quant) for folder in candidates)
    return next((path for path in found if path is not None), None)


def list_files(name: str, revision: str | None) -> list[KnownFile]:
    """What ModelScope has under this id now. Errors as in `pull`."""
    return _list(_client(name), name, revision)


def pull(name: str, revision: str | None, into: Path | None, *, progress: bool, quant: str | None = None) -> Path:
    """Bring a model here, or bring it up to date, and compare every file with the hub's checksums.

    Files already there are compared too, and fetched again where they differ. When the hub cannot be reached a whole copy
    in the cache serves, with a warning. Raises, one sentence each: ConnectionError without connection and copy; ValueError or
    FileNotFoundError for an unknown id, a model that asks for a token, checksums that do not match, a hostile listing, or
    when the client is not installed.
    """
    client = _client(name)
    try:
        files = _list(client, name, revision)
    except ConnectionError as error:
        return copy_without_hub(error, find_cached(name, revision, quant) if into is None else None)
    chosen = choose_files(files, f"ms:{name}", quant)
    folder = into if into is not None else _snapshot(name, revision)
    downloads = [
        Download(
            client.legacy.get_download_url(name, "model", file.path, revision or "master"),
            target=folder / file.path,
            part=folder / f"{file.path}.part",
            known=file,
        )
        for file in chosen
    ]
    token = client.legacy.token
    headers = {"User-Agent": "qwenkit"}
    if token:  # httpx drops both when it is sent on to another host
        headers |= {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"}
    fetch(downloads, headers, title=name, progress=progress)
    if into is not None:
        write_sums(into, chosen)
    return folder if quant is None else folder / chosen[0].path


def _list(client: Any, name: str, revision: str | None) -> list[KnownFile]:
    from modelscope_hub import errors

    at = f"ms:{name} at {client.legacy.endpoint}"
    try:
        entries = client.list_repo_files(name, "model", revision=revision)
    except errors.NotExistError:
        raise FileNotFoundError(f"{at} does not exist, or has no revision {revision or 'master'!r}") from None
    except (errors.AuthenticationError, errors.PermissionDeniedError):
        raise ValueError(
            f"{at} is not given to everyone: set MODELSCOPE_API_TOKEN to the token of an account that may read it"
        ) from None
    except (errors.NetworkError, OSError):
        raise ConnectionError(f"{at} cannot be reached (MODELSCOPE_ENDPOINT can name another site)") from None
    except errors.HubError as error:
        raise ConnectionError(
            f"{at} cannot be reached: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from None
    # The listing gives 0 for a size that it does not know.
    return [KnownFile(e.path, e.size or None, sha256=e.sha256 or None) for e in entries if not e.is_dir]


def _client(name: str) -> Any:
    try:
        from modelscope_hub import HubApi, HubConfig
    except ImportError:
        raise ValueError(f"ms:{name} needs the ModelScope client: {install_extra('modelscope')}") from None
    return HubApi(config=HubConfig())  # a new one: the shared one keeps the environment of its first use


def _snapshot(name: str, revision: str | None) -> Path:
    return _cache() / "models" / name.replace("/", "--") / "snapshots" / (revision or "master")


def _cache() -> Path:
    return Path(os.environ.get("MODELSCOPE_CACHE") or Path.home() / ".cache" / "modelscope").expanduser()
