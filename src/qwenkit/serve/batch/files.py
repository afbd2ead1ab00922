"""/v1/files: upload, list, look at, fetch and delete the files of the key that asks.

In: uploads for batches (purpose `batch`), ids. Out: OpenAI's file objects, and contents. A file is stored under an id made
here; the name that its sender gave it is only shown. Somebody else's file is answered like one that never was.
"""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse

from qwenkit.serve.batch.lines import place, private
from qwenkit.serve.batch.rows import FileRow, NewFile, new_id
from qwenkit.serve.batch.service import Batches, owner, the_batches
from qwenkit.serve.batch.upload import Form, receive
from qwenkit.serve.errors import ApiError

router = APIRouter()

PURPOSE = "batch"
KEEP = 30 * 86400  # seconds that an upload lives where it does not say
_UPLOAD = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"const": PURPOSE}},
}
TheBatches = Annotated[Batches, Depends(the_batches)]


def no_file(file_id: str, param: str = "file_id") -> ApiError:
    return ApiError(404, f"there is no file {file_id[:80]!r}", param=param, code="not_found")


async def find(batches: Batches, file_id: str, param: str = "file_id") -> FileRow:
    """The file of that id that belongs to the asking key. Raises ApiError 404."""
    row = await batches.call("file", owner(), file_id)
    if row is None:
        raise no_file(file_id, param)
    assert isinstance(row, FileRow)
    return row


@router.post(
    "/v1/files",
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _UPLOAD}}}},
)
async def upload(request: Request, batches: TheBatches) -> dict[str, Any]:
    """Keep an input file for batches; it is removed after 30 days, or after `expires_after[seconds]`."""
    who, worker = owner(), await batches.worker()
    limit = batches.limits.max_file_bytes
    await batches.make_room(who)
    file_id = new_id("file-")
    target = worker.store.path(file_id)
    part = target.with_name(file_id + ".part")

    async def room(size: int) -> None:
        if size > limit:
            raise ApiError(413, f"the file is longer than {limit} bytes", param="file", code="file_too_large")
        before = batches.receiving[file_id][1]
        await batches.make_room(who, size - before)
        batches.receiving[file_id] = (who, size)

    batches.receiving[file_id] = (who, 0)
    file = private(part)
    try:
        form = await receive(request, file, room)
        seconds = _checked(form)
        await worker.call(place, file, part, target)
        new = NewFile(file_id, form.filename or "upload.jsonl", form.size)
        try:
            row = await worker.call(worker.store.add_file, who, PURPOSE, new, seconds)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
    finally:
        del batches.receiving[file_id]
        file.close()
        part.unlink(missing_ok=True)
    shown: dict[str, Any] = row.public()
    return shown


def _checked(form: Form) -> int:
    """Seconds that the file lives. Raises ApiError 400 for fields that are missing, unknown or wrong."""
    if form.filename is None:
        raise ApiError(400, "file is missing", param="file", code="missing_required_parameter")
    fields = dict(form.fields)
    purpose = fields.pop("purpose", None)
    if purpose != PURPOSE:
        given = "missing" if purpose is None else repr(purpose[:80])
        raise ApiError(400, f"purpose is {given}, allowed is {PURPOSE!r}", param="purpose", code="invalid_value")
    anchor, seconds = fields.pop("expires_after[anchor]", None), fields.pop("expires_after[seconds]", None)
    if fields:
        names = ", ".join(sorted(fields))
        raise ApiError(400, f"unknown field: {names[:200]}", param=min(fields)[:80], code="unknown_parameter")
    if anchor is None and seconds is None:
        return KEEP
    if anchor != "created_at" or seconds is None or not seconds.isdecimal() or len(seconds) > 8:
        raise ApiError(
            400,
            "expires_after needs anchor 'created_at' and a number of seconds",
            param="expires_after",
            code="invalid_value",
        )
    return lifetime(int(seconds), "expires_after.seconds")


def lifetime(seconds: int, param: str) -> int:
    """`seconds` if a file may live that long. Raises ApiError 400."""
    if not 3600 <= seconds <= KEEP:
        raise ApiError(400, f"{param} is {seconds}, allowed is 3600 to {KEEP}", param=param, code="invalid_value")
    return seconds


@router.get("/v1/files")
async def list_files(
    batches: TheBatches,
    purpose: str | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """The key's files, newest first, beyond the one that `after` names."""
    beyond = (await find(batches, after, "after")).seq if after else None
    rows = await batches.call("files", owner(), purpose, beyond, limit + 1, order == "desc")
    return page(rows, limit)


def page(rows: list[Any], limit: int) -> dict[str, Any]:
    """OpenAI's list object of up to `limit` of the rows; one more than that says that there are more."""
    shown = [row.public() for row in rows[:limit]]
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return {"object": "list", "data": shown, **ends, "has_more": len(rows) > limit}


@router.get("/v1/files/{file_id}")
async def retrieve_file(file_id: str, batches: TheBatches) -> dict[str, Any]:
    return (await find(batches, file_id)).public()


@router.get("/v1/files/{file_id}/content", response_class=FileResponse)
async def file_content(file_id: str, batches: TheBatches) -> FileResponse:
    row = await find(batches, file_id)
    path = (await batches.worker()).store.path(row.id)
    if not path.is_file():
        raise no_file(file_id)
    headers = {"X-Content-Type-Options": "nosniff"}
    return FileResponse(path, media_type="application/octet-stream", filename=row.filename, headers=headers)


@router.delete("/v1/files/{file_id}")
async def delete_file(file_id: str, batches: TheBatches) -> dict[str, Any]:
    """Delete a file; 409 while a batch that is not finished reads it."""
    row = await find(batches, file_id)
    if not await batches.call("delete_file", row.owner, row.id):
        raise ApiError(
            409, f"a batch that is not finished reads {row.id}, cancel it first", param="file_id", code="file_in_use"
        )
    return {"id": row.id, "object": "file", "deleted": True}
