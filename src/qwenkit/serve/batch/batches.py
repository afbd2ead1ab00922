"""/v1/batches: create, look at, list and cancel the batches of the key that asks.

In: the id of an input file and what to do with its lines. Out: OpenAI's batch objects; all work is the worker's.
"""

import json
import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import BeforeValidator, Field

from qwenkit.serve.batch.files import PURPOSE, find, lifetime, no_file, page
from qwenkit.serve.batch.rows import BatchRow
from qwenkit.serve.batch.service import Batches, lifespan, owner, the_batches
from qwenkit.serve.body import JsonRoute, RequestModel, Whole, at_most
from qwenkit.serve.caller import caller
from qwenkit.serve.errors import ApiError

router = APIRouter(lifespan=lifespan, route_class=JsonRoute)

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
    BeforeValidator(at_most(16)),
]
_LONGEST = 30 * 86400
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
TheBatches = Annotated[Batches, Depends(the_batches)]


class OutputExpiresAfter(RequestModel):
    anchor: Literal["created_at"]
    seconds: Whole


class BatchRequest(RequestModel):
    """`completion_window` is a whole number and s, m, h or d, up to 30 days; what is not done by then is left out."""

    input_file_id: str
    endpoint: Endpoint
    completion_window: str = Field(examples=["24h"])
    metadata: Metadata | None = None
    output_expires_after: OutputExpiresAfter | None = None

    @property
    def seconds(self) -> int:
        """The window. Raises ApiError 400."""
        match = re.fullmatch(r"([0-9]{1,8})([smhd])", self.completion_window)
        seconds = int(match[1]) * _SECONDS[match[2]] if match else 0
        if not 1 <= seconds <= _LONGEST:
            given = repr(self.completion_window[:80])
            sentence = f"completion_window is {given}, allowed is a time such as 24h, from 1s to 30d"
            raise ApiError(400, sentence, param="completion_window", code="invalid_value")
        return seconds


@router.post("/v1/batches")
async def create_batch(body: BatchRequest, batches: TheBatches) -> dict[str, Any]:
    """Begin a batch over an uploaded file."""
    seconds, lasts = body.seconds, body.output_expires_after
    output_seconds = lifetime(lasts.seconds, "output_expires_after.seconds") if lasts else None
    file = await find(batches, body.input_file_id, "input_file_id")
    if file.purpose != PURPOSE:
        sentence = f"{file.id} has the purpose {file.purpose!r}, allowed is {PURPOSE!r}"
        raise ApiError(400, sentence, param="input_file_id", code="invalid_value")
    limit = batches.limits.key_batches
    if len(await batches.call("open_batches", owner())) >= limit:
        sentence = f"this key has {limit} unfinished batches, which is the most: wait for one, or cancel one"
        raise ApiError(429, sentence, "rate_limit_error", code="too_many_batches", headers={"Retry-After": "60"})
    await batches.make_room(owner())
    metadata = json.dumps(body.metadata) if body.metadata is not None else None
    worker = await batches.worker()
    try:
        row = await worker.call(
            worker.store.create_batch,
            *(file, body.endpoint, body.completion_window, seconds),
            owner_name=caller.get().name,
            metadata=metadata,
            output_seconds=output_seconds,
        )
    except LookupError:  # deleted since it was found
        raise no_file(file.id, "input_file_id") from None
    worker.wake()
    shown: dict[str, Any] = row.public()
    return shown


async def _find(batches: Batches, batch_id: str, param: str = "batch_id") -> BatchRow:
    row = await batches.call("batch", owner(), batch_id)
    if row is None:
        raise ApiError(404, f"there is no batch {batch_id[:80]!r}", param=param, code="not_found")
    assert isinstance(row, BatchRow)
    return row


@router.get("/v1/batches")
async def list_batches(
    batches: TheBatches,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> dict[str, Any]:
    """The key's batches, newest first, beyond the one that `after` names."""
    beyond = (await _find(batches, after, "after")).seq if after else None
    return page(await batches.call("batches", owner(), beyond, limit + 1), limit)


@router.get("/v1/batches/{batch_id}")
async def retrieve_batch(batch_id: str, batches: TheBatches) -> dict[str, Any]:
    return (await _find(batches, batch_id)).public()


@router.post("/v1/batches/{batch_id}/cancel")
async def cancel_batch(batch_id: str, batches: TheBatches) -> dict[str, Any]:
    """Stop a batch; what is done so far comes as its output. 409 for a batch that is finished, or about to be."""
    row = await _find(batches, batch_id)
    if not await batches.call("cancel", row.seq):
        row = await _find(batches, batch_id)
        if row.status not in ("cancelling", "cancelled"):
            sentence = f"{row.id} is {row.status}, only a batch that is validating or in progress can be cancelled"
            raise ApiError(409, sentence, param="batch_id", code="invalid_state")
    (await batches.worker()).wake()
    return (await _find(batches, batch_id)).public()
