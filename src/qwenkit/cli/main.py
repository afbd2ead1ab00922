"""The command `qwenkit`: verbs that are imported when they are used, and one place where errors become one sentence.

In: the command line. Out: exit code 0; 2 with one sentence on stderr for anything the user can put right; 130 after Ctrl-C.
"""

from __future__ import annotations

import errno
import importlib
import os
from collections.abc import MutableMapping
from typing import Any

import click

from qwenkit.cli.errors import UserError, sentence
from qwenkit.settings import near, nearest

# verb -> what `qwenkit --help` says of it. The module of that name in this folder is imported only when the verb is used.
VERBS = {
    "chat": "Talk to a model: a conversation, or one streamed answer.",
    "doctor": "Versions, devices, instruction sets, folders: what qwenkit sees of this machine.",
    "generate": "Answer every line of a JSONL file; goes on where it was interrupted.",
    "pull": "Get a model and check every file, or check files that are already here.",
    "quantize": "Make a model smaller: 4 or 8 bits a weight, by GPTQ, as a folder that others read too.",
    "bench": "Measure a model's speed and memory here, and how near they are to what the machine could do.",
    "train": "Train a model: pretrain, fine-tune, LoRA, QLoRA, preferences; on one device or many.",
    "plan": "Predict the memory of a training run, and the largest batch that fits, before it starts.",
    "export": "Merge adapters into a model and write it as a folder that loads by itself.",
    "eval": "Measure how good a model is: perplexity, and what quantizing it costs.",
    "serve": "Serve a model to clients of the OpenAI and Anthropic APIs, and as a page to talk in.",
}

# How long threads of OpenMP, which torch computes with, spin before they sleep: about a millisecond. By default it is many
# milliseconds, in which they take a core from other processes. Read by GCC's and Intel's runtimes when torch is loaded.
OPENMP_SPIN = {"GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "1"}


class Verbs(click.Group):
    """A group that knows its verbs by name and imports one only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command = getattr(importlib.import_module(f"qwenkit.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in VERBS and not args[0].startswith("-"):
            raise click.UsageError(f"No such command {args[0]!r}; {nearest(args[0], VERBS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo(err=True)
            ctx.exit(130)
        except click.NoSuchOption as error:
            meant = near(error.option_name, error.possibilities or ())
            possibilities = [] if meant is None else [meant]
            raise click.NoSuchOption(error.option_name, possibilities=possibilities, ctx=error.ctx) from None
        except (ValueError, OSError) as error:
            if ctx.params["debug"] or (isinstance(error, OSError) and error.errno == errno.EPIPE):
                raise
            raise UserError(sentence(error)) from error


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='\b\nExample:\n  qwenkit chat smollm2 "What is the capital of Germany?"',
)
@click.version_option(package_name="qwenkit", prog_name="qwenkit")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """One package for the whole life of a Qwen model."""


def limit_openmp_spin(environment: MutableMapping[str, str]) -> None:
    """Set OPENMP_SPIN in an environment, unless it says how OpenMP's threads wait."""
    if not {"OMP_WAIT_POLICY", *OPENMP_SPIN} & set(environment):
        environment.update(OPENMP_SPIN)


def main() -> None:
    """Entry point of the console script and of `python -m qwenkit`."""
    limit_openmp_spin(os.environ)
    cli(prog_name="qwenkit")
