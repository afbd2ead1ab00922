"""`qwenkit serve` as a process: what it refuses before it begins, how it begins, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from qwenkit.cli.main import cli
from qwenkit.serve.config import ServeConfig
from tests.serve.conftest import asking, wait_until
from tests.tiny_models import write_model

Serve = Callable[..., tuple["subprocess.Popen[str]", str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("served"), max_position_embeddings=2048)


@pytest.fixture
def serve(folder: Path, tmp_path: Path) -> Iterator[Serve]:
    """serve(*flags) -> the process and its URL, when it answers."""
    processes: list[subprocess.Popen[str]] = []

    def start(*flags: str, **environment: str) -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "qwenkit", "serve", str(folder), "--port", "0", "--device", "cpu", "--kv-memory", "8MiB",
             "--state-dir", str(tmp_path / "state"), *flags],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment,
        )  # fmt: skip
        processes.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"is served at (\S+)", line)
        assert found, line + process.communicate(timeout=30)[1]
        return process, found[1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_sigterm_lets_running_requests_finish(serve: Serve, folder: Path) -> None:
    process, url = serve("--log-format", "json", "--drain-timeout", "300")
    assert folder.name in httpx.get(url + "/v1/models", timeout=60).json()["data"][0]["id"]
    body: dict[str, Any] = {
        "model": folder.name,
        "prompt": "Hi",
        "max_tokens": 1000,
        "ignore_eos": True,
        "stream": True,
    }
    lines: list[str] = []

    def listen() -> None:
        with httpx.stream("POST", url + "/v1/completions", json=body, timeout=300) as answer:
            lines.extend(line for line in answer.iter_lines() if line)

    thread = threading.Thread(target=listen)
    thread.start()
    wait_until(lambda: httpx.get(url + "/ready", timeout=60).json()["running"] == 1)
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 60
    while (ready := httpx.get(url + "/ready", timeout=60)).status_code == 200 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert ready.json()["status"] == "draining"
    assert httpx.get(url + "/health", timeout=60).status_code == 200
    refused = httpx.post(url + "/v1/completions", json=body, timeout=60)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    thread.join(300)
    assert lines[-1] == "data: [DONE]", "the answer that ran is whole"
    assert any('"finish_reason":"length"' in line for line in lines)
    assert process.wait(60) == 0
    assert process.stderr is not None
    said = process.stderr.read()
    assert '"event": "answer"' in said
    assert "stopping: 1 requests get 300 seconds to finish" in said


def test_a_drain_that_takes_too_long_ends_with_an_error(serve: Serve, folder: Path) -> None:
    process, url = serve("--drain-timeout", "0")
    body = {"model": folder.name, "prompt": "Hi", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert '"code":"shutting_down"' in rest[-1], "it is told, not just cut off"
    assert process.wait(60) == 0


def test_a_second_signal_ends_at_once(serve: Serve, folder: Path) -> None:
    process, url = serve()
    body = {"model": folder.name, "prompt": "Hi", "max_tokens": 2000, "ignore_eos": True, "n": 16}
    with asking(url + "/v1/completions", body):
        wait_until(lambda: httpx.get(url + "/ready", timeout=60).json()["running"] == 1)
        process.send_signal(signal.SIGINT)
        wait_until(lambda: httpx.get(url + "/ready", timeout=60).status_code == 503)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130


def test_keys_of_the_environment_open_the_network(serve: Serve) -> None:
    _, url = serve("--host", "0.0.0.0", QWENKIT_API_KEYS="k1,k2")
    url = url.replace("0.0.0.0", "127.0.0.1")
    assert httpx.get(url + "/v1/models", timeout=60).status_code == 401
    assert httpx.get(url + "/v1/models", headers={"Authorization": "Bearer k2"}, timeout=60).status_code == 200


def test_connections_that_say_nothing_or_too_much_are_closed(serve: Serve) -> None:
    _, url = serve("--header-timeout", "0.5", "--max-connections", "20")
    address = ("127.0.0.1", int(url.rpartition(":")[2]))
    for first in (b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: "):
        began = time.monotonic()
        with socket.create_connection(address, timeout=60) as client:
            client.sendall(first)
            assert client.recv(100) == b"", "it is closed without an answer"
            assert 0.4 < time.monotonic() - began < 30
    with socket.create_connection(address, timeout=60) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: ")
        with pytest.raises(OSError), client:  # noqa: PT011, PT012
            for _ in range(200):
                client.sendall(b"x" * 65536)
                time.sleep(0.001)
    many = [socket.create_connection(address, timeout=60) for _ in range(40)]
    for client in many:
        with client:
            assert client.recv(100) == b"", (
                "closed at once where it is one too many, after the time for a head where not"
            )
    assert httpx.get(url + "/health", timeout=60).status_code == 200


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--host", "0.0.0.0"], "there is no API key"),
        (["--host", "::"], "there is no API key"),
        (["--host", "no.such.host.invalid", "--allow-no-key"], "no address or name"),
        (["--tls-cert", "/nowhere.pem", "--tls-key", "/nowhere.pem"], "not a file"),
        (["--api-key-file", "/nowhere"], "not a file"),
        (["--cors-origin", "*"], "cors_origin is '*'"),
        (["--max-body", "much"], "max_body is 'much'"),
        (["--max-queued", "0"], "max_queued is 0"),
        (["--port", "70000"], "port is 70000"),
        (["--lora", "poet"], "allowed is NAME=FOLDER"),
        (["--log-format", "xml"], "log_format is 'xml'"),
        (["--stall-timeout", "nan"], "stall_timeout is nan"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(folder: Path, flags: list[str], sentence: str) -> None:
    result = CliRunner().invoke(cli, ["serve", str(folder), *flags])
    assert result.exit_code == 2
    assert sentence in result.output
    assert result.output.startswith("error: ")
    assert result.output.count("\n") == 1


def test_a_port_in_use_is_said_before_the_model_is_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(cli, ["serve", "/no/such/model", "--port", str(port)])
    assert result.exit_code == 2
    assert f"port {port}" in result.output


def test_loopback_is_told_from_the_rest() -> None:
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        assert ServeConfig(host=host).is_loopback
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org", ""):
        assert not ServeConfig(host=host).is_loopback
