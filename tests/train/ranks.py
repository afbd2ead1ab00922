"""One process of several: trains tiny models under every layout that so many processes allow, and reports what it found.

Run by test_parallel.py in processes that are forked from one which has imported this file. The first of N writes
found-N.json.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # FSDP does, which takes seconds: here it is done once for all processes
import torch.distributed.fsdp  # what `wrap` imports when it is needed

from qwenkit.model.config import ModelConfig
from qwenkit.model.qwen import Qwen
from qwenkit.train.batch import Sample, TrainBatch
from qwenkit.train.config import TrainConfig
from qwenkit.train.loss import token_loss_sum
from qwenkit.train.parallel import (
    World,
    gradient_norm,
    gradient_sync,
    load_sharded,
    local,
    reduce_gradients,
    reshard,
    save_sharded,
    wrap,
)

SIZES = {
    "vocab_size": 66,
    "hidden_size": 32,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": SIZES | {"model_type": "qwen2"},
    "qwen3": SIZES | {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen3_moe": SIZES
    | {"model_type": "qwen3_moe", "num_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
}
LAYOUTS: dict[int, dict[str, tuple[str, dict[str, Any]]]] = {
    2: {
        "ddp_experts": ("qwen3_moe", {"parallel": "ddp"}),
        "fsdp": ("qwen2", {"parallel": "fsdp"}),
        "fsdp_tied": ("qwen3", {"parallel": "fsdp"}),
        "tensor": ("qwen2", {"tensor_parallel": 2}),
        "tensor_tied": ("qwen3", {"tensor_parallel": 2}),
        "tensor_experts": ("qwen3_moe", {"tensor_parallel": 2}),
    },
    4: {
        "hsdp": ("qwen2", {"parallel": "fsdp", "dp_replicate": 2}),
        "fsdp_tensor": ("qwen3", {"parallel": "fsdp", "tensor_parallel": 2}),
        "ddp_tensor": ("qwen2", {"parallel": "ddp", "tensor_parallel": 2}),
        "fsdp_uneven": ("qwen2", {"parallel": "fsdp"}),
    },
}
STEPS, MICRO_BATCHES, DATA_RANKS = 2, 2, 4  # the data is always cut in four; fewer processes read more of it each


def new_model(kind: str) -> Qwen:
    torch.manual_seed(0)
    model = Qwen(ModelConfig.from_dict(MODELS[kind]))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def documents(step: int, micro_batch: int, part: int) -> list[list[int]]:
    """Different numbers of tokens on every process, so that an average of averages would show."""
    generator = torch.Generator().manual_seed(100 * step + 10 * micro_batch + part)
    lengths = (3 + 2 * part, 9 - part, 4 + step)
    return [torch.randint(0, SIZES["vocab_size"], (length,), generator=generator).tolist() for length in lengths]


def micro_batches(step: int, world: World) -> Iterator[list[list[int]]]:
    share = DATA_RANKS // world.data_world_size
    for micro_batch in range(MICRO_BATCHES):
        parts = range(world.data_rank * share, (world.data_rank + 1) * share)
        yield [document for part in parts for document in documents(step, micro_batch, part)]


def loss_sum(model: Qwen, batch: list[list[int]]) -> torch.Tensor:
    return token_loss_sum(model, TrainBatch.of([Sample(ids, ids) for ids in batch]), chunk=16)[0]


def train(model: Qwen, optimizer: torch.optim.Optimizer, world: World, steps: range) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the steps."""
    losses, norms = [], []
    for step in steps:
        batches = list(micro_batches(step, world))
        targets = world.sum(sum(len(document) - 1 for batch in batches for document in batch))
        total = 0.0
        for place, batch in enumerate(batches):
            gradient_sync(model, world, last=place == len(batches) - 1)
            loss = loss_sum(model, batch) / targets
            loss.backward()
            total += loss.item()
        reduce_gradients(model, world)
        norms.append(gradient_norm(model.parameters(), world))
        losses.append(world.sum(total))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():  # an evaluation leaves the model as it was
            loss_sum(model, batches[0])
        reshard(model)
    return losses, norms


def optimizer_of(model: Qwen) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=2.0, momentum=0.9)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def state(model: Qwen, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter
        if "momentum_buffer" not in optimizer.state[parameter]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        tensors[f"momentum.{name}"] = optimizer.state[parameter]["momentum_buffer"]
    return tensors


def be_rank(rank: int, size: int, port: int) -> None:
    """Make this process one of `size`, as torchrun would."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)


def held(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters in this process."""
    return sum(local(parameter).nbytes for parameter in model.parameters())


def main(rank: int, size: int, port: int, folder: Path) -> None:
    be_rank(rank, size, port)
    found: dict[str, Any] = {}
    world = World.current(TrainConfig(method="full", parallel="ddp"))
    alone = {kind: new_model(kind) for kind in MODELS}
    expected: dict[str, Any] = {}
    for kind, model in alone.items():
        expected[kind] = train(model, optimizer_of(model), World(), range(STEPS))
    for layout, (kind, settings) in LAYOUTS[world.world_size].items():
        here = World.current(TrainConfig(method="full", **settings))
        model = wrap(new_model(kind), TrainConfig(method="full", **settings), here)
        optimizer = optimizer_of(model)
        losses, norms = train(model, optimizer, here, range(STEPS))
        reference = dict(alone[kind].named_parameters())
        found[layout] = {
            "world": here.layout,
            "losses": max(abs(a - b) for a, b in zip(losses, expected[kind][0], strict=True)),
            "norms": max(abs(a - b) for a, b in zip(norms, expected[kind][1], strict=True)),
            "weights": max(
                (whole(parameter) - reference[name]).abs().max().item() for name, parameter in model.named_parameters()
            ),
            "moved": max(
                (a - b).abs().max().item()
                for a, b in zip(alone[kind].parameters(), new_model(kind).parameters(), strict=True)
            ),
        }
        save_sharded(folder / f"{layout}-{world.world_size}", state(model, optimizer), here)
        found[layout]["files"] = [
            file.stat().st_size for file in sorted((folder / f"{layout}-{world.world_size}").glob("*.safetensors"))
        ]
        # What was saved by other layouts and numbers of processes is read under this one, and trained on.
        others = [f"{other}-2" for other, (its_kind, _) in LAYOUTS[2].items() if its_kind == kind]
        names = [f"{layout}-{world.world_size}", *(others if world.world_size == 4 else ())]
        for saved in (folder / name for name in names):
            again = wrap(new_model(kind), TrainConfig(method="full", **settings), here)
            resumed = optimizer_of(again)
            load_sharded(saved, state(again, resumed))
            train(again, resumed, here, range(STEPS, STEPS + 1))
            found[layout][f"from {saved.name}"] = max(
                (whole(a) - whole(b)).abs().max().item()
                for a, b in zip(again.parameters(), continued(kind), strict=True)
            )
    if world.is_first:
        (folder / f"found-{world.world_size}.json").write_text(json.dumps(found))
    world.close()


_CONTINUED: dict[str, list[torch.Tensor]] = {}


def continued(kind: str) -> list[torch.Tensor]:
    """The weights of one process after one step more."""
    if kind not in _CONTINUED:
        model = new_model(kind)
        train(model, optimizer_of(model), World(), range(STEPS + 1))
        _CONTINUED[kind] = [parameter.detach() for parameter in model.parameters()]
    return _CONTINUED[kind]
