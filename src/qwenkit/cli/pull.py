"""`qwenkit pull`: get a model and compare every file with its hub's checksum, or check a folder that is already there.

In: flags. Out: the model's path on stdout, progress on stderr. The work is `weights.find`'s.
"""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("model", required=False)
@click.option(
    "--into", type=click.Path(path_type=Path), metavar="FOLDER", help="Put plain files here, with SHA256SUMS."
)
@click.option("--revision", metavar="NAME", help="Branch, tag or commit on the hub; its main branch by default.")
@click.option(
    "--verify", type=click.Path(path_type=Path), metavar="FOLDER", help="Download nothing: check these files."
)
def pull(model: str | None, into: Path | None, revision: str | None, verify: Path | None) -> None:
    """Get MODEL, and compare every file with the hub's checksum.

    MODEL is a hub id, org/name (Hugging Face, or the mirror that HF_ENDPOINT names) or ms:org/name (ModelScope), or smollm2.
    What an interrupted run has fetched is kept, and the same command goes on from there. The last line printed is the path.

    \b
    qwenkit pull Qwen/Qwen2.5-0.5B-Instruct
    qwenkit pull ms:Qwen/Qwen2.5-0.5B-Instruct --into models/qwen
    qwenkit pull --verify models/qwen                             with what is known here: lengths, SHA256SUMS
    qwenkit pull --verify models/qwen Qwen/Qwen2.5-0.5B-Instruct  with the hub's checksums
    """
    from qwenkit.hub.find import check_model, pull_model  # the hubs' clients take their time to import

    if verify is not None:
        if into is not None:
            raise ValueError("--into is where to download to, --verify downloads nothing: give one of them")
        click.echo(check_model(verify, model, revision=revision))
    elif model is None:
        raise ValueError("pull needs the MODEL to get, or --verify FOLDER")
    else:
        click.echo(pull_model(model, into=into, revision=revision))
