"""The thread pool: results do not depend on the number of threads, waiting threads give way, and a forked child computes."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from qwenkit import ops
from qwenkit.ops import packed
from qwenkit.ops.cache import INT4, KVCache
from qwenkit.ops.cpu.native import NativeOps
from qwenkit.ops.cpu.program import Replay

pytestmark = pytest.mark.usefixtures("instruction_set")


@pytest.fixture
def native() -> Iterator[NativeOps]:
    chosen = ops.native()
    assert chosen is not None
    yield chosen
    chosen.executor.library.use_threads(1)


def recorded_layer(native: NativeOps, tokens: int, bits: int, dtype: torch.dtype) -> tuple[Replay, list[torch.Tensor]]:
    """A program of every op, and its results: `tokens` requests that decode after 700 tokens each."""
    torch.manual_seed(tokens)
    width, heads, dim, context = 192, 3, 32, 700
    blocks = -(-context // 16)
    cache = KVCache.empty(tokens * blocks, 16, heads, dim, dtype)
    everything = torch.arange(tokens * blocks * 16)
    native.write_cache(*(torch.randn(len(everything), heads, dim) for _ in range(2)), cache, everything)
    tables = torch.arange(tokens * blocks, dtype=torch.int32).view(tokens, blocks)
    slots, lengths = torch.arange(tokens) * blocks * 16 + context - 1, torch.full((tokens,), context)

    def matrix(rows: int, cols: int) -> packed.PackedWeight:
        weight = torch.randn(rows, cols) / 8
        return packed.pack_bfloat16(weight) if bits == 16 else packed.quantize(weight, bits)

    table, qkv, head = matrix(999, width), matrix(4 * heads * dim, width), matrix(999, 2 * heads * dim)
    norm, angles = torch.rand(width), torch.randn(tokens, dim // 2)
    limits = (torch.full((tokens,), 0.9), torch.full((tokens,), 40), torch.ones(tokens), torch.zeros(tokens))
    uniform = torch.rand(tokens, dtype=torch.float64)
    with native.executor.record() as program:
        x = native.embedding(torch.arange(tokens) * 7, table)
        x = native.add(x, x)
        q2, k, v = native.packed_linear(native.rms_norm(x, norm, 1e-6), qkv, None).split(
            [2 * heads * dim, heads * dim, heads * dim], 1
        )
        k, v = (part.contiguous().view(tokens, heads, dim) for part in (k, v))
        q = native.rotate(q2.contiguous().view(tokens, 2 * heads, dim), angles.cos(), angles.sin())
        native.write_cache(native.rotate(k, angles.cos(), angles.sin()), v, cache, slots)
        out = native.paged_attention(q, cache, torch.arange(tokens + 1), lengths, tables, None)
        logits = native.packed_linear(native.silu_mul(out.view(tokens, -1), out.view(tokens, -1)), head, None)
        chosen = native.sample(logits, *limits, uniform)
    return program.finish(native.executor.library), [out, logits, chosen]


@pytest.mark.parametrize(("tokens", "bits", "dtype"), [(1, 4, torch.int8), (2, 8, INT4), (3, 16, torch.bfloat16)])
@torch.inference_mode()
def test_results_are_the_same_bits_on_any_number_of_threads(
    native: NativeOps, tokens: int, bits: int, dtype: torch.dtype
) -> None:
    library = native.executor.library
    library.use_threads(1)
    replay, results = recorded_layer(native, tokens, bits, dtype)
    replay()
    expected = [result.clone() for result in results]
    assert expected[0].abs().sum() > 0
    for threads in (2, 3, 4, 7):
        library.use_threads(threads)
        for _ in range(20):  # some of them on fewer threads, where other processes keep cores busy
            for result in results:
                result.zero_()
            replay()
            assert all(map(torch.equal, results, expected)), threads


def until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
    return True


@torch.inference_mode()
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs a system that binds threads to cores")
def test_fewer_threads_run_where_they_have_no_core(native: NativeOps) -> None:
    """Four threads that may use one core: each takes it from the others, so that one alone is faster."""
    library = native.executor.library
    library.use_threads(1)
    replay, _ = recorded_layer(native, 1, 4, torch.int8)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        library.use_threads(4)  # new threads stay on this core
        assert library.active_threads == 4

        def is_reduced() -> bool:
            replay()
            return library.active_threads == 1

        assert until(is_reduced)
    finally:
        os.sched_setaffinity(0, before)


@torch.inference_mode()
def test_threads_without_work_sleep(native: NativeOps) -> None:
    library = native.executor.library
    library.use_threads(1)
    replay, _ = recorded_layer(native, 1, 4, torch.int8)
    library.use_threads(4)
    replay()
    time.sleep(0.1)
    cpu_s = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - cpu_s < 0.25


FORKING = """
import os, signal, sys, threading
import torch
from qwenkit import ops
from qwenkit.ops import packed

torch.set_num_threads(2)
ops.use(sys.argv[1])
library = ops.native().executor.library
library.use_threads(3)
weight = packed.quantize(torch.randn(640, 512), 4)
x, logits, targets = torch.randn(4, 512), torch.randn(64, 500), torch.arange(64)
train = lambda: ops.cross_entropy_(logits.clone(), targets, gradient=True)
expected, losses = ops.packed_linear(x, weight, None), train()
stop = threading.Event()

def compute():  # another thread runs programs while this one forks
    while not stop.is_set():
        ops.packed_linear(x, weight, None)

def check():
    same = all(torch.equal(ops.packed_linear(x, weight, None), expected) for _ in range(50))
    return same and torch.equal(train(), losses)

def in_child(work):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # rather than wait for ever
        code = 1
        try:
            code = 0 if work() else 3
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

thread = threading.Thread(target=compute)
thread.start()
try:
    assert all(in_child(check) for _ in range(10)), "a child"
    assert in_child(lambda: check() and in_child(check)), "a child's child"
    library.use_threads(2)
    assert in_child(lambda: library.use_threads(4) or check()), "another number of threads"
    assert check(), "the parent afterwards"
finally:
    stop.set()
    thread.join()
"""


def test_a_forked_child_computes(instruction_set: str) -> None:
    """A DataLoader's worker, or a user's process of multiprocessing: it has none of the parent's threads."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKING, instruction_set]
    subprocess.run(command, check=True, timeout=120)
