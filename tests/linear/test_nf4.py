"""NF4: near to what it was, in the bits that it claims, and differentiable without a float copy that stays."""

import pytest
import torch
from torch import nn

from qwenkit.linear import nf4
from qwenkit.linear.frozen import PackedBase, dequantized_weight, frozen_linear
from qwenkit.linear.nf4 import CODEBOOK, NF4Linear
from qwenkit.linear.packed import Matrix, PackedLinear
from qwenkit.ops.packed import dequantize, quantize


def linear(inputs: int, outputs: int, *, bias: bool = True, std: float = 0.02) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(made.weight, std=std)
    return made


def test_the_codebook_is_the_papers_construction() -> None:
    """Appendix E: quantiles of a normal distribution, 8 levels below zero and 9 above, one zero; scaled to reach 1."""
    offset = 0.9677083
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    above = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64))[:-1]
    below = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64))[:-1]
    values = torch.cat((above, torch.zeros(1, dtype=torch.float64), below)).sort().values
    torch.testing.assert_close(torch.tensor(CODEBOOK, dtype=torch.float64), values / values.max(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 300), (64, 7), (40, 30)])
def test_it_is_near_and_codes_are_the_nearest(inputs: int, outputs: int, double: bool) -> None:
    base = linear(inputs, outputs)
    weight = base.weight.detach().clone()
    quantized = NF4Linear.of(base, double_quantization=double)
    found = quantized.dequantized()
    assert found.shape == weight.shape
    assert float((found - weight).norm() / weight.norm()) < 0.1
    if not double:  # by definition, block by block
        for row, start in ((0, 0), (outputs - 1, inputs // 64 * 64 if inputs % 64 else inputs - 64)):
            block = weight[row, start : start + 64].double()
            largest = block.abs().max()
            levels = torch.tensor(CODEBOOK, dtype=torch.float64) * largest
            nearest = levels[(block[:, None] - levels).abs().argmin(1)]
            torch.testing.assert_close(found[row, start : start + 64].double(), nearest, atol=1e-7, rtol=1e-6)


def test_bits_of_a_weight() -> None:
    for double, expected in ((True, 4 + 8 / 64 + 64 / (64 * 256)), (False, 4.5)):
        quantized = NF4Linear.of(linear(1024, 512, bias=False), double_quantization=double)
        stored = sum(tensor.numel() * tensor.element_size() for tensor in quantized.parameters())
        assert 8 * stored / (1024 * 512) == expected


def test_double_quantization_costs_next_to_nothing() -> None:
    base = linear(768, 512)
    errors = [
        float((NF4Linear.of(base, double_quantization=double).dequantized() - base.weight.detach()).norm())
        for double in (False, True)
    ]
    assert errors[1] < 1.01 * errors[0]


def test_zeros_and_blocks_of_very_different_sizes() -> None:
    base = linear(128, 300)
    with torch.no_grad():
        base.weight[:5] = 0
        base.weight[5, 64:] *= 1000
    quantized = NF4Linear.of(base)
    found = quantized.dequantized()
    assert found.isfinite().all()
    assert not found[:5].any()
    assert NF4Linear.of(base, double_quantization=False).dequantized()[5].abs().max() == base.weight[5].abs().max()


def test_rows_in_parts_are_the_same_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base = linear(96, 600)
    whole = NF4Linear.of(base).dequantized()
    parts = NF4Linear(base)

    class Stored:
        def read(self, start: int, stop: int) -> torch.Tensor:
            assert stop - start <= nf4.ROWS
            return base.weight.detach()[start:stop]

    parts.fill("weight", Stored())
    assert torch.equal(parts.dequantized(), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_product_and_gradient(dtype: torch.dtype) -> None:
    quantized = NF4Linear.of(linear(96, 40)).to(torch.float32)
    x = torch.randn(5, 96, dtype=dtype, requires_grad=True)
    y = quantized(x)
    weight = quantized.dequantized(dtype)
    assert quantized.bias is not None
    assert torch.equal(y, x @ weight.T + quantized.bias.to(dtype))
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, torch.ones_like(y) @ weight)


def test_no_float_matrix_is_kept_for_the_backward() -> None:
    quantized = NF4Linear.of(linear(256, 256))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        quantized(torch.randn(3, 256, requires_grad=True)).sum()
    assert all(count < 256 * 256 for count in kept)


def test_packed_matrices_stay_as_they_are() -> None:
    base = linear(64, 48)
    packed = quantize(base.weight.detach(), 4)
    kept = PackedBase(base, lambda stored: packed)
    kept.fill("weight", None)
    assert torch.equal(kept.dequantized(torch.float32), dequantize(packed))
    x = torch.randn(3, 64, requires_grad=True)
    y = kept(x)
    torch.testing.assert_close(y, x @ dequantize(packed).T + base.bias)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, torch.ones_like(y) @ dequantize(packed))
    assert not any(parameter.requires_grad for parameter in kept.parameters())
    assert kept.to(torch.bfloat16).packed.q.dtype == torch.uint8


def test_what_has_no_matrix_says_so() -> None:
    served = PackedLinear(linear(32, 32), Matrix(), lambda stored: stored)
    with pytest.raises(ValueError, match="a PackedLinear has no matrix to compute with"):
        dequantized_weight(served, torch.float32)
    assert torch.equal(
        frozen_linear(torch.ones(1, 2), lambda dtype: torch.eye(2, dtype=dtype), torch.ones(2)),
        torch.tensor([[2.0, 2.0]]),
    )
