"""Second moments of what a Linear reads. In: inputs (T, in), a chunk at a time. Out: the Hessian of its squared output error.

With GPTAQ (arXiv 2504.02692) also the inputs that the same tokens would have had in the unquantized model: minimising
|Q X - W X'|^2 over Q is minimising |(Q - W') X|^2 with W' = W + W (X' - X)^T X (X^T X)^-1, rows of X being tokens.
"""

from __future__ import annotations

import torch

TILE = 512  # columns whose products are made together


class Moments:
    """Running sums over tokens, in fp32 (or `dtype`)."""

    def __init__(
        self,
        inputs: int,
        *,
        asymmetric: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.tokens = 0
        self.hessian = torch.zeros(inputs, inputs, dtype=dtype, device=device)
        self.shift = torch.zeros_like(self.hessian) if asymmetric else None

    def add(self, x: torch.Tensor, unquantized: torch.Tensor | None = None) -> None:
        """x (T, in), and what the unquantized model has in its place."""
        x = x.to(self.hessian.dtype)
        self.tokens += x.shape[0]
        for begin in range(0, x.shape[1], TILE):  # the lower triangle: half of the work
            end = begin + TILE
            self.hessian[begin:end, :end].addmm_(x[:, begin:end].T, x[:, :end])
        if self.shift is not None:
            assert unquantized is not None
            self.shift.addmm_((unquantized.to(x.dtype) - x).T, x)

    def mean_hessian(self) -> torch.Tensor:
        """H = 2/n X^T X, (in, in)."""
        lower = self.hessian.tril()
        return (lower + lower.tril(-1).T) * (2 / max(self.tokens, 1))

    def mean_shift(self) -> torch.Tensor | None:
        """2/n (X' - X)^T X, (in, in)."""
        return None if self.shift is None else self.shift * (2 / max(self.tokens, 1))
