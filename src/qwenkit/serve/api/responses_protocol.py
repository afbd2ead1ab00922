"""Types of OpenAI's /v1/responses, and what such a request means in the shape of /v1/chat/completions.

In: the JSON of a request. Out: `chat_fields`, the fields of the chat request that asks for the same answer. Nothing is stored
here, so every request brings the whole conversation, and what refers to stored state is refused in one sentence.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from qwenkit.serve.api import spellings, unsupported
from qwenkit.serve.api.protocol import (
    INT32,
    MAX_LIST,
    JsonObject,
    Label,
    LogitBias,
    Maximum,
    Name,
    Seed,
    Stops,
    TemplateArguments,
    Text,
)
from qwenkit.serve.body import LeftOut, RequestModel, Unsupported, Whole, whole, without_nulls

_ITEMS = ("message", "function_call", "function_call_output", "reasoning")
_PARTS = ("input_text", "output_text", "refusal")


def _kind(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return kind if isinstance(kind, str) else None


def _readable(part: Any) -> Any:
    kind = _kind(part)
    if isinstance(part, dict) and (kind == "text" or (kind is None and isinstance(part.get("text"), str))):
        return {**part, "type": "input_text"}  # as chat calls it
    if kind is not None and kind not in _PARTS:
        raise PydanticCustomError(
            "text_only", "a part of the type '{kind}' was given, but this model reads only text", {"kind": kind}
        )
    return part


class InputText(RequestModel):
    type: Literal["input_text"]
    text: Text = ""


class OutputText(RequestModel):
    """A part of an answer of this API, given back as it was."""

    type: Literal["output_text"]
    text: Text = ""


class Refusal(RequestModel):
    type: Literal["refusal"]
    refusal: Text = ""


_AnyPart = Annotated[InputText | OutputText | Refusal, Field(discriminator="type")]
Part = Annotated[_AnyPart, BeforeValidator(_readable, json_schema_input_type=_AnyPart)]


def _as_parts(content: Any) -> Any:
    if isinstance(content, str):
        content = [content]
    if not isinstance(content, list):
        return content
    return [{"type": "input_text", "text": part} if isinstance(part, str) else part for part in content]


Parts = Annotated[
    list[Part],
    Field(max_length=MAX_LIST, fail_fast=True),
    BeforeValidator(_as_parts, json_schema_input_type=str | list[_AnyPart]),
]


class MessageItem(RequestModel):
    type: Literal["message"] = "message"
    role: Literal["user", "system", "developer", "assistant"]
    content: Parts = Field(default_factory=list)


class FunctionCall(RequestModel):
    """A call as a model made it: the name is any text, and the arguments may be no JSON object."""

    type: Literal["function_call"]
    call_id: Text = ""
    name: Text = ""
    arguments: Any = None


class FunctionCallOutput(RequestModel):
    type: Literal["function_call_output"]
    call_id: Text = ""
    output: Parts = Field(default_factory=list)


class SummaryText(RequestModel):
    type: Literal["summary_text"]
    text: Text


class ReasoningText(RequestModel):
    type: Literal["reasoning_text"]
    text: Text


class ReasoningItem(RequestModel):
    type: Literal["reasoning"]
    summary: Annotated[list[SummaryText], Field(max_length=MAX_LIST, fail_fast=True)] = Field(default_factory=list)
    content: Annotated[list[ReasoningText], Field(max_length=MAX_LIST, fail_fast=True)] | None = None


def _known_item(item: Any) -> Any:
    """A message may leave out its type."""
    kind = _kind(item)
    if kind is None and isinstance(item, dict) and "role" in item and item.get("type") is None:
        return {**without_nulls(item), "type": "message"}
    if kind is not None and kind not in _ITEMS:
        raise PydanticCustomError(
            "stateless_items",
            "an item of the type '{kind}' was given, allowed are " + ", ".join(_ITEMS),
            {"kind": kind},
        )
    return item


_AnyItem = Annotated[MessageItem | FunctionCall | FunctionCallOutput | ReasoningItem, Field(discriminator="type")]
Item = Annotated[_AnyItem, BeforeValidator(_known_item, json_schema_input_type=_AnyItem)]


def _as_items(given: Any) -> Any:
    return [{"type": "message", "role": "user", "content": given}] if isinstance(given, str) else given


Items = Annotated[
    list[Item],
    Field(min_length=1, max_length=MAX_LIST, fail_fast=True),
    BeforeValidator(_as_items, json_schema_input_type=str | list[_AnyItem]),
]


class FunctionTool(RequestModel):
    type: Literal["function"] = "function"
    name: Name
    description: Text | None = None
    parameters: (
        Annotated[JsonObject, BeforeValidator(spellings.parameters, json_schema_input_type=JsonObject)] | None
    ) = None
    strict: bool | None = None


def _flat_tool(tool: Any) -> Any:
    """A tool in the shape of this API, where the function stands flat beside the type, also from chat's."""
    nested = spellings.function_tool(tool)
    function = nested.get("function") if isinstance(nested, dict) else None
    return {"type": "function", **function} if isinstance(function, dict) else tool


