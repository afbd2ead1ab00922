"""GPTQ on one matrix, against the textbook, against rounding to nearest, and at the edges."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenkit.quant.config import QuantConfig
from qwenkit.quant.gptq import Quantized, gptq, round_to_nearest
from qwenkit.quant.grid import find_grid
from qwenkit.quant.moments import TILE, Moments
from tests.quant.textbook import textbook_gptaq, textbook_gptq, textbook_refine

PLAIN = {"mse": 0.0, "refine": 0}  # as the paper has it


def inputs(count: int = 600, width: int = 128, seed: int = 0) -> torch.Tensor:
    """Correlated inputs of very different sizes, as those of a transformer are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.rand(width, generator=generator) ** 3
    return torch.randn(count, width, generator=generator) @ mix


def matrix(outputs: int = 48, width: int = 128, seed: int = 1) -> torch.Tensor:
    return torch.randn(outputs, width, generator=torch.Generator().manual_seed(seed))


def moments_of(x: torch.Tensor, dtype: torch.dtype = torch.float32, unquantized: torch.Tensor | None = None) -> Moments:
    moments = Moments(x.shape[1], asymmetric=unquantized is not None, dtype=dtype)
    for start in range(0, len(x), 250):
        part = slice(start, start + 250)
        moments.add(x[part], None if unquantized is None else unquantized[part])
    return moments


def error(values: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> float:
    y = x.double() @ weight.double().T
    return float(((x.double() @ values.double().T - y) ** 2).sum() / (y**2).sum())


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 64), (4, -1), (8, 32)])
def test_the_textbook_gives_the_same(bits: int, group_size: int, sym: bool) -> None:
    """In fp64 and in the order of the inputs, every single weight."""
    x, weight = inputs(), matrix()
    config = QuantConfig(bits=bits, group_size=group_size, sym=sym, group_aware=False, **PLAIN)  # type: ignore[arg-type]
    moments = moments_of(x, torch.float64)
    found = gptq(weight, moments, config)
    expected = textbook_gptq(
        weight, moments.mean_hessian(), bits=bits, group_size=group_size, sym=sym, damp=config.damp
    )
    assert torch.allclose(found.values.double(), expected, atol=1e-6)
    assert found.error == pytest.approx(error(expected, weight, x), rel=1e-4)


def test_moments() -> None:
    """Made in tiles of one triangle, chunk by chunk."""
    x = inputs(500, TILE + 70)
    other = x + inputs(500, TILE + 70, seed=5)
    moments = moments_of(x, torch.float64, other)
    assert torch.allclose(moments.mean_hessian(), 2 / 500 * x.double().T @ x.double())
    shift = moments.mean_shift()
    assert shift is not None
    assert torch.allclose(shift, 2 / 500 * (other.double() - x.double()).T @ x.double())
    assert moments.tokens == 500


VARIANTS = [
    {},
    {"group_aware": False},
    {"desc_act": True},
    {"desc_act": True, "static_groups": True},
    {"static_groups": True},
    {"mse": 2.4},
    {"mse": 0.0, "refine": 0},
    {"refine": 0},
    {"group_size": -1},
    {"group_size": 64},
    {"sym": False},
    {"bits": 8},
]


@given(variant=st.sampled_from(VARIANTS), seed=st.integers(0, 50))
@settings(max_examples=30)
def test_less_is_lost_than_by_rounding_to_nearest(variant: dict[str, object], seed: int) -> None:
    config = QuantConfig(**({"group_size": 32, "damp": 0.01} | variant))  # type: ignore[arg-type]
    x, weight = inputs(seed=seed), matrix(seed=seed + 1)
    found, nearest = gptq(weight, moments_of(x), config), round_to_nearest(weight, replace(config, method="rtn"))
    assert error(found.values, weight, x) < 0.9 * error(nearest.values, weight, x)
    assert_consistent(found, config)
    assert_consistent(nearest, config)
    assert found.error == pytest.approx(error(found.values, weight, x), rel=1e-2)
    in_order = torch.equal(found.group_of, found.group_of.sort().values)
    assert in_order == (not config.desc_act or config.static_groups)


def assert_consistent(found: Quantized, config: QuantConfig) -> None:
    """The values are what a reader of codes, scales and zero points computes."""
    zeros, scales = (part[:, found.group_of].float() for part in (found.zeros, found.scales))
    assert torch.equal(found.values, (found.codes.float() - zeros) * scales)
    assert int(found.codes.max()) < 2**config.bits
    assert found.scales.dtype == torch.float16
    assert (found.scales > 0).all()
    if config.sym:
        assert (found.zeros == 2 ** (config.bits - 1)).all()


