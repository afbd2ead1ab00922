"""POST /v1/responses, the stateless part of it: every request brings its conversation, and no response is kept.

In: a ResponsesRequest. Out: a response, or its events as they come. What asks for stored responses, for tools that the server
would run, or for work in the background is refused by responses_protocol.py.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from qwenkit.serve.api.foreign import chat_request, in_words_of, json_response, named_event, respond
from qwenkit.serve.api.prepare import prepare, prompt_ids
from qwenkit.serve.api.prompt import off_loop
from qwenkit.serve.api.responses_events import ResponseWriter
from qwenkit.serve.api.responses_protocol import InputTokensRequest, ResponsesRequest, chat_fields
from qwenkit.serve.body import JsonRoute
from qwenkit.serve.server import Server, the_server

router = APIRouter(tags=["OpenAI"], route_class=JsonRoute)
_NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}


@router.post("/v1/responses/input_tokens", response_class=Response)
async def count_input_tokens(
    body: InputTokensRequest, http: Request, server: Annotated[Server, Depends(the_server)]
) -> Response:
    """How many tokens the prompt of such a response has, also one that is a little too long to be answered."""
    with in_words_of(_NAMES):
        ids = await off_loop(server, http, lambda: prompt_ids(server, chat_request(chat_fields, body)))
    return json_response({"object": "response.input_tokens", "input_tokens": len(ids)})


@router.post("/v1/responses", response_class=Response)
async def create_response(
    body: ResponsesRequest, http: Request, server: Annotated[Server, Depends(the_server)]
) -> Response:
    """Answer a conversation."""
    with in_words_of(_NAMES):
        prepared = await prepare(server, lambda: chat_request(chat_fields, body), http)
    params = prepared.params.with_defaults(server.driver.engine.defaults)
    writer = ResponseWriter(body, prepared.model, params)
    named_event({"type": "", "response": [writer.whole()]})  # what it repeats of the request can be written
    return await respond(server, prepared, http, writer, stream=bool(body.stream))
