"""Loss curves of `qwenkit train` beside those of transformers' Trainer (with peft for LoRA) over the same batches.

Both get the same ids and labels, the same start, AdamW, schedule and clipping. Ours lie end to end and come out of
trainer_log.jsonl; theirs are padded. A few steps of a tiny model here; with QWENKIT_SLOW=1 fifty steps of the default model on
alpaca_zh, and QLoRA beside LoRA over two hundred.
"""

import json
import os
import statistics
import warnings
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch.utils.data import DataLoader

from qwenkit.hub.find import find_model
from qwenkit.train.batch import IGNORE, TrainBatch
from qwenkit.train.config import TrainConfig
from qwenkit.train.data import DataStream
from qwenkit.train.methods import prepare_model, save_trained
from qwenkit.train.run import train
from qwenkit.weights.checkpoint import open_checkpoint
from tests.tiny_models import write_model

SLOW = pytest.mark.skipif(
    not os.environ.get("QWENKIT_SLOW"), reason="trains the default model for minutes; set QWENKIT_SLOW=1"
)


def our_losses(config: TrainConfig) -> list[float]:
    """Train and read each step's loss from the log."""
    train(config)
    lines = (Path(config.output_dir) / "trainer_log.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def micro_batches(config: TrainConfig) -> list[TrainBatch]:
    """What a run of this configuration is given, in its order."""
    checkpoint = open_checkpoint(find_model(config.model))
    stream = DataStream(config, checkpoint.tokenizer(), checkpoint.chat())
    assert config.max_steps is not None
    endless = (batch for _ in range(config.max_steps) for batch in stream)
    return list(islice(endless, config.max_steps * config.gradient_accumulation_steps))


def padded(batch: TrainBatch) -> dict[str, torch.Tensor]:
    """The batch as transformers knows it: a row for each document, filled up on the right."""

    def rows(values: torch.Tensor, filling: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            list(values.split(batch.lengths)), batch_first=True, padding_value=filling
        )

    return {
        "input_ids": rows(batch.ids, 0),
        "labels": rows(batch.labels, IGNORE),
        "attention_mask": rows(torch.ones_like(batch.ids), 0),
    }


class Reference(transformers.Trainer):
    """transformers' own loop over ready batches, in their order; remembers the loss of each micro-batch's backward pass."""

    def __init__(self, batches: list[TrainBatch], **settings: Any) -> None:
        super().__init__(train_dataset=[padded(batch) for batch in batches], **settings)
        self.losses: list[float] = []

    def get_train_dataloader(self) -> Any:
        return DataLoader(self.train_dataset, batch_size=None, shuffle=False)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))
        return loss


def their_losses(config: TrainConfig, model: Any, folder: Path) -> list[float]:
    """Each step's loss of transformers' Trainer with the settings of `config`."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=config.max_steps,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Reference(micro_batches(config), model=model, args=arguments)
    trainer.train()
    every = config.gradient_accumulation_steps
    return [sum(trainer.losses[i : i + every]) for i in range(0, len(trainer.losses), every)]


def their_model(config: TrainConfig, folder: Path) -> Any:
    """transformers' model of the same file, for LoRA inside peft with the adapter that our run begins with."""
    path = find_model(config.model)
    place = {"gguf_file": path.name} if path.is_file() else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent if place else path, dtype=torch.float32, **place
    )
    model.is_quantized = (
        False  # what it says of every GGUF, though its weights are float32 now; its Trainer would refuse
    )
    if config.method != "lora":
        return model
    checkpoint = open_checkpoint(path)
    save_trained(prepare_model(config, checkpoint, "cpu"), config, checkpoint, folder)
    return peft.PeftModel.from_pretrained(model, folder, is_trainable=True)


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference of any step."""
    return max(abs(our - their) / abs(their) for our, their in zip(ours, theirs, strict=True))


def compare(config: TrainConfig, folder: Path) -> tuple[list[float], list[float]]:
    ours = our_losses(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = their_losses(config, their_model(config, folder / "adapter"), folder / "theirs")
    return ours, theirs


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_tiny_model(tmp_path: Path, method: str) -> None:
    words = ("ab", "cde", "f", "ghij", "kl", "mnopq", "r", "stuv")
    rows = [{"instruction": f"say {word} twice", "output": f"{word} {word}"} for word in words]
    (tmp_path / "words.json").write_text(json.dumps(rows))
    config = TrainConfig(
        model=str(write_model(tmp_path / "model")),
        method=method,
        dataset=(str(tmp_path / "words.json"),),
        output_dir=str(tmp_path / "ours"),
        cache_dir=str(tmp_path / "cache"),
        max_steps=6,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        weight_decay=0.1,
        warmup_steps=2,
        logging_steps=1,
        save_steps=None,
        dtype="float32",
        device="cpu",
    )
    ours, theirs = compare(config, tmp_path)
    assert len(ours) == 6
    assert ours[-1] < 0.98 * ours[0]  # so that equal curves are no equal standstill
    assert largest_difference(ours, theirs) < 1e-4


@pytest.fixture
def alpaca(data_folder: Path, default_model: Path, tmp_path: Path) -> TrainConfig:
    """The default model on short samples of alpaca_zh."""
    return TrainConfig(
        model="smollm2",
        dataset=("alpaca_zh_demo",),
        dataset_dir=str(data_folder / "sft"),
        output_dir=str(tmp_path / "ours"),
        cache_dir=str(tmp_path / "cache"),
        cutoff_len=128,
        per_device_train_batch_size=2,
        max_steps=50,
        logging_steps=1,
        save_steps=None,
        warmup_steps=5,
        dtype="float32",
        device="cpu",
    )


@SLOW
@pytest.mark.parametrize(("method", "rate"), [("full", 2e-5), ("lora", 2e-4)])
def test_the_default_model(alpaca: TrainConfig, tmp_path: Path, method: str, rate: float) -> None:
    config = replace(alpaca, method=method, learning_rate=rate)
    ours, theirs = compare(config, tmp_path)
    difference = largest_difference(ours, theirs)
    ends = f"{statistics.mean(ours[:10]):.4f} to {statistics.mean(ours[-10:]):.4f}"
    print(f"{method}: {len(ours)} steps, loss {ends}, largest relative difference {difference:.2e}")
    assert len(ours) == 50
    assert statistics.mean(ours[-10:]) < statistics.mean(ours[:10])
    assert difference < 1e-3


@SLOW
def test_qlora_ends_where_lora_does(alpaca: TrainConfig, tmp_path: Path) -> None:
    """The mean loss of the last 20 of 200 steps, over the same samples in the same order."""
    config = replace(alpaca, max_steps=200, per_device_train_batch_size=1, learning_rate=2e-4)
    means = {}
    for method in ("lora", "qlora"):
        losses = our_losses(replace(config, method=method, output_dir=str(tmp_path / method)))
        means[method] = statistics.mean(losses[-20:])
        print(f"{method}: loss {statistics.mean(losses[:20]):.4f} to {means[method]:.4f}")
        assert len(losses) == 200
        assert means[method] < statistics.mean(losses[:20])
    assert means["qlora"] == pytest.approx(means["lora"], rel=0.02)
