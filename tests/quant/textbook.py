"""GPTQ as its paper tells it (arXiv 2210.17323, algorithm 1), in fp64 and without any of the shortcuts: columns in their order,
one at a time, each error spread at once over all later columns through the explicit inverse of the Hessian. The same for GPTAQ
(arXiv 2504.02692), and for choosing scales and codes again."""

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


def textbook_gptaq(
    weight: torch.Tensor, hessian: torch.Tensor, shift: torch.Tensor, *, bits: int, group_size: int, damp: float
) -> torch.Tensor:
    """Symmetric. With shift = 2/n (X' - X)^T X (in, in), each column's part of W (X' - X) is made up for by the later ones:
    w_i (x'_i - x_i) X_F^T (X_F X_F^T)^-1 is added to the columns F behind i."""
    work, hessian = weight.double().clone(), hessian.double().clone()
    inputs = work.shape[1]
    hessian += damp * hessian.diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
    rounded = torch.zeros_like(work)
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    for i in range(inputs):
        inverse = torch.linalg.inv(hessian[i:, i:])
        if i % group_size == 0:
            scale = (2 * work[:, i : i + group_size].abs().amax(1) / top).half().double()
        code = (work[:, i] / scale + middle).round().clamp(0, top)
        rounded[:, i] = scale * (code - middle)
        error = (work[:, i] - rounded[:, i]) / inverse[0, 0]
        made_up = work[:, i, None] * (shift[i, i + 1 :] @ torch.linalg.inv(hessian[i + 1 :, i + 1 :]))[None]
        work[:, i:] -= error[:, None] * inverse[0][None]
        work[:, i + 1 :] += made_up
    return rounded


def textbook_refine(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    group_of: torch.Tensor,
    *,
    rounds: int,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row: each group's scale by its closed form, then its codes one after the other -> codes and scales."""
    weight, codes, scales = weight.double(), codes.clone(), scales.clone()
    for row in range(len(weight)):
        zero = zeros[row].double()

        def missed(row: int = row, zero: torch.Tensor = zero) -> torch.Tensor:
            return weight[row] - (codes[row] - zero[group_of]) * scales[row].double()[group_of]

        for _ in range(rounds):
            for group in range(scales.shape[1]):
                inside = (group_of == group).nonzero()[:, 0].tolist()
                steps = torch.zeros_like(weight[row])
                steps[inside] = codes[row, inside] - zero[group]
                scale = scales[row, group].double()
                curvature = steps @ hessian @ steps
                best = scale if curvature == 0 else scale + steps @ hessian @ missed() / curvature
                if (best - best.half()).abs() < (best - scale).abs():
                    scales[row, group] = best.half()
                scale = scales[row, group].double()
                for i in inside:
                    value = (codes[row, i] - zero[group]) * scale + (hessian[i] @ missed()) / hessian[i, i]
                    codes[row, i] = int((value / scale).round().add(zero[group]).clamp(0, 2**bits - 1))
    return codes, scales
