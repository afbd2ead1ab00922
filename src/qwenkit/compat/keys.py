"""The table of other trainers' keys: what each one means here.

In: a key of LLaMA-Factory's argument classes, of transformers' TrainingArguments or of Qwen's finetune.py. Out: a `Key` that
says whether it is neutral, translated, noted or refused, and why. table.py joins all of them; docs/train.md shows them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["neutral", "translated", "noted", "refused"]
TRUE = ("true", "yes", "on", "1")
FALSE = ("false", "no", "off", "0", "none", "null", "")


@dataclass(frozen=True)
class Key:
    """One key. `text` is the setting it becomes, or the reason; `default` is the other trainer's, at which it says nothing.

    neutral: it says nothing about training, whatever its value. translated: qwenkit has the same thing. noted: accepted, and said
    to have no effect. refused: it would change what is learned. Noted and refused keys pass at a neutral value.
    """

    kind: Kind
    text: str
    default: Any = None
    name: str | None = None  # the key's name here, where only the name differs

    def is_neutral(self, value: Any) -> bool:
        """True for null, false, 0, an empty value, and the other trainer's default."""
        if isinstance(value, list | tuple | dict | set) and not value:
            return True
        plain = _plain(value)
        return plain in (*FALSE, 0.0) or (self.default is not None and plain == _plain(self.default))


def _plain(value: Any) -> Any:
    """A value as a number or a lower-case text, so that YAML's, JSON's and the command line's spellings compare equal."""
    text = str(value).strip().lower()
    try:
        return float(text)
    except ValueError:
        return text


def same(names: str) -> dict[str, Key]:
    """Keys that have the same name here."""
    return {name: Key("translated", name, name=name) for name in names.split()}


def renamed(**names: str) -> dict[str, Key]:
    """Keys that have another name here and the same values."""
    return {name: Key("translated", ours, name=ours) for name, ours in names.items()}


def translated(names: str, text: str) -> dict[str, Key]:
    """Keys whose values are translated too; `text` names the settings that they become."""
    return {name: Key("translated", text) for name in names.split()}


def neutral(names: str, text: str) -> dict[str, Key]:
    return {name: Key("neutral", text) for name in names.split()}


def noted(text: str, names: str = "", **defaults: Any) -> dict[str, Key]:
    """Keys without effect for one reason: names with a neutral default, and keywords with another."""
    return {name: Key("noted", text) for name in names.split()} | {
        name: Key("noted", text, default) for name, default in defaults.items()
    }


def refused(text: str, names: str = "", **defaults: Any) -> dict[str, Key]:
    return {name: Key("refused", text) for name in names.split()} | {
        name: Key("refused", text, default) for name, default in defaults.items()
    }


def joined(tables: Iterable[dict[str, Key]]) -> dict[str, Key]:
    """One table from several, none of which may name a key of another."""
    whole: dict[str, Key] = {}
    for table in tables:
        twice = whole.keys() & table.keys()
        assert not twice, f"in the table twice: {sorted(twice)}"
        whole |= table
    return whole
