"""Sampler: logits of a step -> one token for each row. Rows do not see each other, so a row's token is the same in any batch.

A random draw uses one number from a counter-based generator (Philox) keyed by the answer's seed and counted by the place in the
answer: nothing has to be stored, and a sequence that is preempted or batched differently draws the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from qwenkit.engine.request import Sequence, TokenLogprob
from qwenkit.engine.sampling import GREEDY_BELOW

CANDIDATES = 256  # how many of the likeliest tokens are sorted before a whole sort is considered


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
    for row, sequence in zip(logits, sequences, strict=True):
        _adjust(row, sequence)
    # numpy's argmax takes a twentieth of torch's time on a CPU
    tokens: list[int] = (logits.numpy() if logits.device.type == "cpu" else logits).argmax(-1).tolist()
    peaks = logits[torch.arange(len(tokens), device=logits.device), tokens]  # a NaN wins every argmax
    for row, sound in enumerate(peaks.isfinite().tolist()):
        if not sound:
            tokens[row] = -1
    for row, sequence in enumerate(sequences):
        temperature = sequence.params.temperature
        assert temperature is not None
        if temperature >= GREEDY_BELOW and tokens[row] >= 0:
            tokens[row] = _draw(logits[row] / temperature, sequence)
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
    """A number in [0, 1) that depends on nothing but the answer's seed, its index among n, and the place in the answer."""
    key = np.array([seed & (2**64 - 1), index], dtype=np.uint64)
    generator = np.random.Philox(key=key, counter=np.array([place, 0, 0, 0], dtype=np.uint64))
    return float(np.random.Generator(generator).random())


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
        seen = torch.tensor(sequence.tokens, device=device).unique()
        values = row[seen]
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if (params.frequency_penalty or params.presence_penalty) and sequence.output_counts:
        ids = torch.tensor(list(sequence.output_counts), device=device)
        counts = torch.tensor(list(sequence.output_counts.values()), dtype=row.dtype, device=device)
        row[ids] -= params.frequency_penalty * counts + params.presence_penalty
    if matcher is not None:
        row.masked_fill_(torch.from_numpy(~matcher.allowed(barred)).to(device), -torch.inf)


def _draw(scaled: torch.Tensor, sequence: Sequence) -> int:
    """One token from logits (vocab_size,) already divided by the temperature: top_k, top_p, min_p, then the draw."""
    probabilities, ids = _candidates(scaled, sequence)
    cumulative = probabilities.double().cumsum(-1)
    target = uniform(sequence.seed, sequence.index, sequence.num_output) * cumulative[-1]
    place = int(torch.searchsorted(cumulative, target, right=True))
    if place == probabilities.shape[0]:  # rounding; what follows the last possible token may be barred
        place = int(probabilities.nonzero()[-1])
    return place if ids is None else int(ids[place])


def _candidates(scaled: torch.Tensor, sequence: Sequence) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Probabilities that survive the cuts, not renormalised, and their ids (None: every id in order)."""
    params = sequence.params
    top_k, top_p, min_p = params.top_k or 0, params.top_p or 1.0, params.min_p or 0.0
    vocab_size = scaled.shape[0]
    if top_k <= 0 and top_p >= 1 and min_p <= 0:
        return scaled.softmax(-1), None
    if 0 < top_k < vocab_size:
        values, ids = scaled.topk(top_k)
        probabilities = values.softmax(-1)
    else:
        # Sorting a whole vocabulary is slow and seldom needed: the likeliest few usually hold more than top_p.
        values, ids = scaled.topk(min(CANDIDATES, vocab_size))
        probabilities = (values - scaled.logsumexp(-1)).exp()
        enough_for_p = top_p < 1 and float(probabilities.sum()) >= top_p
        enough_for_min_p = min_p > 0 and float(probabilities[-1]) < min_p * float(probabilities[0])
        if not (enough_for_p or enough_for_min_p):
            values, ids = scaled.sort(descending=True)
            probabilities = values.softmax(-1)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        keep = before < top_p
        keep[0] = True
        probabilities, ids = probabilities[keep], ids[keep]
    if min_p > 0:
        keep = probabilities >= min_p * probabilities[0]
        probabilities, ids = probabilities[keep], ids[keep]
    return probabilities, ids
