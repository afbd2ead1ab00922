"""Types of Anthropic's /v1/messages, and what a request of that shape means in the OpenAI shape of /v1/chat/completions.

In: the JSON of a request; a field or block that this server has no meaning for is refused by name. Out: `chat_fields`, the
fields of the chat request that asks for the same answer. Conversations are plain text: images and documents are refused.
"""

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from qwenkit.serve.api.foreign import without_nulls
from qwenkit.serve.api.protocol import INT32, MAX_LIST, JsonObject, Label, Name, Text
from qwenkit.serve.body import RequestModel

CallId = Annotated[str, Field(min_length=1, max_length=512)]
_TEXT_ONLY = {
    "image": "an image",
    "document": "a document",
    "search_result": "a search result",
    "container_upload": "an upload",
}


class CacheControl(RequestModel):
    """Accepted and without effect: prefixes are always cached."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(RequestModel):
    type: Literal["text"]
    text: Text
    cache_control: CacheControl | None = None
    citations: Annotated[list[JsonObject], Field(max_length=0, fail_fast=True)] | None = None


class ThinkingBlock(RequestModel):
    """`signature` is not checked: this server gives out empty ones."""

    type: Literal["thinking"]
    thinking: Text
    signature: Text = ""


class RedactedThinkingBlock(RequestModel):
    """Thinking that only the service that wrote it can read; it is left out of the prompt."""

    type: Literal["redacted_thinking"]
    data: Text


class ToolUseBlock(RequestModel):
    type: Literal["tool_use"]
    id: CallId
    name: Name
    input: JsonObject
    cache_control: CacheControl | None = None
    caller: JsonObject | None = None


def _as_blocks(content: Any) -> Any:
    """Content that is one text, as the list with one text block that it stands for."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _readable(block: Any) -> Any:
    kind = block.get("type") if isinstance(block, dict) else None
    if isinstance(kind, str) and kind in _TEXT_ONLY:
        raise PydanticCustomError(
            "text_only", "{what} was given, but this model reads only text", {"what": _TEXT_ONLY[kind]}
        )
    return without_nulls(block)


_Text = Annotated[TextBlock, BeforeValidator(_readable, json_schema_input_type=TextBlock)]
Texts = Annotated[
    list[_Text],
    Field(max_length=MAX_LIST, fail_fast=True),
    BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextBlock]),
]


class ToolResultBlock(RequestModel):
    type: Literal["tool_result"]
    tool_use_id: CallId
    content: Texts = Field(default_factory=list)
    is_error: bool = False
    cache_control: CacheControl | None = None


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
    content: Blocks


class Tool(RequestModel):
    """A function that the caller runs; tools that Anthropic's own servers run are refused."""

    type: Literal["custom"] | None = None
    name: Name
    description: Text | None = None
    input_schema: JsonObject
    strict: bool | None = None
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = None


def _own_tool(tool: Any) -> Any:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if isinstance(kind, str) and kind != "custom":
        raise PydanticCustomError(
            "client_tools_only",
            "the tool type '{kind}' is not available here, allowed are tools with a name and an input_schema",
            {"kind": kind},
        )
    return tool


_Tool = Annotated[Tool, BeforeValidator(_own_tool, json_schema_input_type=Tool)]


class ToolChoice(RequestModel):
    """auto: the model decides; any: at least one call; tool: this one; none: no call."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool = False


class Thinking(RequestModel):
    """`budget_tokens` is accepted and is no limit: max_tokens covers thinking and answer together."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=1, le=INT32)
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(RequestModel):
    type: Literal["json_schema"]
    schema_: JsonObject = Field(alias="schema")


class OutputConfig(RequestModel):
    """`effort` is accepted and without effect: the models know only thinking or not thinking."""

    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class Metadata(RequestModel):
    user_id: Label | None = None


class CountTokensRequest(RequestModel):
    """What decides the length of a prompt."""

    model: Label
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_LIST, fail_fast=True)]
    system: Texts | None = None
    tools: Annotated[list[_Tool], Field(max_length=MAX_LIST, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None


class MessagesRequest(CountTokensRequest):
    """POST /v1/messages."""

    max_tokens: int = Field(ge=1, le=INT32)
    stop_sequences: Annotated[list[Label], Field(max_length=MAX_LIST, fail_fast=True)] | None = None
    stream: bool = False
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=INT32)
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None


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
        fields["max_tokens"] = request.max_tokens
        fields["stream"] = request.stream
        named = {"temperature": request.temperature, "top_p": request.top_p, "top_k": request.top_k}
        fields |= {name: value for name, value in named.items() if value is not None}
        if request.stop_sequences:
            fields["stop"] = request.stop_sequences
        if request.metadata is not None and request.metadata.user_id is not None:
            fields["user"] = request.metadata.user_id
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
            arguments = json.dumps(block.input, ensure_ascii=False)
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
            if block.tool_use_id not in names:
                raise ValueError(
                    f"messages[{index}].content has a tool_result for tool_use_id {block.tool_use_id!r}, "
                    "but no earlier tool_use has that id"
                )
            result = "".join(part.text for part in block.content)
            yield {
                "role": "tool",
                "tool_call_id": block.tool_use_id,
                "name": names[block.tool_use_id],
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
