"""Seeing a run: one record after the other to everybody who listens, and how fast the run is.

In: records (a step and its numbers), answers to sample prompts. Out: the progress line, trainer_log.jsonl under LLaMA-Factory's
names, plots, and whatever tracker is asked for, all behind one protocol. `Meter` turns batches and seconds into tokens/s and MFU.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from torch import nn
from tqdm import tqdm

from qwenkit.linear.lora import linears
from qwenkit.model.qwen import Qwen
from qwenkit.storage import strict, write_text
from qwenkit.train.batch import TrainBatch
from qwenkit.train.config import TrainConfig

Record = Mapping[str, float]
LOG = "trainer_log.jsonl"


class Callback(Protocol):
    """Who hears of a run. Called on the first process only."""

    def start(self, config: TrainConfig, step: int, total_steps: int) -> None:
        """Before the first step; `step` steps of `total_steps` are done already (after a resume)."""

    def step(self, step: int, record: Record) -> None:
        """After every step: loss, learning_rate, and of the Meter throughput, mfu, memory."""

    def log(self, step: int, record: Record) -> None:
        """Every logging_steps (loss, learning_rate, epoch, …) and after each evaluation (eval_loss, …)."""

    def samples(self, step: int, answers: Sequence[tuple[str, str]]) -> None:
        """Prompts and what the model answers to them now."""

    def say(self, text: str) -> None:
        """A sentence for people: a checkpoint, memory that ran out, a step that was skipped."""

    def finish(self) -> None:
        """The run is over, however it ended."""


class Silent:
    """A Callback that hears nothing; others override what they want to hear."""

    def start(self, config: TrainConfig, step: int, total_steps: int) -> None: ...

    def step(self, step: int, record: Record) -> None: ...

    def log(self, step: int, record: Record) -> None: ...

    def samples(self, step: int, answers: Sequence[tuple[str, str]]) -> None: ...

    def say(self, text: str) -> None: ...

    def finish(self) -> None: ...


class Everyone(Silent):
    """Passes everything on to several."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = tuple(callbacks)

    def start(self, config: TrainConfig, step: int, total_steps: int) -> None:
        for callback in self.callbacks:
            callback.start(config, step, total_steps)

    def step(self, step: int, record: Record) -> None:
        for callback in self.callbacks:
            callback.step(step, record)

    def log(self, step: int, record: Record) -> None:
        for callback in self.callbacks:
            callback.log(step, record)

    def samples(self, step: int, answers: Sequence[tuple[str, str]]) -> None:
        for callback in self.callbacks:
            callback.samples(step, answers)

    def say(self, text: str) -> None:
        for callback in self.callbacks:
            callback.say(text)

    def finish(self) -> None:
        for callback in self.callbacks:
            callback.finish()


