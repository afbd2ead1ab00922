"""Routes for those who run a server, and the list of models.

/health says whether the engine's loop comes by and can compute, /ready whether new requests are taken too. No route here touches
the engine, so all of them answer while it computes, and while it hangs.
"""

from __future__ import annotations

from datetime import datetime, timezone
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from qwenkit.serve.errors import ApiError
from qwenkit.serve.server import Server, the_server

router = APIRouter()
TheServer = Annotated[Server, Depends(the_server)]


@router.head("/health", include_in_schema=False, response_model=None)
@router.get("/health", response_model=None)
async def health(server: TheServer) -> JSONResponse:
    """200 while the engine's loop comes by and can compute, else 503."""
    return _state(server, server.driver.healthy, "stuck or broken")


@router.head("/ready", include_in_schema=False, response_model=None)
@router.get("/ready", response_model=None)
async def ready(server: TheServer) -> JSONResponse:
    """200 while new requests are taken; 503 also while the server is about to stop."""
    driver = server.driver
    return _state(server, driver.healthy and not driver.draining, "draining" if driver.draining else "stuck or broken")


def _state(server: Server, good: bool, otherwise: str) -> JSONResponse:
    driver = server.driver
    body = {
        "status": "ok" if good else otherwise,
        "heartbeat_age": round(driver.heartbeat_age, 3),
        "running": driver.num_running,
        "waiting": driver.num_waiting,
    }
    return JSONResponse(body, 200 if good else 503)


@router.get("/version")
async def the_version() -> dict[str, str]:
    """Which qwenkit this is."""
    return {"version": version("qwenkit")}


@router.get("/metrics", response_class=Response)
async def metrics(server: TheServer) -> Response:
    """Counts and times in Prometheus' text format."""
    return Response(server.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/models")
async def models(server: TheServer, request: Request) -> dict[str, Any]:
    """What may stand as `model` in a request: the model's names and the adapters' (whose parent is the model)."""
    data = [_model(server, name, request) for name in (*server.model_names, *server.adapters)]
    if "anthropic-version" in request.headers:
        return {"data": data, "has_more": False, "first_id": data[0]["id"], "last_id": data[-1]["id"]}
    return {"object": "list", "data": data}


@router.get("/v1/models/{name:path}")
async def model(name: str, server: TheServer, request: Request) -> dict[str, Any]:
    """One of them; 404 for another."""
    if name not in server.model_names and name not in server.adapters:
        raise ApiError(404, f"model {name!r} is not served here", param="model", code="model_not_found")
    return _model(server, name, request)


def _model(server: Server, name: str, request: Request) -> dict[str, Any]:
    if "anthropic-version" in request.headers:
        created = datetime.fromtimestamp(server.started, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        return {"type": "model", "id": name, "display_name": name, "created_at": created}
    is_adapter = name in server.adapters
    return {
        "id": name,
        "object": "model",
        "created": server.started,
        "owned_by": "qwenkit",
        "root": name if is_adapter else server.model_name,
        "parent": server.model_name if is_adapter else None,
        "max_model_len": server.max_model_len,
    }
