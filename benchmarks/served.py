"""A `qwenkit serve` process and a light HTTP client, for the scripts beside this file.

In: a model and flags. Out: the address of a server that answers, its resident memory and its log; and answers to requests. The
client speaks just enough HTTP/1.1 for this server and costs little, because it computes on the same cores as the engine.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any


class Served:
    """A server in a process of its own, on a free port, with a state folder of its own, from `with` to its end."""

    def __init__(self, model: str, *flags: str, patience: float = 300.0) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="qwenkit-")
        self._log = Path(self._folder.name, "log")
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "qwenkit", "serve", model, "--port", "0", "--served-model-name", "served",
                 "--state-dir", str(Path(self._folder.name, "state")), *flags],
                stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"is served at http://[^:]+:(\d+)", line)
        if found is None:
            self.process.wait(patience)
            raise SystemExit(f"the server did not start: {line}{self.log}")
        self.port = int(found[1])

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        self._folder.cleanup()

    @property
    def log(self) -> str:
        """What it has written on standard error."""
        return self._log.read_text("utf-8", "replace")

    @property
    def resident(self) -> int:
        """Bytes of its memory that are resident."""
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        assert found is not None
        return int(found[1]) * 1024

    def terminate(self, patience: float = 60.0) -> int:
        """SIGTERM; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(patience)


@dataclass
class Answer:
    """An answer; `body` is the whole of it, `last` the time.perf_counter() at which it was complete."""

    status: int
    headers: dict[str, str]
    body: bytes
    last: float

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The data of a stream's events; [DONE] is the word itself."""
        parts = [part[6:] for part in self.body.split(b"\n\n") if part.startswith(b"data: ")]
        return [part.decode() if part == b"[DONE]" else json.loads(part) for part in parts]


def head(method: str, path: str, length: int | None) -> bytes:
    """The head of a request whose body is JSON; `length` None: the body comes in chunks."""
    size = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    text = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n{size}\r\n\r\n"
    return text.encode()


@asynccontextmanager
async def connection(port: int, data: bytes) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection over which `data` has been sent; closed at the end, whatever is still under way."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        writer.write(data)
        yield reader, writer
    finally:
        writer.close()


def reset_on_close(writer: asyncio.StreamWriter) -> None:
    """Let closing be a reset instead of a farewell, as when a machine drops off."""
    sock: socket.socket = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def ask(port: int, path: str, body: Any = None, *, method: str = "POST") -> Answer:
    """One request, its body as JSON or bytes as they are, and the whole answer. ConnectionError where it breaks off."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    return await send(port, head(method, path, len(data)) + data)


async def send(port: int, data: bytes) -> Answer:
    """The bytes of a request, and the whole answer. ConnectionError where it breaks off."""
    async with connection(port, data) as (reader, _):
        received = bytearray()
        while part := await reader.read(1 << 16):
            received += part
    last = time.perf_counter()
    top, found, rest = bytes(received).partition(b"\r\n\r\n")
    if not found:
        raise ConnectionError("the connection ended before the answer began")
    first, *lines = top.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    whole = _dechunked(rest) if headers.get("transfer-encoding") == "chunked" else rest
    if "content-length" in headers and len(whole) != int(headers["content-length"]):
        raise ConnectionError(f"{len(whole)} of {headers['content-length']} bytes came")
    return Answer(int(first.split()[1]), headers, whole, last)


def _dechunked(data: bytes) -> bytes:
    whole, place = bytearray(), 0
    while True:
        line = data.find(b"\r\n", place)
        if line < 0:
            raise ConnectionError("the answer broke off between two chunks")
        size = int(data[place:line], 16)
        if size == 0:
            return bytes(whole)
        if line + 2 + size > len(data):
            raise ConnectionError("the answer broke off within a chunk")
        whole += data[line + 2 : line + 2 + size]
        place = line + size + 4
