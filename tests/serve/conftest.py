"""Servers for tests: a scripted or a real tiny engine behind uvicorn on a loopback port, in a thread."""

from __future__ import annotations

import contextlib
import http.client
import importlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI

from qwenkit.serve.app import create_app
from qwenkit.serve.config import ServeConfig
from qwenkit.serve.driver import Driver
from qwenkit.serve.limits import MinuteLimits
from qwenkit.serve.listener import Listener, bind
from qwenkit.serve.metrics import Metrics
from qwenkit.serve.server import Server
from qwenkit.text.chat import ChatFormat, JinjaChat
from qwenkit.text.tokenizer import Tokenizer
from tests.serve.scripted import ScriptedEngine, Scripts
from tests.tiny_models import CHAT_TEMPLATE, write_tokenizer

MODEL = "tiny"
PATIENCE = 60.0  # seconds after which a test gives up; only one that fails takes them
HTTP: dict[str, Any] = {"timeout": PATIENCE, "verify": False}  # reading certificates takes 40 ms for each client


@dataclass
class LiveServer:
    """`url` has no /v1 at its end. `engine` is the one behind it, scripted unless the test brought another."""

    url: str
    app: FastAPI
    server: Server
    engine: Any
    listener: Listener

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return httpx.get(self.url + path, **(HTTP | kwargs))

    def post(self, path: str, json: Any = None, **kwargs: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=json, **(HTTP | kwargs))


MakeServer = Callable[..., Server]
StartServer = Callable[..., LiveServer]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.from_folder(folder)


@pytest.fixture
def make_server(tokenizer: Tokenizer, tmp_path: Path) -> Iterator[MakeServer]:
    """make_server(scripts, engine=, tokenizer=, chat_format=, **settings of ServeConfig) -> Server, driver not started.

    Other fields of Server are given by `server_fields`.
    """
    with servers(tokenizer, tmp_path) as make:
        yield make


@contextlib.contextmanager
def servers(tokenizer: Tokenizer, folder: Path) -> Iterator[MakeServer]:
    """What the fixture `make_server` gives, for fixtures of wider scope."""
    compilers: list[Any] = []

    def make(
        scripts: Scripts = ("Hello!",),
        *,
        engine: Any = None,
        tokenizer: Tokenizer = tokenizer,
        chat_format: ChatFormat | None = None,
        server_fields: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Server:
        config = ServeConfig(**({"port": 0, "state_dir": str(folder / "state")} | settings))
        engine = engine or ScriptedEngine(tokenizer, scripts)
        chat_format = chat_format or JinjaChat(tokenizer, CHAT_TEMPLATE)
        metrics = Metrics(config.metrics_prefix, MODEL)
        driver = Driver(
            engine,
            max_queued=config.max_queued,
            max_queued_tokens=config.max_queued_tokens,
            stall_timeout=config.stall_timeout,
            metrics=metrics,
            limits=MinuteLimits(config.requests_per_minute, config.tokens_per_minute),
            log_contents=config.log_contents,
        )
        fields: dict[str, Any] = {
            "config": config,
            "tokenizer": tokenizer,
            "chat_format": chat_format,
            "driver": driver,
            "model_names": config.served_model_name or (MODEL,),
            "max_model_len": engine.max_model_len,
            "metrics": metrics,
        }
        with contextlib.suppress(ModuleNotFoundError):
            answer = importlib.import_module("qwenkit.text.answer")
            fields["answer_format"] = answer.AnswerFormat.of(tokenizer, chat_format)
        with contextlib.suppress(ModuleNotFoundError):
            grammar = importlib.import_module("qwenkit.engine.grammar_compiler")
            fields["compiler"] = grammar.GrammarCompiler(tokenizer, timeout=PATIENCE)
            compilers.append(fields["compiler"])
        return Server(**(fields | (server_fields or {})))

    yield make
    for compiler in compilers:
        compiler.close()


@pytest.fixture
def live_server(make_server: MakeServer) -> Iterator[StartServer]:
    """live_server(...) -> LiveServer: make_server's arguments; runs until the test is over."""
    with contextlib.ExitStack() as stack:

        def start(*args: Any, **kwargs: Any) -> LiveServer:
            server = make_server(*args, **kwargs)
            return stack.enter_context(running(server))

        yield start


@contextlib.contextmanager
def running(server: Server, *, app: FastAPI | None = None) -> Iterator[LiveServer]:
    """A Server behind its Listener in a thread, on a free loopback port."""
    web = Listener(app or create_app(server), server.driver, server.config, lambda: None)
    sock = bind("127.0.0.1", 0)
    server.driver.start()
    thread = threading.Thread(target=web.run, args=([sock],), name="uvicorn", daemon=True)
    thread.start()
    deadline = time.monotonic() + PATIENCE
    while not web.started:
        assert thread.is_alive(), "the server did not start"
        assert time.monotonic() < deadline, "the server took too long to start"
        time.sleep(0.005)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    try:
        yield LiveServer(url, web.config.app, server, server.driver.engine, web)  # type: ignore[arg-type]
    finally:
        gate = getattr(server.driver.engine, "gate", None)
        if gate is not None:
            gate.set()
        web.should_exit = True
        thread.join(PATIENCE)
        server.driver.stop()
        assert not thread.is_alive(), "the server did not stop"


@contextlib.contextmanager
def asking(url: str, body: dict[str, Any]) -> Iterator[None]:
    """POST a body and read nothing of the answer; the connection is closed at the end of the block."""
    address = urlsplit(url)
    with contextlib.closing(http.client.HTTPConnection(str(address.hostname), address.port)) as connection:
        connection.request("POST", address.path, json.dumps(body), {"Content-Type": "application/json"})
        yield


def wait_until(holds: Callable[[], bool], seconds: float = PATIENCE, why: str = "") -> None:
    """Wait for something that another thread brings about."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, why or "it did not come true in time"
        time.sleep(0.005)
