"""One process of two: whole runs of every stage over data that does not divide by two; see test_uneven.py."""

import json
from pathlib import Path
from typing import Any

import torch.distributed

from qwenkit.train.config import TrainConfig
from qwenkit.train.parallel import World
from qwenkit.train.run import train
from tests.train.ranks import be_rank

NAMES = {"sft": "text", "pt": "text", "dpo": "pairs", "orpo": "pairs", "rm": "pairs", "kto": "liked"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {"method": "lora", "parallel": "ddp"},
    "fsdp": {"method": "full", "parallel": "fsdp"},
}
RUNS = [
    *(("dpo", "ddp"), ("dpo", "fsdp"), ("kto", "ddp"), ("kto", "fsdp")),
    *(("orpo", "fsdp"), ("rm", "ddp"), ("sft", "fsdp"), ("pt", "ddp")),
]


def settings(stage: str, layout: str, folder: Path, processes: int) -> dict[str, Any]:
    """Three records to train on and three, or one, to evaluate: with two processes the last round is one record short."""
    each = 2 if stage == "kto" else 1  # sequences of a process in a micro-batch
    return {
        **LAYOUTS[layout],
        "stage": stage,
        "model": str(folder / "model"),
        "dataset": [NAMES[stage]],
        "eval_dataset": [f"{NAMES[stage]}_eval"],
        "dataset_dir": str(folder),
        "output_dir": str(folder / f"{stage}-{layout}-{processes}"),
        "cache_dir": str(folder / "cache"),
        "packing": False,
        "shuffle": False,
        "per_device_train_batch_size": each * 2 // processes,
        "num_train_epochs": 2,
        "save_steps": 2,
        "eval_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-3,
    }


def losses(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("loss", "eval_loss") if name in line} for line in lines]


def main(rank: int, size: int, port: int, folder: Path) -> None:
    be_rank(rank, size, port)
    close, World.close = World.close, lambda self: None  # type: ignore[assignment,method-assign]
    for stage, layout in RUNS:
        outcome = train(TrainConfig.from_settings(settings(stage, layout, folder, size)))
        assert outcome.reason == "done", outcome
    torch.distributed.barrier()
    World.close = close  # type: ignore[method-assign]
    torch.distributed.destroy_process_group()
