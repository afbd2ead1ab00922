"""`qwenkit serve`: a model behind the OpenAI and Anthropic APIs, with a page to talk in.

In: flags. Out: one line on stdout when requests are answered, then a log on stderr until SIGTERM (exit code 0) or Ctrl-C (130).
"""

from __future__ import annotations

import signal
import sys
from typing import Any

import click

from qwenkit.cli.options import Verb, dataclass_options, given
from qwenkit.engine.config import EngineConfig
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
    """Serve MODEL: a folder, a .gguf file, a hub id, or smollm2, the small default model.

    Only this machine can reach the server unless --host says otherwise, which needs a key: --api-key, --api-key-file, or the
    environment's QWENKIT_API_KEYS (and QWENKIT_ADMIN_KEY for the administration routes).
    """
    config = ServeConfig(**given(ServeConfig, values))
    engine_config = EngineConfig(**given(EngineConfig, values))
    try:
        from qwenkit.serve.process import run
    except ModuleNotFoundError as error:
        raise ValueError(f"serve needs the extra serve: pip install 'qwenkit[serve]' ({error})") from None
    if run(model, engine_config, config, click.echo, progress=sys.stderr.isatty()) == signal.SIGINT:
        raise KeyboardInterrupt
