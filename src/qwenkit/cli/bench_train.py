"""`qwenkit bench train`: memory and seconds a step of training, for methods and sequence lengths, on this machine.

In: a model, settings of TrainConfig, flags. Out: a line for each row, one JSON line, or the table of the Qwen README in markdown.
Each row is measured in a process of its own, so that the memory of one says nothing about another; what is measured and how is
`bench_train_measure`'s business.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from qwenkit.model.config import ModelConfig
    from qwenkit.train.config import TrainConfig
    from qwenkit.weights.checkpoint import Checkpoint

Record = dict[str, Any]

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "lora_emb": {"method": "lora", "modules_to_save": ["embed_tokens", "lm_head"]},
    "qlora": {"method": "qlora"},
    "full": {"method": "full"},
}
DEFAULT_METHODS = ("lora", "qlora", "full")
_OURS = ("model", "method", "cutoff_len", "modules_to_save")  # said by the model and by --methods and --lengths
_KILLED = (-9, 137)


@dataclass(frozen=True)
class Rows:
    """What is measured. Raises ValueError naming the flag for a value that is not allowed."""

    methods: tuple[str, ...]
    lengths: tuple[int, ...]
    steps: int
    warmup: int

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f"methods has {method!r}, allowed are {', '.join(METHODS)}")
        for name, values, least in (
            ("lengths", self.lengths, 2),
            ("steps", (self.steps,), 1),
            ("warmup", (self.warmup,), 0),
        ):
            for value in values:
                if value < least:
                    raise ValueError(f"{name} has {value}, allowed are whole numbers of at least {least}")

    @classmethod
    def of(cls, methods: str, lengths: str, steps: int, warmup: int) -> Rows:
        """From texts with commas."""
        try:
            numbers = tuple(int(length) for length in lengths.split(",") if length.strip())
        except ValueError:
            raise ValueError(f"lengths is {lengths!r}, allowed are whole numbers with commas between them") from None
        names = tuple(name.strip() for name in methods.split(",") if name.strip())
        if not names or not numbers:
            raise ValueError(f"{'lengths' if names else 'methods'} is empty, allowed is at least one")
        return cls(names, numbers, steps, warmup)


@click.command(
    "train",
    epilog="""\b
