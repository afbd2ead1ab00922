"""Types of Anthropic's /v1/messages, and what a request of that shape means in the OpenAI shape of /v1/chat/completions.

In: the JSON of a request. Out: `chat_fields`, the fields of the chat request that asks for the same answer. Conversations are
plain text: images and documents are refused.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from qwenkit.serve.api import spellings, unsupported
from qwenkit.serve.api.protocol import INT32, MAX_LIST, JsonObject, Label, Maximum, Name, Stops, Text
from qwenkit.serve.body import LeftOut, RequestModel, Unsupported, Whole

_TEXT_ONLY = {
    "image": "an image",
    "document": "a document",
    "search_result": "a search result",
    "container_upload": "an upload",
}


class TextBlock(RequestModel):
    type: Literal["text"]
    text: Text = ""


class ThinkingBlock(RequestModel):
    """Its `signature` is not looked at: this server gives out empty ones."""

    type: Literal["thinking"]
    thinking: Text = ""


class RedactedThinkingBlock(RequestModel):
    """Thinking that only the service that wrote it can read; it is left out of the prompt."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(RequestModel):
    """A call as a model made it: its name is any text."""

    type: Literal["tool_use"]
    id: Text = ""
    name: Text = ""
    input: Any = None


def _as_blocks(content: Any) -> Any:
    """Content that is one text, or holds plain texts, as the list of text blocks that it stands for."""
    if isinstance(content, str):
        content = [content]
    if not isinstance(content, list):
        return content
    return [{"type": "text", "text": block} if isinstance(block, str) else block for block in content]


def _readable(block: Any) -> Any:
    kind = block.get("type") if isinstance(block, dict) else None
    if isinstance(kind, str) and kind in _TEXT_ONLY:
        raise PydanticCustomError(
            "text_only", "{what} was given, but this model reads only text", {"what": _TEXT_ONLY[kind]}
        )
    if kind is None and isinstance(block, dict) and isinstance(block.get("text"), str):
        return {**block, "type": "text"}
    return block


_Text = Annotated[TextBlock, BeforeValidator(_readable, json_schema_input_type=TextBlock)]
Texts = Annotated[
    list[_Text],
    Field(max_length=MAX_LIST, fail_fast=True),
    BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextBlock]),
]


class ToolResultBlock(RequestModel):
    type: Literal["tool_result"]
    tool_use_id: Text = ""
    content: Texts = Field(default_factory=list)
    is_error: bool = False


_AnyBlock = Annotated[
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]
Block = Annotated[_AnyBlock, BeforeValidator(_readable, json_schema_input_type=_AnyBlock)]
Blocks = Annotated[
    list[Block],
    Field(max_length=MAX_LIST, fail_fast=True),
    BeforeValidator(_as_blocks, json_schema_input_type=str | list[_AnyBlock]),
]


class Message(RequestModel):
    role: Literal["user", "assistant", "system"]
    content: Blocks = Field(default_factory=list)


class Tool(RequestModel):
    """A function that the caller runs."""

    name: Name
    description: Text | None = None
    input_schema: JsonObject
    strict: bool | None = None


def _own_tool(tool: Any) -> Any:
    """A tool in Anthropic's shape, also from OpenAI's."""
    if not isinstance(tool, dict) or "input_schema" in tool:
        return tool
    function = spellings.function_tool(tool).get("function")
    if not isinstance(function, dict):
        return tool
    schema = spellings.parameters(function.get("parameters"))
    return {**function, "input_schema": {"type": "object"} if schema is None else schema}


_Tool = Annotated[Tool, BeforeValidator(_own_tool, json_schema_input_type=Tool)]


