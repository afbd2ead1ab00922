"""GPTQ as its paper tells it (arXiv 2210.17323, algorithm 1), in fp64 and without any of the shortcuts: columns in their order,
one at a time, each error spread at once over all later columns through the explicit inverse of the Hessian."""

import torch


def textbook_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, *, bits: int, group_size: int, sym: bool, damp: float
) -> torch.Tensor:
    """weight (out, in), H = 2/n X^T X (in, in) -> the rounded weights (out, in)."""
    work, hessian = weight.double().clone(), hessian.double().clone()
    inputs = work.shape[1]
    size = inputs if group_size == -1 else group_size
    hessian += damp * hessian.diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
    rounded = torch.zeros_like(work)
    top = 2**bits - 1
    for i in range(inputs):
        inverse = torch.linalg.inv(hessian[i:, i:])  # of the columns that are left
        if i % size == 0:
            group = work[:, i : i + size]
            low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
            if sym:
                high = torch.maximum(high, -low)
                low = -high
            scale = ((high - low) / top).half().double()
            zero = torch.full_like(scale, (top + 1) // 2) if sym else (-low / scale).round().clamp(0, top)
        code = (work[:, i] / scale + zero).round().clamp(0, top)
        rounded[:, i] = scale * (code - zero)
        error = (work[:, i] - rounded[:, i]) / inverse[0, 0]
        work[:, i:] -= error[:, None] * inverse[0][None]
    return rounded
