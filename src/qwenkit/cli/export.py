"""`qwenkit export`: adapters merged into a model, written as a folder that loads by itself.

In: flags, or a YAML file with LLaMA-Factory's export keys. Out: the folder's path on stdout, progress on stderr. The work is
weights/export.py's and, with --quantize, quant/'s on what was merged.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from qwenkit.quant.config import QuantConfig
    from qwenkit.weights.checkpoint import Checkpoint

_FORMATS = ("safetensors", "bin")
_OF_QUANTIZING = ("data", "samples", "length")
_OWN = (
    "model",
    "adapter",
    "output",
    "shard_size",
    "format",
    "dtype",
    "template",
    "device",
    "quantize",
    *_OF_QUANTIZING,
)


@click.command(
    epilog="""\b
Examples:
  qwenkit export --model smollm2 --adapter output --output merged
  qwenkit export --model Qwen/Qwen2-7B-Instruct --adapter saves/qwen-7b --output merged --shard-size 4GB --dtype bfloat16
  qwenkit export --model smollm2 --adapter output --output merged-int4 --quantize 4 --data data/identity.json
  qwenkit export qwen_merge.yaml"""
)
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--model", metavar="MODEL", help="A folder, a .gguf file, a hub id, or smollm2.")
@click.option("--adapter", multiple=True, metavar="FOLDER", help="Merge this adapter; several in their order.")
@click.option("--output", metavar="FOLDER", help="The folder to write.")
@click.option(
    "--shard-size", metavar="SIZE", help="Largest file, such as 4GB, 4GiB (or 4G), or a number of GB.  [default: 5GB]"
)
@click.option("--format", "format_", type=click.Choice(_FORMATS), help="safetensors, or bin (torch.save).")
@click.option("--dtype", metavar="TEXT", help="float32, bfloat16 or float16.  [default: the model's own]")
@click.option("--template", metavar="TEXT", help="default (the model's own), chatml, qwen, or a .jinja file.")
@click.option("--device", metavar="TEXT", help="Where matrices are merged: auto, cpu, cuda, …  [default: cpu]")
@click.option("--quantize", type=int, metavar="BITS", help="Quantize what was merged to 4 or 8 bits, by GPTQ.")
@click.option("--data", metavar="FILE", help="Its calibration, as for `qwenkit quantize`.  [default: a small text]")
@click.option("--samples", type=int, metavar="N", help="Calibration samples.  [default: 128]")
@click.option("--length", type=int, metavar="N", help="Tokens of a calibration sample, at most.  [default: 512]")
@click.option("--dequantize", is_flag=True, help="Write a GPTQ or AWQ model, whose matrices are packed, as floats.")
@click.option("--overwrite", is_flag=True, help="Replace what is in the output folder.")
def export(file: Path | None, format_: str | None, dequantize: bool, overwrite: bool, **flags: Any) -> None:
    """Merge adapters into a model, in float32, and write the result as a folder that qwenkit, transformers and vLLM load.

    FILE is a YAML file with LLaMA-Factory's export keys, or with these flags' names as keys; flags go before it.
    """
    settings = _read(file) if file is not None else {}
    settings |= {name: value for name, value in flags.items() if value not in (None, ())}
    if format_ is not None:
        settings["legacy"] = format_ == "bin"
    for name, key in (("model", "model_name_or_path"), ("output", "export_dir")):
        if not isinstance(settings.get(name), str) or not settings[name]:
            raise ValueError(f"export needs --{name}, or {key} in a YAML file")
    click.echo(_export(settings, dequantize=dequantize, overwrite=overwrite))


def _read(path: Path) -> dict[str, Any]:
    """A YAML file as flags. ValueError for a key that is unknown, or that asks for what is not done here."""
    from qwenkit.compat.verbs import read_export

    settings = read_export(path, _OWN)
    form = settings.pop("format", None)
    if form is not None:
        if form not in _FORMATS:
            raise ValueError(f"{path}: format is {form!r}, allowed are {', '.join(_FORMATS)}")
        settings["legacy"] = form == "bin"
    return settings


def _export(settings: Mapping[str, Any], *, dequantize: bool, overwrite: bool) -> Path:
    from qwenkit.hub.find import find_model
    from qwenkit.settings import parse_size
    from qwenkit.weights.checkpoint import open_checkpoint
    from qwenkit.weights.export import export_model
    from qwenkit.weights.saving import Form, new_folder
    from qwenkit.weights.templated import with_template

    form = Form(
        parse_size("shard_size", settings.get("shard_size", "5GB"), unit="GB", example="4GB"),
        bool(settings.get("legacy")),
    )
    quantization = _quantization(settings)
    output = Path(settings["output"]).expanduser()
    adapters = [Path(name).expanduser() for name in settings.get("adapter", ())]
    checkpoint = open_checkpoint(find_model(settings["model"]))
    checkpoint = with_template(checkpoint, _template(settings, adapters, checkpoint))
    dtype, device = settings.get("dtype"), _device(str(settings.get("device", "cpu")))

    def merge(folder: Path, overwrite: bool) -> None:
        export_model(
            checkpoint,
            folder,
            adapters=adapters,
            dtype=None if dtype == "auto" else dtype,
            form=form,
            dequantize=dequantize,
            overwrite=overwrite,
            device=device,
            progress=True,
        )

    if quantization is None:
        merge(output, overwrite)
        return output
    for path in (checkpoint.path, *adapters):
        if path.resolve() == output.resolve():
            raise ValueError(f"output is {str(output)!r}, which is where the model or an adapter lies")
    with new_folder(output, overwrite=overwrite) as beside, TemporaryDirectory(dir=beside, prefix="work.") as work:
        merged, packed = Path(work) / "merged", Path(work) / "packed"
        merge(merged, False)
        _quantize(merged, packed, quantization, settings.get("data"))
        for path in packed.iterdir():
            os.replace(path, beside / path.name)
    return output


def _quantization(settings: Mapping[str, Any]) -> QuantConfig | None:
    """How to quantize, if at all. ValueError for bits, samples or a length that are not allowed, and for .bin files."""
    from qwenkit.quant.config import QuantConfig

    given = [name for name in _OF_QUANTIZING if settings.get(name) is not None]
    if settings.get("quantize") is None:
        if given:
            raise ValueError(f"{given[0]} is given, but belongs to quantize, which is not")
        return None
    if settings.get("legacy"):
        raise ValueError("format is bin, but what is quantized is written as safetensors only")
    numbers = {"bits": settings["quantize"]} | {name: settings[name] for name in given if name != "data"}
    for name, value in numbers.items():
        if type(value) is not int:
            raise ValueError(f"{'quantize' if name == 'bits' else name} is {value!r}, allowed is a whole number")
    data = settings.get("data")
    if data is not None and not Path(str(data)).expanduser().is_file():
        raise FileNotFoundError(f"data: there is no file {str(data)!r}")
    return QuantConfig(**numbers)


def _quantize(merged: Path, folder: Path, config: QuantConfig, data: str | None) -> None:
    from qwenkit import ops
    from qwenkit.quant.data import calibration_documents
    from qwenkit.quant.quantize import quantize_model
    from qwenkit.weights.checkpoint import open_checkpoint

    ops.use()
    checkpoint = open_checkpoint(merged)
    path = None if data is None else Path(data).expanduser()
    documents = calibration_documents(checkpoint, path, samples=config.samples, length=config.length, seed=config.seed)
    quantize_model(checkpoint, folder, config, documents, progress=True)


def _template(settings: Mapping[str, Any], adapters: list[Path], checkpoint: Checkpoint) -> str:
    """The name that was given; else, for a model without a template, the one that an adapter was trained with."""
    name = str(settings.get("template", "default"))
    if name != "default" or checkpoint.chat() is not None:
        return name
    learned = [path / "chat_template.jinja" for path in adapters if (path / "chat_template.jinja").is_file()]
    return str(learned[-1]) if learned else name


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return str(torch.zeros((), device=name).device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {name!r}, which is not usable here: {str(error).splitlines()[0]}") from None
