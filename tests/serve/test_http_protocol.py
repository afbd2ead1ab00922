"""What a connection may send and how long it may take: heads, bodies, splits at any byte, deadlines, places."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import shutil
import socket
import ssl
import subprocess
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenkit.serve.config import ServeConfig
from qwenkit.serve.connections import Acceptor, Connections, Slot, connection_limit, peer_of
from qwenkit.serve.http_protocol import MAX_HEAD
from qwenkit.serve.keys import Keys
from qwenkit.text.tokenizer import Tokenizer
from tests.serve.conftest import LiveServer, StartServer, running, servers, wait_until

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def connect(live: LiveServer, timeout: float = 20.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])), timeout=timeout)


def post(path: str, body: bytes, *headers: str, length: bool = True) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    if length:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunked(path: str, body: bytes, size: int) -> bytes:
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    data = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    return post(path, b"", "Transfer-Encoding: chunked", length=False) + data


def answers(sock: socket.socket, number: int) -> list[tuple[int, bytes]]:
    """(status, body) of the next answers of a connection; fewer where it is closed before."""
    found, data = [], b""
    while len(found) < number:
        head, end, rest = data.partition(b"\r\n\r\n")
        length = next(
            (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
        )
        if end and len(rest) >= length:
            status = int(head.split()[1])
            if status != 100:
                found.append((status, rest[:length]))
            data = rest[length:]
            continue
        part = sock.recv(1 << 16)
        if not part:
            break
        data += part
    return found


def is_closed(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except (ConnectionError, ssl.SSLError):
        return True


@pytest.fixture(scope="module")
def live(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One server for tests that leave it as it was."""
    with servers(tokenizer, tmp_path_factory.mktemp("live")) as make, running(make(max_body="4MiB")) as live:
        yield live


