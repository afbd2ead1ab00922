"""Which command installs what is missing: the one that fits how qwenkit itself came here."""

from __future__ import annotations

import json
import sys

import pytest

from qwenkit import installation
from qwenkit.installation import install_extra, install_package


@pytest.mark.parametrize(
    ("origin", "requirement"),
    [
        (None, "'qwenkit[serve]'"),
        ({"url": "file:///src/my%20kit", "dir_info": {"editable": True}}, "-e '/src/my kit[serve]'"),
        ({"url": "file:///src/kit", "dir_info": {}}, "'/src/kit[serve]'"),
        ({"url": "file:///w/qwenkit-1.whl", "archive_info": {}}, "'/w/qwenkit-1.whl[serve]'"),
        (
            {"url": "https://git.example/kit", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "'qwenkit[serve] @ git+https://git.example/kit@abc'",
        ),
        (
            {"url": "https://host.example/kit.whl", "archive_info": {}},
            "'qwenkit[serve] @ https://host.example/kit.whl'",
        ),
        ({}, "'qwenkit[serve]'"),
    ],
)
def test_an_extra(monkeypatch: pytest.MonkeyPatch, origin: dict[str, object] | None, requirement: str) -> None:
    monkeypatch.setattr(installation, "_origin", lambda: None if origin is None else json.dumps(origin))
    assert install_extra("serve") == f"{sys.executable} -m pip install {requirement}"


def test_here() -> None:
    """The tests run in an editable installation, whose extras come from its folder."""
    assert install_extra("serve").endswith("[serve]'")
    assert install_package("wandb") == f"{sys.executable} -m pip install wandb"
