"""Quantized caches: what four bits lose, a key bias that stays out of them, and the native kernels against the reference."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenkit import ops
from qwenkit.ops import reference
from qwenkit.ops.cache import KeyBias, KVCache, bytes_per_token

relaxed = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def angles(places: int, half: int) -> torch.Tensor:
    """(places, half) of a rotary embedding."""
    return torch.arange(places)[:, None] * 1e4 ** (-torch.arange(half) / half)


def key_bias(heads: int, dim: int, rotary: int, size: float, *, places: int = 256, stretches: int = 1) -> KeyBias:
    """A few channels of `size`, the others small, some pairs 0."""
    bias = torch.randn(heads, dim)
    bias[:, torch.randperm(dim)[: max(1, dim // 16)]] = size
    bias[:, 0] = bias[:, rotary // 2] = 0
    angle = torch.cat([angles(places, rotary // 2) * (0.9**stretch) for stretch in range(stretches)])
    table = torch.cat((angle.cos(), angle.sin()), 1).T.contiguous()
    return KeyBias(bias, table, places, tuple(map(float, range(1, stretches + 1))))


def blank(
    blocks: int, block_size: int, heads: int, dim: int, dtype: torch.dtype, bias: KeyBias | None = None
) -> KVCache:
    """A cache in which whatever was not written is NaN, as the memory of a new cache may be."""
    cache = KVCache.empty(blocks, block_size, heads, dim, dtype, key_bias=bias)
    for tensor in (cache.keys, cache.values, cache.key_scale, cache.value_scale):
        if tensor is not None:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 77)
    return cache


def test_four_bits_give_back_what_was_written_within_half_a_step() -> None:
    """A step is a fifteenth of the range of a token and head; the rounding of its bf16 scale and offset adds 2^-8."""
    cache = KVCache.empty(3, 4, 2, 16, torch.int4)
    written = torch.randn(2, 6, 2, 16) * torch.tensor([1e-6, 1.0, 1e4]).repeat(2)[:, None, None]
    written[0, 2, 1] = 0
    written[1, 1, 0] = 3.5
    cache.write(*written, slots=torch.tensor([8, 9, 10, 11, 0, 1]))
    assert cache.nbytes == 12 * bytes_per_token(2, 16, torch.int4) == 12 * 2 * 2 * (8 + 4)
    for mine, expected in zip(cache.read(torch.tensor([2, 0]), 6, torch.float32), written, strict=True):
        low, high = expected.aminmax(dim=-1, keepdim=True)
        bound = (high - low) / 30 + 2**-8 * torch.maximum(low.abs(), high.abs())
        assert ((mine - expected).abs() <= bound).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_four_bits_do_not_hide_what_is_not_finite(bad: float) -> None:
    cache = KVCache.empty(1, 4, 1, 8, torch.int4)
    k = torch.randn(2, 1, 8)
    k[1, 0, 3] = bad
    cache.write(k, k, torch.tensor([0, 1]))
    for found in cache.read(torch.tensor([0]), 2, torch.float32):
        assert found[0].isfinite().all()
        assert found[1].isnan().all()


def test_a_cache_takes_half_and_about_a_quarter_of_bfloat16() -> None:
    whole, half, quarter = (bytes_per_token(8, 128, dtype) for dtype in (torch.bfloat16, torch.int8, torch.int4))
    assert half / whole == pytest.approx(0.5, abs=0.02)
    assert quarter / whole == pytest.approx(0.25, abs=0.02)


def test_head_dim_must_fit() -> None:
    with pytest.raises(ValueError, match="kv_cache_dtype int4 needs a head_dim divisible by 8, the model's is 12"):
        KVCache.empty(1, 1, 1, 12, torch.int4)


@pytest.mark.parametrize(("dtype", "gain"), [(torch.int8, 20), (torch.int4, 20)])
def test_large_key_biases_cost_nothing_when_they_stay_out(dtype: torch.dtype, gain: float) -> None:
    """512 keys with a few channels of 100: scores of random queries against exact ones, with the bias split off and without."""
    torch.manual_seed(0)
    heads, dim, count = 2, 64, 256
    bias = key_bias(heads, dim, dim, 100.0)
    places = torch.arange(count)
    keys = torch.randn(count, heads, dim) + bias.at(places)
    queries = torch.randn(50, heads, dim)
    errors = []
    for split in (None, bias):
        cache = KVCache.empty(16, 16, heads, dim, dtype, key_bias=split)
        cache.write(keys, torch.zeros_like(keys), places, places if split else None)
        read, _ = cache.read(torch.arange(16), count, torch.float32)
        scores = torch.einsum("qhd,khd->qkh", queries, read - keys) / dim**0.5
        scores -= scores.mean(1, keepdim=True)  # what is the same for all keys changes no probability
        errors.append(scores.abs().mean())
    assert errors[0] > gain * errors[1]


@relaxed
@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 50)), min_size=1, max_size=4),
    block_size=st.sampled_from([1, 3, 16, 32]),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 7]),
    dim=st.sampled_from([16, 24, 64, 128]),
    partial=st.booleans(),
    dtype=st.sampled_from([torch.int8, torch.int4]),
    size=st.sampled_from([None, 0.0, 5.0, 100.0]),
    window=st.one_of(st.none(), st.integers(1, 40)),
    seed=st.integers(0, 10_000),
)
def test_native_equals_reference(
    instruction_set: str,
    lengths: list[tuple[int, int]],
    block_size: int,
    kv_heads: int,
    group: int,
    dim: int,
    partial: bool,
    dtype: torch.dtype,
    size: float | None,
    window: int | None,
    seed: int,
) -> None:
    """Decode rows and prompt chunks mixed, of two rotary stretches; slots that belong to nobody hold NaN. Without a bias both
    write the same bytes; with one their last bits differ, and so may a rounding: never by more than a step."""
    torch.manual_seed(seed)
    native = ops.native()
    assert native is not None
    totals = [new + old for new, old in lengths]
    counts = [-(-total // block_size) for total in totals]
    order = torch.randperm(sum(counts), dtype=torch.int32)
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    rotary = dim // 2 if partial else dim
    bias = None if size is None else key_bias(kv_heads, dim, rotary, size, places=96, stretches=2)
    cache = blank(sum(counts), block_size, kv_heads, dim, dtype, bias)
    places = []
    for row, (table, total, (new, _)) in enumerate(zip(order.split(counts), totals, lengths, strict=True)):
        tables[row, : len(table)] = table
        slots = torch.tensor([int(table[p // block_size]) * block_size + p % block_size for p in range(total)])
        k, v = torch.randn(2, total, kv_heads, dim)
        here = None
        if bias is not None:
            here = torch.arange(total) + bias.place(0, stretch=1.0 + row % 2)
            k = k + bias.at(here)
            places.append(here[total - new :])
        native.write_cache(k, v, cache, slots, here)
        twin = blank(sum(counts), block_size, kv_heads, dim, dtype, bias)
        reference.write_cache(k, v, twin, slots, here)
        first = 0 if here is None else int(here[0])
        mine, expected = (one.read(table.long(), total, torch.float32, first) for one in (cache, twin))
        steps = 127 / 2 if dtype == torch.int8 else 15
        allowed = 0.0 if bias is None else 8 / steps
        torch.testing.assert_close(mine[0], expected[0], atol=allowed, rtol=0)
        torch.testing.assert_close(mine[1], expected[1], atol=0, rtol=0)
    starts = torch.tensor([0, *itertools.accumulate(new for new, _ in lengths)])
    q = torch.randn(int(starts[-1]), kv_heads * group, dim) * 2
    of_tokens = torch.cat(places) if places else None
    arguments = (q, cache, starts, torch.tensor(totals), tables, window, of_tokens)
    mine, expected = native.paged_attention(*arguments), reference.paged_attention(*arguments)
    # Weights of attention in steps of 1/255; with a bias a scale may be rounded the other way, and all its numbers with it.
    steps = 4e-2 if bias is not None or (dtype == torch.int8 and dim % 16 == 0) else 6e-4
    torch.testing.assert_close(mine, expected, atol=steps, rtol=1e-5)
    assert (mine - expected).square().mean().sqrt() < steps / 8
