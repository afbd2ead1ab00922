"""POST /v1/messages and /v1/messages/count_tokens: the API of Anthropic's clients.

In: a MessagesRequest. Out: a message, or its events as they come; errors have Anthropic's shape (errors.py). The headers
x-api-key and anthropic-version are accepted, the latter without effect: there is one version of this API here.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from qwenkit.serve.api.foreign import chat_request, in_words_of, json_response, respond
from qwenkit.serve.api.messages_events import PATH, MessageWriter
from qwenkit.serve.api.messages_protocol import CountTokensRequest, MessagesRequest, chat_fields
from qwenkit.serve.api.prepare import prepare, prompt_ids
from qwenkit.serve.api.prompt import off_loop
from qwenkit.serve.body import JsonRoute
from qwenkit.serve.server import Server, the_server

router = APIRouter(tags=["Anthropic"], route_class=JsonRoute)
_NAMES = {"response_format": "output_config.format", "stop": "stop_sequences"}


@router.post(PATH, response_class=Response)
async def create_message(
    body: MessagesRequest, http: Request, server: Annotated[Server, Depends(the_server)]
) -> Response:
    """Answer a conversation. A max_tokens beyond the context's room is cut to it, as clients ask for more than they need."""
    with in_words_of(_NAMES):
        prepared = await prepare(server, lambda: chat_request(chat_fields, body), http, clip=True)
    writer = MessageWriter(prepared.model, body.stop_sequences or ())
    return await respond(server, prepared, http, writer, stream=body.stream)


@router.post(PATH + "/count_tokens", response_class=Response)
async def count_tokens(
    body: CountTokensRequest, http: Request, server: Annotated[Server, Depends(the_server)]
) -> Response:
    """How many tokens the prompt of such a message has, also one that is a little too long to be answered."""
    with in_words_of(_NAMES):
        ids = await off_loop(server, http, lambda: prompt_ids(server, chat_request(chat_fields, body)))
    return json_response({"input_tokens": len(ids)})
