"""The points that weights are rounded to. In: the weights of a group. Out: a scale and a zero point for each row, and codes.

Scales are rounded to fp16, as files hold them, before anything is divided by them.
"""

from __future__ import annotations

import torch

from qwenkit.quant.config import QuantConfig

SMALLEST_SCALE = 2.0**-24  # fp16's
_SHRINK = torch.linspace(1.0, 0.4, 25).tolist()  # of a group's range, tried by the search for the best scale


def find_grid(
    weight: torch.Tensor, config: QuantConfig, price: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid of each row of a group (out, n): scales (out,), exactly representable in fp16, and zero points (out,).

    Symmetric: all steps over -max|w| to max|w|, zero in the middle. Else from the smallest weight to the largest, 0 among them.
    With `mse` ranges are shrunk and the one with the least sum of |error|^mse is taken, errors of an input counting
    `price` (n,) times where that is known.
    """
    top = 2**config.bits - 1
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    if config.sym:
        high = torch.maximum(-low, high)
        low = -high
    flat = low == high
    low, high = low.masked_fill(flat, -1), high.masked_fill(flat, 1)
    best: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    for share in _SHRINK if config.mse else (1.0,):
        scale = ((high - low) * share / top).clamp(min=SMALLEST_SCALE).to(torch.float16).to(weight.dtype)
        middle = torch.full_like(scale, (top + 1) // 2)
        zero = middle if config.sym else (-low * share / scale).round().clamp(0, top)
        if not config.mse:
            break
        values = scale[:, None] * (codes_of(weight, scale[:, None], zero[:, None], config.bits) - zero[:, None])
        errors = (values - weight).abs_().pow_(config.mse)
        error = errors.sum(1) if price is None else errors @ price
        if best is None:
            best = error, scale, zero
        else:
            better = error < best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip((error, scale, zero), best, strict=True))  # type: ignore[assignment]
    if best is not None:
        _, scale, zero = best
    if not bool(torch.isfinite(scale).all()):
        raise ValueError("weights are not finite, or too large for scales in fp16: the model cannot be quantized")
    return scale, zero


def codes_of(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest codes, as whole numbers in the weights' dtype."""
    return (weight / scale).round_().add_(zero).clamp_(0, 2**bits - 1)
