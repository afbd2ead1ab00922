"""From a request to tokens and SamplingParams, and from the engine's Deltas to what they mean.

In: a ChatRequest (of whichever route), or the parts of a completion. Out: `Prepared`, checked against the limits of the server
and the model; `events` then runs it. A refusal is an ApiError that names the field. When the client goes away, `events` closes
the driver's stream, which takes the request out of the engine within one step, be it queued, computed or streamed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from fastapi import Request

from qwenkit.engine.grammar import Grammar
from qwenkit.engine.request import Delta
from qwenkit.engine.sampling import SamplingParams
from qwenkit.serve.api.conversation import ToolUse, plain_messages, tool_use
from qwenkit.serve.api.prompt import answer_room, off_loop, render, template_variables
from qwenkit.serve.api.protocol import ChatRequest, GenerationRequest
from qwenkit.serve.api.structured import GrammarParts, among, bad_grammar, check_compiles, checked, grammar_of
from qwenkit.serve.caller import caller
from qwenkit.serve.errors import ApiError, client_gone
from qwenkit.serve.server import Server
from qwenkit.text.answer import AnswerEvent, AnswerParser
from qwenkit.text.tool_calls import argument_schemas


@dataclass(frozen=True)
class Prepared:
    """One prompt, ready to run. `parser` makes an AnswerParser for each of the `params.n` answers; None leaves text as it is."""

    prompt_ids: list[int]
    params: SamplingParams
    parser: Callable[[], AnswerParser] | None = None
    adapter: str | None = None
    model: str = ""
    tools: ToolUse = field(default_factory=ToolUse)
    cache_namespace: str | None = None
    grammar_field: str = ""  # where the request says what shape the answer must have
    grammar_parts: GrammarParts = tuple  # what that is made from, asked for only where it does not compile


async def prepare(
    server: Server, make_request: Callable[[], ChatRequest], http: Request, *, clip: bool = False
) -> Prepared:
    """`prepare_chat` of the request that `make_request` gives, and the check of its grammar, off the event loop if long.

    Raises ApiError. `clip`: a max_tokens that the context has no room for is cut under --strict, too.
    """
    prepared = await off_loop(server, http, lambda: prepare_chat(server, make_request(), clip=clip))
    await check_grammar(server, prepared)
    return prepared


async def check_grammar(server: Server, prepared: Prepared) -> None:
    """Refuse a grammar that does not compile within the limits, before the engine meets it."""
    grammar = prepared.params.grammar
    if grammar is None:
        return
    if server.compiler is None:
        raise ApiError(
            400, f"{prepared.grammar_field}: this server has no structured output", param=prepared.grammar_field
        )
    await check_compiles(server.compiler, grammar, prepared.grammar_field, prepared.grammar_parts)


def prepare_chat(server: Server, request: ChatRequest, *, clip: bool = False) -> Prepared:
    """Render the conversation and settle how the answer is sampled, constrained and read. Raises ApiError.

    Tools that must be called (`required`, or one by name) constrain the answer to calls, and response_format has no say then.
    Where tools may be called, response_format constrains the answer that is no call. Either begins after the thinking.
    """
    adapter = server.adapter_of(request.model)
    check_limits(server, request)
    tools = tools_of(server, request)
    if request.stream and request.prompt_logprobs is not None:
        raise ApiError(400, "prompt_logprobs cannot be streamed, ask with stream: false", param="prompt_logprobs")
    ids = _rendered(server, request, tools)
    wanted = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    max_tokens = answer_room(server, ids, wanted, "messages", clip=clip or not server.config.strict)
    answers = server.answer_format
    grammar, after, where = constraint(server, request, tools, ids)
    params = sampling(
        server,
        request,
        max_tokens=max_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        stop=answers.stop if answers is not None and tools.tools else (),
    )
    if grammar is not None:
        params = replace(params, grammar=grammar, grammar_after=after)
    parser = None
    if answers is not None:
        parser = partial(
            answers.parser,
            ids,
            tools=bool(tools.tools),
            skip_special=params.skip_special_tokens,
            definitions=tools.tools,
            whole=not request.stream,
        )
    name, parts = adapter or server.model_name, partial(grammar_parts, request, tools)
    return Prepared(ids, params, parser, adapter, name, tools, namespace_of(request), where, parts)


def grammar_parts(request: ChatRequest, tools: ToolUse) -> tuple[tuple[str, Grammar], ...]:
    """The schemas in the grammar of an answer, each with its name: the one asked for, and those of the tools it may call."""
    asked = None if tools.forced else grammar_of(request)
    parts = [] if asked is None else [("", asked[0])]
    try:
        schemas = argument_schemas(tools.tools, tools.choice if tools.forced else "required") if tools.tools else {}
        parts += [
            (f"the parameters of the tool {name!r}", Grammar("json_schema", text)) for name, text in schemas.items()
        ]
    except ValueError:
        return ()  # nothing that a part could explain
    return tuple(parts)


def prompt_ids(server: Server, request: ChatRequest) -> list[int]:
    """The prompt of a chat, also one that is a little too long to be answered. Raises ApiError."""
    server.adapter_of(request.model)
    return _rendered(server, request, tools_of(server, request))


def _rendered(server: Server, request: ChatRequest, tools: ToolUse) -> list[int]:
    return render(
        server,
        plain_messages(request.messages),
        tools=tools.tools,
        variables=template_variables(request),
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continues,
    )


def tools_of(server: Server, request: ChatRequest) -> ToolUse:
    """`tool_use` within the server's limit. Raises ApiError."""
    count_tools(server, request.tools or request.functions or ())
    return tool_use(request)


