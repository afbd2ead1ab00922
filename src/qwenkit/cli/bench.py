"""`qwenkit bench`: how fast a model answers on this machine, and how near that is to what the machine could do.

In: flags. Out: an aligned table, one JSON line, a markdown table over --weights, or a plot; progress on stderr. What is measured
and how is `bench_measure`'s business.
"""

from __future__ import annotations

import json
import math
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from qwenkit.cli.options import Verb, dataclass_options, given
from qwenkit.engine.config import WEIGHTS, EngineConfig, option
from qwenkit.eval.figure import check_figure, save_figure

if TYPE_CHECKING:
    from qwenkit.weights.checkpoint import Checkpoint

Record = dict[str, Any]  # what --json prints

NOT_A_FLAG = ("seed",)  # greedy: nothing is drawn
SETTINGS = tuple(weights for weights in WEIGHTS if weights != "auto")  # auto is always one of the others


@dataclass(frozen=True)
class BenchConfig:
    """What is measured. Raises ValueError naming the field for a value outside its range."""

    prefill: int = option(512, "tokens of the prompt that is read")
    decode: int = option(64, "tokens written after it, the first not counted")
    batch: int = option(16, "requests submitted at once")
    batch_prompt: int = option(128, "tokens of the prompt of each of them")
    batch_decode: int = option(64, "tokens written to each of them")
    repeat: int = option(3, "runs that count, after one that warms up; figures are their medians")
    threads: int | None = option(None, "threads to compute with (default: torch's choice)")

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise ValueError(f"{field.name} is {value}, allowed is a whole number of at least 1")

    def longest_request(self, allowed: int, *, curves: bool) -> int:
        """Tokens of the longest request that is run; ValueError when it is longer than `allowed`."""
        needs = {
            f"prefill {self.prefill} and decode {self.decode}": self.prefill + self.decode + 1,
            f"batch_prompt {self.batch_prompt} and batch_decode {self.batch_decode}": self.batch_prompt
            + self.batch_decode,
        }
        if curves:
            needs[f"batch_prompt {self.batch_prompt} and decode {self.decode}"] = self.batch_prompt + self.decode + 1
        for name, need in needs.items():
            if need > allowed:
                raise ValueError(f"{name} need room for {need} tokens, allowed is a context of {allowed} tokens")
        return max(needs.values())


class _Bench(Verb):
    """`bench train` is another verb: it measures training."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args[:1] == ["train"]:
            from qwenkit.cli.bench_train import train

            return train.make_context(f"{info_name} train", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


@click.command(
    cls=_Bench,
    epilog="""\b
