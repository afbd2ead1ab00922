"""The loss of next tokens, without ever holding all logits.

In: a model and a batch of documents end to end. Out: the sum of the targets' losses, differentiable, and how many there are; or
the loss of each target, for preference stages. Only rows that have a target meet the vocabulary, `chunk` of them at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from qwenkit import ops
from qwenkit.model.context import Packed
from qwenkit.model.qwen import Qwen
from qwenkit.train.batch import IGNORE, TrainBatch

LOGITS_AT_ONCE = 2**25  # elements; 128 MiB in fp32


def token_loss_sum(model: Qwen, batch: TrainBatch, *, chunk: int | None = None) -> tuple[torch.Tensor, int]:
    """Sum of -log p(token | what stands before it in its document) over the batch's targets, fp32 (), and their number.

    `chunk` is the number of rows whose logits exist at the same time (None: 128 MiB of them). Targets are never averaged
    here: whoever accumulates divides by the targets of the whole step.
    """
    rows, targets = target_rows(batch)
    hidden = hidden_states(model, batch)[rows]
    return _cross_entropy(model, hidden, targets, chunk, summed=True).sum(), targets.shape[0]


def token_losses(model: Qwen, batch: TrainBatch, *, chunk: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """-log p of each target (N,) fp32, and the number of the document (N,) int64 that it belongs to."""
    rows, targets = target_rows(batch)
    hidden = hidden_states(model, batch)[rows]
    lengths = torch.tensor(batch.lengths, device=rows.device)
    documents = torch.repeat_interleave(torch.arange(len(batch.lengths), device=rows.device), lengths)
    return _cross_entropy(model, hidden, targets, chunk, summed=False), documents[rows]


def hidden_states(model: nn.Module, batch: TrainBatch) -> torch.Tensor:
    """The model's hidden states (T, hidden_size) of a batch, every document from position 0.

    Qwen-1's dynamic NTK stays off: the original trains without it.
    """
    positions = torch.cat([torch.arange(length, device=batch.ids.device) for length in batch.lengths])
    hidden: torch.Tensor = model(batch.ids, positions, Packed(tuple(batch.lengths)))
    return hidden


def target_rows(batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the hidden states that predict a target (N,), and the targets (N,)."""
    rows = (batch.labels[1:] != IGNORE).nonzero()[:, 0]
    return rows, batch.labels[1:][rows]


def _cross_entropy(
    model: Qwen, hidden: torch.Tensor, targets: torch.Tensor, chunk: int | None, *, summed: bool
) -> torch.Tensor:
    """(N, hidden_size), (N,) -> (N,) fp32. `summed` promises that all rows get the same gradient."""
    head: Any = model.lm_head
    chunk = chunk or max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    if type(head) is nn.Linear and head.bias is None:
        losses: torch.Tensor = _ChunkedCrossEntropy.apply(
            hidden, head.weight, targets, chunk, summed, torch.is_grad_enabled()
        )
        return losses
    # Another kind of head (quantized, with LoRA): its own forward, computed again for the backward.
    parts = [
        checkpoint(
            lambda rows, wanted: F.cross_entropy(head(rows).float(), wanted, reduction="none"),
            *part,
            use_reentrant=False,
        )
        for part in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Head and cross-entropy of rows, a chunk at a time: log-sum-exp(W h) - (W h)[target].

    The gradient of the logits, softmax - onehot, is at hand while a chunk's logits are, so it goes into the gradient of the
    hidden states (and of the head, where all rows weigh the same) at once. A trainable head whose rows weigh differently is
    computed a second time in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        chunk: int,
        summed: bool,
        grad_enabled: bool,
    ) -> torch.Tensor:
        for_hidden = grad_enabled and ctx.needs_input_grad[0]
        for_weight = grad_enabled and ctx.needs_input_grad[1]
        ctx.again = for_weight and not summed
        ctx.chunk = chunk
        losses = torch.empty(targets.shape, dtype=_wide(hidden), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if for_hidden and not ctx.again else None
        grad_weight = torch.zeros_like(weight, dtype=_wide(weight)) if for_weight and summed else None
        logits = _memory(hidden, weight, targets, chunk)
        for start in range(0, targets.shape[0], chunk):
            rows = slice(start, start + chunk)
            wants = grad_hidden is not None or grad_weight is not None
            losses[rows], grad = _cross_entropy_and_gradient(
                hidden[rows], weight, targets[rows], logits, gradient=wants
            )
            if not wants:
                continue
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, grad, hidden[rows])
        ctx.save_for_backward(*((hidden, weight, targets) if ctx.again else (grad_hidden, grad_weight)))
        ctx.weight_dtype = weight.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (scale,) = grads  # (N,)
        if ctx.again:
            return *_backward_again(ctx, scale), None, None, None, None
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * scale[:, None].to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * scale[0] if scale.numel() else grad_weight).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _backward_again(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, weight, targets = ctx.saved_tensors
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros_like(weight, dtype=_wide(weight))
    logits = _memory(hidden, weight, targets, ctx.chunk)
    for start in range(0, targets.shape[0], ctx.chunk):
        rows = slice(start, start + ctx.chunk)
        _, grad = _cross_entropy_and_gradient(hidden[rows], weight, targets[rows], logits, gradient=True)
        grad = grad.mul_(scale[rows, None]).to(hidden.dtype)
        torch.mm(grad, weight, out=grad_hidden[rows])
        _add_product(grad_weight, grad, hidden[rows])
    return grad_hidden, grad_weight.to(weight.dtype)


def _memory(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int) -> torch.Tensor | None:
    """Where the logits of one chunk after the other can lie; None where products have another dtype than losses."""
    rows = min(chunk, targets.shape[0])
    return hidden.new_empty(rows, weight.shape[0]) if hidden.dtype == weight.dtype == _wide(hidden) else None


def _cross_entropy_and_gradient(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, logits: torch.Tensor | None, *, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The targets' losses (n,), and their gradient with respect to the logits (n, V), softmax - onehot, in at least fp32.

    `logits` is memory for them, where hidden has their dtype.
    """
    if logits is None:
        made = F.linear(hidden, weight).to(_wide(hidden))
    else:
        made = torch.mm(hidden, weight.t(), out=logits[: targets.shape[0]])
    losses = ops.cross_entropy_(made, targets, gradient=gradient)
    return losses, made


def _add_product(total: torch.Tensor, grad: torch.Tensor, hidden: torch.Tensor) -> None:
    """total (V, d) += grad^T (V, n) hidden (n, d), the sum over chunks in total's dtype."""
    if total.dtype == hidden.dtype:
        total.addmm_(grad.t(), hidden)
    else:
        total += grad.t() @ hidden


def _wide(tensor: torch.Tensor) -> torch.dtype:
    """fp32, or fp64 where the tensor is."""
    return torch.promote_types(tensor.dtype, torch.float32)