class ToolChoice(RequestModel):
    """auto: the model decides; any: at least one call; tool: this one; none: no call."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool = False


def _own_choice(choice: Any) -> Any:
    """A tool_choice in Anthropic's shape, also from OpenAI's words."""
    if isinstance(choice, dict) and choice.get("type") in ("auto", "any", "tool", "none"):
        return choice
    plain = spellings.function_choice(choice)
    if isinstance(plain, str):
        plain = {"type": "any" if plain == "required" else plain}
    elif isinstance(plain, dict) and isinstance(plain.get("function"), dict):
        plain = {"type": "tool", "name": plain["function"].get("name")}
    if isinstance(choice, dict) and isinstance(plain, dict) and "disable_parallel_tool_use" in choice:
        plain["disable_parallel_tool_use"] = choice["disable_parallel_tool_use"]
    return plain


class Thinking(RequestModel):
    """Its `budget_tokens` is no limit: max_tokens covers thinking and answer together."""

    type: Literal["enabled", "disabled", "adaptive"]


class OutputFormat(RequestModel):
    type: Literal["json_schema"]
    schema_: JsonObject = Field(alias="schema")


class OutputConfig(RequestModel):
    """Its `effort` is without effect: the models know only thinking or not thinking."""

    format: OutputFormat | None = None


class CountTokensRequest(RequestModel):
    """What decides the length of a prompt."""

    model: Label
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_LIST, fail_fast=True)]
    system: Texts | None = None
    tools: Annotated[list[_Tool], Field(max_length=MAX_LIST, fail_fast=True)] | None = None
    tool_choice: Annotated[ToolChoice, BeforeValidator(_own_choice, json_schema_input_type=ToolChoice)] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    UNSUPPORTED: ClassVar[Mapping[str, Unsupported]] = unsupported.STATE
    WITHOUT_EFFECT: ClassVar[frozenset[str]] = unsupported.WITHOUT_EFFECT_OF_MESSAGES

    @classmethod
    def simplify(cls, body: dict[str, Any], left_out: LeftOut) -> dict[str, Any]:
        if "output_format" in body and "output_config" not in body:  # its name before it had a field of its own
            body = {**body, "output_config": {"format": body["output_format"]}}
            del body["output_format"]
        return super().simplify(spellings.runnable_tools(body, left_out), left_out)


class MessagesRequest(CountTokensRequest):
    """POST /v1/messages."""

    max_tokens: Maximum
    stop_sequences: Stops | None = None
    stream: bool = False
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: Whole | None = Field(default=None, ge=-1, le=INT32)


def chat_fields(request: CountTokensRequest) -> dict[str, Any]:
    """The same request in the shape of /v1/chat/completions, only with fields that were given or follow from the shape.

    Thinking is off unless asked for, as everywhere in this API. Raises ValueError, naming the field, where parts of the
    request contradict each other.
    """
    fields: dict[str, Any] = {"model": request.model, "messages": list(_messages(request))}
    last = fields["messages"][-1]
    if last["role"] == "assistant" and not last.get("tool_calls"):
        fields["continue_final_message"] = True  # the answer goes on where this message breaks off
    if request.tools:
        fields["tools"] = [_tool(tool) for tool in request.tools]
    if request.tool_choice is not None:
        fields |= _tool_choice(request.tool_choice, request.tools or [])
    thinking = "disabled" if request.thinking is None else request.thinking.type
    if thinking != "adaptive":
        fields["chat_template_kwargs"] = {"enable_thinking": thinking == "enabled"}
    if request.output_config is not None and request.output_config.format is not None:
        schema = {"name": "output", "schema": request.output_config.format.schema_, "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if isinstance(request, MessagesRequest):
        if request.max_tokens is not None:
            fields["max_tokens"] = request.max_tokens
        fields["stream"] = request.stream
        named = {"temperature": request.temperature, "top_p": request.top_p, "top_k": request.top_k}
        fields |= {name: value for name, value in named.items() if value is not None}
        if request.stop_sequences:
            fields["stop"] = request.stop_sequences
    return fields


def _messages(request: CountTokensRequest) -> Iterator[dict[str, Any]]:
    messages = request.messages
    first = 0
    system = list(request.system or [])
    while first < len(messages) and messages[first].role == "system":
        system += _texts(messages[first], first)
        first += 1
    if system:
        yield {"role": "system", "content": "\n\n".join(block.text for block in system)}
    if first == len(messages):
        raise ValueError("messages holds only system messages, at least one of the user is needed")
    names: dict[str, str] = {}  # of tools, by the id of the call
    for index in range(first, len(messages)):
        message = messages[index]
        if message.role == "assistant":
            yield _assistant(message, index, names)
        elif message.role == "system":
            yield {"role": "system", "content": "\n\n".join(block.text for block in _texts(message, index))}
        else:
            yield from _user(message, index, names)


def _texts(message: Message, index: int) -> list[TextBlock]:
    for block in message.content:
        if not isinstance(block, TextBlock):
            raise ValueError(f"messages[{index}].content has a {block.type} block, allowed for system is text")
    return [block for block in message.content if isinstance(block, TextBlock)]


def _assistant(message: Message, index: int, names: dict[str, str]) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for block in message.content:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            names[block.id] = block.name
            arguments = json.dumps(block.input or {}, ensure_ascii=False)
            call = {"name": block.name, "arguments": arguments}
            calls.append({"id": block.id, "type": "function", "function": call})
        elif isinstance(block, ToolResultBlock):
            raise ValueError(f"messages[{index}].content has a tool_result block, which belongs into a user message")
    fields: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        fields["reasoning_content"] = "\n".join(thoughts)
    if calls:
        fields["tool_calls"] = calls
    return fields


def _user(message: Message, index: int, names: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Results of tools become messages of their own, in the order of the blocks; the text between them is the user's."""
    texts: list[str] = []
    for block in message.content:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ToolResultBlock):
            if texts:
                yield {"role": "user", "content": "".join(texts)}
                texts = []
            result = "".join(part.text for part in block.content)
            yield {
                "role": "tool",
                "tool_call_id": block.tool_use_id,
                "name": names.get(block.tool_use_id),
                "content": f"Error: {result}" if block.is_error else result,
            }
        else:
            raise ValueError(f"messages[{index}].content has a {block.type} block, which belongs to the assistant")
    if texts or not message.content:
        yield {"role": "user", "content": "".join(texts)}


def _tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _tool_choice(choice: ToolChoice, tools: list[Tool]) -> dict[str, Any]:
    if (choice.name is not None) != (choice.type == "tool"):
        raise ValueError("tool_choice.name is needed with the type 'tool', and not allowed with any other")
    if not tools and choice.type != "none":
        raise ValueError(f"tool_choice is {choice.type!r}, but tools is empty")
    if choice.name is not None and choice.name not in {tool.name for tool in tools}:
        raise ValueError(f"tool_choice.name is {choice.name!r}, which is none of tools")
    given: dict[str, Any] = {"auto": "auto", "any": "required", "none": "none"}
    named = {"type": "function", "function": {"name": choice.name}}
    fields: dict[str, Any] = {"tool_choice": given.get(choice.type, named)} if tools else {}
    if choice.disable_parallel_tool_use:
        fields["parallel_tool_calls"] = False
    return fields
