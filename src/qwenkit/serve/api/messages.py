"""POST /v1/messages and /v1/messages/count_tokens: the API of Anthropic's clients.

In: a MessagesRequest. Out: a message, or its events as they come; errors have Anthropic's shape (errors.py). The headers
x-api-key and anthropic-version are accepted, the latter without effect: there is one version of this API here.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from qwenkit.serve.api.conversation import plain_messages, tool_use
from qwenkit.serve.api.foreign import Events, answer, as_json, chat_request, in_words_of, named_event, on_the_wire
from qwenkit.serve.api.messages_events import MessageWriter
from qwenkit.serve.api.messages_protocol import CountTokensRequest, MessagesRequest, chat_fields
from qwenkit.serve.api.prepare import Prepared, off_loop, prepare, render, template_variables
from qwenkit.serve.api.protocol import ChatRequest
from qwenkit.serve.api.stream import EventStream
from qwenkit.serve.errors import ApiError
from qwenkit.serve.server import Server, the_server

router = APIRouter(tags=["Anthropic"])
PATH = "/v1/messages"
_NAMES = {"response_format": "output_config.format", "stop": "stop_sequences"}


@router.post(PATH, response_class=Response)
async def create_message(
    body: MessagesRequest, http: Request, server: Annotated[Server, Depends(the_server)]
) -> Response:
    """Answer a conversation. A max_tokens beyond the context's room is cut to it, as clients ask for more than they need."""
    request = chat_request(chat_fields, body)
    with in_words_of(_NAMES):
        prepared = await prepare(server, request, http, clip=True)
    writer = MessageWriter(prepared.model, body.stop_sequences or ())
    steps = _steps(server, prepared, http, writer)
    if body.stream:
        return EventStream(on_the_wire(await anext(steps), steps), _error_event)
    async for _ in steps:
        pass
    return _json(writer.message())


@router.post(PATH + "/count_tokens", response_class=Response)
async def count_tokens(
    body: CountTokensRequest, http: Request, server: Annotated[Server, Depends(the_server)]
) -> Response:
    """How many tokens the prompt of such a message has, also one that is too long to be answered."""
    request = chat_request(chat_fields, body)
    server.adapter_of(request.model)
    with in_words_of(_NAMES):
        ids = await off_loop(http, _prompt_ids, server, request)
    return _json({"input_tokens": len(ids)})


def _prompt_ids(server: Server, request: ChatRequest) -> list[int]:
    return render(
        server,
        plain_messages(request.messages),
        tools=tool_use(request).tools,
        variables=template_variables(request),
        continue_final_message=request.continue_final_message,
    )


async def _steps(
    server: Server, prepared: Prepared, http: Request, writer: MessageWriter
) -> AsyncGenerator[Events, None]:
    """The events that each step of the engine makes due; the message is written on the way."""
    started = False
    async for found, delta, usage in answer(server, prepared, http):
        out: Events = []
        if not started:
            started = True
            out += writer.start(usage)
        out += writer.push(found)
        if delta.finish_reason is not None:
            out += writer.finish(delta.finish_reason, delta.stop_reason, usage)
        if out:
            yield out


def _error_event(error: ApiError) -> bytes:
    return named_event(error.body(PATH))


def _json(value: dict[str, Any]) -> Response:
    return Response(as_json(value), media_type="application/json")
