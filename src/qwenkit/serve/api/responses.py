"""POST /v1/responses, the stateless part of it: every request brings its conversation, and no response is kept.

In: a ResponsesRequest. Out: a response, or its events as they come. What asks for stored responses, for tools that the server
would run, or for work in the background is refused by responses_protocol.py.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from qwenkit.serve.api.foreign import Events, answer, as_json, chat_request, in_words_of, named_event, on_the_wire
from qwenkit.serve.api.prepare import Prepared, prepare
from qwenkit.serve.api.responses_events import ResponseWriter
from qwenkit.serve.api.responses_protocol import ResponsesRequest, chat_fields
from qwenkit.serve.api.stream import EventStream
from qwenkit.serve.errors import ApiError
from qwenkit.serve.server import Server, the_server

router = APIRouter(tags=["OpenAI"])
_NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}


@router.post("/v1/responses", response_class=Response)
async def create_response(
    body: ResponsesRequest, http: Request, server: Annotated[Server, Depends(the_server)]
) -> Response:
    """Answer a conversation."""
    with in_words_of(_NAMES):
        prepared = await prepare(server, chat_request(chat_fields, body), http)
    params = prepared.params.with_defaults(server.driver.engine.defaults)
    writer = ResponseWriter(body, prepared.model, params)
    named_event({"type": "", "response": [writer.response()]})  # what it repeats of the request can be written
    steps = _steps(server, prepared, http, writer)
    if body.stream:

        def failed(error: ApiError) -> bytes:
            return b"".join(map(named_event, writer.fail(error.message)))

        return EventStream(on_the_wire(await anext(steps), steps), failed)
    async for _ in steps:
        pass
    return Response(as_json(writer.response()), media_type="application/json")


async def _steps(
    server: Server, prepared: Prepared, http: Request, writer: ResponseWriter
) -> AsyncGenerator[Events, None]:
    """The events that each step of the engine makes due; the response is written on the way."""
    started = False
    async for found, delta, usage in answer(server, prepared, http):
        out: Events = []
        if not started:
            started = True
            out += writer.start()
        out += writer.push(found)
        if delta.finish_reason is not None:
            out += writer.finish(delta.finish_reason, usage)
        if out:
            yield out
