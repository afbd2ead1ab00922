"""The native ops against the reference, on every instruction set of this machine and on ragged shapes."""

import itertools
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenkit import ops
from qwenkit.ops import packed, reference
from qwenkit.ops.cache import KVCache
from qwenkit.ops.packed import PackedWeight

relaxed = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
seeds = st.integers(0, 10_000)
# What weights of attention in steps of 1/255 may change in a sum of int8 values up to 4: half a step of some of them.
BYTE_WEIGHTS = 4e-2


pytestmark = pytest.mark.usefixtures("instruction_set")


def native_result(name: str, *arguments: object) -> torch.Tensor:
    """The op by the native library, which must not have declined."""
    native = ops.native()
    assert native is not None
    return getattr(native, name)(*arguments)


@relaxed
@given(rows=st.integers(1, 5), dim=st.integers(1, 70), seed=seeds)
def test_elementwise_ops(rows: int, dim: int, seed: int) -> None:
    torch.manual_seed(seed)
    a, b, weight = torch.randn(rows, dim) * 4, torch.randn(rows, dim), torch.randn(dim)
    for name, arguments in (("rms_norm", (a, weight, 1e-5)), ("silu_mul", (a, b)), ("add", (a, b))):
        expected = getattr(reference, name)(*arguments)
        torch.testing.assert_close(native_result(name, *arguments), expected, atol=2e-6, rtol=2e-6)
    both = native_result("add_rms_norm", a, b, weight, 1e-5)
    torch.testing.assert_close(both, reference.add_rms_norm(a, b, weight, 1e-5), atol=2e-6, rtol=2e-6)


