"""A matrix and its LoRA update as one node of autograd, against the sum of two products."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qwenkit.linear.lora import LoRALinear
from qwenkit.linear.lora_product import lora_product


@pytest.mark.parametrize(("rows", "inputs", "outputs", "rank"), [(1, 3, 2, 1), (5, 4, 7, 2), (6, 8, 3, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients(rows, inputs, outputs, rank, bias):
    torch.manual_seed(0)
    x, a, b = torch.randn(rows, inputs), torch.randn(rank, inputs), torch.randn(outputs, rank)
    x, a, b = (tensor.double().requires_grad_() for tensor in (x, a, b))
    weight = torch.randn(outputs, inputs).double()
    offset = torch.randn(outputs).double().requires_grad_() if bias else None
    expected = F.linear(x, weight, offset) + 0.5 * F.linear(F.linear(x, a), b)
    torch.testing.assert_close(lora_product(x, weight, offset, a, b, 0.5), expected)
    given = (x, weight, offset, a, b, 0.5)
    assert torch.autograd.gradcheck(lora_product, given)


@pytest.mark.parametrize("wanted", ["x", "a", "b"])
def test_only_what_wants_a_gradient_gets_one(wanted):
    tensors = {"x": torch.randn(4, 6), "a": torch.randn(2, 6), "b": torch.randn(5, 2)}
    tensors[wanted].requires_grad_()
    lora_product(tensors["x"], torch.randn(5, 6), None, tensors["a"], tensors["b"], 2.0).sum().backward()
    assert [name for name, tensor in tensors.items() if tensor.grad is not None] == [wanted]


@pytest.mark.parametrize("trained_bias", [False, True])
def test_a_lora_linear_is_one_node_and_equals_the_general_way(trained_bias, monkeypatch):
    torch.manual_seed(0)
    lora = LoRALinear(nn.Linear(12, 9), 4, 8.0)
    lora.base.bias.requires_grad_(trained_bias)
    with torch.no_grad():
        lora.lora_B.normal_()
    found = []
    for general in (False, True):
        if general:
            monkeypatch.setattr(LoRALinear, "_is_one_product", lambda self, base, x: False)
        x = torch.linspace(-1, 1, 60).view(5, 12).requires_grad_()
        y = lora(x)
        assert (type(y.grad_fn).__name__ == "_LoRAProductBackward") is not general
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in lora.parameters() if p.requires_grad)])
        lora.zero_grad()
    torch.testing.assert_close(*found)


def test_dropout_and_dora_take_the_general_way():
    x = torch.randn(3, 8, requires_grad=True)
    dropping = LoRALinear(nn.Linear(8, 8), 2, 4.0, dropout=0.5)
    for lora in (dropping.train(), LoRALinear(nn.Linear(8, 8), 2, 4.0, dora=True)):
        assert type(lora(x).grad_fn).__name__ != "_LoRAProductBackward"
    assert type(dropping.eval()(x).grad_fn).__name__ == "_LoRAProductBackward"
