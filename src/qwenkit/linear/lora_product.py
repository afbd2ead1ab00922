"""A frozen matrix and its LoRA update as one product, W x + bias + scaling * B (A x), and its gradients.

In: activations, the matrix, the update. Out: their product as one node of autograd that keeps the input and A x; both updates, of
the result and of the input's gradient, are added by the matrix product that makes them, so that nothing is copied.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def lora_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """x (T, in), weight (out, in), bias (out,), a (r, in), b (out, r), all of one dtype -> (T, out).

    Differentiable, once, in everything but the weight.
    """
    y: torch.Tensor = _LoRAProduct.apply(x, weight, bias, a, b, scaling)
    return y


class _LoRAProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        y = F.linear(x, weight, bias)
        inner = F.linear(x, a).mul_(scaling)  # (T, r)
        ctx.scaling = scaling
        ctx.save_for_backward(x, weight, a, b, inner)
        return y.addmm_(inner, b.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, a, b, inner = ctx.saved_tensors
        wants_x, _, wants_bias, wants_a, wants_b, _ = ctx.needs_input_grad
        of_x = of_bias = of_a = of_b = None
        of_inner = (grad @ b).mul_(ctx.scaling) if wants_x or wants_a else None  # (T, r)
        if wants_x:
            of_x = (grad @ weight).addmm_(of_inner, a)
        if wants_bias:
            of_bias = grad.sum(0)
        if wants_a and of_inner is not None:
            of_a = of_inner.t() @ x
        if wants_b:
            of_b = (inner.t() @ grad).t()
        return of_x, None, of_bias, of_a, of_b, None
