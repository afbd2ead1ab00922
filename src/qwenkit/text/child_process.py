"""ChildProcess: a worker program in a process of its own, with messages over two pipes and limits that the kernel keeps.

For work on what strangers wrote (templates, tokenizer files, grammars), which may take any time and memory: the worker can be
killed, and what it did dies with it. Parent: `ChildProcess`. Worker: `receive`, `send`, `limit_memory`, `limit_cpu`. A message is
four bytes of length and JSON. Imports the standard library only, for every worker starts with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

ENVIRONMENT = (
    "PATH",
    "PYTHONPATH",
    "PYTHONHOME",
    "VIRTUAL_ENV",
    "LD_LIBRARY_PATH",
    "HOME",
    "LANG",
    "SYSTEMROOT",
    "TMPDIR",
)
"""What a worker needs to find Python and its libraries. Keys and tokens of the environment are not passed on."""


class ChildProcess:
    """Runs the module `module` as a program. Its working directory is the package's: no module is imported from the caller's."""

    def __init__(self, module: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=clean_environment(),
            cwd=Path(__file__).resolve().parents[2],
            start_new_session=True,  # Ctrl-C is for the parent, which still ends its work
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        self._send_lock = threading.Lock()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, message: Mapping[str, Any]) -> bool:
        """Write one message; False if the worker has ended. Safe to call from several threads."""
        with self._send_lock:
            try:
                send(self._input, message)
            except (OSError, ValueError):  # ValueError: the pipe was closed by `close`
                return False
        return True

    def receive(self, seconds: float | None = None) -> dict[str, Any] | None:
        """The worker's next message; None if it ended, or was killed because it took longer than `seconds`."""
        watch = None if seconds is None else threading.Timer(seconds, self.kill)
        if watch is not None:
            watch.daemon = True
            watch.start()
        try:
            return receive(self._output)
        except (OSError, ValueError):
            return None
        finally:
            if watch is not None:
                watch.cancel()

    def kill(self) -> None:
        """End the worker and its own children at once. `close` must follow."""
        if hasattr(os, "killpg") and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()

    def close(self) -> None:
        """End the worker, wait for it, and close its pipes. No other thread may be in `receive`."""
        self.kill()
        self._process.wait()
        for stream in (self._input, self._output):
            with contextlib.suppress(OSError):
                stream.close()


def clean_environment() -> dict[str, str]:
    """The environment of a worker. One malloc arena: each thread's own would reserve 64 MiB of the limited address space."""
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    if environment.get("PYTHONPATH"):  # relative entries mean the caller's working directory
        environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, environment["PYTHONPATH"].split(os.pathsep)))
    return environment | {"MALLOC_ARENA_MAX": "1"}


def send(stream: IO[bytes], message: Mapping[str, Any]) -> None:
    """Write one message."""
    data = json.dumps(message).encode()
    stream.write(struct.pack(">I", len(data)) + data)
    stream.flush()


def receive(stream: IO[bytes]) -> dict[str, Any] | None:
    """Read one message; None where the stream ends."""
    header = stream.read(4)
    if len(header) < 4:
        return None
    size = struct.unpack(">I", header)[0]
    data = stream.read(size)
    return json.loads(data) if len(data) == size else None


def limit_memory(max_bytes: int) -> None:
    """Allow this process `max_bytes` of address space beyond what it has, where the kernel can hold it to that."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + max_bytes, used + max_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_cpu(seconds: float, *, wall: float) -> None:
    """End this process after `seconds` of CPU time or `wall` seconds, by SIGPROF and SIGALRM. 0 takes the limits away."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, wall)
