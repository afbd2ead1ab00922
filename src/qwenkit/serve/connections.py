"""Accepting connections: how many, from whom, and which one makes room for a new one.

In: a listening socket. Out: an HttpProtocol on each accepted connection. A connection counts from the moment it is accepted, so
that TLS handshakes count too, and has a deadline until it is closed (see HttpProtocol.overdue). Where all places are taken the
connection that has waited longest without a request is closed for the new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
import time
from collections.abc import Callable
from functools import partial
from ipaddress import ip_address
from typing import Any, Protocol

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

log = logging.getLogger("qwenkit.serve")

BACKLOG = 2048
RESERVED_FILES = 256  # open files for everything else: the model, the batches, uploads, workers' pipes
_BURST = 64  # connections accepted in one turn of the event loop
_PAUSE = 0.5  # seconds without accepting after the system had no file or memory left
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_FULL = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nretry-after: 1\r\nconnection: close\r\n\r\n"


class Accepted(Protocol):
    """What a Slot needs of the protocol on its connection."""

    @property
    def is_slow(self) -> bool: ...
    def overdue(self, now: float) -> bool: ...
    def abort(self) -> None: ...


class Slot:
    """The place of one connection. `since` is when it began to wait for the client, None while a request is served."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.since: float | None = None
        self.protocol: Accepted | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def is_slow(self) -> bool:
        """Whether a request is served whose client takes its time, sending the body or reading the answer."""
        return self.protocol is not None and self.protocol.is_slow

    def abort(self) -> None:
        if self.protocol is not None:
            self.protocol.abort()
        elif self.task is not None:
            self.task.cancel()


class Connections:
    """The slots in use: at most `limit`, and at most `limit_of_peer` of one address."""

    def __init__(self, limit: int, limit_of_peer: int) -> None:
        self.limit, self.limit_of_peer = limit, limit_of_peer
        self._slots: dict[str, dict[Slot, None]] = {}  # by address
        self._waiting: dict[str, dict[Slot, None]] = {}  # those with `since`, by address, the longest first
        self._all_waiting: dict[Slot, None] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def slots(self) -> list[Slot]:
        return [slot for slots in self._slots.values() for slot in slots]

    def admit(self, address: str) -> Slot | None:
        """A slot for a new connection, or None if there is no place and none can be made."""
        peer = peer_of(address)
        if len(self._slots.get(peer, ())) >= self.limit_of_peer:
            victim = next(iter(self._waiting.get(peer, ())), None) or _slow(self._slots[peer])
            if victim is None:
                return None
            self.evict(victim)
        elif self._count >= self.limit and not self.evict_one():
            return None
        slot = Slot(peer)
        self._slots.setdefault(peer, {})[slot] = None
        self._count += 1
        self.waits(slot)
        return slot

    def evict_one(self) -> bool:
        """Close the connection that has waited longest, else one whose client is slow. Returns False if all are busy."""
        victim = next(iter(self._all_waiting), None) or _slow(self.slots())
        if victim is None:
            return False
        self.evict(victim)
        return True

    def evict(self, slot: Slot) -> None:
        self.release(slot)
        slot.abort()

    def waits(self, slot: Slot) -> None:
        """The connection waits for its client from now on."""
        self.serves(slot)
        if slot in self._slots.get(slot.peer, ()):
            slot.since = time.monotonic()
            self._waiting.setdefault(slot.peer, {})[slot] = self._all_waiting[slot] = None

    def serves(self, slot: Slot) -> None:
        """A request of the connection is served from now on."""
        if slot.since is not None:
            slot.since = None
            self._all_waiting.pop(slot, None)
            _discard(self._waiting, slot)

    def release(self, slot: Slot) -> None:
        """The connection is closed. May be called again."""
        self.serves(slot)
        if slot in self._slots.get(slot.peer, ()):
            _discard(self._slots, slot)
            self._count -= 1


def _discard(by_peer: dict[str, dict[Slot, None]], slot: Slot) -> None:
    slots = by_peer.get(slot.peer, {})
    slots.pop(slot, None)
    if not slots:
        by_peer.pop(slot.peer, None)


