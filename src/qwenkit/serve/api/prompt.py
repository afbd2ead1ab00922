"""From the text or the messages of a request to prompt token ids.

In: what a client wrote, of any length. Out: ids, or ApiError for what cannot fit the context: characters are counted before a
text is tokenized, tokens while it is. Long requests do this in a thread, callers in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastapi import Request

from qwenkit.serve.api.protocol import ChatRequest, TemplateArguments
from qwenkit.serve.body import INLINE_BYTES
from qwenkit.serve.caller import caller
from qwenkit.serve.errors import ApiError, context_too_long, text_too_long
from qwenkit.serve.server import Server
from qwenkit.text.tokenizer import TokenLimitError

R = TypeVar("R")


async def off_loop(server: Server, http: Request, function: Callable[[], R]) -> R:
    """The function's result, computed in a thread when the request is long or does not say how long it is."""
    length = http.headers.get("content-length", "")
    if length.isdigit() and int(length) <= INLINE_BYTES:
        return function()
    result: R = await server.prompts.run(caller.get().namespace, function)
    return result


def encode(server: Server, text: str, param: str) -> list[int]:
    """Ids of a bare prompt, control tokens written in it included. Raises ApiError for one far longer than the context."""
    check_length(server, len(text), param)
    try:
        return server.tokenizer.encode_document(text, allow_special=True, max_tokens=server.max_counted)
    except TokenLimitError as error:
        raise text_too_long(f"more than {error.max_tokens} tokens", server.max_model_len, param) from None
    except ValueError as error:
        raise ApiError(400, f"{param}: {error}", param=param, code="invalid_value") from None


def check_length(server: Server, num_chars: int, param: str) -> None:
    """Raises ApiError for a text that cannot fit the context even if each of its tokens is the longest one."""
    if num_chars > server.max_prompt_chars:
        raise text_too_long(f"{num_chars} characters", server.max_model_len, param)


def template_variables(request: ChatRequest) -> dict[str, Any]:
    """What the request tells the chat template. chat_template_kwargs counts more than enable_thinking, that more than effort."""
    variables: dict[str, Any] = {}
    if request.reasoning_effort is not None:
        variables["enable_thinking"] = request.reasoning_effort != "none"
    if request.enable_thinking is not None:
        variables["enable_thinking"] = request.enable_thinking
    return variables | template_arguments(request.chat_template_kwargs)


def template_arguments(given: TemplateArguments | None) -> dict[str, Any]:
    return {} if given is None else given.model_dump(exclude_none=True)


def render(
    server: Server,
    messages: Sequence[dict[str, Any]],
    *,
    tools: Sequence[dict[str, Any]],
    variables: dict[str, Any],
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> list[int]:
    """Ids of a conversation; to continue its last message they end where that message's text ends. Raises ApiError."""
    if server.chat_format is None:
        raise ApiError(
            400,
            "the model has no chat template: use /v1/completions, or start the server with --chat-template",
            param="messages",
        )
    # Templates may leave out what the assistant thought or said, but nothing else.
    check_length(server, sum(len(one["content"] or "") for one in messages if one["role"] != "assistant"), "messages")
    try:
        rendered = server.chat_format.render(
            messages,
            tools=list(tools) or None,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            max_tokens=server.max_counted,
            **variables,
        )
    except TokenLimitError as error:
        raise text_too_long(f"more than {error.max_tokens} tokens", server.max_model_len, "messages") from None
    except ValueError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_value") from None
    if not continue_final_message:
        return rendered.ids
    mask = rendered.mask or []
    last = max((index for index, said in enumerate(mask) if said), default=None)
    if last is None:
        raise ApiError(
            400, "continue_final_message: the chat template does not show where the message ends", param="messages"
        )
    return rendered.ids[:last]  # without the token that ends the turn


def answer_room(
    server: Server, prompt_ids: Sequence[int], wanted: int | None, param: str, *, clip: bool = False
) -> int:
    """How many tokens the answer may have. Raises ApiError context_length_exceeded where prompt and answer do not fit."""
    room = server.max_model_len - len(prompt_ids)
    if room < 1 or (wanted is not None and wanted > room and not clip):
        raise context_too_long(len(prompt_ids), wanted or 0, server.max_model_len, param)
    return min(wanted or room, room)
