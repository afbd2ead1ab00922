"""Settings as people write them: a YAML or JSON file, and key=value words. Nothing is checked here but the form."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from qwenkit.files import read_text

RECIPES = Path(__file__).parents[1] / "recipes"
"""Training configurations that come with qwenkit; `recipes/NAME.yaml` names one of them from wherever one stands."""


def find_recipe(name: str) -> Path:
    """The path of a configuration: a file, or one that comes with qwenkit under the name recipes/NAME.yaml."""
    path = Path(name)
    if not path.exists() and path.parts[:1] == ("recipes",) and (RECIPES / Path(*path.parts[1:])).is_file():
        return RECIPES / Path(*path.parts[1:])
    return path


def read_settings(path: Path) -> dict[str, Any]:
    """The keys of a YAML or JSON file; none of them is checked yet.

    Raises FileNotFoundError, and ValueError for a file that is too large or no YAML, holds no mapping, or one key twice.
    """
    try:
        settings = yaml.load(read_text(path), _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML that can be read: {' '.join(str(error).split())}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ValueError(f"{path} must hold lines `key: value`")
    return settings


def parse_assignments(texts: Iterable[str]) -> dict[str, str]:
    """`key=value` texts as settings; later ones win. ValueError for a text without `=`."""
    settings = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{text!r} is neither a file nor key=value")
        settings[key.strip().removeprefix("--").replace("-", "_")] = value
    return settings


class _Loader(yaml.SafeLoader):
    """YAML's safe subset, without keys that stand twice and override one another in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"the key {twice} stands twice")
        return super().construct_mapping(node, deep)
