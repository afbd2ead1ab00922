"""Laying a model over processes, and what must happen to gradients between a backward pass and the optimizer.

In: a finished model, trainable parts marked, on each process whole, or without memory yet (`fill_slices` then fills it). Out: the
same object. Replicated parameters (ddp) keep their tensors and sum gradients once a step; sharded ones (fsdp2, hsdp) become
DTensors, gathered block by block when they are used (PyTorch FSDP, arXiv 2304.11277). Gradients are sums over processes: the
loss is divided by the targets of all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from qwenkit.model.qwen import Qwen
from qwenkit.train.config import TrainConfig
from qwenkit.train.parallel.world import World, local

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

BUCKET_BYTES = 64 * 2**20  # gradients that travel together


def wrap(model: Qwen, config: TrainConfig, world: World) -> Qwen:
    """Lay `model` over the processes, in place. To be called once: after swaps, before the optimizer is made.

    Blocks are gathered for forward, freed, and gathered again for backward; embedding, final norm and head stay gathered from
    forward to backward, since the loss uses the head on its own. Raises ValueError where tensor parallelism does not fit.
    """
    if world.mesh is None:
        return model
    if world.tensor > 1:
        from qwenkit.train.parallel.tensor import cut

        cut(model, world.mesh["tensor"])
    if world.shard == 1:
        if world.replicate > 1:
            _same_start(model, world)
        return model
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # see `is_cut`

    mesh = world.mesh["replicate", "shard"] if world.replicate > 1 else world.mesh["shard"]
    # Gradients travel in fp32: sums over many processes would lose bits in bf16.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for block in model.model.layers:
        _unify_dtypes(block)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in _sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    return model


def gradient_sync(model: nn.Module, world: World, *, last: bool) -> None:
    """Say before the backward pass of a micro-batch whether it is the step's last.

    Sharded gradients are added up after every one, so that no process ever holds them whole; copies of the model (hsdp) are
    made equal after the last.
    """
    if world.shard > 1 and world.replicate > 1:
        for module in _sharded_modules(model):
            module.set_requires_all_reduce(last, recurse=False)


def reduce_gradients(model: nn.Module, world: World) -> None:
    """After the last backward pass of a step: sum the gradients of replicated parameters over their copies.

    Nothing to do where parameters are sharded. A parameter without a gradient here (an expert that saw no token) may have one
    elsewhere, so it counts as zero.
    """
    if world.mesh is None or world.shard > 1 or world.replicate == 1:
        return
    group = world.mesh["replicate"].get_group()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [local(parameter.grad) for parameter in trained if parameter.grad is not None]
    sent = []
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        sent.append((bucket, flat, dist.all_reduce(flat, group=group, async_op=True)))
    for bucket, flat, work in sent:
        assert work is not None
        work.wait()
        for gradient, summed in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def reshard(model: nn.Module) -> None:
    """Give back what a forward pass without backward has left gathered. After it `parameters()` are the sharded ones."""
    for module in _sharded_modules(model):
        module.reshard()


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    imported = sys.modules.get("torch.distributed.fsdp")  # by `wrap`
    return [] if imported is None else [m for m in model.modules() if isinstance(m, imported.FSDPModule)]


def _same_start(model: nn.Module, world: World) -> None:
    """What was drawn at random (lora_A) is the first copy's on all of them."""
    assert world.mesh is not None
    group = world.mesh["replicate"].get_group()
    first = dist.get_global_rank(group, 0)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.is_meta:  # what is still to be read is the checkpoint's
            dist.broadcast(local(parameter.detach()), first, group=group)


def _unify_dtypes(block: nn.Module) -> None:
    """Trained parameters of one block travel together, so they must be of one type."""
    dtypes = {parameter.dtype for parameter in block.parameters() if parameter.requires_grad}
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(
            f"trained parameters of a block are of several types ({names}), but fsdp needs one; use parallel=ddp"
        )


def _buckets(gradients: Iterable[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    """Gradients of one type and about BUCKET_BYTES at a time, in the order that they came."""
    bucket: list[torch.Tensor] = []
    held = 0
    for gradient in gradients:
        if bucket and (held > BUCKET_BYTES or bucket[0].dtype != gradient.dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(gradient)
        held += gradient.nbytes
    if bucket:
        yield bucket
