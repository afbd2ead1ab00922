"""Every op in obvious torch: the specification that faster implementations are tested against, and what runs without them.

Letters in shapes: T tokens of a flat stream, H query heads, K key/value heads, D head dim, R rotary width.
All of them are differentiable, so training uses the same functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from qwenkit.ops.cache import KVCache
from qwenkit.ops.packed import LANES, PackedWeight, dequantize


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dim; the division in fp32, the product in x's dtype (arXiv 1910.07467)."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + y, and its rms_norm: a residual connection with the normalisation that reads it."""
    total = x + y
    return total, rms_norm(total, weight, eps)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, the inner product of a SwiGLU MLP (arXiv 2002.05202)."""
    return F.silu(gate) * up


def cross_entropy_(logits: torch.Tensor, targets: torch.Tensor, *, gradient: bool) -> torch.Tensor:
    """-log softmax(logits)[target] of each row: logits (N, V) in fp32 or fp64, targets (N,) int64 -> (N,).

    With `gradient` the logits become the losses' gradient with respect to them, softmax - onehot; else what they are afterwards
    is not said.
    """
    logits -= logits.amax(-1, keepdim=True)
    wanted = logits.gather(-1, targets[:, None])[:, 0]
    total = logits.exp_().sum(-1)
    if gradient:
        logits /= total[:, None]
        logits[torch.arange(targets.shape[0], device=targets.device), targets] -= 1
    return total.log() - wanted


def add(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a + b, the residual connection."""
    return a + b


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the first R channels of x (T, H, D) by the angles of cos and sin (T, R / 2), pairing channel j with j + R / 2."""
    half = cos.shape[-1]
    wide = x[..., : 2 * half].float()
    a, b = wide[..., :half], wide[..., half:]
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
    return turned if x.shape[-1] == 2 * half else torch.cat((turned, x[..., 2 * half :]), -1)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Causal attention of one document's last tokens over all of it.

    q (Tq, H, D), k and v (Tk, K, D), Tq <= Tk: query i stands at position Tk - Tq + i. `window` counts the visible keys, the
    query's own included. Returns (Tq, H, D).
    """
    queries, keys = q.shape[0], k.shape[0]
    mask = None
    if 1 < queries < keys or (window is not None and keys > window):
        position = torch.arange(keys - queries, keys, device=q.device)[:, None]
        key = torch.arange(keys, device=q.device)[None]
        mask = key <= position
        if window is not None:
            mask &= key > position - window
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None and queries > 1,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], window: int | None = None
) -> torch.Tensor:
    """Causal attention inside each of several documents that lie end to end in one stream; sum(lengths) == T."""
    documents = zip(q.split(list(lengths)), k.split(list(lengths)), v.split(list(lengths)), strict=True)
    return torch.cat([attention(*document, window=window) for document in documents])


def write_cache(
    k: torch.Tensor, v: torch.Tensor, cache: KVCache, slots: torch.Tensor, places: torch.Tensor | None = None
) -> None:
    """Store this step's keys and values (T, K, D) at their slots (T,) of the cache. places (T,) int64: see KeyBias."""
    cache.write(k, v, slots, places)


