"""Pictures of a run: training_loss.png and training_eval_loss.png, drawn from trainer_log.jsonl. Needs the extra plot.

In: the records of the log. Out: PNG files; the loss itself pale, over it the smoothed curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from qwenkit.installation import install_extra
from qwenkit.storage import new_file
from qwenkit.train.log import LOG, read_log

FILES = {"loss": "training_loss.png", "eval_loss": "training_eval_loss.png"}


def smooth(values: Sequence[float]) -> list[float]:
    """An exponential moving average whose weight grows with the number of points: 1.8 (sigmoid(0.05 n) - 0.5)."""
    if not values:
        return []
    weight = 1.8 * (1 / (1 + math.exp(-0.05 * len(values))) - 0.5)
    last, smoothed = values[0], []
    for value in values:
        last = last * weight + (1 - weight) * value
        smoothed.append(last)
    return smoothed


def plot_losses(folder: Path) -> list[Path]:
    """Draw each curve that trainer_log.jsonl has points of; returns the files. ValueError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no global state
    except ModuleNotFoundError:
        raise ValueError(f"plot_loss needs the extra plot: {install_extra('plot')}") from None
    drawn = []
    for key, name in FILES.items():
        points = [(r["current_steps"], r[key]) for r in read_log(folder / LOG) if isinstance(r.get(key), int | float)]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(steps, values, color="#1f77b4", alpha=0.4, label="original")
        axes.plot(steps, smooth(values), color="#1f77b4", label="smoothed")
        axes.set(xlabel="step", ylabel=key, title=f"{key} of {folder.resolve().name}")
        axes.legend()
        path = folder / name
        with new_file(path) as part:
            figure.savefig(part, format="png", dpi=100)
        drawn.append(path)
    return drawn
