"""A figure as a PNG file. In: matplotlib's figure, a path. Out: the file, whole or not there at all."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from qwenkit.installation import install_extra
from qwenkit.storage import new_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_figure(setting: str, path: Path) -> None:
    """ValueError or FileNotFoundError for a figure that could not be drawn or written, before anything is measured."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{setting} is {str(path)!r}, but there is no folder {str(path.parent)!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"{setting} as .png needs matplotlib: {install_extra('plot')}")


def save_figure(figure: Figure, path: Path) -> None:
    """Write it beside its place first and then into it."""
    with new_file(path) as part:
        figure.savefig(part, format="png", dpi=150)
