"""What is seen of a run: the log file, the progress line, plots, trackers, FLOPs."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwenkit.train import reporters as trackers
from qwenkit.train.batch import Sample, TrainBatch
from qwenkit.train.config import REPORTERS, TrainConfig
from qwenkit.train.log import (
    LOG,
    Everyone,
    JsonLines,
    Meter,
    ModelFlops,
    Progress,
    clock,
    describe,
    peak_flops,
    read_log,
)
from qwenkit.train.plots import plot_losses, smooth
from qwenkit.train.reporters import reporters
from tests.tiny_models import tiny_pair
from tests.train.runs import Memory, config, tiny_model


def test_lines_have_the_names_that_others_know(tmp_path: Path) -> None:
    log = JsonLines(tmp_path)
    log.start(config(), 0, 4)
    log.log(1, {"loss": 2.5, "learning_rate": 1e-4, "epoch": 0.25})
    log.log(2, {"eval_loss": math.nan})
    log.samples(2, [("Wer?", "Ich.")])
    first, second, third = read_log(tmp_path / LOG)
    assert first.keys() == {
        *("current_steps", "total_steps", "loss", "learning_rate", "epoch"),
        *("percentage", "elapsed_time", "remaining_time"),
    }
    assert (first["current_steps"], first["total_steps"], first["percentage"]) == (1, 4, 25.0)
    assert second["eval_loss"] is None  # NaN is no JSON
    assert (third["prompt"], third["answer"]) == ("Wer?", "Ich.")


def test_progress_says_it_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(bar=False)
    progress.start(config(), 0, 10)
    record = {"loss": 1.23456, "learning_rate": 1e-4, "throughput": 1234.5, "mfu": 0.456, "memory_gib": 1.5}
    progress.log(5, record)
    progress.samples(5, [("who", "me")])
    err = capsys.readouterr().err
    assert "step 5/10  loss 1.2346  lr 1.00e-04  1234 tok/s  MFU 46%  1.50 GiB" in err
    assert "'who' -> 'me'" in err
    assert describe({}) == ""


def test_times() -> None:
    assert [clock(s) for s in (0, 59.6, 3661, 90061, -1)] == [
        "0:00:00",
        "0:01:00",
        "1:01:01",
        "1 days, 1:01:01",
        "0:00:00",
    ]


def test_everyone_hears_everything() -> None:
    memories = [Memory(), Memory()]
    everyone = Everyone(memories)
    everyone.start(config(), 0, 1)
    everyone.step(1, {"loss": 1.0})
    everyone.log(1, {"loss": 1.0})
    everyone.samples(1, [("a", "b")])
    everyone.say("text")
    everyone.finish()
    for memory in memories:
        assert (memory.losses, memory.said, memory.finished) == ([1.0], ["text"], True)


def test_plots_are_drawn_of_what_is_there(tmp_path: Path) -> None:
    log = JsonLines(tmp_path)
    log.start(config(), 0, 9)
    for step in range(1, 10):
        log.log(step, {"loss": 3 / step})
    assert [path.name for path in plot_losses(tmp_path)] == ["training_loss.png"]
    log.log(9, {"eval_loss": 1.0})
    assert [path.name for path in plot_losses(tmp_path)] == ["training_loss.png", "training_eval_loss.png"]
    assert (tmp_path / "training_loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_smoothed_curve_is_llama_factorys() -> None:
    values = [5.0, 3.0, 4.0]
    weight = 1.8 * (1 / (1 + math.exp(-0.05 * 3)) - 0.5)
    second = 5 * weight + 3 * (1 - weight)
    assert smooth(values) == pytest.approx([5.0, second, second * weight + 4 * (1 - weight)])
    assert smooth([]) == []


class FakeTracker:
    """Takes every call of wandb, swanlab, trackio, mlflow, and a SummaryWriter's."""

    def __init__(self, name: str) -> None:
        self.__name__ = name
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return self

        return call


@pytest.mark.parametrize("name", REPORTERS)
def test_trackers_get_numbers_in_groups(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTracker(name)
    monkeypatch.setattr(trackers, "importlib", SimpleNamespace(import_module=lambda _: fake))
    (callback,) = reporters(TrainConfig(report_to=(name,), output_dir="runs/poet"))
    callback.start(config(), 0, 2)
    callback.log(1, {"loss": 1.5, "eval_loss": 2.5})
    callback.finish()
    text = repr(fake.calls)
    assert "train/loss" in text
    assert "eval/loss" in text
    assert "poet" in text


def test_a_tracker_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(trackers, "importlib", SimpleNamespace(import_module=missing))
    with pytest.raises(ValueError, match="report_to names wandb, which is not installed"):
        reporters(TrainConfig(report_to=("wandb",)))


def test_flops_are_counted_by_hand() -> None:
    full, lora = tiny_model(lora=False), tiny_model()
    matrices = sum(p.numel() for n, p in full.model.layers.named_parameters() if p.ndim == 2)
    head = full.config.vocab_size * full.config.hidden_size
    thin = sum(p.numel() for n, p in lora.named_parameters() if "lora_" in n)
    assert ModelFlops.of(full).per_token == 6 * matrices
    assert ModelFlops.of(full).per_target == 6 * head
    assert ModelFlops.of(lora).per_token == 4 * matrices + 6 * thin
    assert ModelFlops.of(lora).per_target == 4 * head
    batch = TrainBatch.of([Sample([1] * 3, [1] * 3), Sample([2] * 4, [-100] * 4)])
    attention = 12 * 2 * 2 * 8 * (6 + 10)  # layers, heads, head dim, visible pairs
    assert ModelFlops.of(full).of_batch(batch) == 7 * 6 * matrices + 2 * 6 * head + attention


def test_only_the_experts_that_work_count() -> None:
    _, model = tiny_pair("qwen3_moe")
    dense = sum(p.numel() for n, p in model.model.layers.named_parameters() if p.ndim == 2 and ".experts." not in n)
    experts = sum(p.numel() for n, p in model.model.layers.named_parameters() if ".experts." in n)
    assert ModelFlops.of(model).per_token == pytest.approx(6 * dense + 6 * experts * 2 / 6)


def test_the_meter_counts_training_only() -> None:
    batch = TrainBatch.of([Sample([1] * 50, [1] * 50)])
    meter = Meter(ModelFlops(100.0, 0.0, 0.0), 1000.0, torch.device("cpu"), devices=2)
    meter.add([batch, batch], 20.0)
    found = meter.read(reset=True)
    assert (found["throughput"], found["mfu"]) == (10.0, 0.5)
    assert found["memory_gib"] > 0
    assert meter.read(reset=False)["throughput"] == 0


def test_the_peak_is_measured_where_no_maker_says_it() -> None:
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e15


def test_log_lines_that_are_none_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / LOG
    path.write_text('[]\n{"current_steps": 1}\nhalf a li')
    assert read_log(path) == [json.loads('{"current_steps": 1}')]
    assert read_log(tmp_path / "nothing") == []
