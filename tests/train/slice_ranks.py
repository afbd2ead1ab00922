"""One process of several: reads a model in slices under several layouts, trains two steps, counts bytes; see test_slices.py."""

import gc
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from qwenkit.model.qwen import Qwen
from qwenkit.train.config import TrainConfig
from qwenkit.train.methods import outline_model, prepare_model, trainable_parameters
from qwenkit.train.parallel import World, fill_slices, wrap
from qwenkit.weights import stored
from qwenkit.weights.checkpoint import open_checkpoint
from tests.train import ranks
from tests.train.allocations import allocated
from tests.train.ranks import be_rank, held

STEPS = 2
SIZES = {
    "vocab_size": 264,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.05,
}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("qwen2", {"method": "full", "parallel": "fsdp"}),
    "tied": ("qwen3", {"method": "full", "parallel": "fsdp"}),
    "tensor": ("qwen2", {"method": "full", "tensor_parallel": 2}),
    "tensor_tied": ("qwen3", {"method": "full", "tensor_parallel": 2}),
    "freeze": ("qwen2", {"method": "freeze", "parallel": "fsdp", "freeze_trainable_layers": 1}),
    "lora": ("qwen2", {"method": "lora", "parallel": "fsdp"}),
    "dora": ("qwen2", {"method": "lora", "parallel": "fsdp", "use_dora": True}),
    "embedding": ("qwen2", {"method": "lora", "parallel": "fsdp", "modules_to_save": ("embed_tokens", "lm_head")}),
    "qlora": ("qwen2", {"method": "qlora", "parallel": "fsdp"}),
    "qdora": ("qwen2", {"method": "qlora", "parallel": "fsdp", "use_dora": True, "double_quantization": False}),
    "adapter": ("qwen2", {"method": "lora", "parallel": "fsdp", "adapter": "saved"}),
}


def configuration(layout: str, folder: Path) -> tuple[Path, TrainConfig]:
    kind, settings = LAYOUTS[layout]
    if "adapter" in settings:
        settings = settings | {"adapter": str(folder / settings["adapter"])}
    return folder / kind, TrainConfig(**settings, model=str(folder / kind), dtype="float32", lora_rank=4)


def train(model: Qwen, world: World) -> list[float]:
    trained = list(trainable_parameters(model).values())
    losses, _ = ranks.train(model, torch.optim.SGD(trained, lr=0.1), world, range(STEPS))
    return losses


class Reading(AbstractContextManager["Reading"]):
    """Counts the bytes that are read from files of weights."""

    def __enter__(self) -> "Reading":
        self.bytes = 0
        self._patch = pytest.MonkeyPatch()
        read = stored._read_into

        def counted(path: Path, file: Any, offset: int, into: memoryview) -> None:
            self.bytes += len(into)
            read(path, file, offset, into)

        self._patch.setattr(stored, "_read_into", counted)
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.undo()


def main(rank: int, size: int, port: int, folder: Path) -> None:
    be_rank(rank, size, port)
    found: dict[str, Any] = {}
    for layout in LAYOUTS:
        gc.collect()  # what the last layout leaves must not be freed while this one's allocations are counted
        base, config = configuration(layout, folder)
        checkpoint = open_checkpoint(base)
        world = World.current(config)
        with Reading() as whole:
            alone = prepare_model(config, checkpoint, "cpu")
        with Reading() as reading, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            model, tensors = outline_model(config, checkpoint, "cpu")
            model = wrap(model, config, world)
            fill_slices(model, tensors, world.device, new_adapter=config.adapter is None)
        there = dict(alone.named_parameters())
        found[layout] = {
            "read": reading.bytes / whole.bytes,
            "held": held(model) / held(alone),
            "peak": allocated(profiled),
            "own": held(model),
            "adapter": sum(tensor.nbytes for name, tensor in there.items() if ".lora_" in name),
            "same": all(torch.equal(ranks.whole(p), there[name]) for name, p in model.named_parameters()),
            "names": [name for name, _ in model.named_parameters()] == list(there),
        }
        found[layout]["losses"] = train(model, world)
        found[layout]["alone"] = train(alone, World())
        del model, alone, there, tensors
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    world.close()
