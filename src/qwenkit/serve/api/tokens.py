"""POST /tokenize and /detokenize, in vLLM's shapes.

In: a text, a conversation or token ids. Out: ids with their number and the model's context, or the text of ids. A text is read as
/v1/completions reads its prompt, a conversation as /v1/chat/completions does; either may be up to four contexts long.
"""

from __future__ import annotations

from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from qwenkit.serve.api.conversation import plain_messages, plain_tool
from qwenkit.serve.api.prepare import count_tools
from qwenkit.serve.api.prompt import encode, off_loop, render, template_arguments
from qwenkit.serve.api.protocol import DetokenizeRequest, TokenizeRequest
from qwenkit.serve.body import JsonRoute
from qwenkit.serve.server import Server, the_server

router = APIRouter(route_class=JsonRoute)


@router.post("/tokenize", response_model=None)
async def tokenize(body: TokenizeRequest, http: Request, server: Annotated[Server, Depends(the_server)]) -> Response:
    """Token ids of a text or a conversation."""
    server.adapter_of(body.model)
    return await off_loop(server, http, lambda: _json(_tokenized(server, body)))


@router.post("/detokenize", response_model=None)
async def detokenize(
    body: DetokenizeRequest, http: Request, server: Annotated[Server, Depends(the_server)]
) -> Response:
    """Text of token ids, control tokens included."""
    server.adapter_of(body.model)
    return await off_loop(
        server, http, lambda: _json({"prompt": server.tokenizer.decode(body.tokens, skip_special=False)})
    )


def _tokenized(server: Server, body: TokenizeRequest) -> dict[str, Any]:
    if body.prompt is not None:
        ids = encode(server, body.prompt, "prompt")
    else:
        count_tools(server, body.tools or ())
        ids = render(
            server,
            plain_messages(body.messages or ()),
            tools=[plain_tool(tool) for tool in body.tools or ()],
            variables=template_arguments(body.chat_template_kwargs),
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
        )
    names = None
    if body.return_token_strs:
        names = [server.tokenizer.token_bytes(token).decode("utf-8", "replace") for token in ids]
    return {"count": len(ids), "max_model_len": server.max_model_len, "tokens": ids, "token_strs": names}


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
