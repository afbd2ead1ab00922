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


def calls(content: str | None, name: str) -> list[dict[str, Any]]:
    """sharegpt's function_call: one call as JSON, or a list of them."""
    try:
        calls = json.loads(content or "")
    except (ValueError, RecursionError):
        raise BadRecordError(
            "wrong type", f"{name} is no valid JSON, a call with name and arguments is needed"
        ) from None
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise BadRecordError("wrong type", f"{name} is {shown(call)}, a call with name and arguments is needed")
    return [{"type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}} for c in calls]


def without_nulls(value: Any) -> Any:
    """Columnar files give every object every key of the column; those that were absent come back as null."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return value


def decoded(value: Any) -> Any:
    """CSV has only texts: one that is a JSON list or object is read as that."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return None if value == "" else value


def shown(value: Any) -> str:
    if value is None:
        return "missing"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
