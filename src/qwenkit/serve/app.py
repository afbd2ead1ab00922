"""The app: routes, doors and error shapes around a Server.

In: a Server. Out: an ASGI app that uvicorn, or a test, runs. The doors (access.py) stand outside of the routes in the order in
which a request meets them.
"""

from __future__ import annotations

import importlib
import os

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from qwenkit.serve.access import BodyLimit, Envelope, Gate
from qwenkit.serve.body import BodyReader
from qwenkit.serve.errors import DOCUMENTED, install_handlers
from qwenkit.serve.keys import Keys
from qwenkit.serve.server import Server
from qwenkit.serve.tracing import OtlpTracing, Tracing

ROUTERS = (
    "operation",
    "adapters",
    "api.chat",
    "api.completions",
    "api.tokens",
    "api.messages",
    "api.responses",
    "batch.files",
    "batch.batches",
    "page.page",
)


def create_app(server: Server, *, keys: Keys | None = None, tracing: Tracing | None = None) -> FastAPI:
    """All routes of the API around `server`, whose driver the caller starts and stops.

    `keys` are those of the flags, the key file and the environment unless given. Raises ValueError for keys that cannot be used.
    """
    config, metrics = server.config, server.metrics
    if tracing is None:
        tracing = Tracing() if config.otlp_endpoint is None else OtlpTracing(config.otlp_endpoint)
    doors = [Middleware(Envelope, metrics, tracing)]
    if config.cors_origin:
        doors.append(
            Middleware(
                CORSMiddleware,
                allow_origins=config.cors_origin,
                allow_methods=("GET", "POST", "DELETE"),
                allow_headers=("*",),
                expose_headers=("x-request-id", "x-ignored-fields", "retry-after"),
            )
        )
    keys = keys or Keys.of(config, os.environ)
    doors.append(Middleware(Gate, config, keys, server.driver.limits, metrics))
    doors.append(Middleware(BodyLimit, config))
    app = FastAPI(
        title="qwenkit",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=doors,
        responses=DOCUMENTED,
    )
    app.state.server = server
    app.state.keys = keys
    app.state.bodies = BodyReader(server.max_model_len, strict=config.strict)
    app.state.tracing = tracing
    install_handlers(app)
    for name in ROUTERS:
        app.include_router(importlib.import_module(f"qwenkit.serve.{name}").router)
    return app
