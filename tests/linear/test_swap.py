"""One walk over the finished model puts other kinds of Linear in place."""

import pytest
import torch
from torch import nn

from qwenkit.linear.swap import swap_linears


class Wrapped(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + 1


def model() -> nn.Module:
    block = nn.ModuleDict({"up": nn.Linear(3, 4), "norm": nn.LayerNorm(4), "down": nn.Linear(4, 3)})
    return nn.ModuleDict({"layers": nn.ModuleList([block]), "head": nn.Linear(3, 5)})


def test_every_linear_is_offered_with_its_name() -> None:
    network = model()
    offered: dict[str, nn.Linear] = {}
    assert swap_linears(network, offered.__setitem__) == []
    assert list(offered) == ["layers.0.up", "layers.0.down", "head"]
    assert all(network.get_submodule(name) is linear for name, linear in offered.items())


def test_chosen_ones_are_replaced_and_named() -> None:
    network = model()
    x = torch.randn(2, 3)
    up = network.get_submodule("layers.0.up")
    expected = up(x) + 1
    replaced = swap_linears(network, lambda name, linear: Wrapped(linear) if name.endswith("up") else None)
    assert replaced == ["layers.0.up"]
    assert torch.equal(network.get_submodule("layers.0.up")(x), expected)
    assert network.get_submodule("layers.0.up.linear") is up
    assert isinstance(network.get_submodule("head"), nn.Linear)


def test_what_a_replacement_keeps_inside_is_not_offered_again() -> None:
    network = model()
    names: list[str] = []

    def wrap(name: str, linear: nn.Linear) -> nn.Module:
        names.append(name)
        return Wrapped(linear)

    assert swap_linears(network, wrap) == names == ["layers.0.up", "layers.0.down", "head"]


def test_an_error_in_the_rule_is_not_swallowed() -> None:
    def refuse(name: str, linear: nn.Linear) -> nn.Module:
        raise ValueError(f"{name}: {linear.in_features} columns do not divide into groups of 128")

    with pytest.raises(ValueError, match="up: 3 columns"):
        swap_linears(model(), refuse)
