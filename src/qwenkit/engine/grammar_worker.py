"""The process that compiles grammars on trial: `python -m qwenkit.engine.grammar_worker`, started by grammar_compiler.py.

In, on stdin: the vocabulary, then grammars with numbers. Out, on stdout: ready, then for each grammar what is wrong with
it or how much memory it takes, in the order in which they are done. Each grammar is compiled in a fork of this process,
which has the vocabulary already, and which its limits of CPU time and memory may end without anything to start again.
This process itself only waits; it ends with its stdin.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import json
import os
import random
import re
import selectors
import signal
import struct
import sys
import threading
import time
from typing import IO, TYPE_CHECKING, Any

from qwenkit.engine.grammar import Grammar, build_vocabulary, compile_grammar, describe_failure
from qwenkit.engine.grammar_fault import locate
from qwenkit.engine.heap import give_back_heap
from qwenkit.text.child_process import limit_cpu, limit_memory, receive, send

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# A compile runs in a thread with a stack half as large as threads have by default, so that nesting which would break the engine's
# process breaks this one first.
STACK_BYTES = 4 << 20
WALL_FACTOR = 6  # wall-clock seconds allowed for each CPU second: others compute beside
NICENESS = 10  # the engine and the event loop go first

WALK_TOKENS = 48  # sampled on trial in each walk; what the first tokens do not exceed, the rest seldom does
WALKS = 3
MAX_TOKEN_SECONDS = 0.01  # CPU, on average over a walk; all requests of a step wait for the masks of each other
WALK_BYTES = re.compile(rb"[^\0]")


class Children:
    """The forks that compile, by the file descriptor on which each one answers."""

    def __init__(self, vocabulary: LLTokenizer, byte_ids: list[int]) -> None:
        self._vocabulary, self._byte_ids = vocabulary, byte_ids
        self._running: dict[int, tuple[int, int]] = {}  # descriptor -> (request's number, process id)

    def start(self, request: dict[str, Any]) -> int:
        """Fork for one grammar; returns the descriptor to wait on."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                self._leave_pipes(reader)
                _compile_and_answer(request, writer, self._vocabulary, self._byte_ids)
                status = 0
            finally:
                os._exit(status)
        os.close(writer)
        self._running[reader] = request["number"], pid
        return reader

    def kill(self) -> None:
        """End all forks."""
        for _, pid in self._running.values():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def _leave_pipes(self, reader: int) -> None:
        """In a fork: close what is the parent's, so that each pipe ends with the one process that writes to it."""
        for descriptor in (reader, *self._running):
            os.close(descriptor)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1):
            os.dup2(nowhere, descriptor)

    def finish(self, reader: int) -> dict[str, Any]:
        """The answer of the fork on `reader`, which has written it or ended."""
        number, pid = self._running.pop(reader)
        with open(reader, "rb") as pipe:
            data = pipe.read()
        status = os.waitpid(pid, 0)[1]
        answer: dict[str, Any] = {"failure": "memory"}
        if data and status == 0:
            answer = json.loads(data)
        elif os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM, signal.SIGXCPU):
            answer = {"failure": "time"}
        return answer | {"number": number}


def main() -> None:
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    setup = receive(requests)
    if setup is None:
        return
    tokens = [base64.b64decode(token) for token in setup["tokens"]]
    by_byte = {token[0]: id for id, token in enumerate(tokens) if len(token) == 1}
    # How forced text is cut into tokens matters for an answer, not for whether and how fast a grammar compiles.
    vocabulary = build_vocabulary(tokens, setup["special_ids"], lambda data: [by_byte.get(byte, 0) for byte in data])
    children = Children(vocabulary, sorted(by_byte.values()))
    del setup, tokens
    give_back_heap()
    gc.freeze()  # a fork that collects garbage would copy every page of it
    send(answers, {"ready": True})
    try:
        serve(requests, answers, children)
    finally:
        children.kill()


