"""World: which of how many processes this one is, on which device, and the sums that all of them need.

In: torchrun's environment variables and the parallel sizes of TrainConfig. Out: ranks, a device mesh with the dimensions
replicate, shard and tensor, and reductions over it. A single process needs no process group and gets no mesh.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qwenkit.train.config import TrainConfig

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

DIMENSIONS = ("replicate", "shard", "tensor")


@dataclass(frozen=True)
class World:
    """The place of this process. `replicate` x `shard` x `tensor` is `world_size`; processes of one tensor group read the same
    data, so data is split by `data_rank` of `data_world_size`."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - a constant
    mesh: DeviceMesh | None = None

    @classmethod
    def current(cls, config: TrainConfig, environment: Mapping[str, str] = os.environ) -> World:
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, and join the process group where there are several.

        Raises ValueError for sizes that do not make up the number of processes, a tensor group that does not fit into one
        node, and context_parallel, which documents packed end to end would need cut in the middle.
        """
        rank, world_size, local_rank, per_node = _environment(environment)
        replicate, shard, tensor = parallel_sizes(config, world_size)
        if per_node % tensor:
            raise ValueError(
                f"tensor_parallel is {tensor}, but a node runs {per_node} processes; "
                "a tensor group stays inside a node, so allowed are divisors of that"
            )
        device = _device(config.device, local_rank, per_node)
        mesh = None
        if world_size > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            if not dist.is_initialized():
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                    timeout=timedelta(seconds=config.ddp_timeout),
                )
            mesh = init_device_mesh(device.type, (replicate, shard, tensor), mesh_dim_names=DIMENSIONS)
        return cls(rank, world_size, local_rank, per_node, replicate, shard, tensor, device, mesh)

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor  # tensor is the innermost dimension of the mesh

    @property
    def data_world_size(self) -> int:
        return self.replicate * self.shard

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all: it writes logs and files that there is one of."""
        return self.rank == 0

    @property
    def shares(self) -> bool:
        """Whether no process holds the whole model."""
        return self.shard > 1 or self.tensor > 1

    @property
    def layout(self) -> str:
        """For people: `1 process`, `8 processes: shard 4, tensor 2`."""
        if self.world_size == 1:
            return "1 process"
        parts = [f"{name} {getattr(self, name)}" for name in DIMENSIONS if getattr(self, name) > 1]
        return f"{self.world_size} processes: {', '.join(parts)}"

    def sum(self, value: float) -> float:
        """The sum of a number over all data ranks; exact for whole numbers below 2**53."""
        if self.world_size == 1:
            return value
        total = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return type(value)(total.item() / self.tensor)

    def sum_tensor(self, value: torch.Tensor) -> torch.Tensor:
        """The same of a tensor, which is left as it is; no gradient flows through."""
        if self.world_size == 1:
            return value.detach()
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.tensor if total.is_floating_point() else total // self.tensor

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process: a signal, a loss that is not finite, memory that ran out."""
        return self.sum(int(flag)) > 0

    def broadcast(self, text: str) -> str:
        """The first process's text, on all processes."""
        if self.world_size == 1:
            return text
        data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        length = torch.tensor(data.numel(), device=self.device)
        dist.broadcast(length, 0)
        if not self.is_first:
            data = torch.empty(int(length), dtype=torch.uint8, device=self.device)
        dist.broadcast(data, 0)
        return bytes(data.tolist()).decode()

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.sum(0)

    def close(self) -> None:
        """Leave the process group."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def is_cut(tensor: torch.Tensor) -> TypeIs[DTensor]:
    """Whether several processes share a tensor. Where nobody has imported torch.distributed.tensor nothing is shared: a single
    process does without it, which saves 45 MiB and half a second."""
    imported = sys.modules.get("torch.distributed.tensor")
    return imported is not None and isinstance(tensor, imported.DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor; it shares memory with it."""
    return tensor.to_local() if is_cut(tensor) else tensor


