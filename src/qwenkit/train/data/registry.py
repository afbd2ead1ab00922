"""Which files a data set's name stands for, and how they are to be read: LLaMA-Factory's dataset_info.json.

In: names from `dataset`, and dataset_dir. Out: `DataSource`s. A name that stands in no registry may be a file or folder itself.
Only local files are read: an entry that points to a hub or a loading script is refused, saying so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenkit.settings import near, nearest
from qwenkit.train.data.files import file_kind
from qwenkit.train.data.mindrecord import partitions
from qwenkit.weights.stored import read_json

REGISTRY = "dataset_info.json"
BUILTIN = Path(__file__).parent / "builtin"
"""A folder like dataset_dir: small data sets that come with qwenkit, for names that dataset_dir does not know."""
FORMATS = ("auto", "alpaca", "sharegpt", "openai", "text", "wiki", "tokens")
_REMOTE = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_KEYS = ("file_name", "formatting", "ranking", "subset", "split", "folder", "num_samples", "columns", "tags", *_REMOTE)
COLUMNS = (
    *("prompt", "query", "response", "history", "messages", "system", "tools", "images", "videos", "audios"),
    *("chosen", "rejected", "kto_tag"),
)
TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")


@dataclass(frozen=True)
class DataSource:
    """A data set: its files in order, and how to read them.

    columns and tags are the registry's, empty where it gives none; `ranking`: answers come in pairs; num_samples: how many of
    its records are taken, drawn at random and with repeats if it has fewer.
    """

    name: str
    files: tuple[Path, ...]
    formatting: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    ranking: bool = False
    num_samples: int | None = None
    notes: tuple[str, ...] = ()
    """What the registry says of it that has no effect."""

    @property
    def settings(self) -> dict[str, Any]:
        """What besides the files' bytes decides what is read from them."""
        return {
            "formatting": self.formatting,
            "columns": dict(self.columns),
            "tags": dict(self.tags),
            "ranking": self.ranking,
        }


def find_sources(names: Sequence[str], dataset_dir: Path) -> list[DataSource]:
    """The data sets called `names`: entries of dataset_dir/dataset_info.json, else paths, beside it or from where we stand,
    else data sets that come with qwenkit.

    Raises ValueError for a name that is neither (naming the nearest entry), an entry with an unknown key, and one that is not
    a local file; FileNotFoundError for an entry whose file is missing.
    """
    path = dataset_dir / REGISTRY
    registry = read_json(path) if path.is_file() else {}
    sources = []
    for name in names:
        if name in registry:
            sources.append(_entry(name, registry[name], dataset_dir))
            continue
        places = [place for place in (dataset_dir / name, Path(name)) if place.exists()]
        if not places and name in (builtin := read_json(BUILTIN / REGISTRY)):
            sources.append(_entry(name, builtin[name], BUILTIN))
            continue
        if not places:
            where = f"no entry of {path}" if registry else f"no data set: there is no {path}"
            hint = f"; {nearest(name, registry)}" if registry else ""
            raise ValueError(f"dataset {name!r} is {where} and no file{hint}")
        sources.append(DataSource(name, _files(name, places[0], None, None)))
    return sources


def _entry(name: str, entry: Any, folder: Path) -> DataSource:
    where = f"{REGISTRY}: {name}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {entry!r}, allowed is an object with a file_name")
    entry = {key: value for key, value in entry.items() if value is not None}
    notes = _unknown(where, entry, _KEYS)
    if not isinstance(entry.get("file_name"), str):
        remote = [key for key in _REMOTE if key in entry]
        if remote:
            raise ValueError(
                f"{where} is not a local file ({remote[0]}: {entry[remote[0]]}); download it and give its file_name"
            )
        raise ValueError(f"{where} has no file_name, which is needed")
    formatting = entry.get("formatting", "auto" if "columns" not in entry else "alpaca")
    if formatting not in FORMATS:
        raise ValueError(f"{where}.formatting is {formatting!r}, allowed are {', '.join(FORMATS)}")
    ranking, number = entry.get("ranking", False), entry.get("num_samples")
    if not isinstance(ranking, bool):
        raise ValueError(f"{where}.ranking is {ranking!r}, allowed are true and false")
    if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
        raise ValueError(f"{where}.num_samples is {number!r}, allowed is a whole number of at least 1")
    files = _files(name, folder / entry["file_name"], entry.get("subset") or entry.get("folder"), entry.get("split"))
    columns = _names(where, "columns", entry, COLUMNS, notes)
    tags = _names(where, "tags", entry, TAGS, notes)
    return DataSource(name, files, formatting, columns, tags, ranking, number, tuple(notes))


def _unknown(where: str, given: Iterable[str], known: Sequence[str]) -> list[str]:
    """A note on keys that are not known, such as checksums and remarks. ValueError for what seems to be a known one misspelt."""
    unknown = [key for key in given if key not in known]
    for key in unknown:
        if (meant := near(key, known)) is not None:
            raise ValueError(f"{where} has the unknown key {key!r}; did you mean {meant}?")
    return [f"{where}: {', '.join(unknown)} ha{'s' if len(unknown) == 1 else 've'} no effect"] if unknown else []


def _names(where: str, key: str, entry: Mapping[str, Any], known: Sequence[str], notes: list[str]) -> dict[str, str]:
    given = entry.get(key, {})
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values() if value is not None):
        raise ValueError(f"{where}.{key} is {given!r}, allowed is an object of names")
    notes += _unknown(f"{where}.{key}", given, known)
    return {name: value for name, value in given.items() if value is not None and name in known}


def _files(name: str, path: Path, subset: str | None, split: str | None) -> tuple[Path, ...]:
    """One file, the partitions of a MindRecord set, or a folder's files of one kind (of a subset and a split)."""
    if path.is_file():
        files = partitions(path) if file_kind(path) == "mindrecord" else [path]
        return tuple(files)
    if not path.is_dir():
        raise FileNotFoundError(f"dataset {name!r}: {path} does not exist")
    folder = path / subset if subset else path
    if not folder.is_dir():
        raise FileNotFoundError(f"dataset {name!r}: {folder} does not exist")
    found = []
    for file in sorted(folder.iterdir()):
        if not file.is_file() or file.name == REGISTRY or file.suffix == ".db":
            continue
        try:
            found.append((file, file_kind(file)))
        except ValueError:
            continue  # a README or a licence beside the data
    if split is not None:
        found = [(file, kind) for file, kind in found if split in re.split(r"[-_.]", file.name)]
    if not found:
        raise FileNotFoundError(
            f"dataset {name!r}: {folder} holds no data file" + (f" of split {split}" if split else "")
        )
    kinds = sorted({kind for _, kind in found})
    if len(kinds) > 1:
        raise ValueError(
            f"dataset {name!r}: {folder} holds files of several kinds ({', '.join(kinds)}); allowed is one"
        )
    return tuple(file for file, _ in found)
