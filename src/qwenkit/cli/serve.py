"""`qwenkit serve`: a model behind the OpenAI and Anthropic APIs, with a page to talk in.

In: flags. Out: one line on stdout when requests are answered, then a log on stderr until SIGTERM (exit code 0) or Ctrl-C (130).
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import click

from qwenkit.cli.options import Verb, dataclass_options, given
from qwenkit.compat.verbs import is_settings_file, read_inference
from qwenkit.engine.config import EngineConfig
from qwenkit.installation import install_extra
from qwenkit.serve.config import ServeConfig


@click.command(
    cls=Verb,
    epilog="""\b
Examples:
  qwenkit serve smollm2
  qwenkit serve Qwen/Qwen3-0.6B --port 8080 --served-model-name qwen --lora poet=adapters/poet
  QWENKIT_API_KEYS=secret qwenkit serve smollm2 --host 0.0.0.0 --log-format json""",
)
@click.argument("model")
@dataclass_options(ServeConfig, "Serving")
@dataclass_options(EngineConfig, "Running the model")
def serve(model: str, **values: Any) -> None:
    """Serve MODEL: a folder, a .gguf file, a hub id, smollm2 (the small default model), or LLaMA-Factory's YAML file.

    Only this machine can reach the server unless --host says otherwise, which needs a key: --api-key, --api-key-file, or the
    environment's QWENKIT_API_KEYS (and QWENKIT_ADMIN_KEY for the administration routes).
    """
    serving, engine, template = given(ServeConfig, values), given(EngineConfig, values), "default"
    if is_settings_file(model):
        file = read_inference(Path(model))
        model, template, engine = file.model, file.template, file.engine | engine
        if file.adapter is not None and "lora" not in serving:
            name = Path(file.adapter).name
            serving["lora"] = (f"{name}={file.adapter}",)
            click.echo(f"note: the adapter is served as the model {name}", err=True)
        asked = [key for key in ("sampling", "system", "variables") if getattr(file, key)]
        if asked:
            click.echo("note: settings of answers have no effect: each request says its own", err=True)
        for note in (*file.notes, *_environment()):
            click.echo(f"note: {note}", err=True)
    config, engine_config = ServeConfig(**serving), EngineConfig(**engine)
    try:
        from qwenkit.serve.process import run
    except ModuleNotFoundError as error:
        raise ValueError(f"serve needs the extra serve: {install_extra('serve')} ({error})") from None
    ended = run(model, engine_config, config, click.echo, template=template, progress=sys.stderr.isatty())
    if ended == signal.SIGINT:
        raise KeyboardInterrupt


def _environment() -> list[str]:
    """Notes on the variables with which LLaMA-Factory's api is started."""
    flags = {
        "API_HOST": "--host",
        "API_PORT": "--port",
        "API_KEY": "--api-key",
        "API_MODEL_NAME": "--served-model-name",
    }
    return [
        f"{name} in the environment is not read; {flag} says it" for name, flag in flags.items() if name in os.environ
    ]
