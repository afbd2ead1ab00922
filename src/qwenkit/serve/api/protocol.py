"""What a request may say: the bodies of the OpenAI routes as pydantic models.

In: JSON. Out: typed, bounded values. Fields of other servers, and other spellings of the same thing, are in unsupported.py and
spellings.py; what is in neither is left out and told. Limits that whoever runs the server sets (n, prompts, stops, tools) are
checked in prepare.py. What stands in a conversation is history: it is shown to the model and never judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from qwenkit.serve.api import spellings, unsupported
from qwenkit.serve.body import LeftOut, RequestModel, Unsupported, Whole, at_most, at_most_minus_one, whole

INT64 = 2**63 - 1
INT32 = 2**31 - 1
MAX_LIST = 4096  # no list of a request is longer, whatever the configuration says
Text = Annotated[str, Field(max_length=100_000_000)]  # the body limit is what bounds these
Name = Annotated[str, Field(pattern=r"^[\w.\-]{1,128}$")]
Label = Annotated[str, Field(max_length=512)]
JsonObject = dict[str, Any]
Truth = Annotated[bool, BeforeValidator(spellings.truth, json_schema_input_type=bool)]


def _plain_ids(value: Any) -> Any:
    """Token ids, also from programs that write whole numbers as floats."""
    return list(map(whole, value)) if isinstance(value, list) and any(type(one) is float for one in value) else value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _without_empty(value: Any) -> Any:
    """Stop strings without the empty ones, which stop nothing."""
    value = _as_list(value)
    return [one for one in value if one != ""] if isinstance(value, list) else value


TokenId = Annotated[int, Field(ge=0, le=INT32)]
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_LIST, fail_fast=True), BeforeValidator(_plain_ids)]
Stops = Annotated[
    list[Label],
    Field(max_length=MAX_LIST, fail_fast=True),
    BeforeValidator(_without_empty, json_schema_input_type=Label | list[Label]),
]
Maximum = Annotated[
    Annotated[Whole, Field(ge=1, le=INT32)] | None,
    BeforeValidator(at_most_minus_one, json_schema_input_type=Annotated[int, Field(ge=-1, le=INT32)]),
]
"""Most tokens of an answer: -1 is no limit."""
Seed = Annotated[
    Annotated[Whole, Field(ge=-INT64, le=INT64)] | None, BeforeValidator(at_most_minus_one, json_schema_input_type=int)
]


LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=1024),
    BeforeValidator(at_most(1024)),
]


class StreamOptions(RequestModel):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool | None = None


class StructuredOutputs(RequestModel):
    """vLLM's `structured_outputs`: exactly one of them."""

    json_: JsonObject | Text | bool | None = Field(default=None, alias="json")
    regex: Text | None = None
    choice: Annotated[list[Text], Field(min_length=1, max_length=MAX_LIST, fail_fast=True)] | None = None
    grammar: Text | None = None
    json_object: Literal[True] | None = None


class JsonSchemaFormat(RequestModel):
    name: Label = "answer"
    description: Text | None = None
    schema_: JsonObject | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(RequestModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_schema(cls, value: Any) -> Any:
        """A schema that stands beside the type, as llama.cpp takes it."""
        if not isinstance(value, dict) or value.get("json_schema") is not None or value.get("schema") is None:
            return value
        if value.get("type") not in ("json_object", "json_schema"):
            return value
        return {"type": "json_schema", "json_schema": {"schema": value["schema"]}}

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("response_format: json_schema belongs to the type 'json_schema' and to no other")
        if self.json_schema is not None and self.json_schema.schema_ is None:
            raise ValueError("response_format: json_schema.schema is missing")
        return self


class GenerationRequest(RequestModel):
    """What chat and completions have in common."""

    model: Label | None = None
    # choosing tokens
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: Whole | None = Field(default=None, ge=-1, le=INT32)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: LogitBias | None = None
    seed: Seed = None
    n: Whole | None = Field(default=None, ge=1, le=128)
    # ending
    stop: Stops | None = None
    stop_token_ids: TokenIds | None = None
    max_tokens: Maximum = None
    min_tokens: Whole | None = Field(default=None, ge=0, le=INT32)
    ignore_eos: bool | None = None
    # what is told
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: Whole | None = Field(default=None, ge=0, le=100)
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    # what the answer must look like
    response_format: ResponseFormat | None = None
    guided_json: JsonObject | Text | None = None
    guided_regex: Text | None = None
    guided_choice: Annotated[list[Text], Field(min_length=1, max_length=MAX_LIST, fail_fast=True)] | None = None
    guided_grammar: Text | None = None
    structured_outputs: StructuredOutputs | None = None
    # how it is treated
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    UNSUPPORTED: ClassVar[Mapping[str, Unsupported]] = unsupported.GENERATION
    WITHOUT_EFFECT: ClassVar[frozenset[str]] = unsupported.WITHOUT_EFFECT

    @classmethod
    def simplify(cls, body: dict[str, Any], left_out: LeftOut) -> dict[str, Any]:
        return super().simplify(spellings.renamed(body, unsupported.RENAMED), left_out)


class Part(RequestModel):
    """A piece of a message's content. Other kinds than text are taken in so that they can be refused by name."""

    type: Label = "text"
    text: Text | None = None
    refusal: Text | None = None


def _parts(content: Any) -> Any:
    """A list of parts, of which some may be plain texts."""
    if not isinstance(content, list):
        return content
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]


class CalledFunction(RequestModel):
    """A call as a model made it: the name is any text, and the arguments may be no JSON object."""

    name: Text = ""
    arguments: Any = None


