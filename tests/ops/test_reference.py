"""The reference ops against float64 formulas written out."""

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenkit import ops
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
    caches = torch.full((2, sum(counts), block_size, 2, 4), torch.nan)
    histories = [torch.randn(2, total, 2, 4) for total in totals]
    for table, history in zip(tables, histories, strict=True):
        slots = torch.tensor(
            [int(table[p // block_size]) * block_size + p % block_size for p in range(history.shape[1])]
        )
        ops.write_cache(history[0], history[1], caches[0], caches[1], slots)
    queries = [torch.randn(new, 4, 4) for new, _ in lengths]
    starts = torch.tensor([0, *itertools.accumulate(new for new, _ in lengths)])
    padded = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, table in enumerate(tables):
        padded[row, : len(table)] = table
    out = ops.paged_attention(torch.cat(queries), caches[0], caches[1], starts, torch.tensor(totals), padded, window)
    expected = [naive_attention(q, k, v, window) for q, (k, v) in zip(queries, histories, strict=True)]
    torch.testing.assert_close(out.double(), torch.cat(expected), atol=2e-6, rtol=1e-5)


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