Examples:
  qwenkit bench smollm2
  qwenkit bench train smollm2 --lengths 256,512
  qwenkit bench Qwen/Qwen2.5-0.5B-Instruct --weights int4 --threads 2 --json
  qwenkit bench Qwen/Qwen2.5-0.5B-Instruct --table
  qwenkit bench smollm2 --plot speed.png""",
)
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON, with machine, versions and settings.")
@click.option("--table", is_flag=True, help="Compare all --weights, each in a fresh process; prints markdown.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE.png",
    help="Draw decode speed against batch size and against context length.",
)
@dataclass_options(BenchConfig, "What is measured")
@dataclass_options(EngineConfig, "Running the model", exclude=NOT_A_FLAG)
def bench(model: str, as_json: bool, table: bool, plot: Path | None, **values: Any) -> None:
    """Measure MODEL on this machine, with random token ids, so that a model with random weights will do.

    `qwenkit bench train MODEL` measures training it.

    \b
    prefill         --prefill tokens over the time to the first token of the answer
    decode          the --decode tokens after that first one over their time
    batch           --batch requests at once, all their answers' tokens over the whole time
    load            from files on this disk to a model that is ready
    peak memory     the most that this process held until all of that was done
    read per token  weights, and the keys and values of the context, that writing one token reads
    memory          that times the decode speed, and the fastest loop over 512 MB found here
    matrices        arithmetic of the linear layers while reading the prompt, and the fastest matrix product found here

    Every run has new token ids, greedy, past the end token. Unless the flags say otherwise the prefix cache is off, and the
    context and the number of requests are what the measurement needs. MB and GB are powers of ten.
    """
    config = BenchConfig(**given(BenchConfig, values))
    settings = given(EngineConfig, {name: value for name, value in values.items() if name not in NOT_A_FLAG})
    EngineConfig(**settings)
    if table:
        if as_json or plot is not None or "weights" in settings:
            raise click.UsageError(
                "--table runs all weights and prints markdown: --weights, --json and --plot do not go with it."
            )
        flags = as_flags({**given(BenchConfig, values), **settings})
        click.echo(weights_table(model, flags, run_child))
        return
    if plot is not None:
        check_plot(plot)
    record = measure(model, config, settings, curves=plot is not None)
    click.echo(json.dumps(record, ensure_ascii=False) if as_json else as_text(record))
    if plot is not None:
        draw(record, plot)


def measure(model: str, bench: BenchConfig, settings: Mapping[str, Any], *, curves: bool) -> Record:
    """Load the model and measure everything; `settings` are the fields of EngineConfig that the user gave."""
    from qwenkit.cli import bench_measure as measuring
    from qwenkit.engine.llm import LLM
    from qwenkit.engine.memory import choose_weights
    from qwenkit.hub.find import find_model
    from qwenkit.model.config import ModelConfig
    from qwenkit.weights.checkpoint import open_checkpoint

    path = find_model(model, progress=sys.stderr.isatty())
    context = ModelConfig.from_dict(open_checkpoint(path).config).max_position_embeddings
    needed = bench.longest_request(min(context, settings.get("max_model_len", context)), curves=curves)
    if curves:
        needed = min(context, max(needed, measuring.CURVE_CONTEXT[1] + bench.decode + 1))
    config = EngineConfig(
        **{
            "prefix_cache": False,
            "max_model_len": needed,
            "max_num_seqs": max(bench.batch, measuring.CURVE_BATCHES[-1] if curves else 1),
            **settings,
        }
    )
    if bench.threads is not None:
        measuring.set_threads(bench.threads)
    start = time.perf_counter()
    llm = LLM(path, config, progress=sys.stderr.isatty())
    load_s = time.perf_counter() - start

    device = llm.engine.runner.device
    points = sum(map(len, measuring.curve_points(llm, bench))) if curves else 0
    with tqdm(total=2 * (bench.repeat + 1) + 1 + points, desc="bench", unit="run", leave=False, disable=None) as bar:

        def tell(done: str) -> None:
            bar.set_postfix_str(done, refresh=False)
            bar.update()

        speed = measuring.measure_speed(llm, bench, tell)
        peak = measuring.peak_rss()
        limits = measuring.measure_limits() if device.type == "cpu" else None
        tell("limits")
        drawn = measuring.measure_curves(llm, bench, tell) if curves else None
    size = measuring.measure_size(llm, bench)
    return {
        "model": model,
        "weights": weights_label(open_checkpoint(path), choose_weights(config, device)),
        "dtype": str(llm.model.model.norm.weight.dtype).removeprefix("torch."),
        "device": str(device),
        **{name: _short(value) for name, value in measuring.figures(speed, size, load_s, peak, limits).items()},
        **({} if drawn is None else {"curves": _curves(asdict(drawn))}),
        "measured": asdict(bench),
        "settings": asdict(config),
        **surroundings(),
    }


def weights_label(checkpoint: Checkpoint, packing: str) -> str:
    """How most of the weights lie in memory: the type of the file's own blocks where they are kept, else the packing."""
    if packing != "bf16":
        return packing
    sizes: dict[str, int] = {}
    for stored in checkpoint.tensors():
        if len(stored.shape) == 2:
            sizes[stored.dtype] = sizes.get(stored.dtype, 0) + math.prod(stored.shape)
    kind = max(sizes, key=lambda dtype: sizes[dtype], default=packing)
    if codes := re.match(r"CODES(\d)", kind):
        return f"int{codes[1]} of the file"
    return packing if kind in ("F32", "F16", "BF16", "F64") else kind


