"""The sampler against a plain float64 reading of its rules."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from qwenkit.engine import sampler
from qwenkit.engine.request import Sequence, TokenCounts
from qwenkit.engine.sampling import SamplingParams
from qwenkit.text.stream import Detokenizer
from qwenkit.text.tokenizer import Tokenizer
from tests.engine.conftest import GREEDY


def sequence(tokenizer: Tokenizer, prompt: list[int], output: list[int] = [], **fields: Any) -> Sequence:  # noqa: B006
    params = SamplingParams(**fields).with_defaults(GREEDY)
    return Sequence(
        request_id=0,
        index=0,
        tokens=prompt + output,
        num_prompt=len(prompt),
        params=params,
        seed=params.seed or 0,
        max_tokens=100,
        stop_ids=frozenset({3}),
        detokenizer=Detokenizer(tokenizer),
        stop_strings=None,
    )


def test_draws_follow_the_distribution(tokenizer: Tokenizer) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]])
    expected = torch.softmax(logits[0] / 0.8, -1)
    count = 4000
    tally = Counter(
        sampler.sample(logits.clone(), [sequence(tokenizer, [1], temperature=0.8, seed=seed)])[0].token_id
        for seed in range(count)
    )
    for token, probability in enumerate(expected.tolist()):
        deviation = math.sqrt(count * probability * (1 - probability))
        assert abs(tally[token] - count * probability) < 4.5 * deviation


def test_uniform_is_a_function_of_seed_index_and_place() -> None:
    values = {(s, i, p): sampler.uniform(s, i, p) for s in (0, 1, -5, 2**62) for i in range(3) for p in range(50)}
    assert len(set(values.values())) == len(values)
    assert all(0 <= value < 1 for value in values.values())
    assert abs(np.mean(list(values.values())) - 0.5) < 0.05
    assert all(sampler.uniform(*key) == value for key, value in values.items())


def test_tokens_are_counted_as_they_come() -> None:
    counted = TokenCounts()
    tokens = [5, 5, 7]
    for token in range(200):
        ids, counts = counted.of(tokens, 3)
        written = Counter(tokens[3:])
        assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == {token: written[token] for token in set(tokens)}
        tokens.append(token % 130)


def test_penalties_bias_and_min_tokens(tokenizer: Tokenizer) -> None:
    logits = torch.tensor([2.0, -2.0, 4.0, 9.0, 1.0, -1.0])
    row = sequence(
        tokenizer,
        [0, 1],
        [2, 2, 4],
        repetition_penalty=1.25,
        frequency_penalty=0.5,
        presence_penalty=0.25,
        logit_bias={5: 3.0, 0: 0.5},
        min_tokens=4,
    )
    sampler.adjust(logits[None], [row])
    expected = [2.5 / 1.25, -2.0 * 1.25, 4.0 / 1.25 - 2 * 0.5 - 0.25, -math.inf, 1.0 / 1.25 - 0.5 - 0.25, 2.0]
    assert logits.tolist() == pytest.approx(expected)


def test_greedy_ties_and_tiny_temperature(tokenizer: Tokenizer) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 5.0]])
    rows = [sequence(tokenizer, [1], temperature=0.0), sequence(tokenizer, [1], temperature=1e-6)]
    assert [choice.token_id for choice in sampler.sample(logits, rows)] == [1, 2]


def test_a_bias_of_minus_a_hundred_bars_a_token(tokenizer: Tokenizer) -> None:
    logits = torch.zeros(1, 4)
    for seed in range(50):
        row = sequence(tokenizer, [1], temperature=1.0, seed=seed, logit_bias={0: -100.0, 1: -100.0, 2: -100.0})
        assert sampler.sample(logits.clone(), [row])[0].token_id == 3
