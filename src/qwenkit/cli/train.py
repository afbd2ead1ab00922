"""`qwenkit train`: pretrain, fine-tune, adapt, align.

In: a YAML file, key=value words, flags; keys of LLaMA-Factory and flags of Qwen's finetune.py are understood. Out: progress on
stderr, the trained model in output_dir; exit code 0, 1 where --check found errors, 2 with one sentence, 130 after Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from qwenkit.cli.options import Verb, flags_of
from qwenkit.compat.sources import read_flags
from qwenkit.compat.translate import translate
from qwenkit.train.config import TrainConfig
from qwenkit.train.launch import Launch, check_environment, run, started_by_torchrun
from qwenkit.train.settings_file import find_recipe, parse_assignments, read_settings


class _TrainVerb(Verb):
    """Lists the fields of TrainConfig as flags. They are read after click, with those of other trainers."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        rows = []
        for flag in flags_of(TrainConfig).values():
            shown = "" if flag.default in (None, (), "") else f"  [default: {_text(flag.default)}]"
            rows.append((f"--{flag.name.replace('_', '-')}", flag.help + shown))
        with formatter.section("Settings, as --flag value, or key=value, or lines of the file"):
            formatter.write_dl(rows)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else str(value)


@click.command(
    cls=_TrainVerb,
    context_settings={"ignore_unknown_options": True},
    epilog="""\b
Examples:
  qwenkit train model=smollm2 dataset=identity output_dir=out "variables=[name=Kit, author=Acme]"
  qwenkit train run.yaml learning_rate=1e-4 --max-steps 100
  qwenkit train run.yaml --check
  qwenkit train run.yaml --nproc 8 --nnodes 2 --node-rank 0 --master 10.0.0.1""",
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[FILE.yaml] [KEY=VALUE]... [--FLAG VALUE]...")
@click.option("--print-config", is_flag=True, help="Print the whole configuration as YAML and stop.")
@click.option("--check", is_flag=True, help="Read all data, report what is wrong with it, and stop.")
@click.option("--nproc", default=1, show_default=True, help="Processes on this node, one for each GPU.")
@click.option("--nnodes", default=1, show_default=True, help="Nodes.")
@click.option("--node-rank", default=0, show_default=True, help="Which of the nodes this is.")
@click.option("--master", default="127.0.0.1", show_default=True, help="Address of the first node.")
@click.option("--port", default=29500, show_default=True, help="Its port, where the processes meet.")
def train(words: tuple[str, ...], print_config: bool, check: bool, **launching: Any) -> None:
    """Train a model: pretraining, fine-tuning, preferences; whole, some layers, LoRA or QLoRA.

    Later words win over earlier ones, and all of them over the file.
    """
    launch = Launch(**launching)
    config, notes = read_config(words, processes=launch.nproc * launch.nnodes)
    if print_config:
        click.echo(config.to_yaml(), nl=False)
        return
    if not started_by_torchrun() and not check:
        notes += check_environment(launch)
        if launch.needed:
            raise SystemExit(run(launch, "qwenkit", ["train", *words]))
    if os.environ.get("RANK", "0") == "0":
        for note in notes:
            click.echo(f"note: {note}", err=True)
    from qwenkit.train import run as training

    if check:
        report = training.check_data(config, processes=launch.nproc * launch.nnodes)
        click.echo(str(report))
        if report.refusal is not None:
            raise ValueError(report.refusal)
        raise SystemExit(1 if report.num_errors else 0)
    if training.train(config, bar=sys.stderr.isatty()).reason == "interrupted":
        raise KeyboardInterrupt


def read_config(words: Sequence[str], *, processes: int = 1) -> tuple[TrainConfig, list[str]]:
    """The configuration of a command line, and what the user should know about the keys of other trainers in it.

    A file comes first, then key=value, then flags; they are merged, and then translated. `processes` is how many will train.
    ValueError for what cannot be understood.
    """
    first_flag = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    plain, flags = list(words[:first_flag]), words[first_flag:]
    settings: dict[str, Any] = {}
    if plain and "=" not in plain[0]:
        settings = read_settings(find_recipe(plain.pop(0)))
    processes = int(os.environ.get("WORLD_SIZE", processes)) if started_by_torchrun() else processes
    translation = translate(settings, parse_assignments(plain), read_flags(flags), processes=processes)
    return TrainConfig.from_settings(translation.settings), translation.notes
