"""AdamW and its surroundings: fp32 copies, stochastic rounding, 8-bit states, averages, schedules."""

import math
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qwenkit.train.config import TrainConfig
from qwenkit.train.optim import MovingAverage, Optimizer, clip, stochastic_round
from qwenkit.train.schedule import learning_rate, warmup_length
from qwenkit.train.states import pack8, unpack8


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix.weight": (17, 33), "norm.weight": (33,)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}


def descend(optimizer: Optimizer, steps: int, start: int = 0, rate: float = 0.01) -> None:
    """Least squares towards a fixed point, with a gradient that differs from step to step."""
    for step in range(start, start + steps):
        loss = sum(((p.float() - math.sin(step)) ** 2).sum() for p in optimizer.parameters.values())
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        optimizer.collect()
        optimizer.step(rate)


def test_it_is_torchs_adamw_and_decays_matrices_only() -> None:
    config = TrainConfig(weight_decay=0.1, adam_beta2=0.95)
    ours, theirs = parameters(), parameters()
    descend(Optimizer(ours, config), 5)
    groups: list[dict[str, Any]] = [
        {"params": [theirs["matrix.weight"]], "weight_decay": 0.1},
        {"params": [theirs["norm.weight"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for step in range(5):
        sum(((p - math.sin(step)) ** 2).sum() for p in theirs.values()).backward()  # type: ignore[union-attr]
        reference.step()
        reference.zero_grad()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)


def test_gradients_of_bfloat16_weights_add_up_in_fp32() -> None:
    low = {"w": nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))}
    optimizer = Optimizer(low, TrainConfig())
    for value in (1.0, 2**-10, 2**-10):  # in bfloat16, 1 + 2**-10 is 1
        low["w"].backward(torch.full((4,), value, dtype=torch.bfloat16))
        optimizer.collect()
    assert low["w"].grad is None
    assert torch.equal(optimizer.gradients()[0], torch.full((4,), 1 + 2**-9))


def test_small_steps_move_fp32_copies_and_not_bfloat16_alone() -> None:
    low = parameters(torch.bfloat16)
    optimizer = Optimizer(low, TrainConfig())
    exact = {name: p.detach().clone() for name, p in optimizer.stepped.items()}
    descend(optimizer, 3, rate=1e-6)
    for name in low:
        assert not torch.equal(optimizer.stepped[name], exact[name])
        assert torch.equal(low[name], optimizer.stepped[name].bfloat16())


def test_stochastic_rounding_is_right_on_average_and_repeatable() -> None:
    exact = torch.full((20_000,), 1 + 2**-9)  # a quarter of the way between two bfloat16 numbers
    rounded = stochastic_round(exact, seed=3)
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    assert abs(rounded.double().mean().item() - (1 + 2**-9)) < 1e-4
    assert torch.equal(rounded, stochastic_round(exact, seed=3))
    assert not torch.equal(rounded, stochastic_round(exact, seed=4))
    kept = torch.tensor([0.0, -1.5, math.inf, -math.inf])
    assert torch.equal(stochastic_round(kept, seed=0).float(), kept)
    assert stochastic_round(torch.tensor([math.nan]), seed=0).isnan().all()


def test_stochastic_weights_follow_fp32_ones() -> None:
    low, exact = parameters(torch.bfloat16), parameters()
    descend(Optimizer(low, TrainConfig(master_weights="stochastic", weight_decay=0.1)), 100)
    descend(Optimizer(exact, TrainConfig(weight_decay=0.1)), 100)
    assert (low["matrix.weight"] - exact["matrix.weight"]).mean().abs() < 2e-3
    assert (low["matrix.weight"] - exact["matrix.weight"]).abs().max() < 0.1


def test_states_in_8_bits_follow_those_in_32() -> None:
    small, exact = parameters(), parameters()
    optimizer = Optimizer(small, TrainConfig(optim="adamw_8bit"))
    descend(optimizer, 200)
    descend(Optimizer(exact, TrainConfig()), 200)
    moved = (exact["matrix.weight"] - parameters()["matrix.weight"]).abs().mean()
    assert (small["matrix.weight"] - exact["matrix.weight"]).abs().mean() < 0.1 * moved
    held = sum(t.nbytes for name, t in optimizer.tensors().items() if name.startswith("matrix"))
    assert held < 3 * small["matrix.weight"].numel()  # bytes; fp32 states would be 8 an element


@given(st.integers(1, 700), st.floats(-12, 3), st.booleans())
def test_8_bit_codes(count: int, exponent: float, signed: bool) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)) * 10**exponent
    values = values if signed else values.square()
    packed = pack8(values, signed=signed)
    back = unpack8(packed["code"], packed["scale"], values.shape, signed=signed)
    biggest = values.abs().max()
    assert ((back - values).abs() <= (0.0081 if signed else 0.0157) * biggest).all()  # half a level, a whole level
    if signed:
        assert (back.sign() * values.sign() >= 0).all()
    else:
        assert (back >= values * (1 - 1e-6)).all()  # never below, so that no step is divided by too little


