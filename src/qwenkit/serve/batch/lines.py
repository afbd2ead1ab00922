"""The lines of a batch: reading an input file, and writing what became of it.

In: the JSONL that a user uploaded, and later the results in the store. Out: where each request stands in the file, or a
list of errors that name lines; at the end an output file and an error file in which every custom_id occurs exactly once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from qwenkit.serve.batch.rows import BatchRow, Line, NewFile, new_id
from qwenkit.serve.batch.store import BatchStore
from qwenkit.serve.body import MAX_FIELDS, MIN_VALUES, strict_json
from qwenkit.serve.errors import ApiError
from qwenkit.storage import atomic_replace

MAX_ERRORS = 100  # that a failed batch lists
_MAX_CUSTOM_ID = 512  # characters
_KEYS = {"custom_id", "method", "url", "body"}
_UNFINISHED = {
    "cancelled": ("batch_cancelled", "The batch was cancelled before this request was finished."),
    "expired": ("batch_expired", "The batch expired before this request was finished."),
}


@dataclass(frozen=True)
class Scan:
    """What reading an input file found: its requests, or why it is refused; the model if all lines name the same."""

    lines: list[Line]
    errors: list[dict[str, Any]]
    model: str | None


class _BadLineError(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


def scan(
    path: Path, endpoint: str, *, max_lines: int, max_line_bytes: int, max_values: int = MIN_VALUES + MAX_FIELDS
) -> Scan:
    """Check every line of an input file for a batch at `endpoint`. Blank lines are skipped, up to `max_lines`. Raises OSError.

    `max_values`: see body.strict_json.
    """
    lines: list[Line] = []
    errors: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    models: set[str | None] = set()
    start = number = blank = 0
    with path.open("rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":  # a byte order mark, as Windows programs write it
            file.seek(0)
        start = file.tell()
        while data := file.readline(max_line_bytes + 2):
            number += 1
            try:
                if len(data.rstrip(b"\r\n")) > max_line_bytes:
                    while data and not data.endswith(b"\n"):
                        data = file.readline(max_line_bytes)
                    raise _BadLineError("line_too_long", f"This line is longer than {max_line_bytes} bytes.")
                if not data.strip():
                    blank += 1
                    if blank > max_lines:
                        raise _BadLineError("too_many_lines", f"The file has more than {max_lines} blank lines.")
                else:
                    custom_id, model = _check(data, endpoint, seen, max_values)
                    if len(lines) == max_lines:
                        raise _BadLineError("too_many_lines", f"The file has more than {max_lines} requests.")
                    seen[custom_id] = number
                    models.add(model)
                    lines.append(Line(number, custom_id, start, len(data)))
            except _BadLineError as error:
                errors.append({"code": error.code, "line": number, "message": str(error), "param": error.param})
                if len(errors) == MAX_ERRORS or error.code == "too_many_lines":
                    break
            start = file.tell()
    if not lines and not errors:
        errors.append({"code": "empty_file", "line": None, "message": "The file has no requests.", "param": None})
    return Scan([] if errors else lines, errors, models.pop() if len(models) == 1 else None)


def _check(data: bytes, endpoint: str, seen: dict[str, int], max_values: int) -> tuple[str, str | None]:
    try:
        request = strict_json(data, max_values)
    except ApiError as error:
        if error.code == "limit_exceeded":
            raise _BadLineError("invalid_json_line", f"This line is too large: {error.message}.") from None
        raise _BadLineError("invalid_json_line", "This line is not parseable as valid JSON.") from None
    if not isinstance(request, dict):
        raise _BadLineError("invalid_json_line", "This line is not a JSON object.")
    custom_id = request.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_CUSTOM_ID:
        allowed = f"allowed is a string of 1 to {_MAX_CUSTOM_ID} characters"
        raise _BadLineError("invalid_custom_id", f"custom_id is missing or unfit, {allowed}.", "custom_id")
    if custom_id in seen:
        raise _BadLineError(
            "duplicate_custom_id", f"custom_id is {custom_id!r}, which line {seen[custom_id]} has already.", "custom_id"
        )
    if request.get("method") != "POST":
        raise _BadLineError(
            "invalid_method", f"method is {_short(request.get('method'))}, allowed is 'POST'.", "method"
        )
    if request.get("url") != endpoint:
        raise _BadLineError(
            "mismatched_url", f"url is {_short(request.get('url'))}, the batch's endpoint is {endpoint!r}.", "url"
        )
    if not isinstance(request.get("body"), dict):
        raise _BadLineError("invalid_body", "body is missing or not a JSON object.", "body")
    if unknown := request.keys() - _KEYS:
        names = ", ".join(_short(name) for name in sorted(unknown)[:5])
        raise _BadLineError("unknown_field", f"Unknown fields: {names}; allowed are {', '.join(sorted(_KEYS))}.")
    model = request["body"].get("model")
    return custom_id, model if isinstance(model, str) else None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_body(path: Path, line: Line) -> dict[str, Any]:
    """The request body that a line of an input file holds. Raises OSError or ValueError if the file has changed."""
    with path.open("rb") as file:
        file.seek(line.start)
        request = orjson.loads(file.read(line.length))
    if request.get("custom_id") != line.custom_id:
        raise ValueError(f"line {line.line} is not {line.custom_id!r} any more")
    body: dict[str, Any] = request["body"]
    return body


def answered(custom_id: str, status: int, request_id: str, body: Any) -> bytes:
    """The record of a line that a route answered."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return orjson.dumps({"id": new_id("batch_req_"), "custom_id": custom_id, "response": response, "error": None})


