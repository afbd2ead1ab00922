"""uvicorn's HTTP/1.1 protocol with a limit on every part of a request that is not its body, and a deadline at all times.

In: bytes of one connection, cut anywhere. Out: requests to the app. The head of a request ends at its blank line and has
MAX_HEAD bytes at most, else it is answered 431; the body has its own limit, in access.BodyLimit. While nothing is served the
connection is overdue after the time-out of its state (see `_state`); while a request is served, when its client reads nothing.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from qwenkit.serve.connections import Connections, Slot

MAX_HEAD = 64 * 1024  # bytes of a request's URL and of the names and values of its headers
MAX_DROPPED = 1 << 20  # bytes after a refused head, beyond which the client does not want the answer
MAX_PIPELINED = 16  # requests of a connection that wait for the answer to an earlier one
READER_PATIENCE = 60.0  # seconds that a client may take nothing of what is written to it
CLOSE_PATIENCE = 5.0  # seconds that the last bytes of a closed connection may take to leave
FRAMING = 16  # bytes of chunk headers, for each byte of a body, beyond MAX_HEAD

_PIECE = 64 * 1024  # bytes that the parser gets at a time
_HEAD_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


@dataclass(frozen=True)
class Timeouts:
    """Seconds for each state in which a connection waits for its client."""

    head: float
    idle: float

    def of(self, state: str) -> float:
        return self.idle if state == "idle" else self.head


class HttpProtocol(HttpToolsProtocol):
    """One connection, in `slot` of `connections`."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        *,
        slot: Slot,
        connections: Connections,
        timeouts: Timeouts,
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._slot, self._slots, self._timeouts = slot, connections, timeouts
        self._state = "head"  # a new connection shall send one
        self._in_head = False  # some bytes of a head have come, not all
        self._in_message = False  # the head has come, and the body not to its end
        self._refused = False
        self._messages = 0  # begun or ended
        self._num_read = 0  # bytes since then
        self._num_body = 0  # of which body
        self._num_dropped = 0  # bytes after a refused head
        self._head_size = 0
        self._paused_at: float | None = None  # since when the client reads nothing
        self._closed_at: float | None = None
        self._raw: asyncio.Transport

    # asyncio

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._raw = transport
        super().connection_made(_Lingering(transport, self))  # type: ignore[arg-type]
        self._slot.protocol = self

    def connection_lost(self, exc: Exception | None) -> None:
        self._slots.release(self._slot)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            self._num_dropped += len(data)
            if self._num_dropped > MAX_DROPPED:
                self.abort()
        for start in range(0, len(data), _PIECE):
            if self._refused or self.transport.is_closing():
                break  # what still comes is dropped until the connection is closed
            piece = data[start : start + _PIECE]
            messages = self._messages
            super().data_received(piece)
            if self._messages == messages:
                self._num_read += len(piece)
            else:
                self._num_read = self._num_body = 0
            if self._num_read > FRAMING * self._num_body + 2 * MAX_HEAD:
                self._refuse()
        self._update()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._paused_at = time.monotonic()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._paused_at = None

    # the parser

    def on_message_begin(self) -> None:
        self._messages += 1
        self._head_size = 0
        self._in_head = True
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._head_size += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_size += len(name) + len(value)
        if self._in_message and self._head_size > 2 * MAX_HEAD:  # trailers of a chunked body
            self._refuse()
        if not self._refused:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._head_size > MAX_HEAD or len(self.pipeline) >= MAX_PIPELINED:
            self._refuse()
        if not self._refused:
            self._in_message = True
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_body += len(body)
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._messages += 1
        if not self._refused:
            self._in_message = False
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update()

    def send_400_response(self, msg: str) -> None:
        if self._is_busy:  # an answer is being written, which nothing may interrupt
            self.abort()
        elif not self._refused:
            super().send_400_response(msg)

    def _refuse(self) -> None:
        """431, unless an answer is being written."""
        if self._refused:
            return
        self._refused = True
        if self._is_busy:
            self.abort()
        else:
            self._in_message = True  # of which more may come, so the connection lingers
            self.transport.write(_HEAD_TOO_LARGE)
            self.transport.close()

    # deadlines

    @property
    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def is_slow(self) -> bool:
        return self._in_message or self._paused_at is not None

    def _new_state(self) -> str:
        """serving: a request's head has come and its answer is not complete; idle: the client may send another request.

        head: a request has begun to come; draining: the answer is complete, or refused, and the request's body is not.
        """
        if self._is_busy and not self._refused:
            return "serving"
        if self._in_message:
            return "draining"
        return "head" if self._in_head or self.cycle is None else "idle"

    def _update(self) -> None:
        state = self._new_state()
        if state == self._state:
            return
        self._state = state
        if state == "serving":
            self._slots.serves(self._slot)
        else:
            self._slots.waits(self._slot)

    def overdue(self, now: float) -> bool:
        """Whether the connection has come to its deadline. A body that is late is answered 408 by access.BodyLimit."""
        if self._closed_at is None and self._raw.is_closing():
            self._closed_at = now
        if self._closed_at is not None and now - self._closed_at > CLOSE_PATIENCE:
            return True
        if self._paused_at is not None and now - self._paused_at > READER_PATIENCE:
            return True
        return self._slot.since is not None and now - self._slot.since > self._timeouts.of(self._state)

    def close(self) -> None:
        """Close for the app's side. If the client is still sending a body its bytes are dropped, until it closes or is overdue.

        A connection that is closed with unread bytes is reset, and the client may lose the answer.
        """
        if not self._in_message:
            self._raw.close()
            return
        self.flow.resume_reading()
        if self._raw.can_write_eof():
            self._raw.write_eof()

    def shutdown(self) -> None:
        """Called by uvicorn when the server stops."""
        if self._is_busy:
            super().shutdown()
        else:
            self._raw.close()

    def abort(self) -> None:
        self._raw.abort()


class _Lingering:
    """The transport as uvicorn sees it: closing it is HttpProtocol.close."""

    def __init__(self, transport: asyncio.Transport, protocol: HttpProtocol) -> None:
        self._transport, self._protocol, self._closing = transport, protocol, False

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._protocol.close()

    def is_closing(self) -> bool:
        return self._closing or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        if not self._closing:
            self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