def count_tools(server: Server, tools: Sequence[Any]) -> None:
    """Raises ApiError for more tools than the server allows."""
    if len(tools) > server.config.max_tools:
        raise limit("tools", len(tools), server.config.max_tools)


def constraint(
    server: Server, request: ChatRequest, tools: ToolUse, prompt_ids: Sequence[int]
) -> tuple[Grammar | None, int | None, str]:
    """(grammar, the token that arms it or None, the field that asks for it) of a chat's answer.

    Where the prompt leaves thinking open the grammar is armed by its end; where it leaves thinking to the model, the grammar
    lets the answer begin with a thought. Raises ApiError.
    """
    answers = server.answer_format
    asked = grammar_of(request)
    if asked is None and not tools.forced:
        return None, None, ""
    grammar, field = asked if asked is not None else (None, "")
    if answers is None:
        if tools.forced:
            raise ApiError(400, "tool_choice: this model has no format for tool calls", param="tool_choice")
        return grammar, None, field
    thinking = answers.prompt_thinking(prompt_ids) if answers.thinks else "closed"
    after = answers.think_end_id if thinking == "open" else None
    may_think = thinking == "none"
    calls = partial(answers.tool_grammar, tools.tools, choice=tools.choice if tools.forced else "required")
    if tools.forced:
        field = "function_call" if tools.legacy else "tool_choice"
        forced = partial(calls, parallel=tools.parallel, may_think=may_think)
        return checked(field, lambda: Grammar("lark", forced())), after, field
    assert grammar is not None
    if tools.tools and answers.tool_style not in ("hermes", "xml"):
        raise ApiError(400, f"{field} and tools cannot be combined with this model", param=field)
    if tools.tools or may_think:
        inner = grammar
        either = partial(calls, parallel=tools.parallel) if tools.tools else str
        grammar = checked(field, lambda: among(inner, server.tokenizer, may_think=may_think, calls=either()))
    return grammar, after, field


def check_limits(server: Server, request: GenerationRequest) -> None:
    """The limits that the server's configuration sets. Raises ApiError."""
    config = server.config
    counts = {
        "n": (request.n or 1, config.max_n),
        "stop": (len(request.stop or ()), config.max_stop),
        "stop_token_ids": (len(request.stop_token_ids or ()), config.max_stop),
        "prompt_logprobs": (request.prompt_logprobs or 0, config.max_logprobs),
        "top_logprobs": (getattr(request, "top_logprobs", None) or 0, config.max_logprobs),
    }
    for name, (given, allowed) in counts.items():
        if given > allowed:
            raise limit(name, given, allowed)


def limit(name: str, given: int, allowed: int) -> ApiError:
    return ApiError(
        400, f"{name}: {given} is more than this server allows ({allowed})", param=name, code="limit_exceeded"
    )