def unanswered(custom_id: str, code: str, message: str) -> bytes:
    """The record of a line that no route answered."""
    error = {"code": code, "message": message}
    return orjson.dumps({"id": new_id("batch_req_"), "custom_id": custom_id, "response": None, "error": error})


def usage(body: Any) -> tuple[int, int]:
    """Input and output tokens that a response names, whichever API it is of; 0 where it names none."""
    counts = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(counts, dict):
        return 0, 0

    def first(*names: str) -> int:
        return next((counts[name] for name in names if isinstance(counts.get(name), int)), 0)

    return first("input_tokens", "prompt_tokens"), first("output_tokens", "completion_tokens")


def assemble(store: BatchStore, batch: BatchRow) -> tuple[NewFile | None, NewFile | None]:
    """Write the output and the error file of a batch that is at its end; None for one that would be empty."""
    output = _Growing(store, f"{batch.id}_output.jsonl")
    error = _Growing(store, f"{batch.id}_error.jsonl")
    try:
        after = 0
        while rows := store.results(batch.seq, after, limit=20):
            for line, ok, record in rows:
                if ok is None:
                    assert batch.outcome is not None
                    record = unanswered(line.custom_id, *_UNFINISHED[batch.outcome])
                (output if ok else error).write(record)
            after = rows[-1][0].line
        return output.keep(), error.keep()
    finally:
        output.close()
        error.close()


class _Growing:
    """A file that is written beside its place and put there whole."""

    def __init__(self, store: BatchStore, filename: str) -> None:
        self.id, self.filename = new_id("file-"), filename
        self.target = store.path(self.id)
        self.part = self.target.with_name(self.id + ".part")
        self.file: BinaryIO = private(self.part)

    def write(self, record: bytes) -> None:
        self.file.write(record + b"\n")

    def keep(self) -> NewFile | None:
        size = self.file.tell()
        if size:
            place(self.file, self.part, self.target)
        return NewFile(self.id, self.filename, size) if size else None

    def close(self) -> None:
        self.file.close()
        self.part.unlink(missing_ok=True)


def private(path: Path) -> BinaryIO:
    """A new file that only the server's own user can read."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def place(file: BinaryIO, part: Path, target: Path) -> None:
    """Put a written file in its place so that a power cut leaves it whole or absent."""
    file.flush()
    atomic_replace(part, target)