def test_important_inputs_first_is_better() -> None:
    x, weight = inputs(), matrix()
    moments = moments_of(x)
    lost = {
        name: gptq(weight, moments, QuantConfig(group_size=32, **PLAIN, **flags)).error  # type: ignore[arg-type]
        for name, flags in {
            "in order": {"group_aware": False},
            "group aware": {},
            "desc_act": {"desc_act": True},
        }.items()
    }
    assert lost["desc_act"] < lost["group aware"] < lost["in order"]  # type: ignore[operator]


def test_a_last_group_may_be_short() -> None:
    x, weight = inputs(width=160), matrix(width=160)
    for group_aware in (False, True):
        config = QuantConfig(group_size=64, group_aware=group_aware, short_groups=True)
        found = gptq(weight, moments_of(x), config)
        assert found.scales.shape == (48, 3)
        assert found.group_of.bincount().tolist() == [64, 64, 32]
        assert_consistent(found, config)
        nearest = round_to_nearest(weight, replace(config, method="rtn"))
        assert error(found.values, weight, x) < error(nearest.values, weight, x)


def test_inputs_that_are_always_zero_and_weights_that_are() -> None:
    x, weight = inputs(), matrix()
    x[:, 3:40] = 0
    weight[5] = 0
    found = gptq(weight, moments_of(x), QuantConfig(group_size=32))
    assert (found.values[:, 3:40] == 0).all()
    assert (found.values[5] == 0).all()
    assert torch.isfinite(found.values).all()


def test_damping_grows_until_the_hessian_can_be_inverted() -> None:
    """Two tokens say nothing of 126 directions; fp32 says less than fp64."""
    x = inputs(2) * 1e4
    found = gptq(matrix(), moments_of(x), QuantConfig(group_size=32, damp=1e-9))
    assert found.damp > 1e-9
    assert torch.isfinite(found.values).all()
    enough = gptq(matrix(), moments_of(inputs()), QuantConfig(group_size=32))
    assert enough.damp == 0.05
    with pytest.raises(ValueError, match="activations are not finite"):
        gptq(matrix(), moments_of(inputs() * float("nan")), QuantConfig(group_size=32))
    with pytest.raises(ValueError, match="weights are not finite, or too large"):
        gptq(matrix() * 1e9, moments_of(inputs()), QuantConfig(group_size=32))


def test_what_earlier_layers_lost_is_made_up_for() -> None:
    """Here they lost a tenth of every input: the best weights are larger."""
    x, weight = inputs(), matrix()
    unquantized = x / 0.9
    moments = moments_of(x, unquantized=unquantized)
    wanted = unquantized.double() @ weight.double().T

    def lost(alpha: float) -> float:
        values = gptq(weight, moments, QuantConfig(group_size=32, gptaq=True, alpha=alpha)).values
        return float(((x.double() @ values.double().T - wanted) ** 2).sum() / (wanted**2).sum())

    assert lost(1.0) < lost(0.5) < lost(0.0)
    assert lost(1.0) < 0.5 * lost(0.0)


def test_the_papers_way_of_making_up_for_them_is_not_better() -> None:
    """GPTAQ's own formula corrects later inputs for earlier ones; the closed form all of them at once, for the same error."""
    ours, theirs = [], []
    for seed in range(5):
        x, weight = inputs(seed=seed), matrix(seed=seed + 1)
        unquantized = x + 0.2 * x.std(0) * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        moments = moments_of(x, torch.float64, unquantized)
        shift = moments.mean_shift()
        assert shift is not None
        config = QuantConfig(group_size=32, gptaq=True, alpha=1.0, group_aware=False, **PLAIN)  # type: ignore[arg-type]
        wanted = unquantized.double() @ weight.double().T
        paper = textbook_gptaq(weight, moments.mean_hessian(), shift, bits=4, group_size=32, damp=config.damp)
        plain = textbook_gptq(weight, moments.mean_hessian(), bits=4, group_size=32, sym=True, damp=config.damp)
        lost = [
            float(((x.double() @ values.double().T - wanted) ** 2).sum())
            for values in (gptq(weight, moments, config).values, paper, plain)
        ]
        assert lost[1] < lost[2]
        ours.append(lost[0])
        theirs.append(lost[1])
    assert sum(ours) < sum(theirs)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("flags", [{}, {"desc_act": True}, {"desc_act": True, "static_groups": True}])
