"""Recorded programs: neighbours that one kernel can do become one operation, and a replay computes what the single ops do."""

import pytest
import torch

from qwenkit import ops
from qwenkit.ops import packed
from qwenkit.ops.cache import KVCache
from qwenkit.ops.cpu.native import NativeOps
from qwenkit.ops.cpu.program import Kind

pytestmark = pytest.mark.usefixtures("instruction_set")


@pytest.fixture
def native() -> NativeOps:
    chosen = ops.native()
    assert chosen is not None
    return chosen


def kinds_of(program: object) -> list[Kind]:
    return [Kind(step.op.kind) for step in program._steps]  # type: ignore[attr-defined]


def memory_of(cache: KVCache) -> list[torch.Tensor]:
    return [memory for memory in (cache.keys, cache.values, cache.key_scale, cache.value_scale) if memory is not None]


@pytest.mark.parametrize("tokens", [1, 2, 3, 17])
@pytest.mark.parametrize("width", [64, 96, 640, 896])
@torch.inference_mode()
def test_one_pass_from_a_sum_to_quantized_activations(native: NativeOps, tokens: int, width: int) -> None:
    torch.manual_seed(tokens * width)
    weight = packed.quantize(torch.randn(48, width), 4)
    norm = torch.rand(width)
    a, b = torch.zeros(tokens, width), torch.zeros(tokens, width)

    def compute() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        total = native.add(a, b)
        out = native.packed_linear(native.rms_norm(total, norm, 1e-5), weight, None)
        return total, out, native.packed_linear(native.silu_mul(a, b), weight, None)

    with native.executor.record() as program:
        recorded = compute()
    assert kinds_of(program) == [Kind.RMS_NORM, Kind.LINEAR, Kind.SILU_MUL, Kind.LINEAR]
    replay = program.finish(native.executor.library)
    for _ in range(3):
        a.copy_(torch.randn(tokens, width))
        b.copy_(torch.randn(tokens, width))
        replay()
        for ours, alone in zip(recorded, compute(), strict=True):
            assert torch.equal(ours, alone)


@torch.inference_mode()
def test_a_pass_never_writes_what_it_reads(native: NativeOps) -> None:
    """Memory of results that nobody holds is used again, but not by an operation that became part of the one that reads it."""
    width = 1280
    weight = packed.quantize(torch.randn(width, width), 4)
    norm, x, y = torch.rand(width), torch.zeros(1, width), torch.zeros(1, width)

    def compute() -> torch.Tensor:
        total = native.add(native.add(x, y), native.add(y, y))
        for _ in range(8):
            normed = native.rms_norm(total, norm, 1e-5)
            hidden = native.silu_mul(
                native.packed_linear(normed, weight, None), native.packed_linear(normed, weight, None)
            )
            total = native.add(total, native.packed_linear(hidden, weight, None))
        return total

    with native.executor.record() as program:
        recorded = compute()
    steps = program._steps
    layer = [Kind.RMS_NORM, Kind.LINEAR, Kind.LINEAR, Kind.SILU_MUL, Kind.LINEAR]
    assert kinds_of(program)[-len(layer) - 1 :] == [*layer, Kind.ADD]
    assert not any(step.reads & step.writes for step in steps)
    replay = program.finish(native.executor.library)
    for _ in range(20):
        x.copy_(torch.randn(1, width))
        y.copy_(torch.randn(1, width))
        replay()
        assert torch.equal(recorded, compute())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@torch.inference_mode()
def test_keys_are_rotated_on_their_way_to_the_cache(native: NativeOps, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens, heads, dim = 3, 2, 48
    k, v, angles = torch.zeros(tokens, heads, dim), torch.zeros(tokens, heads, dim), torch.randn(tokens, 20)
    cos, sin, slots = angles.cos(), angles.sin(), torch.tensor([5, 17, 30])
    cache, expected = (KVCache.empty(2, 16, heads, dim, dtype) for _ in range(2))
    for memory in memory_of(cache) + memory_of(expected):
        memory.zero_()
    with native.executor.record() as program:
        native.write_cache(native.rotate(k, cos, sin), v, cache, slots)
    assert kinds_of(program) == [Kind.WRITE_CACHE]
    replay = program.finish(native.executor.library)
    k.copy_(torch.randn(tokens, heads, dim))
    v.copy_(torch.randn(tokens, heads, dim))
    replay()
    native.write_cache(native.rotate(k, cos, sin), v, expected, slots)
    for ours, alone in zip(memory_of(cache), memory_of(expected), strict=True):
        assert torch.equal(ours, alone)


@torch.inference_mode()
def test_results_that_others_read_are_kept(native: NativeOps) -> None:
    """A linear layer of floats reads the normalised activations that were also quantized; rotated keys may not be read twice."""
    x, norm = torch.randn(2, 64), torch.rand(64)
    small, wide = packed.quantize(torch.randn(32, 64), 4), packed.pack_bfloat16(torch.randn(32, 64))
    with native.executor.record() as program:
        normed = native.rms_norm(x, norm, 1e-5)
        native.packed_linear(normed, small, None)
        out = native.packed_linear(normed, wide, None)
    replay = program.finish(native.executor.library)
    x.copy_(torch.randn(2, 64))
    replay()
    assert torch.equal(out, native.packed_linear(native.rms_norm(x, norm, 1e-5), wide, None))

    cache, slots, angle = KVCache.empty(1, 16, 1, 16, torch.float32), torch.tensor([0]), torch.zeros(1, 8)
    with native.executor.record():
        turned = native.rotate(torch.randn(1, 1, 16), angle, angle)
        native.write_cache(turned, torch.randn(1, 1, 16), cache, slots)
        with pytest.raises(AssertionError, match="no longer writes"):
            native.add(turned, turned)
