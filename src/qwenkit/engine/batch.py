"""Batch: the scheduled rows as flat tensors, with a context over the paged cache. The one noun between scheduler and runner; what
comes back is `Computed`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qwenkit import ops
from qwenkit.engine.scheduler import Row
from qwenkit.ops.cache import KVCache


@dataclass(frozen=True)
class Paged:
    """Attention over a paged key/value cache: every token writes its slot, then reads its own request's blocks.

    Row i's new tokens stand in the stream from query_starts[i] (int64) to query_starts[i + 1]; those included it has
    context_lengths[i] (int64) tokens, in the blocks that block_tables[i] (int32, padded to the longest) begins with. places (T,)
    int64 are the tokens' places in the caches' KeyBias, where they have one.
    """

    caches: Sequence[KVCache]
    slots: torch.Tensor
    query_starts: torch.Tensor
    context_lengths: torch.Tensor
    block_tables: torch.Tensor
    rope_alpha: torch.Tensor | None = None
    places: torch.Tensor | None = None

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, window: int | None
    ) -> torch.Tensor:
        cache = self.caches[layer]
        ops.write_cache(k, v, cache, self.slots, self.places)
        return ops.paged_attention(
            q, cache, self.query_starts, self.context_lengths, self.block_tables, window, self.places
        )


@dataclass(frozen=True)
class Batch:
    """ids and positions (T,), their context, and `last_rows` (N,): where in the stream the N sampling rows end."""

    rows: list[Row]
    ids: torch.Tensor
    positions: torch.Tensor
    ctx: Paged
    last_rows: torch.Tensor

    @classmethod
    def of(cls, rows: list[Row], caches: Sequence[KVCache], device: torch.device) -> Batch:
        """Flatten the rows; `caches` are the runner's, one a layer."""
        block_size = caches[0].block_size
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        last_rows: list[int] = []
        starts = [0]
        alphas: list[float] = []
        for row in rows:
            sequence, start = row.sequence, row.sequence.num_computed
            stop = start + row.num_tokens
            ids += sequence.tokens[start:stop]
            positions += range(start, stop)
            table = sequence.block_table
            slots += [table[place // block_size] * block_size + place % block_size for place in range(start, stop)]
            starts.append(len(ids))
            if row.samples:
                last_rows.append(len(ids) - 1)
            if sequence.rope_alpha is not None:
                alphas += [sequence.rope_alpha] * row.num_tokens
        assert len(alphas) in (0, len(ids))
        places = None
        key_bias = next((cache.key_bias for cache in caches if cache.key_bias is not None), None)
        if key_bias is not None:
            stretches = alphas or [1.0] * len(ids)
            places = [key_bias.place(*where) for where in zip(positions, stretches, strict=True)]
        ctx = Paged(
            caches=caches,
            slots=torch.tensor(slots, device=device),
            query_starts=torch.tensor(starts, device=device),
            context_lengths=torch.tensor([row.sequence.num_computed + row.num_tokens for row in rows], device=device),
            block_tables=_padded([row.sequence.block_table for row in rows]).to(device),
            rope_alpha=torch.tensor(alphas, device=device) if alphas else None,
            places=None if places is None else torch.tensor(places, device=device),
        )
        return cls(
            rows=rows,
            ids=torch.tensor(ids, device=device),
            positions=torch.tensor(positions, device=device),
            ctx=ctx,
            last_rows=torch.tensor(last_rows, dtype=torch.long, device=device),
        )


@dataclass(frozen=True)
class Computed:
    """logits (N, vocab_size) fp32 of the N rows that sample, in order; they are overwritten by a later step.

    A step that ran as the model's code says has hidden (T, hidden_size) of the whole stream. One that was replayed may have drawn
    `tokens`, the rows' next, -1 where the logits gave no choice; else a row's logits are still to be changed or told of.
    """

    logits: torch.Tensor
    hidden: torch.Tensor | None = None
    tokens: list[int] | None = None


def _padded(tables: list[list[int]]) -> torch.Tensor:
    """Block tables as one int32 tensor (rows, longest), zeros beyond the end of each."""
    padded = torch.zeros(len(tables), max(map(len, tables)), dtype=torch.int32)
    for row, table in enumerate(tables):
        padded[row, : len(table)] = torch.tensor(table, dtype=torch.int32)
    return padded