def test_refined_as_written_out(flags: dict[str, bool], sym: bool) -> None:
    """Weight by weight with the whole gradient each time, in fp64; and never worse."""
    x, weight = inputs(), matrix(12)
    moments = moments_of(x, torch.float64)
    config = QuantConfig(group_size=32, refine=0, sym=sym, **flags)  # type: ignore[arg-type]
    before = gptq(weight, moments, config)
    hessian = moments.mean_hessian()
    hessian += config.damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    last = before.error
    assert last is not None
    for rounds in (1, 2):
        found = gptq(weight, moments, replace(config, refine=rounds))
        codes, scales = textbook_refine(
            weight, hessian, before.codes, before.scales, before.zeros, before.group_of, rounds=rounds, bits=4
        )
        assert torch.equal(found.codes, codes)
        assert torch.equal(found.scales, scales)
        assert found.error is not None
        assert found.error < 0.999 * last
        last = found.error
        assert_consistent(found, config)


def test_the_grid() -> None:
    row = torch.tensor([[-1.0, 0.0, 0.5, 2.0], [0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    scale, zero = find_grid(row, QuantConfig(group_size=32, mse=0))
    assert zero.tolist() == [8, 8, 8]
    assert scale[0] == torch.tensor(4 / 15).half()
    scale, zero = find_grid(row, QuantConfig(group_size=32, sym=False, mse=0))
    assert zero.tolist() == [5, 8, 0]
    assert scale[2] == torch.tensor(4 / 15).half()
    heavy = torch.cat((torch.randn(1, 127, generator=torch.Generator().manual_seed(0)), torch.tensor([[9.0]])), 1)
    shrunk, _ = find_grid(heavy, QuantConfig(group_size=128, mse=2.0))
    whole, _ = find_grid(heavy, QuantConfig(group_size=128, mse=0))
    assert shrunk[0] < whole[0]
    priced, _ = find_grid(heavy, QuantConfig(group_size=128, mse=2.0), torch.tensor([1.0] * 127 + [1e6]))
    assert shrunk[0] < priced[0]  # the large one matters most: its error decides
    nearest = round_to_nearest(heavy, QuantConfig(group_size=128, method="rtn"))
    assert torch.equal(nearest.scales[:, 0].float(), whole)


@pytest.mark.parametrize(
    ("given_field", "sentence"),
    [
        ({"bits": 3}, "bits is 3, allowed are 4, 8"),
        ({"group_size": 100}, "group_size is 100, allowed are 32, 64, 128, -1"),
        ({"method": "awq"}, "method is 'awq', allowed are gptq, rtn"),
        ({"format": "marlin"}, "format is 'marlin', allowed are auto, gptq, gptq_v2"),
        ({"samples": 0}, "samples is 0, allowed are whole numbers of at least 1"),
        ({"length": 1}, "length is 1, allowed are whole numbers of at least 2"),
        ({"damp": 0.0}, "damp is 0.0, allowed is more than 0"),
        ({"alpha": 2.0}, "alpha is 2.0, allowed is 0 to 1"),
        ({"mse": 0.5}, "mse is 0.5, allowed are 0"),
        ({"refine": -1}, "refine is -1, allowed are whole numbers from 0 to 100"),
    ],
)
def test_settings_that_are_refused(given_field: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        QuantConfig(**given_field)  # type: ignore[arg-type]


def test_groups_must_fit_the_model() -> None:
    shapes = {"a": (64, 576), "b": (64, 1536)}
    assert QuantConfig().fitted(shapes).group_size == 64
    assert QuantConfig().fitted({"b": (64, 1536)}).group_size == 128
    assert QuantConfig(group_size=128, short_groups=True).fitted(shapes).group_size == 128
    assert QuantConfig(group_size=-1).fitted(shapes).group_size == -1
    with pytest.raises(
        ValueError, match=r"group_size is 128, but a has 576 inputs, .* take 32 or 64 or -1, or --short"
    ):
        QuantConfig(group_size=128).fitted(shapes)
    with pytest.raises(ValueError, match="b has 40 inputs and 64 outputs; at 4 bits inputs must be a multiple of 32"):
        QuantConfig().fitted({"b": (64, 40)})
    with pytest.raises(ValueError, match="outputs of 8"):
        QuantConfig().fitted({"b": (60, 64)})


@pytest.mark.parametrize(
    ("asked", "sym", "written"),
    [
        ("auto", True, "gptq"),
        ("auto", False, "gptq_v2"),
        ("gptq", False, "gptq"),
        ("gptq_v2", True, "gptq_v2"),
    ],
)
def test_the_format_is_one_that_readers_take(asked: str, sym: bool, written: str) -> None:
    """GPTQModel takes the first layout without symmetry only from writers that it knows, gptq_v2 from anybody."""
    assert QuantConfig(format=asked, sym=sym).fitted({"model.layers.0.mlp.up_proj": (64, 64)}).format == written
