"""The fields of a record: what may stand in them, and the sentence that is said when something else does.

In: decoded JSON, or the texts of a CSV. Out: checked values. Everything here raises BadRecordError, naming the field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

Message = dict[str, Any]


class BadRecordError(ValueError):
    """A record that cannot be learned from. kind: what a report counts it as; the message names the field."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def integers(record: Mapping[str, Any], name: str) -> list[int]:
    values = record.get(name)
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise BadRecordError("wrong type", f"{name} is {shown(values)}, allowed is a list of token ids")
    return values


def answer(text: str, name: str) -> Message:
    if not text.strip():
        raise BadRecordError("empty answer", f"{name} is empty")
    return {"role": "assistant", "content": text}


def text_or_none(values: Mapping[str, Any], columns: Mapping[str, str], key: str) -> str | None:
    value = values.get(key)
    if value is not None and not isinstance(value, str):
        raise BadRecordError("wrong type", f"{columns[key]} is {shown(value)}, allowed is a text")
    return value


def joined(content: Any, name: str) -> str | None:
    """A content's text; lists of text parts are joined."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRecordError("wrong type", f"{name} is {shown(content)}, allowed is a text")
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise BadRecordError("unsupported field", f"{name} holds {shown(part)}, allowed are text parts")
        texts.append(part["text"])
    return "".join(texts)


def without_nulls(value: Any) -> Any:
    """A value of a table without null fields: every object of a column has all of the column's keys."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def as_list(value: Any) -> list[Any] | None:
    """A value where only a list has a place: itself, or the JSON of one, as tables write it. None for anything else."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, list) else None


def shown(value: Any) -> str:
    if value is None:
        return "missing"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