def namespace_of(request: GenerationRequest) -> str | None:
    """The caller's part of the prefix cache, or with cache_salt a part of that."""
    return None if request.cache_salt is None else f"{caller.get().namespace}\0{request.cache_salt}"


_SAME_NAME = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop_token_ids",
    "min_tokens",
    "n",
    "prompt_logprobs",
    "ignore_eos",
    "skip_special_tokens",
)


def sampling(
    server: Server,
    request: GenerationRequest,
    *,
    max_tokens: int,
    logprobs: int | None,
    stop: Sequence[str] = (),
) -> SamplingParams:
    """SamplingParams of a request, with `stop` besides its own stop strings. Raises ApiError."""
    given = {name: value for name in _SAME_NAME if (value := getattr(request, name)) is not None}
    try:
        return SamplingParams(
            **given,
            stop=tuple(dict.fromkeys((*(request.stop or ()), *stop))),
            max_tokens=max_tokens,
            logprobs=logprobs,
            logit_bias={int(token): bias for token, bias in (request.logit_bias or {}).items()},
        )
    except ValueError as error:
        raise bad_value(error) from None


def bad_value(error: ValueError) -> ApiError:
    """400 from a sentence of the engine, which begins with the field's name."""
    word = str(error).split(" ", 1)[0].rstrip(":")
    known = word in SamplingParams.__dataclass_fields__ or word == "prompt"
    return ApiError(400, str(error), param=word if known else None, code="invalid_value")


async def events(
    server: Server, prepared: Prepared, http: Request
) -> AsyncIterator[tuple[int, list[AnswerEvent], Delta]]:
    """(which answer, what it means, what the engine added) until every answer is finished; the last has a finish_reason.

    Raises ApiError: before the first item what the engine or the queue refuses, later 500 when the engine fails, and 499 when the
    client has gone. Where one call is allowed, an answer ends where its second call would begin.
    """
    params = prepared.params
    parsers = [prepared.parser() if prepared.parser else None for _ in range(params.n)]
    one_call = bool(prepared.tools.tools) and not prepared.tools.parallel
    unfinished = set(range(params.n))
    client = Client(http)
    stream = server.driver.stream(
        prepared.prompt_ids, params, adapter=prepared.adapter, cache_namespace=prepared.cache_namespace
    )
    try:
        async with aclosing(stream):  # type: ignore[type-var]
            while unfinished:
                delta = await client.next(stream)
                if delta.error is not None:
                    raise ApiError(
                        500, f"the answer could not be computed: {delta.error}", "server_error", code="engine_error"
                    )
                index = delta.index
                if index not in unfinished:
                    continue
                parser, found = parsers[index], []
                if parser is not None:
                    found = parser.push(delta.token_ids, delta.text)
                    if delta.finish_reason is not None:
                        found += parser.finish(cut=delta.finish_reason == "length")
                    if one_call and (second := next((e for e in found if e.tool_index > 0), None)) is not None:
                        found = found[: found.index(second)]
                        delta = replace(delta, finish_reason="stop", stop_reason=None)
                if delta.finish_reason is not None:
                    unfinished.discard(index)
                yield index, found, delta
    except ValueError as error:
        if prepared.grammar_field and str(error).startswith("grammar "):
            raise bad_grammar(prepared.grammar_field, error) from None
        raise bad_value(error) from None
    finally:
        client.close()


class Client:
    """Whoever waits for an answer. Waiting for the engine ends with ApiError 499 as soon as the connection is closed.

    One task listens to the connection; a token costs nothing extra.
    """

    def __init__(self, http: Request) -> None:
        self._waiting: asyncio.Task[Any] | None = None
        self._gone = False
        self._listener = asyncio.create_task(self._listen(http))

    async def next(self, stream: AsyncIterator[Delta]) -> Delta:
        """The stream's next item."""
        if self._gone:
            raise client_gone()
        task = asyncio.current_task()
        self._waiting = task
        try:
            return await anext(stream)
        except asyncio.CancelledError:
            if not self._gone:
                raise
            if task is not None and hasattr(task, "uncancel"):  # Python 3.11
                task.uncancel()
            raise client_gone() from None
        finally:
            self._waiting = None

    async def _listen(self, http: Request) -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        if self._waiting is not None:
            self._waiting.cancel()

    def close(self) -> None:
        self._listener.cancel()
