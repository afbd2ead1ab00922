"""LoRA: nothing at the start, the same merged and unmerged, and for each row of a stream the update it asked for."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from qwenkit.linear.lora import (
    AdaptedLinear,
    LoRALinear,
    LowRank,
    Routing,
    adapters_off,
    features,
    linears,
    lora_scaling,
    merge_lora,
    put,
)
from qwenkit.linear.nf4 import NF4Linear
from qwenkit.linear.packed import Matrix, PackedLinear
from qwenkit.linear.swap import swap_linears
from qwenkit.ops.packed import quantize
from qwenkit.weights.load import load_model
from tests.tiny_models import tiny_reference


def trained(base: nn.Linear, rank: int = 3, alpha: float = 6, **settings: object) -> LoRALinear:
    linear = LoRALinear(base, rank, alpha, **settings)  # type: ignore[arg-type]
    with torch.no_grad():
        linear.lora_B.normal_()
    return linear


def test_the_update_is_nothing_at_the_start_and_alone_is_trained() -> None:
    base = nn.Linear(7, 5)
    x = torch.randn(4, 7)
    expected = base(x).detach()
    linear = LoRALinear(base, 3, 6)
    assert torch.equal(linear(x), expected)
    assert {name for name, parameter in linear.named_parameters() if parameter.requires_grad} == {"lora_A", "lora_B"}
    assert (linear.lora_A.shape, linear.lora_B.shape) == ((3, 7), (5, 3))
    assert linear.lora_A.abs().sum() > 0
    linear(x).sum().backward()
    assert linear.lora_B.grad is not None
    assert linear.lora_B.grad.abs().sum() > 0
    assert base.weight.grad is None


def test_scaling() -> None:
    assert lora_scaling(4, 8) == 2
    assert lora_scaling(4, 8, rslora=True) == 4
    linear = trained(nn.Linear(7, 5), rslora=True)
    x = torch.randn(4, 7)
    expected = linear.base(x) + 6 / 3**0.5 * (x @ linear.lora_A.T @ linear.lora_B.T)
    torch.testing.assert_close(linear(x), expected)


def test_merged_equals_unmerged_and_back() -> None:
    base = nn.Linear(7, 5, bias=False)
    before = base.weight.clone()
    linear = trained(base)
    x = torch.randn(4, 7)
    expected = linear(x).detach()
    linear.merge()
    linear.merge()
    torch.testing.assert_close(linear(x), expected)
    torch.testing.assert_close(base(x), expected)
    linear.unmerge()
    linear.unmerge()
    torch.testing.assert_close(base.weight, before)
    torch.testing.assert_close(linear(x), expected)


def test_merging_a_model_leaves_plain_linears() -> None:
    network = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5))
    assert swap_linears(network, lambda name, module: trained(module)) == ["0", "2"]
    x = torch.randn(4, 7)
    expected = network(x).detach()
    assert merge_lora(network) == ["0", "2"]
    assert [type(module) for module in network] == [nn.Linear, nn.ReLU, nn.Linear]
    torch.testing.assert_close(network(x), expected)


def test_dropout_only_while_training() -> None:
    linear = trained(nn.Linear(50, 5), dropout=0.5)
    x = torch.randn(4, 50)
    assert not torch.equal(linear(x), linear(x))
    linear.eval()
    assert torch.equal(linear(x), linear(x))


def test_the_update_stays_in_its_dtype_and_the_answer_in_the_base_s() -> None:
    linear = trained(nn.Linear(7, 5).bfloat16())
    assert linear.lora_A.dtype == torch.float32
    assert linear(torch.randn(4, 7, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_impossible_settings() -> None:
    with pytest.raises(ValueError, match="rank is 6, allowed are 1 to 5 for a Linear of 7 inputs and 5 outputs"):
        LoRALinear(nn.Linear(7, 5), 6, 1)
    with pytest.raises(ValueError, match="dropout is 1, allowed is at least 0"):
        LoRALinear(nn.Linear(7, 5), 2, 1, dropout=1)


def packed_linear(linear: nn.Linear, bits: int) -> PackedLinear:
    return PackedLinear(linear, Matrix(quantize(linear.weight.detach(), bits)), lambda stored: quantize(stored, bits))


def test_over_packed_weights() -> None:
    base = nn.Linear(64, 5, bias=False)
    packed = packed_linear(base, 4)
    linear = LoRALinear(packed, 3, 6)
    assert features(linear) == (64, 5)
    x = torch.randn(4, 64)
    assert torch.equal(linear(x), packed(x))
    with pytest.raises(ValueError, match="into a plain Linear only, not into a PackedLinear"):
        linear.merge()


def test_a_model_is_loaded_with_it(tmp_path: Path) -> None:
    """The base is filled from the checkpoint, the update by its own initialisation."""
    tiny_reference("qwen2").save_pretrained(tmp_path)
    expected = load_model(tmp_path)
    model = load_model(tmp_path, swaps=[lambda name, m: LoRALinear(m, 2, 4) if name.endswith("q_proj") else None])
    linear = model.get_submodule("model.layers.1.self_attn.q_proj")
    assert isinstance(linear, LoRALinear)
    assert torch.equal(linear.base.weight, expected.get_parameter("model.layers.1.self_attn.q_proj.weight"))  # type: ignore[arg-type]
    assert not linear.lora_B.any()
    assert linear.lora_A.isfinite().all()
    assert linear.lora_A.any()


def update(seed: int, scaling: float = 0.5) -> LowRank:
    torch.manual_seed(seed)
    return LowRank(torch.randn(3, 64), torch.randn(5, 3), scaling)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_rows_get_the_updates_they_ask_for(bits: int | None) -> None:
    plain = nn.Linear(64, 5, bias=False).requires_grad_(False)
    base = plain if bits is None else packed_linear(plain, bits)
    routing = Routing()
    linear = AdaptedLinear(base, routing)
    linear.updates = {"a": update(1), "b": update(2)}
    x = torch.randn(6, 64)
    assert torch.equal(linear(x), base(x))
    routing.groups = (("b", torch.tensor([5, 0])), ("a", torch.tensor([2])), ("elsewhere", torch.tensor([1, 3])))
    expected = base(x).clone()
    for row, name in ((0, "b"), (5, "b"), (2, "a")):
        expected[row] += linear.updates[name].matrix() @ x[row]
    torch.testing.assert_close(linear(x), expected)
    routing.groups = (("a", None),)
    torch.testing.assert_close(linear(x), base(x) + x @ linear.updates["a"].matrix().T)


def test_linears_of_a_model_by_name() -> None:
    network = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.ModuleDict({"up": nn.Linear(6, 5)}))
    assert list(linears(network)) == ["0", "2.up"]
    wrapped = copy.deepcopy(network)
    put(wrapped, "2.up", AdaptedLinear(wrapped.get_submodule("2.up"), Routing()))
    assert list(linears(wrapped)) == ["0", "2.up"]
    assert isinstance(linears(wrapped)["2.up"], AdaptedLinear)


def test_dora_by_its_formula_and_merged() -> None:
    """Rows of W + s B A brought to trained lengths; the lengths that are divided by count as constants (2402.09353)."""
    for bias in (False, True):
        base = nn.Linear(7, 5, bias=bias)
        x = torch.randn(4, 7)
        expected = base(x).detach()
        linear = LoRALinear(base, 3, 6, dora=True)
        assert linear.lora_magnitude_vector is not None
        torch.testing.assert_close(linear(x), expected)
        torch.testing.assert_close(linear.lora_magnitude_vector.detach(), base.weight.norm(dim=1).detach())
        with torch.no_grad():
            linear.lora_B.normal_()
            linear.lora_magnitude_vector.mul_(torch.rand(5) + 0.5)
        total = base.weight + 2 * linear.lora_B @ linear.lora_A
        weight = total * (linear.lora_magnitude_vector / total.norm(dim=1).detach())[:, None]
        y = nn.functional.linear(x, weight, base.bias)
        torch.testing.assert_close(linear(x), y)
        trained_ones = [p for p in linear.parameters() if p.requires_grad]
        assert len(trained_ones) == 3
        for ours, wanted in zip(
            torch.autograd.grad(linear(x).square().sum(), trained_ones),
            torch.autograd.grad(y.square().sum(), trained_ones),
            strict=True,
        ):
            torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)
        before = base.weight.clone()
        linear.merge()
        torch.testing.assert_close(linear(x), y)
        linear.unmerge()
        torch.testing.assert_close(base.weight, before)
        torch.testing.assert_close(linear(x), y)


def test_dora_over_nf4() -> None:
    base = nn.Linear(64, 5)
    quantized = NF4Linear.of(base)
    linear = LoRALinear(quantized, 3, 6, dora=True)
    plain = nn.Linear(64, 5)
    plain.load_state_dict({"weight": quantized.dequantized(), "bias": base.bias.detach()})
    reference = LoRALinear(plain, 3, 6, dora=True)
    with torch.no_grad():
        linear.lora_B.normal_()
        for name, parameter in reference.named_parameters():
            if "lora_" in name:
                parameter.copy_(linear.get_parameter(name))
    x = torch.randn(4, 64)
    torch.testing.assert_close(linear(x), reference(x))


def test_adapters_off_and_on_again() -> None:
    linear = trained(nn.Linear(7, 5))
    x = torch.randn(4, 7)
    changed, plain = linear(x), linear.base(x)
    with adapters_off(nn.Sequential(linear)):
        assert torch.equal(linear(x), plain)
    assert torch.equal(linear(x), changed)


def test_the_update_is_computed_in_the_dtype_of_its_input() -> None:
    linear = trained(nn.Linear(7, 5).to(torch.bfloat16))
    y = linear(torch.randn(4, 7, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert linear.lora_A.dtype == torch.float32
    y.float().sum().backward()
    assert linear.lora_A.grad is not None
    assert linear.lora_A.grad.dtype == torch.float32
