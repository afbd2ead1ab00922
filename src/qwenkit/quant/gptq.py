"""GPTQ on one matrix (arXiv 2210.17323). In: weights (out, in) and the moments of their inputs. Out: codes, scales, zero points.

Inputs are rounded one at a time; what each rounding loses is made up for by those that are not rounded yet, as the Hessian of
the squared output error, H = 2/n X^T X, says. Everything is in the moments' dtype. Scales are rounded to fp16, as files hold
them, before anything is divided by them, so the values that come out are those that a reader computes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qwenkit.quant.config import QuantConfig
from qwenkit.quant.grid import codes_of, find_grid
from qwenkit.quant.moments import Moments
from qwenkit.quant.refine import refine

BLOCK = 128  # inputs whose errors are spread over the rest of the matrix together, by one product
STRIP = 32  # the same inside a block


@dataclass(frozen=True)
class Quantized:
    """w = scale * (code - zero): codes (out, in) uint8, scales (out, groups) fp16, zeros (out, groups) uint8, group_of (in,).

    `values` (out, in) fp32 is that. `lost` and `energy` (out,): the mean squared error of each output and its mean square, None
    where the inputs are not known. `damp` is the share that had to be added to the Hessian's diagonal.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    group_of: torch.Tensor
    values: torch.Tensor
    lost: torch.Tensor | None = None
    energy: torch.Tensor | None = None
    damp: float = 0.0

    @property
    def error(self) -> float | None:
        """The squared error of all outputs as a share of them."""
        if self.lost is None or self.energy is None:
            return None
        return float(self.lost.sum()) / max(float(self.energy.sum()), 1e-30)

    def rows(self, start: int, stop: int) -> Quantized:
        """Some of the outputs."""

        def cut(part: torch.Tensor) -> torch.Tensor:
            return part[start:stop]

        return replace(
            self,
            codes=cut(self.codes),
            scales=cut(self.scales),
            zeros=cut(self.zeros),
            values=cut(self.values),
            lost=None if self.lost is None else cut(self.lost),
            energy=None if self.energy is None else cut(self.energy),
        )


def round_to_nearest(weight: torch.Tensor, config: QuantConfig) -> Quantized:
    """Each weight (out, in) to the nearest point of its group's grid. With the method rtn, that is the range of its group."""
    inputs = weight.shape[1]
    groups = _groups(inputs, config)
    weight = weight.float()
    if config.method == "rtn":
        config = replace(config, mse=0.0)
    grids = [find_grid(weight[:, start:stop], config) for start, stop in groups]
    scales, zeros = (torch.stack(parts, 1) for parts in zip(*grids, strict=True))
    group_of = _group_of(inputs, groups).to(weight.device)
    codes = codes_of(weight, scales[:, group_of], zeros[:, group_of], config.bits)
    return _finished(codes, scales, zeros, group_of)


def gptq(weight: torch.Tensor, moments: Moments, config: QuantConfig) -> Quantized:
    """The weights (out, in) rounded one input after the other, later ones making up for earlier ones.

    The order of inputs is that of `_order`. Raises ValueError where no damping makes the Hessian invertible, as with inputs that
    are not finite.
    """
    original = weight.to(moments.hessian.dtype)
    hessian = moments.mean_hessian()
    inputs = original.shape[1]
    groups = _groups(inputs, config)
    diagonal = hessian.diagonal()
    dead = diagonal == 0  # inputs that were always zero: any weight will do
    importance = diagonal.clone()
    diagonal[dead] = 1
    target = original.masked_fill(dead, 0)
    order, groups_in_order = _order(importance, groups, config)
    factor, damp = _inverse_factor(hessian[order][:, order], config.damp)
    work = target.T[order].contiguous()  # (in, out): a rounded input is a contiguous row
    shift = moments.mean_shift()
    if shift is not None:
        # H^-1 of the damped Hessian is factor^T factor; see Moments for where the shift of the optimum comes from.
        work += config.alpha * (factor.T @ (factor @ (shift[order][:, order].T @ work)))
    wanted = torch.empty_like(work).index_copy_(0, order, work) if config.refine else None
    keep_groups = config.static_groups or not config.desc_act
    fixed = None
    if config.static_groups:
        price = torch.empty_like(importance).index_copy_(0, order, factor.diagonal() ** -2)
        fixed = [find_grid(target[:, a:b], config, price[a:b]) for a, b in groups]
    codes, scales, zeros = _round_in_order(work, factor, groups_in_order, fixed, config)
    codes = torch.empty_like(codes).index_copy_(0, order, codes)
    del factor, work
    group_of = _group_of(inputs, groups).to(codes.device)
    if not keep_groups:  # groups are runs of the order, and inputs are scattered over them
        group_of = torch.empty_like(group_of).index_copy_(0, order, group_of)
    if wanted is not None:
        diagonal += damp * float(diagonal.mean())
        _refine(wanted, hessian, codes, scales, zeros, group_of, config)
    diagonal.copy_(importance)
    result = _finished(codes.T.contiguous(), scales, zeros, group_of)
    change = result.values.to(original.dtype) - original
    lost, energy = (((each @ hessian) * each).sum(1) / 2 for each in (change, original))  # H is twice the mean of x x^T
    return replace(result, lost=lost, energy=energy, damp=damp)


def _refine(
    wanted: torch.Tensor,
    hessian: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    group_of: torch.Tensor,
    config: QuantConfig,
) -> None:
    """`refine`, groups being brought together where they are scattered."""
    sizes = group_of.bincount().tolist()
    if bool((group_of.diff() >= 0).all()):
        refine(wanted, hessian, codes, scales, zeros, sizes, bits=config.bits, rounds=config.refine)
        return
    order = group_of.argsort(stable=True)
    together = codes[order]
    refine(
        wanted[order], hessian[order][:, order], together, scales, zeros, sizes, bits=config.bits, rounds=config.refine
    )
    codes[order] = together