@relaxed
@given(tokens=st.integers(1, 5), heads=st.integers(1, 4), half=st.integers(1, 40), rest=st.integers(0, 9), seed=seeds)
def test_rotate(tokens: int, heads: int, half: int, rest: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, angles = torch.randn(tokens, heads, 2 * half + rest), torch.randn(tokens, half)
    arguments = (x, angles.cos(), angles.sin())
    torch.testing.assert_close(native_result("rotate", *arguments), reference.rotate(*arguments), atol=1e-6, rtol=1e-6)


def packed_weights(rows: int, cols: int, kind: str) -> PackedWeight:
    weight = torch.randn(rows, cols)
    if kind == "bf16":
        return packed.pack_bfloat16(weight)
    if kind in ("int8", "int4"):
        return packed.quantize(weight, int(kind[3:]))
    if kind == "int8 in groups of 32":
        return packed.quantize(weight, 8, 32)
    bits = int(kind[0])
    group = packed.group_for(cols)
    codes = torch.randint(0, 1 << bits, (rows, cols), dtype=torch.uint8)
    scale, offset = torch.rand(2, rows, cols // group) / (1 << bits)
    return PackedWeight(
        bits,
        rows,
        cols,
        group,
        packed.pack_codes(codes, bits),
        packed.pack_groups(scale),
        packed.pack_groups(-offset * 4),
    )


@relaxed
@given(
    tokens=st.sampled_from([1, 2, 3, 5, 11, 12, 13, 30]),
    rows=st.sampled_from([1, 15, 16, 33, 64, 100]),
    cols=st.sampled_from([32, 64, 96, 128, 320, 896]),
    kind=st.sampled_from(["bf16", "int8", "int8 in groups of 32", "int4", "8 bits with offset", "4 bits with offset"]),
    bias=st.booleans(),
    seed=seeds,
)
def test_packed_linear(tokens: int, rows: int, cols: int, kind: str, bias: bool, seed: int) -> None:
    """Against the reference on activations that int8 holds exactly, so that only the order of sums differs."""
    torch.manual_seed(seed)
    weight = packed_weights(rows, cols, kind)
    x = torch.randint(-127, 128, (tokens, cols)).float()
    x[:, :: weight.group] = 127.0  # the largest value of every group, so that its scale is one step
    x = x.view(tokens, -1, weight.group)
    x = (x * torch.rand(tokens, cols // weight.group, 1).add(0.1)).flatten(1)
    padded = torch.nn.functional.pad(torch.randn(rows), (0, -rows % packed.ROWS)) if bias else None
    out = native_result("packed_linear", x, weight, padded)
    expected = reference.packed_linear(x.double(), weight, None if padded is None else padded.double())
    scale = expected.abs().max().item() + 1e-3
    torch.testing.assert_close(out.double(), expected, atol=3e-6 * scale * cols**0.5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4", "4 bits with offset"])
def test_no_tokens_have_no_results(kind: str) -> None:
    """A step in which no row samples meets the head all the same."""
    assert native_result("packed_linear", torch.empty(0, 64), packed_weights(96, 64, kind), None).shape == (0, 96)


@relaxed
@given(
    tokens=st.integers(1, 4), cols=st.sampled_from([64, 128, 896]), kind=st.sampled_from(["int8", "int4"]), seed=seeds
)
def test_rounding_of_activations_costs_little(tokens: int, cols: int, kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    weight, x = packed_weights(48, cols, kind), torch.randn(tokens, cols)
    expected = reference.packed_linear(x, weight, None)
    error = (native_result("packed_linear", x, weight, None) - expected).norm() / expected.norm()
    assert error < 0.015


@relaxed
@given(kind=st.sampled_from(["bf16", "int8", "int4", "8 bits with offset", "4 bits with offset"]), seed=seeds)
def test_embedding(kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    weight = packed_weights(75, 128, kind)
    ids = torch.randint(0, 75, (9,))
    expected = packed.dequantize(weight)[ids]
    torch.testing.assert_close(reference.embedding(ids, weight), expected)
    torch.testing.assert_close(native_result("embedding", ids, weight), expected)


def new_cache(blocks: int, block_size: int, heads: int, dim: int, dtype: torch.dtype) -> KVCache:
    """A cache in which whatever was not written is NaN, as the memory of a new cache may be."""
    cache = KVCache.empty(blocks, block_size, heads, dim, dtype)
    for tensor in (cache.keys, cache.values, cache.key_scale, cache.value_scale):
        if tensor is not None:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 77)
    return cache


@relaxed
@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 50)), min_size=1, max_size=4),
    block_size=st.sampled_from([1, 3, 16, 32]),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 7]),
    dim=st.sampled_from([16, 20, 64, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    window=st.one_of(st.none(), st.integers(1, 40)),
    seed=seeds,
)
def test_paged_attention(
    lengths: list[tuple[int, int]],
    block_size: int,
    kv_heads: int,
    group: int,
    dim: int,
    dtype: torch.dtype,
    window: int | None,
    seed: int,
) -> None:
    """Decode rows and prompt chunks mixed; slots that belong to nobody hold NaN. Both write the cache, both read it."""
    torch.manual_seed(seed)
    totals = [new + old for new, old in lengths]
    counts = [-(-total // block_size) for total in totals]
    order = torch.randperm(sum(counts), dtype=torch.int32)
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    cache = new_cache(sum(counts), block_size, kv_heads, dim, dtype)
    for row, (table, total) in enumerate(zip(order.split(counts), totals, strict=True)):
        tables[row, : len(table)] = table
        slots = torch.tensor([int(table[p // block_size]) * block_size + p % block_size for p in range(total)])
        k, v = torch.randn(2, total, kv_heads, dim)
        native_result("write_cache", k, v, cache, slots)
        twin = new_cache(sum(counts), block_size, kv_heads, dim, dtype)
        reference.write_cache(k, v, twin, slots)
        mine, expected = (one.read(table.long(), total, torch.float32) for one in (cache, twin))
        torch.testing.assert_close(mine, expected, atol=0, rtol=0)
    starts = torch.tensor([0, *itertools.accumulate(new for new, _ in lengths)])
    q = torch.randn(int(starts[-1]), kv_heads * group, dim) * 2
    arguments = (q, cache, starts, torch.tensor(totals), tables, window)
    # an int8 cache meets queries of 16 bits and weights of 8
    tolerance = BYTE_WEIGHTS if dtype == torch.int8 else 6e-6
    torch.testing.assert_close(
        native_result("paged_attention", *arguments), reference.paged_attention(*arguments), atol=tolerance, rtol=1e-5
    )


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_token_of_a_long_request_is_the_same_bit_for_bit_however_it_is_computed(
    dtype: torch.dtype, window: int | None
) -> None:
    """Alone, where threads share its keys; among many rows, where they do not; and at the end of a chunk of its prompt."""
    total, dim = 700, 64
    cache = new_cache(50, 16, 2, dim, dtype)
    tables = torch.randperm(50, dtype=torch.int32)[None, : -(-total // 16)]
    slots = torch.tensor([int(tables[0, p // 16]) * 16 + p % 16 for p in range(total)])
    native_result("write_cache", *torch.randn(2, total, 2, dim), cache, slots)
    q = torch.randn(30, 6, dim)

    def attend(q: torch.Tensor, starts: list[int], lengths: list[int]) -> torch.Tensor:
        rows = tables.expand(len(lengths), -1).contiguous()
        return native_result(
            "paged_attention", q, cache, torch.tensor(starts), torch.tensor(lengths), rows, window
        ).clone()

    chunk = attend(q, [0, 30], [total])
    expected = reference.paged_attention(q, cache, torch.tensor([0, 30]), torch.tensor([total]), tables, window)
    tolerance = BYTE_WEIGHTS if dtype == torch.int8 else 6e-6
    torch.testing.assert_close(chunk, expected, atol=tolerance, rtol=1e-5)
    assert torch.equal(attend(q[-1:].contiguous(), [0, 1], [total])[0], chunk[-1])
    many = 8 * (os.cpu_count() or 1) + 1
    rows = attend(q[-1:].repeat(many, 1, 1), list(range(many + 1)), [total] * many)
    assert all(torch.equal(row, chunk[-1]) for row in rows)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_lost(bad: float) -> None:
    """A broken value must reach the logits, where it is noticed, not vanish in a rounding."""
    x = torch.randn(2, 64)
    x[1, 37] = bad
    for kind in ("bf16", "int8", "int4"):
        out = native_result("packed_linear", x, packed_weights(40, 64, kind), None)
        assert out[0].isfinite().all()
        assert not out[1].isfinite().any()
    assert not native_result("rms_norm", x, torch.ones(64), 1e-6)[1].isfinite().all()
    if bad != -torch.inf:
        assert not native_result("silu_mul", x, torch.ones(2, 64))[1, 37].isfinite()
    assert not native_result("add", x, torch.ones(2, 64))[1, 37].isfinite()
    for dtype, dim in itertools.product((torch.float32, torch.bfloat16, torch.int8), (32, 64)):
        cache = new_cache(1, 16, 1, dim, dtype)
        q, (k, v) = torch.randn(1, 2, dim), torch.randn(2, 9, 1, dim)
        v[3, 0, 5] = bad
        tables, one = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 1])
        native_result("write_cache", k, v, cache, torch.arange(9))
        out = native_result("paged_attention", q, cache, one, torch.tensor([9]), tables, None)
        assert not out[0, :, 5].isfinite().any()
        k[3] = bad
        native_result("write_cache", k, v, cache, torch.arange(9))
        if dtype == torch.int8 or bad != bad:  # an infinite score of one key is a probability of 1 or 0
            assert native_result("paged_attention", q, cache, one, torch.tensor([9]), tables, None).isnan().any()


def test_gradients_and_other_types_go_to_the_reference() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    ops.rms_norm(x, torch.ones(8), 1e-6).sum().backward()
    assert x.grad is not None
    half = torch.randn(3, 8).bfloat16()
    assert ops.silu_mul(half, half).dtype == torch.bfloat16
    assert ops.add(x.detach().T, x.detach().T).shape == (8, 3)


def test_the_table_says_which_instruction_set_runs(instruction_set: str) -> None:
    assert ops.implementations()["packed_linear"] == f"native ({instruction_set})"
    assert ops.implementations()["packed_attention"] == "reference"
