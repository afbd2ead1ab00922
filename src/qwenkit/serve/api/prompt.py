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
from qwenkit.text.answer import THINK, THINK_END
from qwenkit.text.chat_qwen1 import Qwen1Chat, in_turn
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
    """Ids of a conversation; to continue its last message they end in exactly that message's text. Raises ApiError."""
    if server.chat_format is None:
        raise ApiError(
            400,
            "the model has no chat template: use /v1/completions, or start the server with --chat-template",
            param="messages",
        )
    # Templates may leave out what the assistant thought or said, but nothing else.
    check_length(server, sum(len(one["content"] or "") for one in messages if one["role"] != "assistant"), "messages")
    begun = messages[-1] if continue_final_message else None
    if server.config.strict and isinstance(server.chat_format, Qwen1Chat) and len(in_turn(messages)) < len(messages):
        raise ApiError(
            400,
            "messages: Qwen-1 takes one system message first, then user and assistant in turn",
            param="messages",
            code="invalid_value",
        )
    try:
        ids = server.chat_format.render(
            messages if begun is None else messages[:-1],
            tools=list(tools) or None,
            add_generation_prompt=add_generation_prompt or begun is not None,
            max_tokens=server.max_counted,
            **variables,
        ).ids
        if begun is not None:
            ids = [*ids, *server.tokenizer.encode(_begun(server, ids, begun), max_tokens=server.max_counted)]
    except TokenLimitError as error:
        raise text_too_long(f"more than {error.max_tokens} tokens", server.max_model_len, "messages") from None
    except ValueError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_value") from None
    return ids


def _begun(server: Server, prompt_ids: Sequence[int], message: dict[str, Any]) -> str:
    """The text of an answer that was begun, behind a prompt that may have opened its thought. Control tokens are text."""
    content: str = message["content"] or ""
    thought = message.get("reasoning_content")
    answers = server.answer_format
    is_open = answers is not None and answers.thinks and answers.prompt_thinking(prompt_ids) == "open"
    if thought is None and is_open and content.lstrip().startswith(THINK):
        return content.lstrip().removeprefix(THINK).removeprefix("\n")
    if thought is None and is_open and content and THINK_END not in content:
        thought = ""
    if thought is None:
        return content
    opening = "" if is_open else f"{THINK}\n"
    return f"{opening}{thought}" if not content else f"{opening}{thought}\n{THINK_END}\n\n{content}"


def answer_room(
    server: Server, prompt_ids: Sequence[int], wanted: int | None, param: str, *, clip: bool = False
) -> int:
    """How many tokens the answer may have: those that are wanted, or with `clip` as many of them as there is room for.

    Raises ApiError context_length_exceeded where the prompt, or without `clip` prompt and answer, do not fit.
    """
    room = server.max_model_len - len(prompt_ids)
    if room < 1 or (wanted is not None and wanted > room and not clip):
        raise context_too_long(len(prompt_ids), wanted or 0, server.max_model_len, param)
    return min(wanted or room, room)
