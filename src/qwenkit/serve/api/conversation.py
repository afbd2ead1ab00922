"""Messages and tools of a request as the chat formats take them.

In: a ChatRequest, in the newer words (tools) or the older (functions). Out: plain messages, and a ToolUse that says which tools
the model sees and whether it must call one. Pictures, sound and files are refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwenkit.serve.api.protocol import (
    AllowedTools,
    CalledFunction,
    ChatRequest,
    Message,
    NamedFunction,
    NamedTool,
    Part,
    Tool,
)
from qwenkit.serve.errors import ApiError


@dataclass(frozen=True)
class ToolUse:
    """`tools` are what the model sees (OpenAI's shape), empty for none; `choice` is auto, required or, with `named`, a name."""

    tools: tuple[dict[str, Any], ...] = ()
    choice: str = "auto"
    named: bool = False
    parallel: bool = True
    legacy: bool = False  # asked for as functions, answered as function_call

    @property
    def forced(self) -> bool:
        return bool(self.tools) and (self.named or self.choice == "required")


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The conversation in the roles system, user, assistant and tool, without fields that say nothing.

    Raises ApiError naming the message for content that is not text.
    """
    return [_plain(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _plain(message: Message, where: str) -> dict[str, Any]:
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    content = message.content
    plain: dict[str, Any] = {"role": role}
    if isinstance(content, list):
        content = "".join(_text(part, f"{where}.content[{index}]") for index, part in enumerate(content))
    if role == "assistant":
        calls = [_call(call.function, call.id) for call in message.tool_calls or ()]
        if message.function_call is not None:
            calls.append(_call(message.function_call, None))
        if calls:
            plain["tool_calls"] = calls
        reasoning = next(
            (text for text in (message.reasoning_content, message.reasoning) if isinstance(text, str)), None
        )
        if reasoning is not None:
            plain["reasoning_content"] = reasoning
        content = message.refusal if content is None else content
    plain["content"] = content or ""
    if role == "tool":
        call_id = message.tool_call_id if message.tool_call_id is not None else message.id
        if isinstance(call_id, str | int):
            plain["tool_call_id"] = str(call_id)
    if isinstance(message.name, str) and message.name:
        plain["name"] = message.name
    return plain


def _text(part: Part, where: str) -> str:
    if part.type not in ("text", "input_text", "output_text", "refusal"):
        raise _wrong(f"{where} has the type {part.type!r}: this model reads text only", where)
    return (part.refusal if part.type == "refusal" else part.text) or ""


def _call(function: CalledFunction, call_id: str | None) -> dict[str, Any]:
    call: dict[str, Any] = {"type": "function", "function": {"name": function.name, "arguments": function.arguments}}
    return call if call_id is None else {"id": call_id, **call}


def tool_use(request: ChatRequest) -> ToolUse:
    """Which tools the model sees, and what it must do with them. With the choice `none` it sees none.

    Raises ApiError for a choice that names no tool of the request, and for two tools of one name.
    """
    legacy = bool(request.functions)
    tools = [Tool(function=function) for function in request.functions or ()] if legacy else list(request.tools or ())
    field = "functions" if legacy else "tools"
    names = [tool.function.name for tool in tools]
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None:
        raise _wrong(f"{field} has {twice!r} twice, each needs a name of its own", field)
    choice = request.function_call if legacy else request.tool_choice
    field = "function_call" if legacy else "tool_choice"
    if choice == "none" or not tools:
        return ToolUse(legacy=legacy)
    parallel = not legacy and request.parallel_tool_calls is not False
    named = None
    if isinstance(choice, AllowedTools):
        allowed = [tool.function.name for tool in choice.allowed_tools.tools]
        _known(allowed, names, field)
        tools = [tool for tool in tools if tool.function.name in allowed]
        choice = choice.allowed_tools.mode
    elif isinstance(choice, NamedTool):
        named = choice.function.name
    elif isinstance(choice, NamedFunction):
        named = choice.name
    if named is not None:
        _known([named], names, field)
    plain = tuple(plain_tool(tool) for tool in tools)
    # A tool that is named is called once, whatever parallel_tool_calls says: clients that name one read one call.
    return ToolUse(plain, named or str(choice or "auto"), named is not None, parallel and named is None, legacy)


def _known(wanted: Sequence[str], names: Sequence[str], field: str) -> None:
    for name in wanted:
        if name not in names:
            raise _wrong(f"{field} names {name!r}, but the tools are {', '.join(names)}", field)


def plain_tool(tool: Tool) -> dict[str, Any]:
    """Only what the request says: templates print the whole object, and models were trained on it without nulls."""
    return {"type": "function", "function": tool.function.model_dump(exclude_none=True, exclude={"strict"})}


def _wrong(message: str, param: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")
