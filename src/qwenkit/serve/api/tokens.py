"""POST /tokenize and /detokenize and GET /tokenizer_info, in vLLM's shapes.

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
from qwenkit.text.chat import JinjaChat

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


@router.get("/tokenizer_info", response_model=None)
async def tokenizer_info(server: Annotated[Server, Depends(the_server)]) -> Response:
    """The tokens that begin, end and pad a text, and the chat template, as lm-evaluation-harness asks for them."""
    tokenizer, chat = server.tokenizer, server.chat_format
    names = {token: text for text, token in tokenizer.special_tokens.items()}
    ends = [text for text in ("<|im_end|>", "<|endoftext|>") if tokenizer.special_tokens.get(text) in _ends(server)]
    if chat is None:
        ends.reverse()
    return _json(
        {
            "bos_token": names.get(tokenizer.prefix[0]) if tokenizer.prefix else None,
            "eos_token": ends[0] if ends else next((names[token] for token in _ends(server) if token in names), None),
            "pad_token": "<|endoftext|>" if "<|endoftext|>" in tokenizer.special_tokens else None,
            "chat_template": chat.source if isinstance(chat, JinjaChat) else None,
            "model_max_length": server.max_model_len,
            "vocab_size": tokenizer.num_ids,
        }
    )


def _ends(server: Server) -> list[int]:
    return sorted(server.driver.engine.eos_ids)


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
