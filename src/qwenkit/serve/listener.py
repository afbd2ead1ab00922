"""The listening side: uvicorn's server on connections.Acceptor and http_protocol.HttpProtocol, with a gentle end.

In: an ASGI app and a bound socket. Out: requests to the app. On SIGTERM or Ctrl-C new requests are refused while running ones
finish; a second signal ends it at once.
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

from qwenkit.serve.config import ServeConfig
from qwenkit.serve.connections import Acceptor, Connections, Slot, connection_limit
from qwenkit.serve.driver import Driver
from qwenkit.serve.http_protocol import HttpProtocol, Timeouts

log = logging.getLogger("qwenkit.serve")


class Listener(uvicorn.Server):
    """Runs the app until a signal. `on_ready` is called once requests are answered; `stopped_by` is the signal then."""

    def __init__(self, app: ASGIApp, driver: Driver, config: ServeConfig, on_ready: Callable[[], None]) -> None:
        settings: dict[str, Any] = {}
        if config.tls_cert is not None:
            settings = {"ssl_certfile": config.tls_cert, "ssl_keyfile": config.tls_key}
        super().__init__(
            uvicorn.Config(
                app,
                http=HttpProtocol,
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
        limit = connection_limit(config.max_connections)
        if limit < config.max_connections:
            log.warning("%d connections at most: the limit of open files (ulimit -n) has no room for more", limit)
        self.connections = Connections(limit, min(config.max_connections_per_address or max(limit // 2, 1), limit))
        self._timeouts = Timeouts(head=config.header_timeout, idle=config.keep_alive)
        self._driver = driver
        self._drain_timeout = config.drain_timeout
        self._on_ready = on_ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=[])  # what uvicorn does but for listening
        if not self.started:
            return
        acceptors = [
            Acceptor(
                sock,
                self._protocol,
                self.connections,
                tls=self.config.ssl,
                handshake_timeout=self._timeouts.head,
                sweep=min(1.0, self._timeouts.head / 4, self._timeouts.idle / 4),
            )
            for sock in sockets or ()
        ]
        for acceptor in acceptors:
            acceptor.start()
        self.servers = acceptors  # type: ignore[assignment]
        self._on_ready()

    def _protocol(self, slot: Slot) -> HttpProtocol:
        return HttpProtocol(
            self.config,
            self.server_state,
            self.lifespan.state,
            slot=slot,
            connections=self.connections,
            timeouts=self._timeouts,
        )

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
