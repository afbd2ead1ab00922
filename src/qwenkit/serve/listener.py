"""The listening side: uvicorn with bounds on what a connection may do before anybody knows who it is, and a gentle end.

In: an ASGI app and a bound socket. Out: requests to the app. A head must arrive whole, in time and within MAX_HEAD bytes; a
client that reads nothing is cut off. On SIGTERM or Ctrl-C new requests are refused while running ones finish; a second signal
ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from qwenkit.serve.config import ServeConfig
from qwenkit.serve.driver import Driver

log = logging.getLogger("qwenkit.serve")

MAX_HEAD = 64 * 1024  # bytes of a request line and its headers
READER_PATIENCE = 60.0  # seconds that a client may take nothing of what is written to it

_HEAD_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def bounded_protocol(head_timeout: float, max_connections: int) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol with a clock on the head of each request and on readers, and a limit on connections."""

    class BoundedProtocol(HttpToolsProtocol):
        _in_head = True
        _head_bytes = 0
        _head_timer: asyncio.TimerHandle | None = None
        _reader_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                transport.abort()
                return
            self._head_timer = self.loop.call_later(head_timeout, self._late)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_head_timer()
            self._stop_reader_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._in_head and self._head_timer is None:
                self._head_timer = self.loop.call_later(head_timeout, self._late)
            super().data_received(data)
            if self._in_head and not self.transport.is_closing():
                self._head_bytes += len(data)
                if self._head_bytes > MAX_HEAD:
                    self.transport.write(_HEAD_TOO_LARGE)
                    self.transport.close()

        def on_headers_complete(self) -> None:
            self._in_head, self._head_bytes = False, 0
            self._stop_head_timer()
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._in_head = True
            super().on_message_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._reader_timer = self.loop.call_later(READER_PATIENCE, self.transport.abort)

        def resume_writing(self) -> None:
            self._stop_reader_timer()
            super().resume_writing()

        def _late(self) -> None:
            self._head_timer = None
            busy = self.cycle is not None and not self.cycle.response_complete
            if not busy and not self.transport.is_closing():
                self.transport.close()

        def _stop_head_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _stop_reader_timer(self) -> None:
            if self._reader_timer is not None:
                self._reader_timer.cancel()
                self._reader_timer = None

    return BoundedProtocol


class Listener(uvicorn.Server):
    """Runs the app until a signal. `on_ready` is called once requests are answered; `stopped_by` is the signal then."""

    def __init__(self, app: ASGIApp, driver: Driver, config: ServeConfig, on_ready: Callable[[], None]) -> None:
        settings: dict[str, Any] = {}
        if config.tls_cert is not None:
            settings = {"ssl_certfile": config.tls_cert, "ssl_keyfile": config.tls_key}
        super().__init__(
            uvicorn.Config(
                app,
                http=bounded_protocol(config.header_timeout, config.max_connections),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=max(int(config.keep_alive), 1),
                timeout_graceful_shutdown=5,
                **settings,
            )
        )
        self.stopped_by: int | None = None
        self._driver = driver
        self._drain_timeout = config.drain_timeout
        self._on_ready = on_ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.stopped_by is not None or self._loop is None:
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_drain)
        self.stopped_by = signal.Signals(sig)

    def _begin_drain(self) -> None:
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        unfinished = self._driver.num_running + self._driver.num_waiting
        if unfinished:
            log.info(
                "stopping: %d requests get %g seconds to finish; a second signal ends them at once",
                unfinished,
                self._drain_timeout,
            )
        if not await self._driver.drain(self._drain_timeout):
            log.warning(
                "stopping: the %g seconds are over, what was left is answered with an error", self._drain_timeout
            )
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to where the server shall listen. OSError, with a sentence, where it cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror:
        raise ValueError(f"host is {host!r}, which is no address or name of this machine") from None
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise ValueError(
            f"port {port} of {host} cannot be listened on: {(error.strerror or str(error)).lower()}"
        ) from None
    sock.set_inheritable(False)
    return sock
