"""`qwenkit eval`: how good a model is, and what quantizing it costs.

In: flags. Out: a line for people or one line of JSON, a markdown table and a plot of variants; progress on stderr. What is
measured and how is `qwenkit.eval`'s business.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from qwenkit.cli.options import Verb, dataclass_options, flags_of, given
from qwenkit.engine.config import EngineConfig
from qwenkit.settings import nearest

if TYPE_CHECKING:
    from qwenkit.engine.llm import LLM
    from qwenkit.eval.compare import Comparison
    from qwenkit.eval.perplexity import Perplexity, Window
    from qwenkit.eval.report import Entry

NOT_A_FLAG = ("seed", "max_num_seqs", "prefix_cache", "max_model_len")  # one text at a time, as long as a window
USUAL = (
    "weights=int8",
    "weights=int4",
    "kv_cache_dtype=int8",
    "kv_cache_dtype=int4",
)  # variants of a report that names none


@click.group(epilog="\b\nExample:\n  qwenkit eval perplexity smollm2 --data wiki.test.raw --limit 10")
def eval() -> None:
    """Measure how good a model is."""


@dataclass(frozen=True)
class Text:
    """A tokenized text and how it is cut into windows."""

    ids: list[int]
    context: int
    stride: int | None
    limit: int | None

    def windows(self) -> Iterator[Window]:
        from qwenkit.eval.perplexity import windows_of

        return windows_of(self.ids, self.context, self.stride, self.limit)

    @property
    def count(self) -> int:
        from qwenkit.eval.perplexity import count_windows

        return count_windows(len(self.ids), self.context, self.stride, self.limit)


@eval.command(
    cls=Verb,
    epilog="""\b
