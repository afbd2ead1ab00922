"""POST /tokenize and /detokenize, in vLLM's shapes.

In: a text, a conversation or token ids. Out: ids with their number and the model's context, or the text of ids. A text is read as
/v1/completions reads its prompt, a conversation as /v1/chat/completions does.
"""

from __future__ import annotations

from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from qwenkit.serve.api.conversation import plain_messages, plain_tool
from qwenkit.serve.api.prepare import limit, off_loop, render, template_arguments
from qwenkit.serve.api.protocol import DetokenizeRequest, TokenizeRequest
from qwenkit.serve.server import Server, the_server

router = APIRouter()


@router.post("/tokenize", response_model=None)
async def tokenize(body: TokenizeRequest, http: Request, server: Annotated[Server, Depends(the_server)]) -> Response:
    """Token ids of a text or a conversation."""
    server.adapter_of(body.model)
    return _json(await off_loop(http, _tokenized, server, body))


@router.post("/detokenize", response_model=None)
async def detokenize(
    body: DetokenizeRequest, http: Request, server: Annotated[Server, Depends(the_server)]
) -> Response:
    """Text of token ids, control tokens included."""
    server.adapter_of(body.model)
    text = await off_loop(http, server.tokenizer.decode, body.tokens, skip_special=False)
    return _json({"prompt": text})


def _tokenized(server: Server, body: TokenizeRequest) -> dict[str, Any]:
    if body.prompt is not None:
        ids = server.tokenizer.encode_document(body.prompt, allow_special=True)
    else:
        if len(body.tools or ()) > server.config.max_tools:
            raise limit("tools", len(body.tools or ()), server.config.max_tools)
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