class JsonLines(Silent):
    """trainer_log.jsonl: a line for each record. Lines of steps that a resumed run does again are taken out first."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOG
        self.total_steps = 0
        self.begun = (time.monotonic(), 0)

    def start(self, config: TrainConfig, step: int, total_steps: int) -> None:
        self.total_steps = total_steps
        self.begun = (time.monotonic(), step)
        kept = [line for line in read_log(self.path) if line["current_steps"] <= step] if step else []
        write_text(self.path, "".join(map(_line, kept)))

    def log(self, step: int, record: Record) -> None:
        begun, first = self.begun
        elapsed = time.monotonic() - begun
        remaining = elapsed / max(step - first, 1) * (self.total_steps - step)
        self._write(
            {
                "current_steps": step,
                "total_steps": self.total_steps,
                **record,
                "percentage": round(100 * step / self.total_steps, 2),
                "elapsed_time": clock(elapsed),
                "remaining_time": clock(remaining),
            }
        )

    def samples(self, step: int, answers: Sequence[tuple[str, str]]) -> None:
        for prompt, answer in answers:
            self._write({"current_steps": step, "total_steps": self.total_steps, "prompt": prompt, "answer": answer})

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(line))


def _line(record: Mapping[str, Any]) -> str:
    """Strict JSON: what is not finite is null."""
    return json.dumps(strict(record), ensure_ascii=False, allow_nan=False) + "\n"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a trainer_log.jsonl; a last line that a killed run left half written does not count."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("current_steps"), int):
            records.append(record)
    return records


class Progress(Silent):
    """One line in the terminal: steps, loss, lr, tokens/s, MFU, memory, time left. Without a terminal: a line for each record."""

    def __init__(self, *, bar: bool) -> None:
        self.shows_bar = bar
        self.bar: tqdm[Any] | None = None
        self.total_steps = 0
        self.begun = (time.monotonic(), 0)

    def start(self, config: TrainConfig, step: int, total_steps: int) -> None:
        self.total_steps = total_steps
        self.begun = (time.monotonic(), step)
        if self.shows_bar:
            self.bar = tqdm(total=total_steps, initial=step, unit="step", desc="train", dynamic_ncols=True)

    def step(self, step: int, record: Record) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(describe(record), refresh=False)
            self.bar.update(step - self.bar.n)

    def log(self, step: int, record: Record) -> None:
        if self.bar is None or "eval_loss" in record:
            begun, first = self.begun
            left = (time.monotonic() - begun) / max(step - first, 1) * (self.total_steps - step)
            self.say(f"step {step}/{self.total_steps}  {describe(record)}  {clock(left)} left")

    def samples(self, step: int, answers: Sequence[tuple[str, str]]) -> None:
        for prompt, answer in answers:
            self.say(f"step {step}  {prompt!r} -> {answer!r}")

    def say(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def finish(self) -> None:
        if self.bar is not None:
            self.bar.close()


_SHOWN = {
    "loss": "loss {:.4f}",
    "eval_loss": "eval_loss {:.4f}",
    "accuracy": "accuracy {:.3f}",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "norm {:.3g}",
    "epoch": "epoch {:.2f}",
    "throughput": "{:.0f} tok/s",
    "mfu": "MFU {:.0%}",
    "memory_gib": "{:.2f} GiB",
}


def describe(record: Record) -> str:
    """The numbers of a record that people look at, in a fixed order."""
    return "  ".join(form.format(record[name]) for name, form in _SHOWN.items() if name in record)


def clock(seconds: float) -> str:
    """1:02:03, with days in front from one day on."""
    whole = max(round(seconds), 0)
    days, rest = divmod(whole, 86400)
    return (f"{days} days, " if days else "") + f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"


# Dense bfloat16 FLOP/s that makers name, by what torch calls the device; the first name that is part of it counts.
_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H20": 148e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A10G": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of large matrix products: what the maker says of a known GPU in bfloat16 or float16, else what is measured here."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for known, flops in _PEAKS.items():
            if known in name:
                return flops
    size = 8192 if device.type == "cuda" else 1024
    best = math.inf
    # A processor without instructions for bfloat16 multiplies float32 faster.
    for kind in {dtype, torch.float32} if device.type == "cpu" else {dtype}:
        a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
        for _ in range(4):
            _wait(device)
            begun = time.perf_counter()
            a @ b
            _wait(device)
            best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs that a training step of a model needs at least; what is computed twice to save memory does not count.

    A matrix costs 2 FLOPs an element and token forward, 2 for the gradient of its input, 2 for its own if it is trained.
    """

    per_token: float  # all matrices but the head
    per_target: float  # the head
    per_pair: float  # attention, for each token and each earlier one (itself included)

    @classmethod
    def of(cls, model: Qwen) -> ModelFlops:
        config = model.config
        per_token = 0.0
        for name, module in linears(model.model).items():
            elements = float(module.in_features * module.out_features)  # type: ignore[operator]
            if config.moe is not None and ".experts." in name:
                elements *= config.moe.num_experts_per_tok / config.moe.num_experts
            trained = sum(p.numel() for p in module.parameters() if p.requires_grad and p.ndim == 2)
            per_token += 4 * elements + (2 * elements if trained >= elements else 6 * trained)
        head = config.vocab_size * config.hidden_size
        trains_head = any(p.requires_grad for p in model.lm_head.parameters())
        attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
        return cls(per_token, head * (6 if trains_head else 4), attention)

    def of_batch(self, batch: TrainBatch) -> float:
        pairs = sum(length * (length + 1) // 2 for length in batch.lengths)
        return batch.num_tokens * self.per_token + batch.num_targets * self.per_target + pairs * self.per_pair


@dataclass
class Meter:
    """Tokens/s, share of the peak, memory. `devices` is the number of processes that work together."""

    flops: ModelFlops | None
    peak: float | None
    device: torch.device
    devices: int = 1
    tokens: int = 0
    work: float = 0.0
    seconds: float = 0.0

    def add(self, batches: Sequence[TrainBatch], seconds: float) -> None:
        """A step of this process over these batches. Evaluations and checkpoints lie between steps and do not count."""
        self.tokens += sum(batch.num_tokens for batch in batches)
        self.work += sum(self.flops.of_batch(batch) for batch in batches) if self.flops is not None else 0.0
        self.seconds += seconds

    def read(self, *, reset: bool) -> dict[str, float]:
        """throughput (tokens/s of all processes), mfu, memory_gib (the most so far on a GPU, what is held now on a CPU)."""
        seconds = max(self.seconds, 1e-9)
        found = {"throughput": self.tokens * self.devices / seconds}
        if self.peak:
            self.peak = max(self.peak, self.work / seconds)  # what a step reached, the device can do
            found["mfu"] = self.work / seconds / self.peak
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            memory = psutil.Process().memory_info().rss
        found["memory_gib"] = memory / 2**30
        if reset:
            self.tokens, self.work, self.seconds = 0, 0.0, 0.0
        return found


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters; a 4-bit weight counts as its buffers' elements do."""
    every = {id(p): p for p in model.parameters()}.values()
    return sum(p.numel() for p in every if p.requires_grad), sum(p.numel() for p in every)
