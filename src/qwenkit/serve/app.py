"""The app: routes, doors and error shapes around a Server.

In: a Server. Out: an ASGI app that uvicorn, or a test, runs. The doors (access.py) stand outside of the routes in the order in
which a request meets them.
"""

from __future__ import annotations

import importlib
import importlib.util

from fastapi import FastAPI

from qwenkit.serve.errors import install_handlers
from qwenkit.serve.server import Server

ROUTERS = (
    "api.chat",
    "api.completions",
    "api.tokens",
    "api.messages",
    "api.responses",
    "batch.files",
    "batch.batches",
    "page.page",
)


def create_app(server: Server) -> FastAPI:
    """All routes of the API around `server`, whose driver the caller starts and stops."""
    app = FastAPI(title="qwenkit", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.server = server
    install_handlers(app)
    for name in ROUTERS:
        module = f"qwenkit.serve.{name}"
        parent = module.rpartition(".")[0]
        if importlib.util.find_spec(parent) is None or importlib.util.find_spec(module) is None:
            continue
        app.include_router(importlib.import_module(module).router)
    return app
