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
    adjust(logits, sequences)
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


class Penalties:
    """What `ops.penalize` wants to know of each row, in tensors that stay where they are: up to `most` ids with their counts, how
    many these are, and the three penalties. Rows that nobody wrote have none.
    """

    def __init__(self, rows: int, most: int) -> None:
        ids, counts = torch.empty(rows, most, dtype=torch.int64), torch.empty(rows, most)  # most of it is never touched
        self.tensors = (ids, counts, torch.zeros(rows, dtype=torch.int64), torch.ones(rows, 3))
        self._ids, self._counts, self._lengths, self._penalties = (tensor.numpy() for tensor in self.tensors)
        self._written = False

    def write(self, sequences: list[Sequence]) -> None:
        """Say which tokens of the first rows are to be less likely, and by how much."""
        penalised = [(row, sequence) for row, sequence in enumerate(sequences) if _is_penalised(sequence.params)]
        if not penalised and not self._written:
            return
        self._lengths[:] = 0
        self._written = bool(penalised)
        for row, sequence in penalised:
            ids, counts = sequence.token_counts.of(sequence.tokens, sequence.num_prompt)
            self._lengths[row] = ids.shape[0]
            self._ids[row, : ids.shape[0]] = ids
            self._counts[row, : ids.shape[0]] = counts
            params = sequence.params
            self._penalties[row] = params.repetition_penalty or 1.0, params.frequency_penalty, params.presence_penalty


def _is_penalised(params: SamplingParams) -> bool:
    return bool(params.frequency_penalty or params.presence_penalty or (params.repetition_penalty or 1.0) != 1.0)


def is_plain(sequence: Sequence) -> bool:
    """Whether nothing but penalties changes the logits before the draw, and nothing else is told of them."""
    params = sequence.params
    return (
        params.logprobs is None
        and not params.logit_bias
        and sequence.num_output >= params.min_tokens
        and sequence.matcher is None
    )


def adjust(logits: torch.Tensor, sequences: list[Sequence]) -> None:
    """Bias, min_tokens, penalties and last the grammar, which none of them can undo, in place on logits (N, vocab_size)."""
    for row, sequence in zip(logits, sequences, strict=True):
        _bias(row, sequence)
    if any(_is_penalised(sequence.params) for sequence in sequences):
        penalties = Penalties(len(sequences), max(len(sequence.tokens) for sequence in sequences))
        penalties.write(sequences)
        ops.penalize(logits, *penalties.tensors)
    for row, sequence in zip(logits, sequences, strict=True):
        if sequence.matcher is not None:
            allowed = sequence.matcher.allowed(_barred(sequence))
            row.masked_fill_(torch.from_numpy(~allowed).to(row.device), -torch.inf)


def _bias(row: torch.Tensor, sequence: Sequence) -> None:
    bias, device = sequence.params.logit_bias, row.device
    if bias:
        ids = torch.tensor(list(bias), device=device)
        row[ids] += torch.tensor(list(bias.values()), dtype=row.dtype, device=device)
    barred = _barred(sequence)
    if barred and sequence.matcher is None:  # which bars them itself, where that leaves a token
        row[torch.tensor(sorted(barred), device=device)] = -torch.inf


def _barred(sequence: Sequence) -> frozenset[int]:
    """The tokens that would end an answer too early."""
    return sequence.stop_ids if sequence.num_output < sequence.params.min_tokens else frozenset()
