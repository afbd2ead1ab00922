"""The server as a process: check what was asked for, open the model, listen, and end gently.

In: a model, EngineConfig and ServeConfig. Out: when it returns, everything accepted has been answered or given up on. What the
user can put right is a ValueError before the model is loaded.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from qwenkit.engine.config import EngineConfig
from qwenkit.engine.grammar_compiler import GrammarCompiler
from qwenkit.engine.llm import LLM
from qwenkit.serve import logs
from qwenkit.serve.app import create_app
from qwenkit.serve.config import ServeConfig
from qwenkit.serve.driver import Driver
from qwenkit.serve.keys import ADMIN_VARIABLE, KEYS_VARIABLE, Keys
from qwenkit.serve.limits import MinuteLimits
from qwenkit.serve.listener import Listener, bind
from qwenkit.serve.metrics import Metrics
from qwenkit.serve.server import Server
from qwenkit.serve.tracing import OtlpTracing, Tracing
from qwenkit.text.answer import AnswerFormat

log = logging.getLogger("qwenkit.serve")

SWITCH_INTERVAL = (
    0.0005  # seconds until the engine's thread gets the interpreter back from the event loop; Python's own is 0.005
)


def check_trust(config: ServeConfig, keys: Keys) -> None:
    """ValueError for a server that strangers could reach without a key, unless that is what was asked for."""
    if not (config.is_loopback or keys.are_set or config.allow_no_key):
        raise ValueError(
            f"host is {config.host!r}, which other machines can reach, and there is no API key: "
            "give --api-key or --api-key-file, or --allow-no-key to let everybody in"
        )


def run(
    model: str,
    engine_config: EngineConfig,
    config: ServeConfig,
    on_ready: Callable[[str], None],
    *,
    template: str = "default",
    progress: bool,
) -> int:
    """Serve until a signal; `on_ready` gets the sentence that says where. The signal's number is the result.

    Raises ValueError or OSError for what cannot be served as asked.
    """
    keys = Keys.of(config, os.environ)
    for name in (KEYS_VARIABLE, ADMIN_VARIABLE):
        os.environ.pop(name, None)  # no worker process inherits them
    check_trust(config, keys)
    tracing = Tracing() if config.otlp_endpoint is None else OtlpTracing(config.otlp_endpoint)
    sock = bind(config.host, config.port)
    try:
        logs.configure(config.log_format)
        llm = LLM(model, engine_config, lora=config.adapters(), template=template, progress=progress)
        server = make_server(llm, names_of(model, config), config)
        _warm(server, llm)
        try:
            return _listen(server, keys, tracing, sock, on_ready)
        finally:
            server.driver.stop()
            if server.compiler is not None:
                server.compiler.close()
            tracing.shutdown()
    finally:
        sock.close()


def names_of(model: str, config: ServeConfig) -> tuple[str, ...]:
    """Names that the API knows the model by: those that were given, else the model as given and its folder's name."""
    if config.served_model_name:
        return config.served_model_name
    short = Path(model).resolve().name if Path(model).exists() else model
    return tuple(dict.fromkeys((short, model)))


def make_server(llm: LLM, names: tuple[str, ...], config: ServeConfig) -> Server:
    """A Server around an opened model; its driver is not started."""
    metrics = Metrics(config.metrics_prefix, names[0])
    driver = Driver(
        llm.engine,
        max_queued=config.max_queued,
        max_queued_tokens=config.max_queued_tokens,
        stall_timeout=config.stall_timeout,
        metrics=metrics,
        limits=MinuteLimits(config.requests_per_minute, config.tokens_per_minute),
        log_contents=config.log_contents,
    )
    clash = set(names) & set(llm.engine.adapters)
    if clash:
        raise ValueError(f"lora names {clash.pop()!r}, which is the model's own name here")
    return Server(
        config=config,
        tokenizer=llm.tokenizer,
        chat_format=llm.chat_format,
        driver=driver,
        model_names=names,
        max_model_len=llm.max_model_len,
        metrics=metrics,
        compiler=GrammarCompiler(
            llm.tokenizer,
            timeout=config.grammar_timeout,
            max_source=config.bytes_of("max_grammar"),
            grammars=llm.engine.grammars,
        ),
        answer_format=None if llm.chat_format is None else AnswerFormat.of(llm.tokenizer, llm.chat_format),
        adapters=config.adapters(),
    )


def _warm(server: Server, llm: LLM) -> None:
    """Let structured output read the vocabulary before a request asks for it.

    llguidance keeps the interpreter to itself meanwhile, so that comes before the first request; its process starts beside them.
    """
    compiler = server.compiler
    if compiler is None:
        return
    try:
        llm.engine.grammars.prepare()
    except ValueError as error:
        log.warning("this server has no structured output: %s", error)
        return

    def start() -> None:
        try:
            compiler.start()
        except (ValueError, RuntimeError) as error:
            if not compiler.closed:
                log.warning("structured output is not ready: %s", error)

    threading.Thread(target=start, name="grammars", daemon=True).start()


def _listen(server: Server, keys: Keys, tracing: Tracing, sock: socket.socket, on_ready: Callable[[str], None]) -> int:
    config = server.config
    scheme = "http" if config.tls_cert is None else "https"
    host = f"[{config.host}]" if ":" in config.host else config.host
    url = f"{scheme}://{host}:{sock.getsockname()[1]}"
    app = create_app(server, keys=keys, tracing=tracing)
    listener = Listener(
        app,
        server.driver,
        config,
        lambda: on_ready(f"{server.model_name} ({server.max_model_len} tokens of context) is served at {url}"),
    )
    sys.setswitchinterval(SWITCH_INTERVAL)
    server.driver.start()
    listener.run(sockets=[sock])
    return int(listener.stopped_by or signal.SIGTERM)