Examples:
  qwenkit eval perplexity smollm2 --data wiki.test.raw
  qwenkit eval perplexity smollm2 --data wiki.test.raw --limit 10 --kv-cache-dtype int8 --json
  qwenkit eval perplexity smollm2 --data wiki.test.raw --limit 10 --report weights=int4 --plot quality.png""",
)
@click.argument("model")
@click.option("--data", required=True, type=click.Path(path_type=Path), metavar="FILE", help="A text to foresee.")
@click.option("--limit", type=int, metavar="N", help="Read only the first N windows.")
@click.option("--context", type=int, default=2048, show_default=True, metavar="N", help="Tokens of a window.")
@click.option("--stride", type=int, metavar="N", help="Begin a window every N tokens; without it they are disjoint.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON, with versions, machine and settings.")
@click.option(
    "--report",
    multiple=True,
    metavar="OTHER",
    help="Compare MODEL with another: a model, or settings such as weights=int4,kv_cache_dtype=int8.",
)
@click.option("--plot", metavar="FILE.png", help="Draw the comparison: quality against memory, and speed.")
@dataclass_options(EngineConfig, "Running the model", exclude=NOT_A_FLAG)
def perplexity(
    model: str,
    data: Path,
    limit: int | None,
    context: int,
    stride: int | None,
    as_json: bool,
    report: tuple[str, ...],
    plot: str | None,
    **values: Any,
) -> None:
    """Measure MODEL's perplexity on the text of a file: e to the mean negative log-likelihood of its tokens.

    \b
    --data      .txt as it is; of records (.json, .jsonl, .csv, .parquet …) the texts, joined by two line feeds, or the
                conversations in the model's chat format; WikiText's own .raw and .tokens: as the data set
                wikitext-2-raw-v1 has their lines, joined like that
    windows     of --context tokens; the first token of each is only read. Disjoint ones, and 2048, are the protocol of
                published wikitext-2 figures; with --stride tokens after the first window have more context
    --report    repeated: MODEL as the flags say is compared with each; --plot alone compares --weights int8 and
                int4, and --kv-cache-dtype int8 and int4. KL is the mean divergence from MODEL's distribution

    The text is read through the key/value cache, so that --kv-cache-dtype counts. Speeds are of this machine, busy as it is.
    """
    settings = given(EngineConfig, values)
    EngineConfig(**settings)
    if plot is not None and not plot.lower().endswith(".png"):
        raise ValueError(f"plot is {plot!r}, allowed is a file name that ends in .png")
    others, picture = _others(report if plot is None else (*report, plot))
    from qwenkit.eval.figure import check_figure
    from qwenkit.eval.perplexity import encode, read_data, windows_of

    if picture is not None:
        check_figure("plot", picture)
    windows_of([0, 0], context, stride, limit)  # raises for flags out of range before a model is loaded
    documents = read_data(data)
    llm = _open(model, settings, context)
    ids = encode(documents, llm.tokenizer, llm.chat_format)
    text = llm.tokenizer.decode(ids, skip_special=False)
    cut = Text(ids, context, stride, limit)
    entries: list[Entry] = []
    if report or plot is not None:
        entries, result = _report(llm, model, settings, others, cut, text)
    else:
        result = _measure(llm, cut)
    record = _record(model, data, cut, result, llm)
    if entries:
        record["report"] = [asdict(entry) for entry in entries]
    if picture is not None:
        from qwenkit.eval.report import draw

        draw(entries, f"{model}, {data.name}, {result.windows} windows of {context} tokens", picture)
    click.echo(json.dumps(record, ensure_ascii=False) if as_json else _as_text(record, entries))


def _others(report: tuple[str, ...]) -> tuple[list[str], Path | None]:
    """The variants and the picture that --report names."""
    plots = [Path(name) for name in report if name.lower().endswith(".png")]
    if len(plots) > 1:
        raise ValueError(f"plot names {len(plots)} .png files, allowed is one")
    others = [name for name in report if not name.lower().endswith(".png")]
    for other in others:
        parse_variant(other)
    return others or list(USUAL), plots[0] if plots else None


def parse_variant(text: str) -> tuple[str | None, dict[str, Any]]:
    """(model or None, settings) of a variant: a model, settings NAME=VALUE of EngineConfig, or both, with commas between them.

    ValueError naming what is no setting, or has no such value.
    """
    if Path(text).exists():
        return text, {}
    flags = flags_of(EngineConfig, exclude=NOT_A_FLAG)
    model, settings = None, {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        name = name.replace("-", "_")
        if not equals:
            if model is not None or not part.strip():
                raise ValueError(
                    f"report is {text!r}, allowed is a model, settings such as weights=int4, or both with a comma between"
                )
            model = part.strip()
        elif name not in flags:
            raise ValueError(f"report is {text!r}, but {name} is no setting; {nearest(name, flags)}")
        else:
            settings[name] = flags[name].parse(value)
    EngineConfig(**settings)
    return model, settings


def _open(model: str, settings: Mapping[str, Any], context: int) -> LLM:
    """A model with room for one window and a short answer."""
    import sys

    from qwenkit.engine.llm import LLM
    from qwenkit.hub.find import find_model
    from qwenkit.model.config import ModelConfig
    from qwenkit.weights.checkpoint import open_checkpoint

    progress = sys.stderr.isatty()
    path = find_model(model, progress=progress)
    longest = ModelConfig.from_dict(open_checkpoint(path).config).max_position_embeddings
    if context > longest:
        raise ValueError(f"context is {context}, but the model's context is {longest} tokens")
    room = min(longest, max(context, 256))
    return LLM(
        path,
        EngineConfig(**{**settings, "max_model_len": room, "max_num_seqs": 1, "prefix_cache": False}),
        progress=progress,
    )


def _measure(llm: LLM, text: Text) -> Perplexity:
    from qwenkit.eval.perplexity import perplexity as measure

    with _bar(text, "perplexity") as bar:
        return measure(llm, text.windows(), lambda known: _show(bar, f"{known.perplexity:.4f}"))


def _report(
    llm: LLM, model: str, settings: Mapping[str, Any], others: list[str], text: Text, whole: str
) -> tuple[list[Entry], Perplexity]:
    """Lines of the report, MODEL's first, and MODEL's perplexity. One variant is in memory beside MODEL at a time."""
    from qwenkit.eval.compare import check_vocabularies, compare
    from qwenkit.eval.report import Entry, decode_speed, kv_bytes, weight_bytes

    prompt = text.ids[:64]

    def entry(name: str, one: LLM, result: Perplexity, kl: float, agreement: float) -> Entry:
        speed = result.tokens / result.seconds
        return Entry(
            name,
            result.perplexity,
            kl,
            agreement,
            weight_bytes(one.model),
            kv_bytes(one),
            speed,
            decode_speed(one, prompt),
        )

    entries: list[Entry] = []
    reference = None
    for other in others:
        path, changes = parse_variant(other)
        variant = _open(path or model, {**settings, **changes}, text.context)
        check_vocabularies(llm, variant, whole)
        with _bar(text, other) as bar:
            result = compare(llm, variant, text.windows(), partial(_show_pair, bar))
        if reference is None:
            reference = result.reference
            entries.append(entry(model, llm, reference, 0.0, 1.0))
        entries.append(entry(other, variant, result.variant, result.kl, result.agreement))
    assert reference is not None
    return entries, reference


def _show_pair(bar: Any, known: Comparison) -> None:
    _show(bar, f"{known.reference.perplexity:.4f} and {known.variant.perplexity:.4f}")


def _bar(text: Text, name: str) -> Any:
    return tqdm(total=text.count, desc=name, unit="window", disable=None)


def _show(bar: Any, value: str) -> None:
    bar.set_postfix_str(value, refresh=False)
    bar.update()


def _record(model: str, data: Path, text: Text, result: Perplexity, llm: LLM) -> dict[str, Any]:
    from qwenkit.cli.bench import surroundings

    return {
        "model": model,
        "data": str(data),
        "perplexity": result.perplexity,
        "nll": result.nll,
        "tokens": result.tokens,
        "windows": result.windows,
        "context": text.context,
        "stride": text.stride,
        "text_tokens": len(text.ids),
        "tok_s": round(result.tokens / result.seconds, 1),
        "kv_cache_dtype": str(llm.engine.runner.caches[0].dtype)[6:],
        "settings": asdict(llm.config),
        **surroundings(),
    }


def _as_text(record: Mapping[str, Any], entries: list[Entry]) -> str:
    if entries:
        from qwenkit.eval.report import as_table

        kind = "disjoint windows" if record["stride"] is None else f"windows every {record['stride']} tokens"
        head = f"{record['data']}: {record['windows']} {kind} of {record['context']} tokens"
        return f"{head}\n\n{as_table(entries)}"
    return (
        f"perplexity {record['perplexity']:.4f}  ({record['tokens']} tokens in {record['windows']} windows of "
        f"{record['context']}, {record['tok_s']:.0f} tok/s, keys and values in {record['kv_cache_dtype']})"
    )
