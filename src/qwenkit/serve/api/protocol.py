"""What a request may say: the bodies of the OpenAI routes as pydantic models.

In: JSON. Out: typed, bounded values; a field that is not named here is an error, and so is text where a number belongs. Limits
that whoever runs the server sets (n, prompts, stops, tools) are checked in prepare.py. Fields that only neutral values make sense
for are typed so: a client that always sends them works, one that wants what this server does not do is told.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from qwenkit.serve.body import RequestModel, at_most

INT64 = 2**63 - 1
INT32 = 2**31 - 1
MAX_LIST = 4096  # no list of a request is longer, whatever the configuration says
Text = Annotated[str, Field(max_length=100_000_000)]  # the body limit is what bounds these
Name = Annotated[str, Field(pattern=r"^[\w.\-]{1,128}$")]
Label = Annotated[str, Field(max_length=512)]
JsonObject = dict[str, Any]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Label], Field(max_length=16), BeforeValidator(at_most(16))
]
TokenId = Annotated[int, Field(ge=0, le=INT32)]


class StreamOptions(RequestModel):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] | None = None


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
    top_k: int | None = Field(default=None, ge=-1, le=INT32)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^\d{1,9}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(max_length=1024),
            BeforeValidator(at_most(1024)),
        ]
        | None
    ) = None
    seed: int | None = Field(default=None, ge=-INT64, le=INT64)
    n: int | None = Field(default=None, ge=1, le=128)
    # ending
    stop: Label | Annotated[list[Label], Field(max_length=MAX_LIST, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_LIST, fail_fast=True)] | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=INT32)
    min_tokens: int | None = Field(default=None, ge=0, le=INT32)
    ignore_eos: bool | None = None
    # what is told
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: int | None = Field(default=None, ge=0, le=100)
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
    # sent by clients, of no effect here
    user: Label | None = None
    # vLLM's, at the values that change nothing
    use_beam_search: Literal[False] | None = None
    length_penalty: float | None = Field(default=None, ge=1, le=1)
    early_stopping: Literal[False] | None = None
    include_stop_str_in_output: Literal[False] | None = None
    spaces_between_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: None = None

    @model_validator(mode="after")
    def _streams(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed together with stream: true")
        if "" in ([self.stop] if isinstance(self.stop, str) else self.stop or ()):
            raise ValueError("stop has an empty string, allowed are texts that are not empty")
        return self


class Part(BaseModel):
    """A piece of a message's content. Other kinds than text are taken in so that they can be refused by name."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    type: Label
    text: Text | None = None
    refusal: Text | None = None


class CalledFunction(RequestModel):
    name: Name
    arguments: Text | JsonObject = ""


class ToolCall(RequestModel):
    id: Label | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Field(default=None, ge=0, le=MAX_LIST)  # streamed deltas sent back as they came


class Message(RequestModel):
    """One message of a conversation, in any role. Fields of answers are taken back as they were given out."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Annotated[list[Part], Field(max_length=MAX_LIST, fail_fast=True)] | None = None
    name: Label | None = None
    tool_call_id: Label | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_LIST, fail_fast=True)] | None = None
    function_call: CalledFunction | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    refusal: Text | None = None
    audio: None = None
    annotations: Annotated[list[JsonObject], Field(max_length=MAX_LIST, fail_fast=True)] | None = None
    id: Label | None = None  # Qwen-Agent's, which calls a tool's tool_call_id so, and keeps notes of its own beside it
    extra: JsonObject | None = None


class Function(RequestModel):
    name: Name
    description: Text | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(RequestModel):
    type: Literal["function"] = "function"
    function: Function


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

    enable_thinking: bool | None = None
    preserve_thinking: bool | None = None
    add_vision_id: Literal[False] | None = None


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions. Other routes build one and go through prepare.py as well."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"messages": [{"role": "user", "content": "Hello!"}]}]})

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_LIST, fail_fast=True)]
    max_completion_tokens: int | None = Field(default=None, ge=1, le=INT32)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=100)
    tools: Annotated[list[Tool], Field(max_length=MAX_LIST, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Function], Field(min_length=1, max_length=MAX_LIST, fail_fast=True)] | None = None
    function_call: Literal["none", "auto"] | NamedFunction | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: TemplateArguments | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    # sent by clients, of no effect here
    metadata: Annotated[dict[str, Label], Field(max_length=16), BeforeValidator(at_most(16))] | None = None
    store: Literal[False] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1, fail_fast=True)] | None = None
    service_tier: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Label | None = None
    echo: Literal[False] | None = None
    include_reasoning: Literal[True] | None = None

    @model_validator(mode="after")
    def _fits(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed together with logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ, give one of them")
        if self.functions is not None and self.tools is not None:
            raise ValueError("functions and tools are the same thing, give one of them (tools is the newer)")
        if self.function_call is not None and not self.functions:
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
        | Annotated[list[TokenId], Field(min_length=1, max_length=INT32, fail_fast=True)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]],
            Field(min_length=1, max_length=MAX_LIST, fail_fast=True),
        ]
    )
    max_tokens: int | None = Field(default=None, ge=0, le=INT32)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=100)
    suffix: Text | None = None
    best_of: int | None = Field(default=None, ge=1, le=128)


class TokenizeRequest(RequestModel):
    """POST /tokenize: a text or a conversation."""

    model: Label | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_LIST, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_LIST, fail_fast=True)] | None = None
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
    tokens: Annotated[list[TokenId], Field(max_length=4_000_000, fail_fast=True)]
