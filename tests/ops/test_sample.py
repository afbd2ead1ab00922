"""Choosing a token, by the reference and by every instruction set, against a plain float64 reading of the rules.

Every token's share of the uniform numbers is its probability, so evenly spaced numbers count it exactly.
"""

import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qwenkit import ops
from qwenkit.ops.cpu.library import INSTRUCTION_SETS, open_library
from tests.conftest import OPS

DRAWS = 1500


@pytest.fixture(scope="module", params=["reference", *INSTRUCTION_SETS], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param != "reference":
        try:
            open_library(request.param)
        except ValueError as error:
            pytest.skip(str(error))
    ops.use(request.param)
    yield request.param
    ops.use(OPS)


def shares(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """How often each token comes out, over DRAWS evenly spaced uniform numbers."""
    tokens = ops.sample(
        logits.expand(DRAWS, -1).contiguous(),
        torch.full((DRAWS,), temperature),
        torch.full((DRAWS,), top_k),
        torch.full((DRAWS,), top_p),
        torch.full((DRAWS,), min_p),
        (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS,
    )
    return {token: count / DRAWS for token, count in Counter(tokens.tolist()).items()}


def naive_distribution(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> dict[int, float]:
    """Temperature, top_k, top_p, min_p one after the other over a sorted list, renormalised after each."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k > 0:
        order = order[:top_k]
    weights = [math.exp((logits[i] - logits[order[0]]) / temperature) for i in order]
    weights = [weight / sum(weights) for weight in weights]
    kept, total = 0, 0.0
    while kept < len(order) and (kept == 0 or total < top_p or top_p == 1):
        total += weights[kept]
        kept += 1
    chosen = {i: weight for i, weight in zip(order[:kept], weights, strict=False) if weight >= min_p * weights[0]}
    return {i: weight / sum(chosen.values()) for i, weight in chosen.items()}


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([1, 5, 40, 700, 3000]),
    temperature=st.floats(0.1, 3.0),
    top_k=st.sampled_from([0, 0, 0, 1, 3, 50, 10_000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.3, 1.0]),
    spread=st.sampled_from([0.02, 2.0, 6.0, 40.0]),
    shape=st.sampled_from(["any", "any", "in steps", "striped"]),
)
@example(seed=852, size=700, temperature=2.9376592450379375, top_k=0, top_p=0.5, min_p=0.0, spread=6.0, shape="any")
def test_the_cuts_keep_what_the_rules_keep(
    seed: int, size: int, temperature: float, top_k: int, top_p: float, min_p: float, spread: float, shape: str
) -> None:
    logits = torch.tensor(np.random.default_rng(seed).normal(size=size) * spread, dtype=torch.float32)
    if shape == "in steps":
        logits = (8 * logits).round() / 8
    elif (
        shape == "striped"
    ):  # whoever looks only at some places, a power of two apart, sees other logits than there are
        logits[torch.arange(size) % 256 < 16] += 0.2
    logits[size // 2] = -torch.inf if size > 1 else 1.0
    mine = shares(logits, temperature, top_k, top_p, min_p)
    expected = naive_distribution(logits.tolist(), temperature, top_k, top_p, min_p)
    assert all(token in expected for token in mine if expected.get(token, 0) or mine[token] > 2 / DRAWS)
    # At the edge of a cut fp32 and float64 may differ about a token, which takes its share from all others.
    edge = max(2 / DRAWS, 1.01 * min(expected.values()))
    total_difference = sum(abs(mine.get(token, 0) - share) for token, share in expected.items())
    assert all(abs(mine.get(token, 0) - share) <= edge for token, share in expected.items())
    assert total_difference <= 2 * min(expected.values()) + 2 * len(expected) / DRAWS


def test_the_likeliest_and_the_first_of_equals() -> None:
    logits = torch.zeros(3, 100)
    logits[0, [17, 60]] = 2.0
    logits[1, 99] = 1e-3
    nothing = torch.zeros(3)
    tokens = ops.sample(
        logits, nothing, nothing.long(), torch.ones(3), nothing, torch.tensor([0.9] * 3, dtype=torch.float64)
    )
    assert tokens.tolist() == [17, 99, 0]


@pytest.mark.parametrize("likelier", [0, 10])
def test_of_equals_the_first_are_kept(likelier: int) -> None:
    """top_p ends among 2,990 or more tokens of one logit: as many as it takes, those with the smallest ids."""
    logits = torch.zeros(3000)
    logits[3000 - likelier :] = math.log(2)
    kept = set(shares(logits, temperature=1.0, top_k=0, top_p=0.25, min_p=0.0))
    mass = 3000 + likelier  # each of the likelier counts as two
    assert kept == {*range(mass // 4 - 2 * likelier + (mass % 4 > 0)), *range(3000 - likelier, 3000)}


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("top_k", [0, 5])
def test_rows_without_a_choice_say_so(temperature: float, top_k: int) -> None:
    logits = torch.randn(5, 83)
    logits[1, 81] = torch.nan
    logits[2, 3] = torch.inf
    logits[3] = -torch.inf
    logits[4] = -torch.inf
    logits[4, 64] = -3.0
    tokens = ops.sample(
        logits,
        torch.full((5,), temperature),
        torch.full((5,), top_k),
        torch.full((5,), 0.9),
        torch.zeros(5),
        torch.full((5,), 0.999999, dtype=torch.float64),
    ).tolist()
    assert tokens[0] >= 0
    assert tokens[1:] == [-1, -1, -1, 64]


def test_penalties_are_those_of_the_papers() -> None:
    """Against one token after the other in Python, for rows with many, few and no tokens."""
    torch.manual_seed(0)
    logits, lengths = torch.randn(4, 300) * 5, torch.tensor([120, 1, 0, 37])
    logits[0, 7], logits[1, 9] = -torch.inf, torch.nan
    ids = torch.stack([torch.randperm(300)[:120] for _ in range(4)])
    counts = torch.randint(0, 4, (4, 120)).float()
    penalties = torch.tensor([[1.3, 0.5, 0.25], [1.1, 0.0, 0.0], [2.0, 1.0, 1.0], [1.0, -0.5, 1.5]])
    expected = logits.double()
    for row, (repetition, frequency, presence) in enumerate(penalties.double()):
        for token, times in zip(ids[row, : lengths[row]], counts[row].double(), strict=False):
            logit = expected[row, token]
            logit = logit / repetition if logit > 0 else logit * repetition
            expected[row, token] = logit - (frequency * times + presence if times > 0 else 0)
    ops.penalize(logits, ids, counts, lengths, penalties)
    torch.testing.assert_close(logits.double(), expected, atol=1e-6, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("spread", [0.02, 1.0, 4.0, 30.0])
def test_a_whole_vocabulary(spread: float) -> None:
    """top_p over 151,936 tokens: what is kept holds top_p, and without its least likely token it would not."""
    logits = torch.randn(1, 151_936, generator=torch.Generator().manual_seed(1)) * spread
    probabilities = logits[0].double().softmax(-1)
    order = probabilities.argsort(descending=True)
    kept = int((probabilities[order].cumsum(-1) < 0.9).sum()) + 1
    allowed = set(order[: kept + 3].tolist())
    for number in np.linspace(0, 0.999999, 40):
        token = ops.sample(
            logits,
            torch.ones(1),
            torch.zeros(1, dtype=torch.int64),
            torch.tensor([0.9]),
            torch.zeros(1),
            torch.tensor([number], dtype=torch.float64),
        )
        assert int(token) in allowed
    assert math.isclose(float(probabilities[order[:kept]].sum()), 0.9, rel_tol=0.05) or kept < 50