def _flat_choice(choice: Any) -> Any:
    """A tool_choice in the shape of this API, also from chat's."""
    plain = spellings.function_choice(choice)
    if not isinstance(plain, dict):
        return plain
    if plain.get("type") == "allowed_tools":
        allowed = plain["allowed_tools"]
        tools = allowed.get("tools")
        named = [_flat_choice(tool) for tool in tools] if isinstance(tools, list) else tools
        return {"type": "allowed_tools", **allowed, "tools": named}
    function = plain.get("function")
    return {"type": "function", "name": function.get("name")} if isinstance(function, dict) else plain


_Tool = Annotated[FunctionTool, BeforeValidator(_flat_tool, json_schema_input_type=FunctionTool)]


class NamedFunction(RequestModel):
    type: Literal["function"] = "function"
    name: Name


class AllowedTools(RequestModel):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=MAX_LIST, fail_fast=True)]


_Choice = Literal["none", "auto", "required"] | NamedFunction | AllowedTools


class TextFormat(RequestModel):
    type: Literal["text", "json_object", "json_schema"]
    name: Label | None = None
    schema_: JsonObject | None = Field(default=None, alias="schema")
    description: Text | None = None
    strict: bool | None = None


class TextConfig(RequestModel):
    format: TextFormat | None = None
    verbosity: Label | None = None  # of no effect


