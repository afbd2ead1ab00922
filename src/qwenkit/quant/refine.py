"""What rounding one input after the other leaves undone: scales fitted to the codes, and codes chosen again, in turn.

GPTQ never comes back to an input, and it chooses a scale before it knows the codes. Here, group by group, the scale of each row
becomes the one that loses least with the row's codes, then each code the best one while all others stay (coordinate descent, as
in arXiv 2309.01885). No step raises the error (Q - W) H (Q - W)^T of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qwenkit.quant.grid import SMALLEST_SCALE, codes_of

STRIP = 32  # inputs whose changes reach the rest of their group together


def refine(
    target: torch.Tensor,
    hessian: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    sizes: Sequence[int],
    *,
    bits: int,
    rounds: int,
) -> None:
    """Change `codes` (in, out) and `scales` (out, groups) in place; scales stay exactly representable in fp16.

    `target` (in, out) are the weights to come near, `hessian` (in, in) what it costs to miss them, `sizes` the inputs of each
    group, which lie one after the other.
    """
    lost = torch.empty_like(target)
    spans: list[slice] = []
    for group, size in enumerate(sizes):
        begin = spans[-1].stop if spans else 0
        spans.append(slice(begin, begin + size))
        lost[spans[-1]] = target[spans[-1]] - (codes[spans[-1]] - zeros[:, group]) * scales[:, group]
    for _ in range(rounds):
        for group, span in enumerate(spans):
            inner, zero = hessian[span, span], zeros[:, group].contiguous()
            pull = hessian[span] @ lost  # half the slope of the error, downhill
            steps = codes[span] - zero
            scale = _fit_scale(scales[:, group], steps, inner, pull)
            codes[span] = _choose_codes(codes[span], scale, zero, inner, pull, bits)
            lost[span] = target[span] - (codes[span] - zero) * scale
            scales[:, group] = scale


def _fit_scale(scale: torch.Tensor, steps: torch.Tensor, inner: torch.Tensor, pull: torch.Tensor) -> torch.Tensor:
    """The scale (out,) of values steps * scale that loses least; `pull` (in, out) is brought up to date."""
    spread = inner @ steps
    curvature = (steps * spread).sum(0)
    change = torch.where(curvature > 0, (steps * pull).sum(0) / curvature, 0)
    fitted = (scale + change).clamp(SMALLEST_SCALE, 65504).to(torch.float16).to(scale.dtype)
    nearer = (scale + change - fitted).abs() < change.abs()  # fp16 may lie farther from the best than where we are
    fitted = torch.where(nearer, fitted, scale)
    pull -= spread * (fitted - scale)
    return fitted


def _choose_codes(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, inner: torch.Tensor, pull: torch.Tensor, bits: int
) -> torch.Tensor:
    """Codes (in, out), one input after the other. `pull` is used up."""
    codes = codes.clone()
    count = len(codes)
    changes = torch.empty_like(codes)
    for first in range(0, count, STRIP):
        last = min(first + STRIP, count)
        strip = pull[first:last].addmm_(inner[first:last, :first], changes[:first], alpha=-1)
        for i, row in enumerate(range(first, last)):
            slope = strip[i] if i == 0 else strip[i].addmv_(changes[first:row].T, inner[first:row, row], alpha=-1)
            best = codes_of((codes[row] - zero) * scale + slope / inner[row, row], scale, zero, bits)
            torch.sub(best, codes[row], out=changes[row]).mul_(scale)
            codes[row] = best
    return codes
