"""The process that compiles grammars on trial: `python -m qwenkit.engine.grammar_worker`, started by grammar_compiler.py.

In, on stdin: the vocabulary, then grammars; each message is four bytes of length and JSON. Out, on stdout in the same form:
ready, then for each grammar what is wrong with it or how much memory it takes. It ends with its stdin, and may be killed.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import struct
import sys
import threading
from typing import IO, TYPE_CHECKING, Any

from qwenkit.engine.grammar import Grammar, build_vocabulary, compile_grammar
from qwenkit.engine.heap import give_back_heap

if TYPE_CHECKING:
    from llguidance import LLTokenizer

# A compile runs in a thread with a stack half as large as threads have by default, so that nesting which would break the engine's
# process breaks this one first.
STACK_BYTES = 4 << 20


def send(stream: IO[bytes], message: dict[str, Any]) -> None:
    """Write one message."""
    data = json.dumps(message).encode()
    stream.write(struct.pack(">I", len(data)) + data)
    stream.flush()


def receive(stream: IO[bytes]) -> dict[str, Any] | None:
    """Read one message; None where the stream ends."""
    header = stream.read(4)
    if len(header) < 4:
        return None
    data = stream.read(struct.unpack(">I", header)[0])
    return json.loads(data) if len(data) == struct.unpack(">I", header)[0] else None


def main() -> None:
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    setup = receive(requests)
    if setup is None:
        return
    tokens = [base64.b64decode(token) for token in setup["tokens"]]
    by_byte = {token[0]: id for id, token in enumerate(tokens) if len(token) == 1}
    # How forced text is cut into tokens matters for an answer, not for whether and how fast a grammar compiles.
    vocabulary = build_vocabulary(tokens, setup["special_ids"], lambda data: [by_byte.get(byte, 0) for byte in data])
    _limit_memory(setup["max_memory"])
    threading.stack_size(STACK_BYTES)
    send(answers, {"ready": True})
    while (request := receive(requests)) is not None:
        # Should the process that watches the time be gone, the kernel ends this one.
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, request["seconds"] + 1)
        answer: dict[str, Any] = {}
        thread = threading.Thread(target=_try, args=(request, vocabulary, answer))
        thread.start()
        thread.join()
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        send(answers, answer or {"error": "grammar cannot be used: it made the compiler fail"})


def _try(request: dict[str, Any], vocabulary: LLTokenizer, answer: dict[str, Any]) -> None:
    before = _resident_bytes()
    try:
        matcher = compile_grammar(Grammar(request["kind"], request["source"]), vocabulary)
        answer["error"], answer["bytes"] = None, max(0, _resident_bytes() - before)
        del matcher
    except ValueError as error:
        answer["error"] = str(error)


def _resident_bytes() -> int:
    """Memory in use, after what was freed went back to the kernel; 0 where the kernel does not say."""
    give_back_heap()
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _limit_memory(max_bytes: int) -> None:
    """No more than `max_bytes` of address space beyond what the vocabulary took, where the kernel can hold to it."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + max_bytes, used + max_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        return


if __name__ == "__main__":
    main()