def _finished(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group_of: torch.Tensor) -> Quantized:
    half = scales.to(torch.float16)
    values = (codes.float() - zeros.float()[:, group_of]) * half.float()[:, group_of]
    return Quantized(codes.to(torch.uint8), half, zeros.to(torch.uint8), group_of, values)


def _groups(inputs: int, config: QuantConfig) -> list[tuple[int, int]]:
    """Where each group of inputs starts and stops; the last may be short."""
    size = config.group_size if config.group_size and config.group_size > 0 else inputs
    return [(start, min(start + size, inputs)) for start in range(0, inputs, size)]


def _group_of(inputs: int, groups: list[tuple[int, int]]) -> torch.Tensor:
    sizes = torch.tensor([stop - start for start, stop in groups])
    return torch.arange(len(groups)).repeat_interleave(sizes, output_size=inputs)


def _order(
    importance: torch.Tensor, groups: list[tuple[int, int]], config: QuantConfig
) -> tuple[torch.Tensor, list[tuple[int, int]] | torch.Tensor]:
    """The order of inputs, and what the loop must know of groups.

    That is, in the order in which they are reached, (group, its size): a list of runs. With desc_act and static groups it is the
    group of each input, since they are scattered.
    """
    inputs = importance.shape[0]
    if config.desc_act:
        order = importance.argsort(descending=True, stable=True)
        if config.static_groups:
            return order, _group_of(inputs, groups).to(order.device)[order]
        return order, [(group, stop - start) for group, (start, stop) in enumerate(groups)]
    if not config.group_aware:
        return torch.arange(inputs, device=importance.device), [
            (group, stop - start) for group, (start, stop) in enumerate(groups)
        ]
    inside = [importance[start:stop].argsort(descending=True, stable=True) + start for start, stop in groups]
    peaks = torch.stack([importance[start:stop].max() for start, stop in groups])
    ranked = peaks.argsort(descending=True, stable=True).tolist()
    return torch.cat([inside[group] for group in ranked]), [(g, groups[g][1] - groups[g][0]) for g in ranked]


def _inverse_factor(hessian: torch.Tensor, damp: float) -> tuple[torch.Tensor, float]:
    """The upper U with U^T U = (H + damp mean(diag H) I)^-1, and the damping that it took.

    With rows and columns reversed, a lower Cholesky factor is H's own upper one, H = R R^T; U is R^-1.
    """
    mean = float(hessian.diagonal().mean())
    identity = torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device)
    while damp < 16:
        reversed_ = hessian.flip(0, 1)
        reversed_.diagonal().add_(damp * mean)
        lower, failed = torch.linalg.cholesky_ex(reversed_)
        if not failed:
            factor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            if bool(torch.isfinite(factor).all()):
                return factor, damp
        damp *= 2
    raise ValueError("the calibration's activations are not finite: the model computes NaN or infinity on this text")


def _round_in_order(
    work: torch.Tensor,
    factor: torch.Tensor,
    groups: list[tuple[int, int]] | torch.Tensor,
    fixed: list[tuple[torch.Tensor, torch.Tensor]] | None,
    config: QuantConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round `work` (in, out) row by row -> codes (in, out), scales and zeros (out, groups). `work` is used up.

    An error is spread late: a row collects those before it when its block, its strip, or itself is reached.
    """
    inputs, outputs = work.shape
    price = factor.diagonal() ** -2  # of missing an input by one, if all later ones make up for it
    group = 0
    if isinstance(groups, list):
        starts, position = {}, 0
        for group, size in groups:
            starts[position] = (group, size)
            position += size
        count = len(groups)
    else:
        starts, count = {}, len(fixed or ())
    codes = torch.empty_like(work)
    scales, zeros = (work.new_empty(outputs, count) for _ in range(2))
    for group, (scale, zero) in enumerate(fixed or ()):
        scales[:, group], zeros[:, group] = scale, zero
    for begin, end in _segments(inputs, starts):
        if fixed is None and begin in starts:
            group, size = starts[begin]
            columns = slice(begin, begin + size)
            scales[:, group], zeros[:, group] = find_grid(work[columns].T, config, price[columns])
        errors = work.new_empty(end - begin, outputs)
        for first in range(begin, end, STRIP):
            last = min(first + STRIP, end)
            strip, lost = work[first:last], errors[first - begin : last - begin]
            strip.addmm_(factor[begin:first, first:last].T, errors[: first - begin], alpha=-1)
            for i, column in enumerate(range(first, last)):
                if isinstance(groups, torch.Tensor):
                    group = int(groups[column])
                    scale, zero = scales[:, group].contiguous(), zeros[:, group].contiguous()
                elif column == first:
                    scale, zero = scales[:, group].contiguous(), zeros[:, group].contiguous()
                row = strip[i] if i == 0 else strip[i].addmv_(lost[:i].T, factor[first:column, column], alpha=-1)
                code = codes_of(row, scale, zero, config.bits)
                codes[column] = code
                torch.sub(row, code.sub_(zero).mul_(scale), out=lost[i]).div_(factor[column, column])
        work[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    return codes, scales, zeros


def _segments(inputs: int, starts: dict[int, tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs of at most BLOCK inputs, none in two groups. When one begins, all that is left is up to date."""
    begins = sorted(starts) or [0]
    segments: list[tuple[int, int]] = []
    for begin, end in zip(begins, [*begins[1:], inputs], strict=True):
        segments += [(at, min(at + BLOCK, end)) for at in range(begin, end, BLOCK)]
    return segments
