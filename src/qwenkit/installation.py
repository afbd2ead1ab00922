"""How this qwenkit was installed, and so how a part of it that is missing is installed.

In: the name of an extra, or of another package. Out: the command that installs it for the Python that runs: an extra of a
checkout comes from its folder, because the package index does not know it.
"""

from __future__ import annotations

import json
import shlex
import sys
from importlib.metadata import PackageNotFoundError, distribution
from urllib.parse import unquote, urlsplit


def install_extra(extra: str) -> str:
    """The command that installs `extra` of qwenkit."""
    return _pip(*_requirement(extra, _origin()))


def install_package(name: str) -> str:
    """The command that installs another package."""
    return _pip(name)


def _pip(*requirement: str) -> str:
    return shlex.join([sys.executable, "-m", "pip", "install", *requirement])


def _origin() -> str | None:
    """The text of direct_url.json (PEP 610), which a package has that came from no index."""
    try:
        return distribution("qwenkit").read_text("direct_url.json")
    except PackageNotFoundError:
        return None


def _requirement(extra: str, origin: str | None) -> tuple[str, ...]:
    """What pip is asked for."""
    try:
        record = {} if origin is None else json.loads(origin)
        url = str(record["url"])
    except (ValueError, KeyError, TypeError):
        return (f"qwenkit[{extra}]",)
    if "vcs_info" in record:
        vcs, commit = record["vcs_info"].get("vcs", "git"), record["vcs_info"].get("commit_id", "")
        return (f"qwenkit[{extra}] @ {vcs}+{url}{f'@{commit}' if commit else ''}",)
    parts = urlsplit(url)
    if parts.scheme != "file":
        return (f"qwenkit[{extra}] @ {url}",)
    folder = f"{unquote(parts.path)}[{extra}]"
    return ("-e", folder) if record.get("dir_info", {}).get("editable") else (folder,)
