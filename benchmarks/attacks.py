"""Hostile clients against a server, one after the other, while /health and a neighbour are watched from other connections.

Starts `qwenkit serve` itself with two keys and short time-outs. Each case of tests/data/security/http.jsonl is sent at full size,
and 2,048 connections are held idle. It is watched that the answer is the right one, that /health, asked every 50 ms, stays below
--health-ms, that a case takes at most --cpu seconds of CPU and --memory MiB, and that the other key's short request is answered.
A late /health counts only where the server computed for as long: on a busy machine it waits for others too.

    python benchmarks/soak.py attacks                       smollm2
    python benchmarks/soak.py attacks MODEL --only errors   cases whose name holds "errors"

Prints a line for each case; exit code 1 where one was violated.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from attack_cases import body_of, cases, expanded
from served import Served

FLAGS = ("--api-key", "a", "--api-key", "b", "--header-timeout", "3", "--keep-alive", "3")
HELD_SECONDS = 7.0  # keep_alive + header_timeout + 1
IDLE = 2048


class Watch(threading.Thread):
    """Asks /health every 50 ms, each answer's time in seconds."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.port, self.times, self.over = port, [0.0], threading.Event()

    def run(self) -> None:
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        while not self.over.wait(0.05):
            start = time.perf_counter()
            try:
                client.request("GET", "/health")
                client.getresponse().read()
            except (OSError, http.client.HTTPException):
                client.close()  # an idle connection may make room for others; the next one is new
                continue
            self.times.append(time.perf_counter() - start)


class Attacker:
    """Sends the cases to the server on `port`; each method returns what was wrong, "" if nothing."""

    def __init__(self, port: int) -> None:
        self.port = port

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=120)

    def ask(self, method: str, path: str, body: Any = None, key: str = "a") -> tuple[int, Any]:
        """(status, JSON) of a request."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        data, kind = body if isinstance(body, tuple) else (json.dumps(body).encode(), "application/json")
        headers = {"Authorization": f"Bearer {key}", "Content-Type": kind}
        client.request(method, path, None if body is None else data, headers)
        answer = client.getresponse()
        text = answer.read()
        client.close()
        return answer.status, json.loads(text)

    def prepare(self, case: dict[str, Any]) -> Callable[[], str]:
        """What runs a case, its bytes made beforehand."""
        if case["do"] == "post":
            data, kind = body_of(case["body"])
            return lambda: self.post(case, data, kind)
        if case["do"] == "batch":
            file = expanded(case["file"], 1 << 30)
            return lambda: self.batch(case, *body_of({"multipart": file}))
        return lambda: getattr(self, case["do"])(case)

    def post(self, case: dict[str, Any], data: bytes, kind: str) -> str:
        head = (
            f"POST {case['path']} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer a\r\n"
            f"Content-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        last = case["body"].get("last", 0)
        with self.connect() as sock:
            sock.sendall(head.encode() + data[: len(data) - last])
            if last:
                time.sleep(0.4)
                sock.sendall(data[len(data) - last :])
            answer = http.client.HTTPResponse(sock)
            answer.begin()
            text = answer.read()
        if answer.status not in case["status"]:
            return f"answered {answer.status}: {text[:200]!r}"
        if "code" in case and json.loads(text)["error"]["code"] != case["code"]:
            return f"answered {text[:200]!r}"
        return ""

    def hold(self, case: dict[str, Any]) -> str:
        with self.connect() as sock:
            sock.sendall(case["send"].encode())
            time.sleep(1)
            sock.sendall(case["after_1s"].encode())
            began = time.monotonic()
            try:
                while sock.recv(1 << 16):
                    pass
            except ConnectionError:
                pass
            held = time.monotonic() - began
        return "" if held < HELD_SECONDS else f"held for {held:.1f} s"

    def batch(self, case: dict[str, Any], data: bytes, kind: str) -> str:
        _, file = self.ask("POST", "/v1/files", (data, kind))
        request = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "1h"}
        _, batch = self.ask("POST", "/v1/batches", request)
        began = time.monotonic()
        while (shown := self.ask("GET", f"/v1/batches/{batch['id']}")[1])["status"] == "validating":
            time.sleep(0.1)
            if time.monotonic() - began > 60:
                break
        took = time.monotonic() - began
        self.ask("DELETE", f"/v1/files/{file['id']}")
        good = shown["status"] == case["status"] and took <= case["seconds"]
        return "" if good else f"{shown['status']} after {took:.1f} s"

    def render(self, case: dict[str, Any]) -> str:
        text = expanded(case["text"], 1 << 30)
        for number in range(case["times"]):
            if self.ask("POST", "/render", {"text": text})[0] == 429:
                return (
                    "" if self.ask("POST", "/render", {"text": "**b**"}, "b")[0] == 200 else "the other key waits too"
                )
            if number == 50:
                break
        return "all are accepted"

    def idle(self, _: Any = None) -> str:
        """As many connections as there may be that say nothing; new ones come in all the same."""
        with ExitStack() as stack:
            for _number in range(IDLE):
                stack.enter_context(self.connect())
            began = time.monotonic()
            status, _answer = self.ask("GET", "/v1/models", key="b")
            took = time.monotonic() - began
        return "" if status == 200 and took < 3 else f"a new connection got {status} after {took:.1f} s"


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and of its children that have ended."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description="Send hostile requests to a server.", epilog="Other flags go to `qwenkit serve`."
    )
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    parser.add_argument("--health-ms", type=float, default=100.0)
    parser.add_argument(
        "--cpu", type=float, default=1.0, help="seconds, beyond what the case's seconds of waiting take"
    )
    parser.add_argument("--memory", type=float, default=100.0, help="MiB")
    given, flags = parser.parse_known_args(arguments)
    violated = 0
    with Served(given.model, *FLAGS, *flags) as served:
        attacker = Attacker(served.port)
        todo = [
            (case["id"], attacker.prepare, case) for kind in ("post", "hold", "batch", "render") for case in cases(kind)
        ]
        runs = [name for name in todo if given.only in name[0]]
        attacker.ask("POST", "/render", {"text": "a"})  # starts its process
        for name, prepare, case in [*runs, *([("idle", None, {})] if given.only in "idle" else [])]:
            run = attacker.idle if prepare is None else prepare(case)
            cpu, resident = cpu_seconds(served.process.pid), served.resident
            watch = Watch(served.port)
            watch.start()
            time.sleep(0.2)
            began = time.monotonic()
            wrong = [run()]
            took = time.monotonic() - began
            neighbour, _ = attacker.ask("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1}, "b")
            time.sleep(0.2)
            watch.over.set()
            watch.join()
            cpu, grown = cpu_seconds(served.process.pid) - cpu, (served.resident - resident) / 2**20
            slowest = 1e3 * max(watch.times)
            wrong += [f"the other key's request was answered {neighbour}"] if neighbour != 200 else []
            wrong += [f"/health took {slowest:.0f} ms"] if given.health_ms < min(slowest, 1e3 * cpu) else []
            wrong += [f"{cpu:.1f} s of CPU"] if cpu > given.cpu + 0.2 * took else []
            wrong += [f"{grown:.0f} MiB more"] if grown > given.memory else []
            said = "; ".join(filter(None, wrong))
            violated += bool(said)
            print(
                f"{name:32} {took:6.2f} s  health {slowest:5.0f} ms  cpu {cpu:5.2f} s  memory {grown:+6.1f} MiB  "
                f"{said or 'ok'}",
                flush=True,
            )
        code = served.terminate()
    if code != 0:
        print(f"SIGTERM ended the server with {code}", file=sys.stderr)
    return int(bool(violated or code))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
