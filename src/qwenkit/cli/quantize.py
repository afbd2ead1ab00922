"""`qwenkit quantize`: a model's weights in 4 or 8 bits, as a folder.

In: flags, and calibration text. Out: the folder; its path on stdout, progress and the error of each layer on stderr. The work is
`quant.quantize`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qwenkit.cli.options import Verb, dataclass_options, given
from qwenkit.quant.config import QuantConfig


@click.command(cls=Verb)
@click.argument("model")
@click.option("--output", type=click.Path(path_type=Path), metavar="DIR", required=True, help="The new folder.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Calibration: conversations (.json, .jsonl as for training) or text (.txt, .raw, .parquet).  [default: a small text]",
)
@dataclass_options(QuantConfig, "Quantization")
def quantize(model: str, output: Path, data: Path | None, **values: Any) -> None:
    """Write MODEL with 4 or 8 bits a weight.

    MODEL is a folder, a .gguf file, a hub id or smollm2. GPTQ runs some text through the model and makes up for what rounding
    loses there, so text like that of the later use is best. The folder loads here, in transformers and in vLLM. What an
    interrupted run has finished is kept in DIR.part; the same command goes on from there.

    \b
    qwenkit quantize Qwen/Qwen2.5-0.5B-Instruct --bits 4 --output qwen-int4 --data chats.jsonl
    qwenkit quantize smollm2 --bits 8 --output smollm2-int8
    qwenkit quantize models/qwen --group-size 128 --no-sym --samples 256 --length 2048 --data text.txt --output qwen-int4
    """
    config = QuantConfig(**given(QuantConfig, values))

    from qwenkit import ops  # torch takes its time to import
    from qwenkit.hub.find import find_model
    from qwenkit.quant.data import calibration_documents
    from qwenkit.quant.quantize import check_output, quantize_model
    from qwenkit.weights.checkpoint import open_checkpoint

    check_output(output)
    if data is not None and not data.is_file():
        raise FileNotFoundError(f"--data: there is no file {str(data)!r}")
    ops.use()
    checkpoint = open_checkpoint(find_model(model))
    documents: list[list[int]] = []
    if config.method == "gptq":
        documents = calibration_documents(
            checkpoint, data, samples=config.samples, length=config.length, seed=config.seed
        )
        tokens = sum(map(len, documents))
        click.echo(f"calibration: {len(documents)} samples, {tokens} tokens", err=True)
        if len(documents) < config.samples:
            held = str(data) if data else "the built-in text"
            click.echo(f"{held} holds no more than that; {config.samples} samples were asked for", err=True)
    try:
        errors = quantize_model(checkpoint, output, config, documents, progress=True)
    except KeyboardInterrupt:
        click.echo(f"\nstopped; run the same command again to go on from {output}.part", err=True)
        raise
    measured = [each.error for each in errors if each.error is not None]
    if measured:
        click.echo(f"error of the layers' outputs: {100 * sum(measured) / len(measured):.2f} % in the mean", err=True)
    click.echo(output)