def sharded_like(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """`part`, of the size of local(whole), as a tensor that is laid out as `whole` is: an optimizer's state, an average."""
    if not is_cut(whole):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def gradient_norm(parameters: Iterable[torch.nn.Parameter], world: World) -> float:
    """The 2-norm of all gradients, as one process that held them all would find it.

    Every process adds the squares of what it holds, divided by how many processes hold the same.
    """
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for parameter in parameters:
        if parameter.grad is not None:
            copies = world.world_size // _parts(parameter.grad)
            total += local(parameter.grad).detach().float().square().sum().double() / copies
    if world.world_size > 1:
        dist.all_reduce(total)
    return float(total.sqrt())


def _parts(tensor: torch.Tensor) -> int:
    """Into how many different pieces a tensor is cut."""
    if not is_cut(tensor):
        return 1
    parts = 1
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        parts *= 1 if placement.is_replicate() else size
    return parts


def _environment(environment: Mapping[str, str]) -> tuple[int, int, int, int]:
    values = []
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", None)):
        text = environment.get(name, default if default is not None else environment.get("WORLD_SIZE", "1"))
        if not text.isdecimal():
            raise ValueError(f"the environment variable {name} is {text!r}, but torchrun sets it to a whole number")
        values.append(int(text))
    rank, world_size, local_rank, per_node = values
    if not (rank < world_size and local_rank < per_node <= world_size):
        raise ValueError(
            f"RANK {rank}, WORLD_SIZE {world_size}, LOCAL_RANK {local_rank} and LOCAL_WORLD_SIZE {per_node} "
            "do not fit together; torchrun sets all four"
        )
    return rank, world_size, local_rank, per_node


def parallel_sizes(config: TrainConfig, world_size: int) -> tuple[int, int, int]:
    """(replicate, shard, tensor), whose product is the number of processes. ValueError where they do not make it up."""
    if config.context_parallel > 1:
        raise ValueError(
            f"context_parallel is {config.context_parallel}, allowed is 1: documents are packed end to end and not cut "
            "over processes; dp_shard, tensor_parallel and gradient_checkpointing make room for long ones"
        )
    tensor = config.tensor_parallel
    if world_size % tensor:
        raise ValueError(f"tensor_parallel is {tensor}, but {world_size} processes are not a multiple of it")
    data = world_size // tensor
    replicate, shard = config.dp_replicate, config.dp_shard
    ddp = config.parallel == "ddp" or (config.parallel == "auto" and config.method != "full")
    if config.parallel == "ddp" and shard not in (None, 1):
        raise ValueError(f"dp_shard is {shard}, but parallel is ddp, which shares nothing; allowed is 1, or fsdp")
    if shard is None:
        whole_copies = ddp and replicate == 1
        replicate = data if whole_copies else replicate
        shard = 1 if whole_copies or (ddp and config.parallel == "ddp") else max(data // replicate, 1)
    if replicate * shard * tensor != world_size:
        raise ValueError(
            f"dp_replicate {replicate} times dp_shard {shard} times tensor_parallel {tensor} is "
            f"{replicate * shard * tensor}, but {world_size} processes run"
        )
    if config.optim == "adamw_8bit" and shard * tensor > 1:
        raise ValueError(
            f"optim is 'adamw_8bit', but {shard * tensor} processes share each parameter (fsdp, tensor_parallel): a scale of 256 "
            "values belongs to one process's part, so a checkpoint would fit no other number; allowed is adamw, or parallel=ddp"
        )
    return replicate, shard, tensor


def _device(wanted: str, local_rank: int, per_node: int) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if wanted not in ("auto", "cuda"):
        if per_node > 1:
            raise ValueError(
                f"device is {wanted!r}, but {per_node} processes run on this node; allowed are auto, cpu, cuda"
            )
        return torch.device(wanted)
    if not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch sees no GPU here")
    if per_node > torch.cuda.device_count():
        raise ValueError(f"{per_node} processes run on this node, but it has {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", local_rank)
