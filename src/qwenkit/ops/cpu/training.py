"""The ops that a step of training spends its time in, each one node of autograd with native kernels forwards and backwards.

In: contiguous fp32 CPU tensors, of which some want gradients. Out: what the reference gives, with a backward that keeps only its
inputs and an inverse rms. Kernels run on the threads of torch's own OpenMP: matrix products come before and after each of them.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qwenkit.ops.cpu.library import Library, Op


class Kind(IntEnum):
    """The kernels, numbered as in training_kinds.h."""

    RMS_NORM_FORWARD = 0
    RMS_NORM_BACKWARD = 1
    SILU_MUL_FORWARD = 2
    SILU_MUL_BACKWARD = 3
    TURN = 4
    CROSS_ENTROPY = 5


class TrainingOps:
    """Native forwards and backwards, on a library that has them and the OpenMP functions of torch (see `open_training`)."""

    def __init__(self, library: Library, team: list[ctypes.c_void_p]) -> None:
        self._run = library.handle.qk_train
        self._set = library.instruction_set.encode()
        self._team = team

    def run(
        self, kind: Kind, tensors: tuple[torch.Tensor | None, ...], numbers: tuple[int, ...], x: float = 0.0
    ) -> None:
        """One kernel on all threads; returns when it is done. A single row is not worth a second thread.

        Of tensors without memory nothing is computed; what they would keep can be counted.
        """
        if tensors[0] is not None and tensors[0].is_meta:
            return
        op = Op(kind=kind, x=x)
        for i, tensor in enumerate(tensors):
            op.p[i] = None if tensor is None else tensor.data_ptr()
        op.n[: len(numbers)] = numbers
        threads = 1 if numbers[0] == 1 else torch.get_num_threads()
        self._run(self._set, ctypes.byref(op), threads, *self._team)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y: torch.Tensor = _RMSNorm.apply(self, x, weight, eps)
        return y

    def add_rms_norm(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total: torch.Tensor
        normed: torch.Tensor
        total, normed = _AddRMSNorm.apply(self, x, y, weight, eps)
        return total, normed

    def silu_mul(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _SiluMul.apply(self, gate, up)
        return y

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Rotate.apply(self, x, cos, sin)
        return y

    def cross_entropy_(self, logits: torch.Tensor, targets: torch.Tensor, *, gradient: bool) -> torch.Tensor:
        losses = logits.new_empty(logits.shape[0])
        self.run(Kind.CROSS_ENTROPY, (logits, targets, losses), tuple(logits.shape), x=float(gradient))
        return losses

    def norm_backward(
        self, saved: tuple[torch.Tensor, ...], grad: torch.Tensor, more: torch.Tensor | None, wants: tuple[bool, bool]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gradients of x and of the weight. `more` is added to that of x."""
        x, weight, inverse = saved
        dim, grad = x.shape[-1], grad.contiguous()
        of_x = of_weight = None
        if wants[0]:
            of_x = torch.empty_like(x)
            more = None if more is None else more.contiguous()
            self.run(Kind.RMS_NORM_BACKWARD, (of_x, x, weight, inverse, grad, more), (inverse.numel(), dim))
        if wants[1]:
            of_weight = (grad * x).view(-1, dim).t() @ inverse
        return of_x, of_weight


def open_training(library: Library) -> TrainingOps | None:
    """The ops on a library; None where torch has no OpenMP runtime that speaks as GCC's does."""
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    try:
        of_torch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        team = [ctypes.cast(getattr(of_torch, name), ctypes.c_void_p) for name in names]
    except (OSError, AttributeError):
        return None
    return TrainingOps(library, team)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: TrainingOps, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y, rows, dim = torch.empty_like(x), x.numel() // x.shape[-1], x.shape[-1]
        inverse = x.new_empty(rows)
        ops.run(Kind.RMS_NORM_FORWARD, (y, x, weight, None, None, inverse), (rows, dim), x=eps)
        ctx.ops = ops
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.ops.norm_backward(ctx.saved_tensors, grad, None, ctx.needs_input_grad[1:3]), None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ops: TrainingOps, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, dim = x.numel() // x.shape[-1], x.shape[-1]
        total, normed, inverse = torch.empty_like(x), torch.empty_like(x), x.new_empty(rows)
        ops.run(Kind.RMS_NORM_FORWARD, (normed, x, weight, y, total, inverse), (rows, dim), x=eps)
        ctx.ops = ops
        ctx.save_for_backward(total, weight, inverse)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: torch.Tensor, of_normed: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _, wants_x, wants_y, wants_weight, _ = ctx.needs_input_grad
        wants = (wants_x or wants_y, wants_weight)
        of_x, of_weight = ctx.ops.norm_backward(ctx.saved_tensors, of_normed, of_total, wants)
        return None, of_x if wants_x else None, of_x if wants_y else None, of_weight, None


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: TrainingOps, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(gate)
        ops.run(Kind.SILU_MUL_FORWARD, (y, gate, up), (gate.numel(),))
        ctx.ops = ops
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        ctx.ops.run(Kind.SILU_MUL_BACKWARD, (of_gate, of_up, gate, up, grad.contiguous()), (gate.numel(),))
        return None, of_gate, of_up


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: TrainingOps, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.ops = ops
        ctx.save_for_backward(cos, sin)
        return _turn(ops, x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return None, _turn(ctx.ops, grad, cos, sin, -1.0), None, None


def _turn(ops: TrainingOps, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, way: float) -> torch.Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    tokens, heads, dim = x.shape
    y = x.new_empty(x.shape)
    ops.run(Kind.TURN, (y, x, cos, sin), (tokens, heads, dim, cos.shape[-1], x.stride(0), x.stride(1)), x=way)
    return y
