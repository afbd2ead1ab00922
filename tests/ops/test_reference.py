"""The reference ops against float64 formulas written out."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenkit import ops
from qwenkit.ops.cache import KVCache, bytes_per_token
from tests.conftest import OPS


def naive_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """One query, one head at a time, in float64."""
    queries, heads, dim = q.shape
    keys, kv_heads, _ = k.shape
    out = torch.zeros(queries, heads, dim, dtype=torch.float64)
    for i in range(queries):
        position = keys - queries + i
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(heads):
            shared = head // (heads // kv_heads)
            scores = k[first : position + 1, shared].double() @ q[i, head].double() / math.sqrt(dim)
            out[i, head] = scores.softmax(0) @ v[first : position + 1, shared].double()
    return out


@settings(max_examples=60, deadline=None)
@given(
    queries=st.integers(1, 9),
    history=st.integers(0, 12),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    window=st.one_of(st.none(), st.integers(1, 12)),
    seed=st.integers(0, 1000),
)
def test_attention(queries: int, history: int, kv_heads: int, group: int, window: int | None, seed: int) -> None:
    torch.manual_seed(seed)
    q = torch.randn(queries, kv_heads * group, 8)
    k, v = torch.randn(2, queries + history, kv_heads, 8)
    out = ops.attention(q, k, v, window)
    torch.testing.assert_close(out.double(), naive_attention(q, k, v, window), atol=2e-6, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 9)), min_size=1, max_size=4),
    block_size=st.integers(1, 5),
    window=st.one_of(st.none(), st.integers(1, 9)),
    seed=st.integers(0, 1000),
)
def test_paged_attention_over_scattered_blocks(
    lengths: list[tuple[int, int]], block_size: int, window: int | None, seed: int
) -> None:
    """Each row's history lies in blocks in random order; unused slots hold NaN, which must never be read."""
    torch.manual_seed(seed)
    totals = [new + old for new, old in lengths]
    counts = [-(-total // block_size) for total in totals]
    tables = torch.randperm(sum(counts)).split(counts)
    cache = KVCache.empty(sum(counts), block_size, 2, 4, torch.float32)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    histories = [torch.randn(2, total, 2, 4) for total in totals]
    for table, history in zip(tables, histories, strict=True):
        slots = torch.tensor(
            [int(table[p // block_size]) * block_size + p % block_size for p in range(history.shape[1])]
        )
        ops.write_cache(history[0], history[1], cache, slots)
    queries = [torch.randn(new, 4, 4) for new, _ in lengths]
    starts = torch.tensor([0, *itertools.accumulate(new for new, _ in lengths)])
    padded = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, table in enumerate(tables):
        padded[row, : len(table)] = table
    out = ops.paged_attention(torch.cat(queries), cache, starts, torch.tensor(totals), padded, window)
    expected = [naive_attention(q, k, v, window) for q, (k, v) in zip(queries, histories, strict=True)]
    torch.testing.assert_close(out.double(), torch.cat(expected), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 0), (torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.int8, 0.5 / 127)]
)
def test_a_cache_gives_back_what_was_written(dtype: torch.dtype, error: float) -> None:
    """Within the rounding of the dtype: of each value, or for int8 of the largest of its token and head."""
    cache = KVCache.empty(3, 4, 2, 8, dtype)
    written = torch.randn(2, 6, 2, 8)
    written[0, 2, 1] = 0
    cache.write(*written, slots=torch.tensor([8, 9, 10, 11, 0, 1]))
    assert cache.nbytes == 12 * bytes_per_token(2, 8, dtype)
    for mine, expected in zip(cache.read(torch.tensor([2, 0]), 6, torch.float32), written, strict=True):
        scale = expected.abs().amax(-1, keepdim=True) if dtype == torch.int8 else expected.abs()
        assert ((mine - expected).abs() <= error * scale * 1.001 + 1e-12).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_int8_cache_does_not_hide_what_is_not_finite(bad: float) -> None:
    cache = KVCache.empty(1, 4, 1, 8, torch.int8)
    k = torch.randn(2, 1, 8)
    k[1, 0, 3] = bad
    cache.write(k, k, torch.tensor([0, 1]))
    keys, _ = cache.read(torch.tensor([0]), 2, torch.float32)
    assert keys[0].isfinite().all()
    assert keys[1].isnan().all()


def test_a_cache_of_whole_lanes_needs_a_fitting_head_dim() -> None:
    with pytest.raises(ValueError, match="kv_cache_dtype int8 needs a head_dim divisible by 4, the model's is 6"):
        KVCache.empty(1, 1, 1, 6, torch.int8)


def test_rms_norm() -> None:
    x, weight = torch.randn(5, 24) * 3, torch.randn(24)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-3).double(), expected, atol=1e-6, rtol=1e-5)


def test_rms_norm_of_bfloat16_divides_in_fp32() -> None:
    x = torch.full((1, 4096), 300.0, dtype=torch.bfloat16)
    assert torch.equal(ops.rms_norm(x, torch.ones(4096, dtype=torch.bfloat16), 1e-6), torch.ones_like(x))


def test_rotate_turns_pairs_and_leaves_the_rest() -> None:
    x = torch.randn(3, 2, 10)
    angles = torch.randn(3, 3)
    out = ops.rotate(x, angles.cos(), angles.sin())
    pairs = torch.complex(x[..., :3], x[..., 3:6]) * torch.polar(torch.ones(3, 1, 3), angles[:, None])
    torch.testing.assert_close(out[..., :6], torch.cat((pairs.real, pairs.imag), -1))
    assert torch.equal(out[..., 6:], x[..., 6:])


def test_silu_mul() -> None:
    gate, up = torch.randn(2, 7)
    torch.testing.assert_close(ops.silu_mul(gate, up), gate / (1 + (-gate).exp()) * up)


def test_every_op_says_which_implementation_runs() -> None:
    ops.use("reference")
    told = ops.implementations()
    ops.use(OPS)
    assert set(told) <= set(ops.__all__)
    assert set(told.values()) == {"reference"}