class ToolCall(RequestModel):
    id: Text | None = None
    function: CalledFunction = CalledFunction()

    @model_validator(mode="before")
    @classmethod
    def _custom(cls, value: Any) -> Any:
        """A call of a custom tool, which another server offered: its text is shown, too."""
        custom = value.get("custom") if isinstance(value, dict) else None
        if not isinstance(custom, dict) or value.get("function") is not None:
            return value
        return {**value, "function": {"name": custom.get("name"), "arguments": {"input": custom.get("input")}}}


class Message(RequestModel):
    """One message of a conversation, in any role. Fields of answers are taken back as they were given out."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        Text | Annotated[list[Part], Field(max_length=MAX_LIST, fail_fast=True)] | None, BeforeValidator(_parts)
    ] = None
    name: Any = None
    tool_call_id: Any = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_LIST, fail_fast=True)] | None = None
    function_call: CalledFunction | None = None
    reasoning_content: Any = None
    reasoning: Any = None
    refusal: Text | None = None
    id: Any = None  # Qwen-Agent's, which calls a tool's tool_call_id so
    prefix: Any = None  # of the last message, with true: go on with it
    partial: Any = None


class Function(RequestModel):
    name: Name
    description: Text | None = None
    parameters: (
        Annotated[JsonObject, BeforeValidator(spellings.parameters, json_schema_input_type=JsonObject)] | None
    ) = None
    strict: bool | None = None


class Tool(RequestModel):
    type: Literal["function"] = "function"
    function: Function


AnyTool = Annotated[Tool, BeforeValidator(spellings.function_tool, json_schema_input_type=Tool)]


class NamedFunction(RequestModel):
    name: Name


class NamedTool(RequestModel):
    type: Literal["function"] = "function"
    function: NamedFunction


class AllowedToolSet(RequestModel):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_LIST, fail_fast=True)]


class AllowedTools(RequestModel):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedToolSet


class TemplateArguments(RequestModel):
    """What a request may tell a chat template: never the template itself."""

    enable_thinking: Truth | None = None
    preserve_thinking: Truth | None = None

    @model_validator(mode="before")
    @classmethod
    def _thinking(cls, value: Any) -> Any:
        """`thinking`, as templates of other families call it."""
        return spellings.renamed(value, {"thinking": "enable_thinking"}) if isinstance(value, dict) else value


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions. Other routes build one and go through prepare.py as well."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"messages": [{"role": "user", "content": "Hello!"}]}]})

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_LIST, fail_fast=True)]
    max_completion_tokens: Maximum = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(default=None, ge=0, le=100)
    tools: Annotated[list[AnyTool], Field(max_length=MAX_LIST, fail_fast=True)] | None = None
    tool_choice: (
        Annotated[
            Literal["none", "auto", "required"] | NamedTool | AllowedTools,
            BeforeValidator(
                spellings.function_choice,
                json_schema_input_type=Literal["none", "auto", "required"] | NamedTool | AllowedTools,
            ),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Function], Field(max_length=MAX_LIST, fail_fast=True)] | None = None
    function_call: Literal["none", "auto"] | NamedFunction | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    enable_thinking: Truth | None = None
    chat_template_kwargs: TemplateArguments | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    modalities: Annotated[list[Literal["text"]], Field(max_length=1, fail_fast=True)] | None = None

    UNSUPPORTED: ClassVar[Mapping[str, Unsupported]] = unsupported.CHAT

    @classmethod
    def simplify(cls, body: dict[str, Any], left_out: LeftOut) -> dict[str, Any]:
        return super().simplify(spellings.runnable_tools(spellings.thinking(body), left_out), left_out)

    @property
    def continues(self) -> bool:
        """Whether the answer goes on where the last message breaks off."""
        last = self.messages[-1]
        return self.continue_final_message or (last.role == "assistant" and True in (last.prefix, last.partial))

    @model_validator(mode="after")
    def _fits(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only allowed together with logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ, give one of them")
        if self.functions and self.tools:
            raise ValueError("functions and tools are the same thing, give one of them (tools is the newer)")
        if isinstance(self.function_call, NamedFunction) and not self.functions:
            raise ValueError("function_call is only allowed together with functions")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools to choose from, and tools is empty")
        if (
            self.continue_final_message
            and self.add_generation_prompt
            and "add_generation_prompt" in self.model_fields_set
        ):
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise ValueError("continue_final_message needs a last message of the assistant")
        return self


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "Once upon a time", "max_tokens": 16}]})

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_LIST, fail_fast=True)]
        | Annotated[list[TokenId], Field(min_length=1, max_length=INT32, fail_fast=True), BeforeValidator(_plain_ids)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1, fail_fast=True), BeforeValidator(_plain_ids)]],
            Field(min_length=1, max_length=MAX_LIST, fail_fast=True),
        ]
    )
    max_tokens: Whole | None = Field(default=None, ge=-1, le=INT32)  # -1: all that fits; missing: 16
    echo: bool | None = None
    logprobs: Whole | None = Field(default=None, ge=0, le=100)
    suffix: Text | None = None
    best_of: Whole | None = Field(default=None, ge=1, le=128)


class TokenizeRequest(RequestModel):
    """POST /tokenize: a text or a conversation."""

    model: Label | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_LIST, fail_fast=True)] | None = None
    tools: Annotated[list[AnyTool], Field(max_length=MAX_LIST, fail_fast=True)] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: TemplateArguments | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, one of them")
        return self


class DetokenizeRequest(RequestModel):
    """POST /detokenize."""

    model: Label | None = None
    tokens: Annotated[list[TokenId], Field(max_length=4_000_000, fail_fast=True), BeforeValidator(_plain_ids)]