def paged_attention(
    q: torch.Tensor,
    cache: KVCache,
    query_starts: torch.Tensor,
    context_lengths: torch.Tensor,
    block_tables: torch.Tensor,
    window: int | None = None,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of several requests' new tokens over their histories in a paged cache.

    q (T, H, D) holds the new tokens of all rows end to end, those of row i from query_starts[i] to query_starts[i + 1]
    (int64, rows + 1). Row i's history, its new tokens included, is context_lengths[i] (int64) tokens long and lies in the first
    blocks of block_tables[i] (int32, (rows, most blocks)). places (T,) int64 are needed where the cache has a KeyBias.
    """
    starts, lengths = query_starts.tolist(), context_lengths.tolist()
    out = []
    for row, length in enumerate(lengths):
        queries = q[starts[row] : starts[row + 1]]
        assert 0 < queries.shape[0] <= length <= block_tables.shape[1] * cache.block_size
        first_place = 0 if places is None else int(places[starts[row]]) - (length - queries.shape[0])
        keys, values = cache.read(block_tables[row, : -(-length // cache.block_size)], length, q.dtype, first_place)
        out.append(attention(queries, keys, values, window=window))
    return torch.cat(out)


def penalize(
    logits: torch.Tensor, ids: torch.Tensor, counts: torch.Tensor, lengths: torch.Tensor, penalties: torch.Tensor
) -> None:
    """Make tokens that were there before less likely, in place on logits (N, V).

    ids (N, most) int64 holds lengths[row] (N,) int64 distinct tokens of each row, and counts, fp32 as ids, how often each was
    written. penalties (N, 3) are repetition (arXiv 1909.05858: positive logits are divided by it, others multiplied), frequency
    (taken off for every time that a token was written) and presence (taken off once, where it was). All but logits on the CPU.
    """
    for row, length in enumerate(lengths.tolist()):
        seen, times = ids[row, :length].to(logits.device), counts[row, :length].to(logits.device)
        repetition, frequency, presence = penalties[row].tolist()
        values = logits[row, seen]
        values = torch.where(values > 0, values / repetition, values * repetition)
        logits[row, seen] = values - frequency * times - presence * (times > 0)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """A token for each row of logits (N, V) fp32: int64 (N,), -1 where a row has no finite largest logit.

    temperature, top_p, min_p (fp32), top_k (int64) and uniform (float64, [0, 1)) are (N,), on the CPU. Temperature 0 takes the
    likeliest token. Else the cuts come one after the other, each over what the one before has left, renormalised: the top_k
    likeliest (0: all); the fewest likeliest that hold top_p (arXiv 1904.09751); those at least min_p times as likely as the
    likeliest (arXiv 2407.01082). `uniform` then chooses among them, in an order that is the implementation's own.
    """
    settings = zip(*(values.tolist() for values in (temperature, top_k, top_p, min_p, uniform)), strict=True)
    return torch.tensor([_sample_row(row, *of_row) for row, of_row in zip(logits, settings, strict=True)])


def _sample_row(row: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float) -> int:
    likeliest = int(row.argmax())  # a NaN wins every argmax
    if not row[likeliest].isfinite():
        return -1
    if temperature <= 0:
        return likeliest
    logits, ids = row.sort(descending=True, stable=True)
    logits, ids = (logits, ids) if top_k <= 0 else (logits[:top_k], ids[:top_k])
    probabilities = ((logits - logits[0]) / temperature).exp().double()
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        keep = before < top_p * probabilities.sum()
        keep[0] = True
        probabilities, ids = probabilities[keep], ids[keep]
    probabilities = probabilities * (probabilities >= min_p * probabilities[0])
    cumulative = probabilities.cumsum(-1)
    place = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    if place == ids.shape[0]:  # rounding; what follows the last possible token may be barred
        place = int(probabilities.nonzero()[-1])
    return int(ids[place])


def packed_linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x (T, cols) times a packed matrix -> (T, rows); `bias` is padded to the packed rows."""
    return F.linear(x, dequantize(weight).to(x.dtype), None if bias is None else bias[: weight.rows])


def embedding(ids: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Rows `ids` (T,) of a packed matrix -> (T, cols) fp32."""
    blocks = ids // LANES
    some = replace(
        weight,
        rows=ids.shape[0] * LANES,
        q=weight.q[blocks],
        scale=None if weight.scale is None else weight.scale[blocks],
        offset=None if weight.offset is None else weight.offset[blocks],
        row_scale=None if weight.row_scale is None else weight.row_scale.unflatten(0, (-1, LANES))[blocks].flatten(),
    )
    return dequantize(some).unflatten(0, (-1, LANES))[torch.arange(ids.shape[0], device=ids.device), ids % LANES]
