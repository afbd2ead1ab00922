"""The lines of a JSONL file as requests.

In: the bytes of one line and the settings that hold where it says nothing. Out: a validated request. Every error names the
line, the field, what was given and what is allowed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwenkit.cli.options import flags_of
from qwenkit.engine.grammar import Grammar
from qwenkit.engine.sampling import SamplingParams
from qwenkit.settings import nearest

SAMPLING = flags_of(SamplingParams)
FIELDS = ("prompt", "messages", "id", "tools", "grammar", "grammar_after", *SAMPLING)


@dataclass(frozen=True)
class Job:
    """One request of a batch. `prompt` is plain text or chat messages; `line` counts from 1."""

    line: int
    prompt: str | list[dict[str, Any]]
    params: SamplingParams
    tools: list[dict[str, Any]] | None = None
    id: str | int | None = None


def job_lines(data: bytes) -> list[tuple[int, bytes]]:
    """The lines that are not blank with their numbers. A byte order mark at the start is no part of the first."""
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def read_job(number: int, data: bytes, settings: Mapping[str, Any]) -> Job:
    """The request of one line; `settings` are the fields of SamplingParams that hold where the line has none."""
    try:
        record = _decode(data)
        for name in record:
            if name not in FIELDS:
                raise ValueError(f"{name!r} is no field of a request; {nearest(name, FIELDS)}")
        own = {name: flag.read_json(record[name]) for name, flag in SAMPLING.items() if name in record}
        if record.get("grammar") is not None:
            own["grammar"] = Grammar.from_json(record["grammar"])
        own["grammar_after"] = record.get("grammar_after")
        return Job(
            number, _prompt(record), SamplingParams(**{**settings, **own}), _tools(record), _id(record.get("id"))
        )
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None


def _decode(data: bytes) -> dict[str, Any]:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8 text") from None
    try:
        record = json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"this is no JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("this JSON is nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f'a request is an object such as {{"prompt": "…"}}, given was {type(record).__name__}')
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair (\\ud800 to \\udfff) is no character") from None
    return record


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _prompt(record: dict[str, Any]) -> str | list[dict[str, Any]]:
    if ("prompt" in record) == ("messages" in record):
        raise ValueError("a request has either prompt (a text) or messages (a list)")
    if "prompt" in record:
        prompt = record["prompt"]
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f"prompt is {prompt!r}, allowed is a text that is not empty")
        return prompt
    messages = record["messages"]
    if not _are_objects(messages) or not all(isinstance(message.get("role"), str) for message in messages):
        raise ValueError('messages is a list of objects such as {"role": "user", "content": "…"}')
    return list(messages)


def _tools(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = record.get("tools")
    if tools is None:
        return None
    if "messages" not in record:
        raise ValueError("tools go with messages, not with prompt")
    if not _are_objects(tools):
        raise ValueError("tools is a list of objects that describe functions")
    return list(tools)


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _id(value: Any) -> str | int | None:
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise ValueError(f"id is {value!r}, allowed is a text or a whole number")
    return value