def serve(requests: IO[bytes], answers: IO[bytes], children: Children) -> None:
    """Fork for each message that comes in, and pass on what the forks answer, until `requests` ends."""
    waiting = selectors.DefaultSelector()
    inbox = requests.fileno()
    waiting.register(inbox, selectors.EVENT_READ)
    pending = b""
    while True:
        for key, _ in waiting.select():
            if key.fd != inbox:
                waiting.unregister(key.fd)
                send(answers, children.finish(key.fd))
                continue
            data = os.read(inbox, 1 << 20)
            if not data:
                return
            pending += data
            while len(pending) >= 4 and len(pending) >= (end := 4 + struct.unpack(">I", pending[:4])[0]):
                waiting.register(children.start(json.loads(pending[4:end])), selectors.EVENT_READ)
                pending = pending[end:]


def _compile_and_answer(request: dict[str, Any], writer: int, vocabulary: LLTokenizer, byte_ids: list[int]) -> None:
    """What a fork does: one grammar within the request's limits, and its answer as JSON."""
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    limit_cpu(request["seconds"], wall=WALL_FACTOR * request["seconds"])
    limit_memory(request["max_memory"])
    answer: dict[str, Any] = {}
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_try, args=(request, vocabulary, byte_ids, answer))
    thread.start()
    thread.join()
    data = json.dumps(answer or {"error": "grammar cannot be used: it made the compiler fail"}).encode()
    with open(writer, "wb") as pipe:
        pipe.write(data)


def _try(request: dict[str, Any], vocabulary: LLTokenizer, byte_ids: list[int], answer: dict[str, Any]) -> None:
    before = _resident_bytes()
    try:
        matcher = compile_grammar(Grammar(request["kind"], request["source"]), vocabulary)
        for seed in range(WALKS):
            walk(matcher.deep_copy(), byte_ids if seed else [], seed)
        answer["error"], answer["bytes"] = None, max(0, _resident_bytes() - before)
        del matcher
    except ValueError as error:
        message = str(error)
        if request["kind"] == "json_schema":
            message = locate(request["source"], message, lambda part: _fault(part, vocabulary))
        answer["error"] = message[:1000]


def _fault(schema: str, vocabulary: LLTokenizer) -> str | None:
    """What is wrong with a schema, by itself; None if nothing is."""
    try:
        compile_grammar(Grammar("json_schema", schema), vocabulary)
    except ValueError as error:
        return str(error)
    return None


def walk(matcher: LLMatcher, preferred: list[int], seed: int) -> None:
    """Sample an answer's first tokens, as the engine would, with its limits.

    Of the tokens that may follow one of `preferred` is taken, else a random one: an answer in single bytes passes other
    states than one in long tokens. Raises ValueError where the matcher fails or its steps take long.
    """
    chooser = random.Random(seed)
    started = time.thread_time()
    for number in range(WALK_TOKENS):
        if number >= WALK_TOKENS // 4 and (took := (time.thread_time() - started) / number) > MAX_TOKEN_SECONDS:
            allowed_ms = MAX_TOKEN_SECONDS * 1000
            raise ValueError(f"grammar takes {took * 1000:.0f} ms for each token, allowed are at most {allowed_ms:.0f}")
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            raise ValueError(describe_failure(matcher.get_error()))
        allowed = [id for id in preferred if mask[id >> 3] >> (id & 7) & 1]
        token = chooser.choice(allowed) if allowed else _random_bit(mask, chooser)
        if token is None:
            return
        matcher.consume_token(token)
        if matcher.is_error():
            raise ValueError(describe_failure(matcher.get_error()))
        if matcher.is_stopped():
            return


def _random_bit(mask: bytes, chooser: random.Random) -> int | None:
    """The number of a set bit, from a random place on; None if no bit is set."""
    found = WALK_BYTES.search(mask, chooser.randrange(len(mask))) or WALK_BYTES.search(mask)
    if found is None:
        return None
    bits = [bit for bit in range(8) if found[0][0] >> bit & 1]
    return found.start() * 8 + chooser.choice(bits)


def _resident_bytes() -> int:
    """Memory in use, after what was freed went back to the kernel; 0 where the kernel does not say."""
    give_back_heap()
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


if __name__ == "__main__":
    main()
