"""Optimizer states in 8 bits (the idea of arXiv 2110.02861): blocks of 256 values share a scale, codes are finer near zero.

In: fp32 moments of any shape. Out: uint8 codes and one fp32 scale a block, about a quarter of the memory. Second moments are
rounded up: one that became zero would make the step it divides unbounded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

BLOCK = 256


def pack8(values: torch.Tensor, *, signed: bool) -> dict[str, torch.Tensor]:
    """code uint8 (blocks, 256), scale fp32 (blocks, 1) of fp32 values of any shape.

    A signed code c stands for sign(c - 127) ((c - 127) / 127)^2, an unsigned one for (c / 255)^4, times the scale.
    """
    blocks = F.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    share = blocks / scale.clamp_min(torch.finfo(torch.float32).tiny)
    levels = 127 + (share.abs().sqrt() * 127).round() * share.sign() if signed else (share.sqrt().sqrt() * 255).ceil()
    return {"code": levels.to(torch.uint8), "scale": scale}


def unpack8(code: torch.Tensor, scale: torch.Tensor, shape: torch.Size, *, signed: bool) -> torch.Tensor:
    """The values, fp32, that `pack8` made code (blocks, 256) and scale (blocks, 1) of."""
    level = code.float()
    if signed:
        share = (level - 127) / 127
        share = share * share.abs()
    else:
        share = (level / 255).square().square()
    return (share * scale).flatten()[: shape.numel()].view(shape)
