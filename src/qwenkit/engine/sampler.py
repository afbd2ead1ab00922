"""Sampler: logits of a step -> one token for each row. Rows do not see each other, so a row's token is the same in any batch.

A random draw uses one number, a hash of the answer's seed and the place in the answer: nothing has to be stored, and a sequence
that is preempted or batched differently draws the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwenkit import ops
from qwenkit.engine.request import Sequence, TokenLogprob
from qwenkit.engine.sampling import GREEDY_BELOW, SamplingParams


@dataclass(frozen=True)
class Sampled:
    """`token_id` is -1 where the logits gave no choice: NaN, infinity, or every token barred."""

    token_id: int
    logprob: TokenLogprob | None


@torch.inference_mode()
def sample(logits: torch.Tensor, sequences: list[Sequence]) -> list[Sampled]:
    """Choose the next token of each sequence from logits (N, vocab_size) fp32, which this function may change."""
    raw_logprobs = {
        row: logits[row].log_softmax(-1)
        for row, sequence in enumerate(sequences)
        if sequence.params.logprobs is not None
    }
    for row, sequence in enumerate(sequences):
        if _adjusts(sequence):
            _adjust(logits[row], sequence)
    limits = Limits(len(sequences))
    limits.write(sequences)
    tokens: list[int] = ops.sample(logits, *limits.tensors).tolist()
    return [
        Sampled(
            token,
            describe(raw_logprobs[row], token, sequence.params.logprobs or 0)
            if row in raw_logprobs and token >= 0
            else None,
        )
        for row, (token, sequence) in enumerate(zip(tokens, sequences, strict=True))
    ]


def describe(logprobs: torch.Tensor, token: int, count: int) -> TokenLogprob:
    """The log-probability of `token` and of the `count` likeliest, from logprobs (vocab_size,)."""
    values, ids = logprobs.topk(min(count, logprobs.shape[0]))
    return TokenLogprob(token, logprobs[token].item(), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def uniform(seed: int, index: int, place: int) -> float:
    """A number in [0, 1) that depends on nothing but the answer's seed, its index among n, and the place in the answer.

    SplitMix64's finalizer over one after the other (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
    """
    state = 0
    for part in (seed, index, place):
        state = _mixed(state + (part + 1) * _GOLDEN)
    return (state >> 11) * 2.0**-53


_GOLDEN, _WORD = 0x9E3779B97F4A7C15, 2**64 - 1


def _mixed(state: int) -> int:
    state &= _WORD
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    state = (state ^ state >> 27) * 0x94D049BB133111EB & _WORD
    return state ^ state >> 31


class Limits:
    """What `ops.sample` wants to know of each row, in tensors that stay where they are: temperature (0: greedy), top_k, top_p,
    min_p and the random number. Rows that nobody wrote are greedy.
    """

    def __init__(self, rows: int) -> None:
        integers, doubles = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.float64)
        self.tensors = (torch.zeros(rows), integers, torch.ones(rows), torch.zeros(rows), doubles)
        # the same memory as numpy sees it, which is quicker to write from lists
        self._columns = [tensor.numpy() for tensor in self.tensors]
        self._written: list[tuple[float, int, float, float]] = []

    def write(self, sequences: list[Sequence]) -> None:
        """Say what the first rows want; most batches want the same in many steps."""
        wanted = [_limits(sequence.params) for sequence in sequences]
        *limits, numbers = self._columns
        if wanted != self._written:
            for column, values in zip(limits, zip(*wanted, strict=True), strict=True):
                column[: len(wanted)] = values
            limits[0][len(wanted) :] = 0
            self._written = wanted
        for row, sequence in enumerate(sequences):
            if wanted[row][0]:
                numbers[row] = uniform(sequence.seed, sequence.index, sequence.num_output)


def _limits(params: SamplingParams) -> tuple[float, int, float, float]:
    """Temperature, top_k, top_p and min_p."""
    assert params.temperature is not None
    temperature = 0.0 if params.temperature < GREEDY_BELOW else params.temperature
    return temperature, max(params.top_k or 0, 0), params.top_p or 1.0, params.min_p or 0.0


def is_plain(sequence: Sequence) -> bool:
    """Whether the next token is drawn from the logits as they are, and nothing else is told of them."""
    return sequence.params.logprobs is None and not _adjusts(sequence)


def _adjusts(sequence: Sequence) -> bool:
    """Whether anything changes the logits before the draw."""
    params = sequence.params
    return bool(
        params.logit_bias
        or params.frequency_penalty
        or params.presence_penalty
        or (params.repetition_penalty or 1.0) != 1.0
        or sequence.num_output < params.min_tokens
        or sequence.matcher is not None
    )


def _adjust(row: torch.Tensor, sequence: Sequence) -> None:
    """Bias, min_tokens, penalties and last the grammar, which none of them can undo, in place on row (vocab_size,)."""
    params, device = sequence.params, row.device
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=device)
        row[ids] += torch.tensor(list(params.logit_bias.values()), dtype=row.dtype, device=device)
    matcher = sequence.matcher
    barred = sequence.stop_ids if sequence.num_output < params.min_tokens else frozenset()
    if barred and matcher is None:
        row[torch.tensor(sorted(barred), device=device)] = -torch.inf
    penalty = params.repetition_penalty or 1.0
    if penalty != 1.0:
        seen = sequence.seen.of(sequence.tokens).to(device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if (params.frequency_penalty or params.presence_penalty) and sequence.output_counts:
        ids = torch.tensor(list(sequence.output_counts), device=device)
        counts = torch.tensor(list(sequence.output_counts.values()), dtype=row.dtype, device=device)
        row[ids] -= params.frequency_penalty * counts + params.presence_penalty
    if matcher is not None:
        row.masked_fill_(torch.from_numpy(~matcher.allowed(barred)).to(device), -torch.inf)