@pytest.mark.parametrize("settings", [{}, {"optim": "adamw_8bit"}, {"master_weights": "stochastic"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_through_tensors_bit_for_bit(settings: dict[str, Any], dtype: torch.dtype) -> None:
    config = TrainConfig(**settings)
    whole, first, second = parameters(dtype), parameters(dtype), parameters(dtype)
    descend(Optimizer(whole, config), 6)
    optimizer = Optimizer(first, config)
    descend(optimizer, 2)
    resumed = Optimizer(second, config)
    for name, parameter in second.items():
        parameter.data.copy_(first[name].data)
    saved = optimizer.tensors()
    assert saved.keys() == resumed.tensors().keys()
    for name, tensor in resumed.tensors().items():
        tensor.copy_(saved[name])
    descend(resumed, 4, start=2)
    for name in whole:
        assert torch.equal(whole[name], second[name])


def test_clipping() -> None:
    grads = [torch.tensor([3.0]), torch.tensor([4.0])]
    clip(grads, 5.0, 0.0)
    clip(grads, 5.0, 6.0)
    assert [g.item() for g in grads] == [3, 4]
    clip(grads, 5.0, 1.0)
    assert [round(g.item(), 5) for g in grads] == [0.6, 0.8]


def test_nothing_to_train_is_said() -> None:
    with pytest.raises(ValueError, match="nothing is trained"):
        Optimizer({}, TrainConfig())


def test_moving_average() -> None:
    weights = {"w": nn.Parameter(torch.tensor([0.0]))}
    average = MovingAverage(weights, 0.9)
    weights["w"].data.fill_(1.0)
    average.update()
    average.update()
    assert average.tensors()["w"].item() == pytest.approx(0.19)
    with average.in_place():
        assert weights["w"].item() == pytest.approx(0.19)
    assert weights["w"].item() == 1.0


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "constant_with_warmup"])
def test_schedules_equal_transformers(kind: str) -> None:
    config = TrainConfig(lr_scheduler_type=kind, warmup_ratio=0.12, learning_rate=0.3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = transformers.get_scheduler(kind, optimizer, num_warmup_steps=6, num_training_steps=50)
    assert warmup_length(50, config) == (0 if kind == "constant" else 6)
    for step in range(50):
        assert learning_rate(step, 50, config) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_warmup_stable_decay() -> None:
    config = TrainConfig(lr_scheduler_type="wsd", warmup_steps=2, decay_ratio=0.5, min_lr_ratio=0.1, learning_rate=1.0)
    rates = [learning_rate(step, 8, config) for step in range(9)]
    assert rates == pytest.approx([0, 0.5, 1, 1, 1, 0.775, 0.55, 0.325, 0.1])


@given(
    st.integers(1, 300),
    st.sampled_from(["cosine", "linear", "constant", "constant_with_warmup", "wsd"]),
    st.floats(0, 1),
)
def test_rates_stay_between_zero_and_the_largest(total: int, kind: str, ratio: float) -> None:
    config = TrainConfig(lr_scheduler_type=kind, warmup_ratio=ratio, decay_ratio=1 - ratio, learning_rate=2.0)
    assert all(0 <= learning_rate(step, total, config) <= 2.0 for step in range(total + 1))
