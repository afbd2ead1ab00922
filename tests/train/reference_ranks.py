"""One process of several: trains on preferences, measured against a model that the processes share; see test_reference.py."""

import json
import random
from pathlib import Path
from typing import Any

import torch

from qwenkit.train.batch import IGNORE, Pair, Sample, TrainBatch
from qwenkit.train.config import TrainConfig
from qwenkit.train.methods import prepare_model, trainable_parameters
from qwenkit.train.parallel import World, gradient_sync, reduce_gradients, reshard, wrap
from qwenkit.train.preference import make_reference, objective
from qwenkit.weights.checkpoint import open_checkpoint
from tests.train.ranks import be_rank, held

STEPS, BATCHES, PAIRS = 3, 2, 3
FSDP: dict[str, Any] = {"method": "full", "parallel": "fsdp"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dpo": FSDP | {"stage": "dpo"},
    "dpo_freeze": FSDP | {"stage": "dpo", "method": "freeze", "freeze_trainable_layers": 1},
    "kto": FSDP | {"stage": "kto"},
    "kto_tensor": {"stage": "kto", "method": "full", "tensor_parallel": 2},
    "dpo_embedding": FSDP | {"stage": "dpo", "method": "lora", "lora_rank": 4, "modules_to_save": ("lm_head",)},
}


def batch(seed: int) -> TrainBatch:
    draw = random.Random(seed)

    def sample() -> Sample:
        prompt, answer = ([draw.randrange(260) for _ in range(draw.randint(2, 9))] for _ in range(2))
        return Sample(prompt + answer, [IGNORE] * len(prompt) + answer)

    return TrainBatch.of_pairs([Pair(sample(), sample(), liked=place != 1) for place in range(PAIRS)])


def train(config: TrainConfig, folder: Path, world: World) -> tuple[list[float], int, int]:
    """The losses of the steps; bytes of the reference that this process holds, before and after."""
    checkpoint = open_checkpoint(folder)
    model = prepare_model(config, checkpoint, "cpu")
    reference = make_reference(config, checkpoint, world, model)
    assert reference is not None
    before = held(reference)
    goal, model = objective(config, reference), wrap(model, config, world)
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=1.0)
    losses = []
    for step in range(STEPS):
        mine = range(world.data_rank, BATCHES, world.data_world_size)
        total = 0.0
        for place in mine:
            gradient_sync(model, world, last=place == mine[-1])
            loss, _ = goal(model, batch(BATCHES * step + place))
            (loss / (BATCHES * PAIRS)).backward()
            total += loss.item()
        reduce_gradients(model, world)
        losses.append(world.sum(total))
        optimizer.step()
        optimizer.zero_grad()
        reshard(model)
    return losses, before, held(reference)


def main(rank: int, size: int, port: int, folder: Path) -> None:
    be_rank(rank, size, port)
    found: dict[str, Any] = {}
    for layout, settings in LAYOUTS.items():
        config = TrainConfig(**settings, model=str(folder), dtype="float32", per_device_train_batch_size=PAIRS)
        world = World.current(config)
        losses, before, after = train(config, folder, world)
        alone, whole, _ = train(config, folder, World())
        found[layout] = {"losses": losses, "alone": alone, "before": before / whole, "after": after / whole}
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    world.close()
