"""Routes that load and unload LoRA adapters while the server runs. They need the admin key.

In: a name, and the folder on this machine that the adapter lies in. Out: 200, and the name can stand as `model` in requests; or
why it cannot.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import Field

from qwenkit.serve.body import JsonRoute, RequestModel
from qwenkit.serve.errors import ApiError
from qwenkit.serve.server import Server, the_server

router = APIRouter(route_class=JsonRoute)
TheServer = Annotated[Server, Depends(the_server)]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")


class LoadAdapter(RequestModel):
    lora_name: str = Field(max_length=128)
    lora_path: str = Field(max_length=4096)


class UnloadAdapter(RequestModel):
    lora_name: str = Field(max_length=128)


@router.post("/v1/load_lora_adapter")
async def load(body: LoadAdapter, server: TheServer) -> dict[str, str]:
    """Read an adapter between two steps of the engine."""
    name, path = body.lora_name, Path(body.lora_path)
    if not _NAME.fullmatch(name):
        raise ApiError(400, f"lora_name is {name!r}, allowed are letters, digits and ._:/-", param="lora_name")
    if name in server.adapters or name in server.model_names:
        raise ApiError(400, f"lora_name is {name!r}, which is served already", param="lora_name")
    if "\0" in body.lora_path or not path.is_dir():
        raise ApiError(400, f"lora_path is {body.lora_path!r}, which is not a folder here", param="lora_path")
    try:
        await server.driver.call(lambda engine: engine.load_adapter(name, path))
    except (ValueError, OSError) as error:
        raise ApiError(400, str(error), param="lora_path") from None
    server.adapters[name] = str(path)
    return {"message": f"adapter {name} is loaded"}


@router.post("/v1/unload_lora_adapter")
async def unload(body: UnloadAdapter, server: TheServer) -> dict[str, str]:
    """Forget an adapter that no request uses."""
    name = body.lora_name
    if name not in server.adapters:
        raise ApiError(404, f"adapter {name!r} is not served here", param="lora_name", code="model_not_found")
    try:
        await server.driver.call(lambda engine: engine.unload_adapter(name))
    except ValueError as error:
        raise ApiError(409, str(error), param="lora_name") from None
    del server.adapters[name]
    return {"message": f"adapter {name} is unloaded"}