Examples:
  qwenkit bench train smollm2 --lengths 256,512 --methods lora,full
  qwenkit bench train Qwen/Qwen2.5-7B-Instruct gradient_checkpointing=true --table
  qwenkit bench train Qwen/Qwen1.5-7B --random --methods qlora --lengths 2048 packing=true --json""",
)
@click.argument("model")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--lengths", default=",".join(map(str, LENGTHS)), show_default=True, help="Tokens of a sample.")
@click.option("--methods", default=",".join(DEFAULT_METHODS), show_default=True, help=f"Of {', '.join(METHODS)}.")
@click.option("--steps", default=3, show_default=True, help="Steps that count; figures are their medians.")
@click.option("--warmup", default=1, show_default=True, help="Steps before them.")
@click.option(
    "--random", "is_random", is_flag=True, help="Draw weights; MODEL is a config.json or a released model of Qwen."
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON, with machine, versions and settings.")
@click.option("--table", is_flag=True, help="Print markdown: a line for each method, a column for each length.")
def train(
    model: str,
    settings: tuple[str, ...],
    lengths: str,
    methods: str,
    steps: int,
    warmup: int,
    *,
    is_random: bool,
    as_json: bool,
    table: bool,
) -> None:
    """Measure training MODEL on this machine: memory, seconds a step, tokens a second, MFU.

    \b
    step    --steps of gradient_accumulation_steps micro-batches (default 8) of
            per_device_train_batch_size samples (default 1), as the Qwen README measured it
    memory  on a GPU the most that tensors held; on a CPU the most that the process
            held, less what it held before the model was loaded
    plan    what `qwenkit plan train` predicts for it
    MFU     arithmetic that the step needs at least, of what the device could do

    lora_emb is LoRA with embedding and head trained too. Where memory runs out, the row says so.
    """
    from qwenkit.train.settings_file import parse_assignments

    rows = Rows.of(methods, lengths, steps, warmup)
    given = parse_assignments(settings)
    for name in _OURS:
        if name in given:
            raise ValueError(f"{name} is not a setting here: MODEL, --methods and --lengths say it")
    if as_json and table:
        raise click.UsageError("--json and --table do not go together.")
    record = measure(model, rows, given, is_random=is_random, child=run_child)
    if as_json:
        click.echo(json.dumps(record, ensure_ascii=False))
    else:
        click.echo(as_markdown(record) if table else as_text(record))


Child = Callable[[list[str]], "tuple[int, Record | None]"]


def run_child(arguments: list[str]) -> tuple[int, Record | None]:
    """`qwenkit bench train ARGUMENTS --json` in a process of its own: exit code and record; it has said why there is none."""
    command = [sys.executable, "-m", "qwenkit", "bench", "train", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, text=True, encoding="utf-8")
    return done.returncode, json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def measure(model: str, rows: Rows, settings: Mapping[str, str], *, is_random: bool, child: Child) -> Record:
    """All rows; a single one in this process. ValueError where a row fails for another reason than memory."""
    source = _source(model, is_random=is_random)
    configs = {
        (method, length): _config(model, method, length, settings) for method in rows.methods for length in rows.lengths
    }
    if len(configs) == 1:
        return _measure_here(model, source, rows, next(iter(configs.values())))
    found: list[Record] = []
    head: Record = {}
    words = [f"{key}={value}" for key, value in settings.items()]
    flags = ["--steps", str(rows.steps), "--warmup", str(rows.warmup), *(["--random"] if is_random else [])]
    for method, length in configs:
        code, record = child([model, *words, *flags, "--methods", method, "--lengths", str(length)])
        if record is None and code not in _KILLED:
            raise ValueError(f"method {method} with {length} tokens could not be measured")
        row: Record = (
            {"method": method, "length": length, "out_of_memory": True} if record is None else record["rows"][0]
        )
        head = head or {key: value for key, value in (record or {}).items() if key != "rows"}
        found.append(row)
        click.echo(_line(row), err=True)
    return {"model": model, **head, "rows": found}


def _source(model: str, *, is_random: bool) -> Checkpoint | ModelConfig:
    from qwenkit.cli.plan import find_sizes
    from qwenkit.hub.find import find_model
    from qwenkit.weights.checkpoint import open_checkpoint

    return find_sizes(model) if is_random else open_checkpoint(find_model(model, progress=sys.stderr.isatty()))


def _config(model: str, method: str, length: int, settings: Mapping[str, str]) -> TrainConfig:
    from qwenkit.train.config import TrainConfig

    usual = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    own = {"model": model, "cutoff_len": length, "save_steps": None, "logging_steps": 2**31, "output_dir": "unused"}
    return TrainConfig.from_settings(usual | dict(settings) | own | METHODS[method])


def _measure_here(model: str, source: Checkpoint | ModelConfig, rows: Rows, config: TrainConfig) -> Record:
    from qwenkit import ops
    from qwenkit.cli.bench import surroundings
    from qwenkit.cli.bench_train_measure import measure_row
    from qwenkit.train.parallel import World

    ops.use()
    row = measure_row(source, config, steps=rows.steps, warmup=rows.warmup)
    return {
        "model": model,
        "device": World.current(config, {}).device.type,
        "rows": [row | {"method": rows.methods[0]}],
        "measured": {"steps": rows.steps, "warmup": rows.warmup},
        "settings": config.settings(),
        **surroundings(),
    }


def _line(row: Record) -> str:
    name = f"{row['method']:<9}{row['length']:>6}"
    if row["out_of_memory"]:
        return f"{name}  out of memory{_predicted(row)}"
    memory, plan = row["memory_bytes"] / 2**30, row["predicted_bytes"] / 2**30
    return (
        f"{name}{memory:>9.2f} GiB  (plan {plan:.2f}){row['step_s']:>10.3g} s/step{row['tok_s']:>10.0f} tok/s"
        f"{100 * row['mfu']:>7.1f} % MFU"
    )


def _predicted(row: Record) -> str:
    return f" (plan {row['predicted_bytes'] / 2**30:.2f} GiB)" if "predicted_bytes" in row else ""


def as_text(record: Record) -> str:
    """A head and a line for each row, aligned."""
    return "\n".join([_head(record), *(_line(row) for row in record["rows"])])


def _head(record: Record) -> str:
    if "settings" not in record:
        return record["model"]
    settings, machine = record["settings"], record["machine"]
    where = machine["processor"] if record["device"] == "cpu" else record["device"]
    return (
        f"{record['model']} on {where}: batch {settings['per_device_train_batch_size']}, accumulation "
        f"{settings['gradient_accumulation_steps']}, medians of {record['measured']['steps']} steps"
    )


def as_markdown(record: Record) -> str:
    """The README's table, memory / seconds a step, and one of tokens a second / MFU."""
    rows = {(row["method"], row["length"]): row for row in record["rows"]}
    methods = list(dict.fromkeys(method for method, _ in rows))
    lengths = list(dict.fromkeys(length for _, length in rows))
    kinds: Sequence[tuple[str, Callable[[Record], str]]] = (
        ("memory / time of a step", lambda row: f"{row['memory_bytes'] / 2**30:.1f} GiB / {row['step_s']:.3g} s"),
        ("tokens a second / MFU", lambda row: f"{row['tok_s']:.0f} / {100 * row['mfu']:.1f} %"),
    )
    lines = [_head(record)]
    for title, cell in kinds:
        lines += ["", f"| {title} | {' | '.join(map(str, lengths))} |", "|---|" + "---:|" * len(lengths)]
        for method in methods:
            cells = [rows[method, length] for length in lengths]
            shown = ["out of memory" if row["out_of_memory"] else cell(row) for row in cells]
            lines.append(f"| {method} | {' | '.join(shown)} |")
    return "\n".join(lines)