def _slow(slots: Any) -> Slot | None:
    return next((slot for slot in slots if slot.is_slow), None)


def peer_of(address: str) -> str:
    """What limits for one address count by: an IPv4 address, or the /64 network of an IPv6 address."""
    try:
        ip = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if ip.version == 4:
        return str(ip)
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return ip.packed[:8].hex()


class Acceptor:
    """Accepts connections of a bound socket between `start` and `close`; stands in for asyncio's Server in uvicorn's."""

    def __init__(
        self,
        sock: socket.socket,
        make_protocol: Callable[[Slot], asyncio.Protocol],
        connections: Connections,
        *,
        tls: ssl.SSLContext | None,
        handshake_timeout: float,
        sweep: float,
    ) -> None:
        self.sockets = (sock,)
        self._make_protocol, self._connections = make_protocol, connections
        self._tls, self._handshake_timeout, self._sweep_seconds = tls, handshake_timeout, sweep
        self._loop = asyncio.get_running_loop()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._opening: set[asyncio.Task[None]] = set()
        self._accepted: dict[Slot, socket.socket] = {}  # those that _open has not taken over yet

    def start(self) -> None:
        for sock in self.sockets:
            sock.setblocking(False)
            sock.listen(BACKLOG)
        self._listen()
        self._sweep()

    def close(self) -> None:
        """Accept no more. Connections that are open stay."""
        for timer in self._timers.values():
            timer.cancel()
        for sock in self.sockets:
            with contextlib.suppress(ValueError, OSError):
                self._loop.remove_reader(sock)
        for task in self._opening:
            task.cancel()

    async def wait_closed(self) -> None:
        await asyncio.gather(*self._opening, return_exceptions=True)

    def _listen(self) -> None:
        for sock in self.sockets:
            self._loop.add_reader(sock, self._accept, sock)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(_BURST):
            try:
                sock, address = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                log.warning("no more connections for now: %s", error.strerror)
                self._connections.evict_one()
                self._loop.remove_reader(listening)
                self._timers["accept"] = self._loop.call_later(_PAUSE, self._listen)
                return
            slot = self._connections.admit(str(address[0]) if address else "")
            if slot is None:
                with sock, contextlib.suppress(OSError):
                    sock.setblocking(False)
                    if self._tls is None:
                        sock.send(_FULL)
                continue
            sock.setblocking(False)
            self._accepted[slot] = sock
            slot.task = self._loop.create_task(self._open(slot))
            self._opening.add(slot.task)
            slot.task.add_done_callback(partial(self._opened, slot))

    async def _open(self, slot: Slot) -> None:
        """TLS, where the server has it, and then the protocol. From here on the transport closes the socket."""
        sock = self._accepted.pop(slot)
        timeout = None if self._tls is None else self._handshake_timeout
        try:
            await self._loop.connect_accepted_socket(
                lambda: self._make_protocol(slot), sock, ssl=self._tls, ssl_handshake_timeout=timeout
            )
        except (OSError, asyncio.TimeoutError, asyncio.CancelledError):  # ssl.SSLError is an OSError
            self._connections.release(slot)
            raise

    def _opened(self, slot: Slot, task: asyncio.Task[None]) -> None:
        self._opening.discard(task)
        sock = self._accepted.pop(slot, None)
        if sock is not None:  # cancelled before _open began
            sock.close()
        if not task.cancelled():
            task.exception()  # a failed handshake is the client's affair: nothing is logged

    def _sweep(self) -> None:
        """Close what is beyond its deadline."""
        now = time.monotonic()
        for slot in self._connections.slots():
            if slot.protocol is not None:
                if slot.protocol.overdue(now):
                    self._connections.evict(slot)
            elif slot.since is not None and now - slot.since > self._handshake_timeout:
                self._connections.evict(slot)
        self._timers["sweep"] = self._loop.call_later(self._sweep_seconds, self._sweep)


def connection_limit(wanted: int) -> int:
    """How many of `wanted` connections the limit of open files leaves room for; the soft limit is raised where it may be."""
    if resource is None:
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(min(wanted, soft - min(RESERVED_FILES, soft // 2)), 1)
