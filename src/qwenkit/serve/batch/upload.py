"""A multipart upload, straight onto the disk.

In: a request whose body is multipart/form-data with one file and a few short fields, in any order. Out: the fields, and the
file beside its place. At no time is more than a piece of it in memory; a size that is too large ends the request at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import BinaryIO

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from qwenkit.serve.errors import ApiError

_PIECE = 1 << 20  # bytes written at a time
_MAX_FIELDS = 16
_MAX_FIELD = 4096  # bytes of a field other than the file, and of a part's headers


@dataclass
class Form:
    """What arrived: text fields by name, the file's name as the sender gave it (None: no file came), its size in bytes."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    size: int = 0


class _Parts:
    """Callbacks of the parser. `pieces` collects what goes to the file until it is written."""

    def __init__(self) -> None:
        self.form, self.pieces, self.ended = Form(), bytearray(), False
        self._name, self._value = bytearray(), bytearray()  # of a header
        self._disposition = b""
        self._field: str | None = None  # None: the file
        self._text = bytearray()

    def callbacks(self) -> dict[str, Callable[..., None]]:
        names = (
            "part_begin",
            "part_data",
            "part_end",
            "header_field",
            "header_value",
            "header_end",
            "headers_finished",
        )
        return {f"on_{name}": getattr(self, name) for name in names} | {"on_end": self.end}

    def part_begin(self) -> None:
        self._disposition, self._text = b"", bytearray()

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._grow(self._name, data[start:end])

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._grow(self._value, data[start:end])

    def header_end(self) -> None:
        if bytes(self._name).lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def headers_finished(self) -> None:
        options = parse_options_header(self._disposition)[1]
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if not name:
            raise _malformed("a part has no name")
        if b"filename" in options or name == "file":
            if name != "file" or self.form.filename is not None:
                raise _malformed(f"the file {name!r} is one too many, allowed is one part named 'file'")
            self._field = None
            self.form.filename = options.get(b"filename", b"").decode("utf-8", "replace")
        else:
            if len(self.form.fields) == _MAX_FIELDS or name in self.form.fields:
                raise _malformed(f"the field {name[:80]!r} is one too many")
            self._field = name
            self.form.fields[name] = ""

    def part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self.pieces += data[start:end]
        else:
            self._grow(self._text, data[start:end])

    def part_end(self) -> None:
        if self._field is not None:
            self.form.fields[self._field] = self._text.decode("utf-8", "replace")

    def end(self) -> None:
        self.ended = True

    def _grow(self, target: bytearray, data: bytes) -> None:
        if len(target) + len(data) > _MAX_FIELD:
            raise _malformed(f"a field or header is longer than {_MAX_FIELD} bytes")
        target += data


async def receive(request: Request, target: BinaryIO, room: Callable[[int], Awaitable[None]]) -> Form:
    """Write the file of an upload to `target`. `room(size)` is asked before the file grows to `size` bytes, and raises.

    Raises ApiError 400 for a body that is no such upload.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise _malformed("the content type is not multipart/form-data with a boundary")
    parts = _Parts()

    async def write() -> None:
        if parts.pieces:
            await room(parts.form.size + len(parts.pieces))
            await asyncio.to_thread(target.write, bytes(parts.pieces))
            parts.form.size += len(parts.pieces)
            parts.pieces.clear()

    try:
        parser = MultipartParser(boundary, parts.callbacks())  # type: ignore[arg-type]
        async for chunk in request.stream():
            parser.write(chunk)
            if len(parts.pieces) >= _PIECE:
                await write()
        parser.finalize()
    except FormParserError:
        raise _malformed("it breaks the format") from None
    if not parts.ended:
        raise _malformed("it ends too early")
    await write()
    return parts.form


def _malformed(why: str) -> ApiError:
    return ApiError(400, f"the body is no upload: {why}", code="invalid_multipart")
