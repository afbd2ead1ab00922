"""Hostile requests from tests/data/security/http.jsonl, for attacks.py and for the tests of the server.

In: lines that say what to send in few words (a text and how often, an element and how many bytes). Out: the bytes.
"""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

PATH = Path(__file__).parents[1] / "tests" / "data" / "security" / "http.jsonl"
_BOUNDARY = "qwenkit-boundary"


def cases(do: str) -> list[dict[str, Any]]:
    """The cases of one kind: post, hold, batch, render or limits."""
    lines = map(json.loads, PATH.read_text("utf-8").splitlines())
    return [case for case in lines if case["do"] == do]


def expanded(value: Any, most: int) -> Any:
    """A JSON value in which {"repeat", "times"} and {"repeat", "bytes"} have become the texts, of `most` bytes at most."""
    if isinstance(value, list):
        return [expanded(item, most) for item in value]
    if not isinstance(value, dict):
        return value
    if "repeat" in value:
        number = value["times"] if "times" in value else value["bytes"] // len(value["repeat"])
        return value["repeat"] * min(number, most // len(value["repeat"]))
    return {name: expanded(item, most) for name, item in value.items()}


def body_of(spec: dict[str, Any], most: int = 1 << 30) -> tuple[bytes, str]:
    """(body, content type) that a case sends; lists of elements have `most` bytes at most."""
    if "json" in spec:
        return json.dumps(expanded(spec["json"], most)).encode(), "application/json"
    if "raw" in spec:
        return spec["raw"].encode(), "application/json"
    if "multipart" in spec:
        head = 'Content-Disposition: form-data; name="purpose"\r\n\r\nbatch'
        file = 'Content-Disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\n' + expanded(
            spec["multipart"], most
        )
        parts = "".join(f"--{_BOUNDARY}\r\n{part}\r\n" for part in (head, file))
        return f"{parts}--{_BOUNDARY}--\r\n".encode(), f"multipart/form-data; boundary={_BOUNDARY}"
    size, element = min(spec["bytes"], most), spec["element"]
    room = size - len(spec["head"]) - len(spec["tail"])
    if "%x" not in element:
        separator = "," if element != "[" else ""
        elements = separator.join([element] * (room // len(element + separator)))
    else:
        pieces, length = [], 0
        for number in count():
            piece = element % number
            length += len(piece) + 1
            if length > room:
                break
            pieces.append(piece)
        elements = ",".join(pieces)
    joint = "," if spec["head"][-1] not in "[{:" else ""
    return (spec["head"] + joint + elements + spec["tail"]).encode(), "application/json"
