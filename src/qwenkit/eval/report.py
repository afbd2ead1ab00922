"""A report on quantized variants of a model: what each costs in quality, and what it saves in memory and time.

In: figures of a reference and of its variants. Out: a markdown table, and a plot. Bytes are those in memory, speeds those of this
machine while it measured.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median

import torch

from qwenkit.engine.llm import LLM
from qwenkit.engine.runner import kv_bytes_per_token
from qwenkit.engine.sampling import SamplingParams
from qwenkit.eval.figure import save_figure
from qwenkit.linear.packed import PackedLinear, packed_matrices
from qwenkit.model.qwen import Qwen

DECODED = 33  # tokens written to measure speed, the first not counted
DECODE_RUNS = 3


@dataclass(frozen=True)
class Entry:
    """One line of a report. `kl` (nats a token) and `agreement` are against the first line; speeds are tokens a second."""

    name: str
    perplexity: float
    kl: float
    agreement: float
    weight_bytes: int
    kv_bytes: int
    prefill_tok_s: float
    decode_tok_s: float


def weight_bytes(model: Qwen) -> int:
    """Bytes of a model's weights in memory; a matrix that embedding and head share counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    for matrix in packed_matrices(model).values():
        values = [getattr(matrix.weight, field.name) for field in fields(matrix.weight)]
        tensors += [value for value in values if isinstance(value, torch.Tensor)]
    tensors += [
        module.bias for module in model.modules() if isinstance(module, PackedLinear) and module.bias is not None
    ]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def kv_bytes(llm: LLM) -> int:
    """Bytes that the keys and values of one token take."""
    return kv_bytes_per_token(llm.model.config, llm.engine.runner.caches[0].dtype)


def decode_speed(llm: LLM, prompt: Sequence[int]) -> float:
    """Tokens a second of one greedy answer to a short prompt, after its first token: the median of three runs."""
    params = SamplingParams(temperature=0.0, repetition_penalty=1.0, max_tokens=DECODED, ignore_eos=True)
    speeds = []
    for _ in range(DECODE_RUNS + 1):
        first = last = 0.0
        for count, _ in enumerate(llm.stream(list(prompt), params)):
            last = time.perf_counter()
            first = last if count == 0 else first
        speeds.append((DECODED - 1) / (last - first))
    return median(speeds[1:])


def as_table(entries: Sequence[Entry]) -> str:
    """Markdown; the first entry is the reference."""
    first = entries[0]
    lines = [
        "| | perplexity | to the first | KL (nats) | same top token | weights (MB) | KV (bytes a token) | prefill (tok/s) "
        "| decode (tok/s) |",
        "|---|" + "---:|" * 8,
    ]
    for entry in entries:
        change = "" if entry is first else f"{100 * (entry.perplexity / first.perplexity - 1):+.2f} %"
        kl, agreement = ("", "") if entry is first else (f"{entry.kl:.5f}", f"{100 * entry.agreement:.2f} %")
        name = entry.name.replace("|", "\\|")
        lines.append(
            f"| {name} | {entry.perplexity:.4f} | {change} | {kl} | {agreement} | {entry.weight_bytes / 1e6:.0f} "
            f"| {entry.kv_bytes} | {entry.prefill_tok_s:.0f} | {entry.decode_tok_s:.1f} |"
        )
    return "\n".join(lines)


def draw(entries: Sequence[Entry], title: str, path: Path) -> None:
    """Write the report as a PNG: quality against memory, and speed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [entry.name for entry in entries]
    first = entries[0]
    panels = {
        "perplexity, % above the first": [100 * (entry.perplexity / first.perplexity - 1) for entry in entries],
        "KL divergence, nats a token": [entry.kl for entry in entries],
        "weights, MB": [entry.weight_bytes / 1e6 for entry in entries],
        "keys and values, bytes a token": [entry.kv_bytes for entry in entries],
        "decode, tokens a second": [entry.decode_tok_s for entry in entries],
    }
    figure = Figure(figsize=(3.2 * len(panels), 1.6 + 0.4 * len(entries)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (label, values) in zip(axes, panels.items(), strict=True):
        bars = axis.barh(range(len(names)), values)
        axis.bar_label(bars, fmt="%.3g", padding=2)
        axis.margins(x=0.25)
        axis.set_xlabel(label)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    save_figure(figure, path)
