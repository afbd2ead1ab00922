"""The ops that training runs natively, against autograd of their references in float64, on random shapes."""

import pytest
import torch

from qwenkit import ops
from qwenkit.ops import dispatch, reference

EPS = 1e-6
SHAPES = [(1, 16), (3, 5, 64), (7, 24), (129, 576), (33, 17)]


@pytest.fixture(params=["avx2", "avx512"], autouse=True)
def native(request):
    try:
        ops.use(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    if dispatch._Table.training is None:
        pytest.skip("this torch has no OpenMP runtime that the kernels can use")
    yield
    ops.use("auto")


@pytest.fixture(params=[1, 2], autouse=True)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def check(op, specification, inputs, constants=(), trained=None):
    """Results and gradients of `op` in fp32 equal those of the specification in float64, and one node of autograd did it."""
    trained = [True] * len(inputs) if trained is None else trained
    exact = [tensor.double().requires_grad_(wanted) for tensor, wanted in zip(inputs, trained, strict=True)]
    given = [tensor.clone().requires_grad_(wanted) for tensor, wanted in zip(inputs, trained, strict=True)]
    found, expected = op(*given, *constants), specification(*exact, *constants)
    found, expected = (out if isinstance(out, tuple) else (out,) for out in (found, expected))
    assert len({type(out.grad_fn) for out in found}) == 1
    assert type(found[0].grad_fn).__name__.startswith("_")
    grads = [torch.randn_like(out) for out in found]
    torch.autograd.backward(found, grads)
    torch.autograd.backward(expected, [grad.double() for grad in grads])
    for out, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(out.double(), wanted, rtol=2e-5, atol=2e-5)
    for tensor, wanted in zip(given, exact, strict=True):
        assert (tensor.grad is None) == (wanted.grad is None)
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad.double(), wanted.grad, rtol=2e-5, atol=5e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_rms_norm(shape, trained):
    torch.manual_seed(0)
    inputs = torch.randn(shape), torch.rand(shape[-1]) + 0.5
    check(ops.rms_norm, _exact_rms_norm, inputs, (EPS,), trained)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "trained", [(True, True, True), (True, True, False), (False, True, False), (True, False, True)]
)
def test_add_rms_norm(shape, trained):
    torch.manual_seed(0)
    inputs = torch.randn(shape), torch.randn(shape), torch.rand(shape[-1]) + 0.5
    check(ops.add_rms_norm, _exact_add_rms_norm, inputs, (EPS,), trained)


def test_a_sum_whose_norm_is_not_used_has_the_gradient_of_a_sum():
    x, y = (torch.randn(3, 32, requires_grad=True) for _ in range(2))
    total, _ = ops.add_rms_norm(x, y, torch.ones(32), EPS)
    total.backward(torch.full((3, 32), 2.0))
    assert torch.equal(x.grad, torch.full((3, 32), 2.0))
    assert torch.equal(y.grad, x.grad)


@pytest.mark.parametrize("shape", [*SHAPES, (40, 1024)])
def test_silu_mul(shape):
    torch.manual_seed(0)
    check(ops.silu_mul, reference.silu_mul, (4 * torch.randn(shape), torch.randn(shape)))


@pytest.mark.parametrize("gate", [-200.0, -90.0, 90.0, 200.0])
def test_silu_mul_of_large_gates_is_finite(gate):
    gates = torch.full((1, 32), gate, requires_grad=True)
    ops.silu_mul(gates, torch.ones(1, 32)).sum().backward()
    torch.testing.assert_close(gates.grad, torch.full((1, 32), float(gate > 0)))


@pytest.mark.parametrize(
    ("tokens", "heads", "dim", "half"), [(1, 1, 8, 4), (5, 3, 64, 32), (130, 9, 64, 32), (6, 2, 20, 5)]
)
def test_rotate(tokens, heads, dim, half):
    torch.manual_seed(0)
    angles = torch.randn(tokens, half)
    check(ops.rotate, _exact_rotate, (torch.randn(tokens, heads, dim),), (angles.cos(), angles.sin()))


def test_rotate_takes_gradients_that_lie_otherwise():
    x, angles = torch.randn(6, 3, 16, requires_grad=True), torch.randn(6, 8)
    grad = torch.randn(3, 6, 16).transpose(0, 1)
    ops.rotate(x, angles.cos(), angles.sin()).backward(grad)
    turned_back = reference.rotate(grad, angles.cos(), -angles.sin())
    torch.testing.assert_close(x.grad, turned_back)


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 16), (5, 33), (64, 1000)])
def test_cross_entropy_and_its_gradient(rows, vocabulary):
    torch.manual_seed(0)
    logits = (5 * torch.randn(rows, vocabulary)).double().requires_grad_()
    targets = torch.randint(vocabulary, (rows,))
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    expected.sum().backward()
    for implementation in (ops.cross_entropy_, reference.cross_entropy_):
        given = logits.detach().float()
        losses = implementation(given.clone(), targets, gradient=False)
        again = implementation(given, targets, gradient=True)
        assert torch.equal(losses, again)
        torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(given.double(), logits.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", [0, 20, 36])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_logit_that_is_not_finite_is_not_lost(value, place):
    logits = torch.randn(2, 37)
    logits[1, place] = value
    losses = ops.cross_entropy_(logits, torch.tensor([3, 3]), gradient=True)
    assert losses.isfinite().tolist() == [True, False]
    assert logits[0].isfinite().all()
    assert not logits[1].isfinite().all()


def test_the_number_of_threads_does_not_change_a_bit():
    x, weight = torch.randn(77, 576), torch.rand(576)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        given = x.clone().requires_grad_()
        ops.rms_norm(given, weight, EPS).square().sum().backward()
        found.append(given.grad)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_what_is_not_fp32_goes_to_the_reference():
    x = torch.randn(4, 32, dtype=torch.bfloat16, requires_grad=True)
    y = ops.rms_norm(x, torch.ones(32, dtype=torch.bfloat16), EPS)
    assert not type(y.grad_fn).__name__.startswith("_")


# The references divide and turn in fp32, whatever they are given; these say the same in the inputs' own precision.


def _exact_rms_norm(x, weight, eps):
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


def _exact_add_rms_norm(x, y, weight, eps):
    return x + y, _exact_rms_norm(x + y, weight, eps)


def _exact_rotate(x, cos, sin):
    half = cos.shape[-1]
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


def test_what_runs_is_told():
    told = ops.implementations()
    assert told["cross_entropy_"] == told["rms_norm"] != "reference"
    ops.use("reference")
    assert ops.implementations()["cross_entropy_"] == "reference"
    y = ops.rms_norm(torch.randn(4, 32, requires_grad=True), torch.ones(32), EPS)
    assert not type(y.grad_fn).__name__.startswith("_")