def _short(value: Any) -> Any:
    """A float with the digits that mean something."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _curves(curves: dict[str, dict[int, float]]) -> dict[str, list[list[float]]]:
    """Lists of [number of requests or length, tokens a second]."""
    return {name: [[place, _short(speed)] for place, speed in curve.items()] for name, curve in curves.items()}


def surroundings() -> Record:
    """Where and when: what makes a figure comparable to another."""
    import torch

    import qwenkit
    from qwenkit import ops
    from qwenkit.cli import doctor

    return {
        "ops": ops.implementations(),
        "versions": {
            "qwenkit": qwenkit.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": doctor.machine(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def as_text(record: Record) -> str:
    """The record for people: a head, then one line for each figure, aligned."""
    measured = record["measured"]
    context = f"with {measured['prefill']} to {measured['prefill'] + measured['decode']} tokens of context"
    rows: list[tuple[str, Any, str, str]] = [
        ("prefill", record["prefill_tok_s"], "tok/s", f"{measured['prefill']} tokens"),
        ("decode", record["decode_tok_s"], "tok/s", f"{measured['decode']} tokens after them"),
        (
            "batch",
            record["batch_out_tok_s"],
            "tok/s",
            f"{measured['batch']} requests of {measured['batch_prompt']} in, {measured['batch_decode']} out",
        ),
        ("load", record["load_s"], "s", ""),
        ("peak memory", record["peak_rss_mb"], "MB", ""),
        ("weights", record["weight_bytes"] / 1e6, "MB", f"{record['weights']}, computed in {record['dtype']}"),
        ("read per token", record["bytes_per_token"] / 1e6, "MB", context),
        ("memory", record["bandwidth_gb_s"], "GB/s", _of(record["bandwidth_share"], record["memory_gb_s"], "GB/s")),
    ]
    if record["matrix_share"] is not None:
        rate = record["matrix_share"] * record["matrix_gop_s"]
        limit = _of(record["matrix_share"], record["matrix_gop_s"], f"GOP/s ({record['matrix_kind']})")
        rows.append(("matrices", rate, "GOP/s", limit))
    machine = record["machine"]
    head = (
        f"{record['model']} on {record['device']}: {machine['processor']}, {machine['torch threads']} threads, "
        f"medians of {measured['repeat']}"
    )
    return "\n".join(
        [head, *(f"{name:<16}{value:>10.1f}  {unit:<7}{note}".rstrip() for name, value, unit, note in rows)]
    )


def _of(share: float | None, limit: float | None, unit: str) -> str:
    return "" if share is None or limit is None else f"{100 * share:.0f} % of {limit:.4g} {unit}"


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Field values as the flags that give them."""
    flags = []
    for name, value in values.items():
        dashed = name.replace("_", "-")
        flags += [f"--{'' if value else 'no-'}{dashed}"] if isinstance(value, bool) else [f"--{dashed}", str(value)]
    return flags


Child = Callable[[list[str]], Record | None]


def run_child(arguments: list[str]) -> Record | None:
    """`qwenkit bench ARGUMENTS --json` in a process of its own: its record, or None if it failed (it has said why)."""
    command = [sys.executable, "-m", "qwenkit", "bench", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, text=True, encoding="utf-8")
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def weights_table(model: str, flags: list[str], child: Child) -> str:
    """Markdown: speed and memory of the model with each of --weights. One that fails has no numbers; ValueError if all fail."""
    from qwenkit.hub.find import find_model

    path = str(find_model(model, progress=sys.stderr.isatty()))
    records: dict[str, Record | None] = {}
    for weights in SETTINGS:
        click.echo(f"--weights {weights}", err=True)
        records[weights] = child([path, *flags, "--weights", weights])
    first = next((record for record in records.values() if record is not None), None)
    if first is None:
        raise ValueError(f"{model} could not be measured with any of --weights {', '.join(SETTINGS)}")
    measured, machine = first["measured"], first["machine"]
    names = ("prefill_tok_s", "decode_tok_s", "batch_out_tok_s", "weight_bytes", "peak_rss_mb")
    lines = [
        f"| weights | prefill {measured['prefill']} (tok/s) | decode {measured['decode']} (tok/s) "
        f"| batch {measured['batch']} (tok/s) | weights (MB) | peak memory (MB) |",
        "|---|" + "---:|" * len(names),
    ]
    for weights, record in records.items():
        cells = ["–"] * len(names)
        if record is not None:
            cells = [_cell(record[name] / 1e6 if name == "weight_bytes" else record[name]) for name in names]
        lines.append(f"| {' | '.join([weights, *cells])} |")
    lines += [
        "",
        f"{model}, {machine['processor']}, {machine['torch threads']} threads, qwenkit {first['versions']['qwenkit']}, "
        f"torch {first['versions']['torch']}, {first['date'][:10]}.",
    ]
    return "\n".join(lines)


def _cell(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def check_plot(path: Path) -> None:
    """ValueError or FileNotFoundError for a plot that could not be drawn or written, before anything is measured."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"plot is {str(path)!r}, allowed is the name of a .png file")
    check_figure("plot", path)


def draw(record: Record, path: Path) -> None:
    """Write the record's curves as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{record['model']}, weights {record['weights']}, {record['machine']['processor']}")
    for place, (name, label) in enumerate((("by_batch", "requests at once"), ("by_context", "tokens of context"))):
        axes = figure.add_subplot(1, 2, place + 1)
        xs, ys = zip(*record["curves"][name], strict=True)
        axes.plot(xs, ys, marker="o")
        axes.set_xscale("log", base=2)
        axes.set_xticks(xs, [str(x) for x in xs])
        axes.set_ylim(0, 1.1 * max(ys))
        axes.set_xlabel(label)
        axes.set_ylabel("decode, tokens a second" + (" of all requests" if name == "by_batch" else ""))
        axes.grid(alpha=0.3)
    save_figure(figure, path)