@pytest.mark.parametrize("size", [65_600, 66_000, 80_000, 131_072, 1_000_000])
@pytest.mark.parametrize("how", ["length", "chunks"])
def test_a_long_body_is_read_however_it_arrives(live: LiveServer, size: int, how: str) -> None:
    """The limit of the head ends at the blank line."""
    body = json.dumps({"tokens": [5] * (size // 3)}).encode()
    data = post("/detokenize", body) if how == "length" else chunked("/detokenize", body, 70_000)
    with closing(connect(live)) as sock:
        sock.sendall(data + HEALTH)
        (first, _), (second, _) = answers(sock, 2)
        assert (first, second) == (200, 200), "the connection is still good for another request"


@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_may_be_split_anywhere(live: LiveServer, data: st.DataObject) -> None:
    """Requests one after the other on a connection, cut at any bytes, are answered in order and one answer each."""
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    stream, expected = b"", []
    for _ in range(data.draw(st.integers(1, 4))):
        kind = rng.choice(["get", "small", "large", "chunked", "expect", "bad"])
        body = json.dumps({"tokens": [rng.randrange(90) for _ in range(rng.choice([1, 50, 40_000]))]}).encode()
        if kind == "get":
            stream, status = stream + HEALTH, 200
        elif kind == "chunked":
            stream, status = stream + chunked("/detokenize", body, rng.choice([7000, 100_000])), 200
        elif kind == "expect":
            stream, status = stream + post("/detokenize", body, "Expect: 100-continue"), 200
        elif kind == "bad":
            stream, status = stream + post("/detokenize", b"{"), 400
        else:
            padding = "X-Padding: " + "a" * (rng.choice([10, 60_000]) if kind == "large" else 10)
            stream, status = stream + post("/detokenize", body, padding), 200
        expected.append(status)
    cuts = sorted({rng.randrange(len(stream)) for _ in range(rng.randrange(6))})
    with closing(connect(live)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            sock.sendall(stream[start:end])
            time.sleep(0.002)
        assert [status for status, _ in answers(sock, len(expected))] == expected


@pytest.mark.parametrize("at", [1, 20, 60_000, 70_000])
def test_a_long_head_is_refused_however_it_is_cut(live: LiveServer, at: int) -> None:
    for size, expected in ((MAX_HEAD - 200, 200), (MAX_HEAD + 1, 431), (3 * MAX_HEAD, 431)):
        head = HEALTH[:-2] + b"X-Long: " + b"a" * size + b"\r\n\r\n"
        with closing(connect(live)) as sock:
            sock.sendall(head[:at])
            time.sleep(0.01)
            sock.sendall(head[at:])
            assert answers(sock, 1)[0][0] == expected, size


def test_a_head_without_end_is_refused(live: LiveServer) -> None:
    for data in (HEALTH[:-2] + b"X: " + b"a" * 300_000, b"GET /" + b"a" * 300_000, HEALTH[:-2] + b"a: b\r\n" * 60_000):
        with closing(connect(live)) as sock:
            sock.sendall(data)
            assert answers(sock, 1)[0][0] == 431


def test_trailers_and_chunk_headers_are_no_way_around_it(live: LiveServer) -> None:
    start = post("/detokenize", b"", "Transfer-Encoding: chunked", length=False) + b"5\r\n     \r\n"
    for data in (b"0\r\n" + b"x: y\r\n" * 100_000, b"0\r\nx: " + b"y" * 400_000, b"1;" + b"e" * 600_000):
        with closing(connect(live)) as sock:
            sock.sendall(start)
            with suppress(ConnectionError):
                for begin in range(0, len(data), 10_000):
                    sock.sendall(data[begin : begin + 10_000])
                    time.sleep(0.001)
            assert is_closed(sock), "long before the time-out of the body"
    assert live.get("/health").status_code == 200


def test_a_refused_upload_is_told_although_the_client_goes_on_sending(live: LiveServer) -> None:
    """An answer before the end of the body must reach the client: the connection is not reset while it sends."""
    with httpx.Client(timeout=20) as client:
        answer = client.post(
            live.url + "/tokenize", content=b"x" * (6 << 20), headers={"content-type": "application/json"}
        )
        assert answer.status_code == 413
        assert client.get(live.url + "/health").status_code == 200


def test_garbage_and_too_many_requests_at_once(live: LiveServer) -> None:
    with closing(connect(live)) as sock:
        sock.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
        assert answers(sock, 1)[0][0] == 400
    with closing(connect(live)) as sock:
        sock.sendall(HEALTH * 1000)
        got = answers(sock, 1000)
        assert len(got) < 1000, "so many are not kept waiting"
    assert live.get("/health").status_code == 200


HELD: dict[str, Any] = {
    "nothing": b"",
    "half a head": HEALTH[:-4],
    "401": b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n",
    "404": b"POST /nowhere HTTP/1.1\r\nHost: a\r\nx-api-key: key\r\nContent-Length: 100\r\n\r\n",
    "405": b"POST /health HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n",
    "413": b"POST /tokenize HTTP/1.1\r\nHost: a\r\nx-api-key: key\r\nContent-Length: 99999999999\r\n\r\n",
    "GET with a body": b"GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n",
    "GET with chunks": b"GET /health HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
    "expectation": b"POST /health HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\nExpect: 100-continue\r\n\r\n",
    "idle": HEALTH,
    "body": post("/tokenize", b"{", "x-api-key: key", "Content-Length: 100", length=False),
    "431": HEALTH[:-2] + b"X: " + b"a" * 300_000,
}


def test_every_connection_ends(live_server: StartServer) -> None:
    """Whatever was sent, closed within keep_alive + header_timeout + 1 s of silence, or of a byte now and then."""
    live = live_server(header_timeout=0.6, keep_alive=0.6, api_key=("key",))
    began = time.monotonic()
    held = {}
    for name, data in HELD.items():
        for drips in (False, True):
            held[name, drips] = sock = connect(live)
            sock.sendall(data)
            sock.setblocking(False)
    ended: set[Any] = set()
    while len(ended) < len(held) and time.monotonic() < began + 20:
        for key, sock in held.items():
            if key in ended:
                continue
            try:
                while True:
                    if sock.recv(1 << 16) == b"":
                        ended.add(key)  # half of it: the server says no more
                        break
            except BlockingIOError:
                pass
            except ConnectionError:
                ended.add(key)
            if key[1] and key not in ended:
                with suppress(BlockingIOError, ConnectionError):
                    sock.send(b"x")
        time.sleep(0.15)
    assert len(ended) == len(held), set(held) - ended
    wait_until(lambda: len(live.listener.connections) == 0, 5, "the server's side is closed too")
    for sock in held.values():
        sock.close()


def test_idle_connections_make_room_for_new_ones(live_server: StartServer) -> None:
    live = live_server(max_connections=40, header_timeout=60.0)
    with closing(connect(live)) as kept:
        kept.sendall(HEALTH)
        assert answers(kept, 1)[0][0] == 200
        idle = [connect(live) for _ in range(100)]
        began = time.monotonic()
        assert live.get("/health", timeout=10).status_code == 200
        assert time.monotonic() - began < 5
        assert len(live.listener.connections) <= 20, "half of all places are for one address"
        assert is_closed(idle[0]), "the oldest went"
        idle[-2].sendall(HEALTH)
        assert answers(idle[-2], 1)[0][0] == 200, "a younger one is still there"
        for sock in idle:
            sock.close()


def test_sockets_of_connections_that_make_room_at_once_are_closed() -> None:
    """A burst: most slots are taken back before their tasks began, and the loop ends right after."""

    async def accept_all(listening: socket.socket) -> None:
        acceptor = Acceptor(
            listening,
            lambda slot: asyncio.Protocol(),
            Connections(4, 4),
            tls=None,
            handshake_timeout=5.0,
            sweep=60.0,
        )
        acceptor.start()
        clients = [socket.create_connection(listening.getsockname(), timeout=5) for _ in range(30)]
        await asyncio.sleep(0.1)
        for client in clients:
            client.close()
        acceptor.close()
        await acceptor.wait_closed()
        await asyncio.sleep(0.1)

    gc.collect()
    with warnings.catch_warnings(record=True) as caught, socket.create_server(("127.0.0.1", 0)) as listening:
        warnings.simplefilter("always")
        asyncio.run(accept_all(listening))
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


def test_connections_that_are_served_are_not_closed_for_new_ones(live_server: StartServer) -> None:
    live = live_server(["x" * 50], max_connections=8, max_connections_per_address=8)
    live.engine.gate.clear()
    body = json.dumps({"prompt": "a", "max_tokens": 2}).encode()
    served = [connect(live) for _ in range(8)]
    for sock in served:
        sock.sendall(post("/v1/completions", body))
    wait_until(lambda: len(live.server.driver._open) == 8)
    with closing(connect(live)) as more:
        assert answers(more, 1)[0][0] == 503
    live.engine.gate.set()
    for sock in served:
        assert answers(sock, 1)[0][0] == 200
        sock.close()


def test_slow_senders_give_way_last() -> None:
    connections = Connections(3, 3)

    class Quiet:
        def __init__(self, is_slow: bool) -> None:
            self.is_slow, self.closed = is_slow, False

        def overdue(self, now: float) -> bool:
            return False

        def abort(self) -> None:
            self.closed = True

    def admit(address: str) -> Slot:
        slot = connections.admit(address)
        assert slot is not None
        return slot

    served, sending, waiting = (admit(f"10.0.0.{n}") for n in range(3))
    for slot, is_slow in ((served, False), (sending, True), (waiting, False)):
        slot.protocol = Quiet(is_slow)
    connections.serves(served)
    connections.serves(sending)
    new = admit("10.0.0.9")
    assert waiting.protocol.closed  # type: ignore[union-attr]
    connections.serves(new)
    last = admit("10.0.0.10")
    assert sending.protocol.closed  # type: ignore[union-attr]
    connections.serves(last)
    assert connections.admit("10.0.0.11") is None
    assert not served.protocol.closed  # type: ignore[union-attr]
    for slot in (served, sending, waiting, new, last, last):
        connections.release(slot)
    assert len(connections) == 0
    assert not connections._slots
    assert not connections._waiting
    assert not connections._all_waiting


def test_addresses_that_count_as_one() -> None:
    assert peer_of("::ffff:10.1.2.3") == peer_of("10.1.2.3") != peer_of("10.1.2.4")
    assert peer_of("2001:db8::1") == peer_of("2001:db8::ffff:1") != peer_of("2001:db8:0:1::1")
    assert peer_of("fe80::1%eth0") == peer_of("fe80::2")
    assert peer_of("") == ""


def test_open_files_limit_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    limits = {"soft": 1024, "hard": 4096}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits["soft"], limits["hard"]))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: limits.update(soft=pair[0]))
    assert connection_limit(500) == 500
    assert limits["soft"] == 1024, "enough as it is"
    assert connection_limit(2048) == 2048
    assert limits["soft"] == 2048 + 256
    assert connection_limit(100_000) == 4096 - 256
    limits.update(soft=64, hard=64)
    assert connection_limit(2048) == 32


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subprocess.run(
        [openssl, "req", "-x509", *curve, "-subj", "/CN=localhost", "-days", "9", "-keyout", key, "-out", cert],
        check=True,
        capture_output=True,
    )
    return cert, key


def test_handshakes_are_counted_and_timed(live_server: StartServer, certificate: tuple[str, str]) -> None:
    cert, key = certificate
    live = live_server(tls_cert=cert, tls_key=key, header_timeout=0.6, keep_alive=0.6, max_connections=20)
    silent = [connect(live) for _ in range(5)]  # none says hello
    wait_until(lambda: len(live.listener.connections) == 5)
    for sock in silent:
        assert is_closed(sock)
        sock.close()
    wait_until(lambda: len(live.listener.connections) == 0)
    many = [connect(live) for _ in range(60)]
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with closing(context.wrap_socket(connect(live))) as sock:
        sock.sendall(post("/detokenize", json.dumps({"tokens": [5] * 60_000}).encode()) + HEALTH)
        assert [status for status, _ in answers(sock, 2)] == [200, 200]
        assert len(live.listener.connections) <= 20
        assert is_closed(sock), "an idle one"
    for sock in many:
        sock.close()


def test_key_files_are_regular_files(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for name in ("api_key_file", "admin_key_file"):
        for path in (fifo, Path("/dev/null"), tmp_path):
            with pytest.raises(ValueError, match=f"{name} is .* not a file"):
                ServeConfig(**{name: str(path)})
    for path in (fifo, Path("/dev/zero")):
        with pytest.raises(ValueError, match=r"tls_cert is .* not a file"):
            ServeConfig(tls_cert=str(path), tls_key=str(path))
    file = tmp_path / "admin"
    file.write_text("the-boss\n")
    config = ServeConfig(admin_key_file=str(file))
    owner = Keys.of(config, {}).owner([b"the-boss"])
    assert owner is not None
    assert owner.is_admin
    for text, sentence in (("", "0 words"), ("a b", "2 words")):
        file.write_text(text)
        with pytest.raises(ValueError, match=sentence):
            Keys.of(config, {})
    with pytest.raises(ValueError, match="give one of them"):
        ServeConfig(admin_key="a", admin_key_file=str(file))
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match="not a file"):
        Keys.of(config, {})