class Reasoning(RequestModel):
    """`summary` is accepted: the reasoning is given out whole instead of summed up."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


def _absent(value: Any, info: ValidationInfo) -> Any:
    """Fields that would need stored state: only their neutral values."""
    if value is not None and value is not False:
        raise PydanticCustomError(
            "stateless",
            "this server stores no responses and runs none in the background, so {name} must be left out; "
            "send the whole conversation as input",
            {"name": info.field_name},
        )
    return value


Stateful = Annotated[None, BeforeValidator(_absent)]
StatefulFlag = Annotated[Literal[False] | None, BeforeValidator(_absent)]


class InputTokensRequest(RequestModel):
    """POST /v1/responses/input_tokens: what decides the length of a prompt."""

    model: Label | None = None
    input: Items
    instructions: Text | None = None
    tools: Annotated[list[_Tool], Field(max_length=MAX_LIST, fail_fast=True)] | None = None
    tool_choice: Annotated[_Choice, BeforeValidator(_flat_choice, json_schema_input_type=_Choice)] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] | None = None  # a prompt that does not fit is an error with either
    chat_template_kwargs: TemplateArguments | None = None
    # what needs stored state
    background: StatefulFlag = None
    previous_response_id: Stateful = None
    conversation: Stateful = None
    prompt: Stateful = None

    UNSUPPORTED: ClassVar[Mapping[str, Unsupported]] = unsupported.GENERATION
    WITHOUT_EFFECT: ClassVar[frozenset[str]] = unsupported.WITHOUT_EFFECT_OF_RESPONSES

    @classmethod
    def simplify(cls, body: dict[str, Any], left_out: LeftOut) -> dict[str, Any]:
        return super().simplify(spellings.runnable_tools(body, left_out), left_out)


class ResponsesRequest(InputTokensRequest):
    """POST /v1/responses."""

    max_output_tokens: Maximum = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    stream: bool | None = None
    # repeated in the answer, and else of no effect; tools that max_tool_calls counts are run by a server, and there are none
    max_tool_calls: Any = None
    metadata: JsonObject | None = None
    user: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    # the same extras as in /v1/chat/completions
    top_k: Whole | None = Field(default=None, ge=-1, le=INT32)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: LogitBias | None = None
    seed: Seed = None
    stop: Stops | None = None

    @classmethod
    def simplify(cls, body: dict[str, Any], left_out: LeftOut) -> dict[str, Any]:
        unsupported.LOGPROBS.check("top_logprobs", whole(body.get("top_logprobs", 0)))
        include = body.get("include")
        if isinstance(include, list) and "message.output_text.logprobs" in include:
            unsupported.LOGPROBS.check("include", include)
        return super().simplify(spellings.renamed(body, {"max_tokens": "max_output_tokens"}), left_out)


_SAME = (
    *("model", "stream", "user", "stop", "seed", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "logit_bias", "parallel_tool_calls", "chat_template_kwargs"),
)


def chat_fields(request: InputTokensRequest) -> dict[str, Any]:
    """The same request in the shape of /v1/chat/completions, only with fields that were given.

    Raises ValueError, naming the field, where parts of the request contradict each other.
    """
    fields: dict[str, Any] = {name: value for name in _SAME if (value := getattr(request, name, None)) is not None}
    if "chat_template_kwargs" in fields:
        fields["chat_template_kwargs"] = fields["chat_template_kwargs"].model_dump(exclude_none=True)
    fields["messages"] = _messages(request)
    if isinstance(request, ResponsesRequest) and request.max_output_tokens is not None:
        fields["max_tokens"] = request.max_output_tokens
    if request.tools:
        functions = (tool.model_dump(exclude={"type"}, exclude_none=True) for tool in request.tools)
        fields["tools"] = [{"type": "function", "function": function} for function in functions]
    choice = request.tool_choice
    if isinstance(choice, NamedFunction):
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    elif isinstance(choice, AllowedTools):
        allowed = [{"type": "function", "function": {"name": tool.name}} for tool in choice.tools]
        fields["tool_choice"] = {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": allowed}}
    elif choice is not None and (request.tools or choice == "required"):
        fields["tool_choice"] = choice
    if request.text is not None and request.text.format is not None:
        fields["response_format"] = _response_format(request.text.format)
    if request.reasoning is not None and request.reasoning.effort is not None:
        fields["reasoning_effort"] = request.reasoning.effort
    return fields


def _response_format(given: TextFormat) -> dict[str, Any]:
    if given.type != "json_schema":
        return {"type": given.type}
    if given.schema_ is None:
        raise ValueError("text.format.schema is missing, which the type 'json_schema' needs")
    named = {"name": given.name, "description": given.description, "strict": given.strict}
    schema = {name: value for name, value in named.items() if value is not None}
    return {"type": "json_schema", "json_schema": schema | {"schema": given.schema_}}


def _messages(request: InputTokensRequest) -> list[dict[str, Any]]:
    """Items become messages; what the assistant thought, said and called in one turn becomes one message."""
    messages: list[dict[str, Any]] = []  # whose texts are lists of pieces until all items are read
    names: dict[str, str] = {}  # of functions, by the id of the call
    if request.instructions:
        messages.append({"role": "system", "content": [request.instructions]})
    for item in request.input:
        last: dict[str, Any] = messages[-1] if messages else {"role": None}
        if isinstance(item, FunctionCallOutput):
            result = {"role": "tool", "tool_call_id": item.call_id, "name": names.get(item.call_id)}
            messages.append({**result, "content": [_joined(item.output)]})
        elif isinstance(item, MessageItem) and item.role != "assistant":
            role = "user" if item.role == "user" else "system"
            content = _joined(item.content)
            if role == "system" and last["role"] == "system":
                last["content"] += ["\n\n", content]
            else:
                messages.append({"role": role, "content": [content]})
        else:
            # A turn thinks, then speaks, then calls: thinking or speaking after that begins another one.
            spoken = last["role"] == "assistant" and (last["content"] or last.get("tool_calls"))
            if last["role"] != "assistant" or (spoken and not isinstance(item, FunctionCall)):
                messages.append({"role": "assistant", "content": []})
            _add(item, messages[-1], names)
    for message in messages:
        message["content"] = "".join(message["content"])
        if "reasoning_content" in message:
            message["reasoning_content"] = "\n".join(message["reasoning_content"])
    return messages


def _add(item: MessageItem | FunctionCall | ReasoningItem, turn: dict[str, Any], names: dict[str, str]) -> None:
    if isinstance(item, ReasoningItem):
        thought = "\n".join(part.text for part in item.content or item.summary)
        if thought:
            turn.setdefault("reasoning_content", []).append(thought)
    elif isinstance(item, FunctionCall):
        names[item.call_id] = item.name
        call = {"name": item.name, "arguments": item.arguments}
        turn.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": call})
    elif text := _joined(item.content):
        turn["content"].append(text)


def _joined(parts: list[Any]) -> str:
    return "".join(part.refusal if isinstance(part, Refusal) else part.text for part in parts)
