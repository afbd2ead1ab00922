"""Trackers of other makers behind the one Callback: tensorboard, wandb, swanlab, mlflow, trackio. Each is an extra.

In: the names in `report_to`. Out: callbacks; a tracker that is not installed is one sentence before anything is loaded.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qwenkit.installation import install_package
from qwenkit.train.config import TrainConfig
from qwenkit.train.log import Callback, Record, Silent


class TensorBoard(Silent):
    """Event files in output_dir/runs."""

    def __init__(self, config: TrainConfig, module: Any) -> None:
        self.writer = module.SummaryWriter(str(Path(config.output_dir) / "runs"))

    def start(self, config: TrainConfig, step: int, total_steps: int) -> None:
        self.writer.add_text("config", f"```yaml\n{config.to_yaml()}```", step)

    def log(self, step: int, record: Record) -> None:
        for name, value in record.items():
            self.writer.add_scalar(_grouped(name), value, step)

    def samples(self, step: int, answers: Sequence[tuple[str, str]]) -> None:
        for i, (prompt, answer) in enumerate(answers):
            self.writer.add_text(f"samples/{i}", f"{prompt}\n\n{answer}", step)

    def finish(self) -> None:
        self.writer.close()


class Tracker(Silent):
    """wandb, swanlab and trackio, which share their three calls: init, log, finish."""

    def __init__(self, config: TrainConfig, module: Any) -> None:
        self.module = module
        self.name = config.run_name or Path(config.output_dir).resolve().name

    def start(self, config: TrainConfig, step: int, total_steps: int) -> None:
        named = {"experiment_name": self.name} if self.module.__name__ == "swanlab" else {"name": self.name}
        self.module.init(project="qwenkit", config=config.settings(), **named)

    def log(self, step: int, record: Record) -> None:
        self.module.log({_grouped(name): value for name, value in record.items()}, step=step)

    def finish(self) -> None:
        self.module.finish()


class MLflow(Silent):
    def __init__(self, config: TrainConfig, module: Any) -> None:
        self.module = module
        self.name = config.run_name or Path(config.output_dir).resolve().name

    def start(self, config: TrainConfig, step: int, total_steps: int) -> None:
        self.module.start_run(run_name=self.name)
        settings = {name: str(value)[:500] for name, value in config.settings().items()}
        names = list(settings)
        for start in range(0, len(names), 100):  # its server takes a hundred at once
            self.module.log_params({name: settings[name] for name in names[start : start + 100]})

    def log(self, step: int, record: Record) -> None:
        self.module.log_metrics({_grouped(name): float(value) for name, value in record.items()}, step=step)

    def finish(self) -> None:
        self.module.end_run()


def _grouped(name: str) -> str:
    """eval_loss -> eval/loss, loss -> train/loss."""
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


_MAKERS: dict[str, tuple[str, Callable[[TrainConfig, Any], Callback]]] = {
    "tensorboard": ("torch.utils.tensorboard", TensorBoard),
    "wandb": ("wandb", Tracker),
    "swanlab": ("swanlab", Tracker),
    "trackio": ("trackio", Tracker),
    "mlflow": ("mlflow", MLflow),
}


def check_reporters(config: TrainConfig) -> None:
    """ValueError for a name in `report_to` whose package is not installed."""
    for name in config.report_to:
        package = "tensorboard" if name == "tensorboard" else name
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"report_to names {name}, which is not installed: {install_package(name)}")


def reporters(config: TrainConfig) -> list[Callback]:
    """One callback for each name in `report_to`. ValueError where one is not installed."""
    found = []
    for name in config.report_to:
        module_name, make = _MAKERS[name]
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError:
            raise ValueError(f"report_to names {name}, which is not installed: {install_package(name)}") from None
        found.append(make(config, module))
    return found
