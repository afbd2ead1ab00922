"""Small runs for the tests of the loop: a tiny model, a stream whose state is exact, a callback that remembers.

Run as a program, `python -m tests.train.runs FOLDER STEPS`, it trains until it is done or killed, and goes on where it was.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from qwenkit.linear.lora import LoRALinear
from qwenkit.linear.swap import swap_linears
from qwenkit.model.config import ModelConfig
from qwenkit.model.qwen import Qwen
from qwenkit.train.batch import IGNORE, Sample, TrainBatch
from qwenkit.train.checkpoint import latest_checkpoint, remove_leftovers
from qwenkit.train.config import TrainConfig
from qwenkit.train.log import JsonLines, Record, Silent
from qwenkit.train.loop import Trainer
from qwenkit.train.parts import NextTokens, Parts

VOCAB = 60
CONFIG = {
    "model_type": "qwen2",
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def tiny_model(*, lora: bool = True, dropout: float = 0.1) -> Qwen:
    torch.manual_seed(0)
    model = Qwen(ModelConfig.from_dict(CONFIG))
    if lora:
        model.requires_grad_(False)
        swap_linears(
            model,
            lambda name, module: (
                LoRALinear(module, 4, 8, dropout=dropout)
                if isinstance(module, torch.nn.Linear) and name != "lm_head"
                else None
            ),
        )
    return model.train()


class Documents:
    """An endless language of counting; batch i of epoch e is drawn from (seed, e, i), so the state is two numbers."""

    def __init__(self, batches: int | None = 8, documents: int = 3, seed: int = 0) -> None:
        self.batches_per_epoch = batches
        self.documents = documents
        self.seed = seed
        self.epoch = self.cursor = 0

    def __iter__(self) -> Iterator[TrainBatch]:
        while self.batches_per_epoch is None or self.cursor < self.batches_per_epoch:
            self.cursor += 1
            yield self.batch(self.epoch, self.cursor - 1)
        self.epoch, self.cursor = self.epoch + 1, 0

    def batch(self, epoch: int, index: int) -> TrainBatch:
        generator = torch.Generator().manual_seed(hash((self.seed, epoch, index)) % 2**31)
        samples = []
        for i in range(self.documents):
            start, length = torch.randint(2, 20, (2,), generator=generator).tolist()
            ids = [(start + k) % VOCAB for k in range(length)]
            masked = int(torch.randint(0, length, (), generator=generator)) // 2
            samples.append(Sample(ids, [IGNORE] * masked + ids[masked:], f"data.jsonl:{epoch}.{index}.{i}"))
        return TrainBatch.of(samples)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.cursor = state["epoch"], state["cursor"]


class Memory(Silent):
    """Remembers everything it hears."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.records: list[tuple[int, dict[str, float]]] = []
        self.said: list[str] = []
        self.answers: list[tuple[int, Sequence[tuple[str, str]]]] = []
        self.finished = False

    def step(self, step: int, record: Record) -> None:
        self.losses.append(record["loss"])

    def log(self, step: int, record: Record) -> None:
        self.records.append((step, dict(record)))

    def samples(self, step: int, answers: Sequence[tuple[str, str]]) -> None:
        self.answers.append((step, answers))

    def say(self, text: str) -> None:
        self.said.append(text)

    def finish(self) -> None:
        self.finished = True


def parts(model: Qwen | None = None, **changes: Any) -> Parts:
    model = tiny_model() if model is None else model
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return Parts(**({"model": model, "parameters": trained, "objective": NextTokens(), "train": Documents()} | changes))


def config(folder: Path | str = "unused", **changes: Any) -> TrainConfig:
    settings = {
        "output_dir": str(folder),
        "learning_rate": 1e-2,
        "save_steps": None,
        "logging_steps": 1,
        "max_steps": 6,
    }
    return TrainConfig(**(settings | changes))


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.parts.parameters.items()}


class Telling(JsonLines):
    """Says on standard output that a step is done."""

    def step(self, step: int, record: Record) -> None:
        super().step(step, record)
        print("step", flush=True)


def main(folder: Path, steps: int) -> None:
    torch.set_num_threads(1)
    run = config(folder, max_steps=steps, save_steps=2, save_total_limit=2, ema=0.9, gradient_accumulation_steps=2)
    trainer = Trainer(run, parts(), Telling(folder))
    folder.mkdir(exist_ok=True)
    remove_leftovers(folder)
    last = latest_checkpoint(folder, print)
    if last is not None:
        trainer.load(last)
    trainer.run()
    torch.save(weights(trainer), folder / "weights.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
