"""POST /v1/completions: text that goes on, for one prompt or many, as text or token ids.

In: a CompletionRequest. Out: one `text_completion`, or its pieces as events; choice number p*n + i is answer i to prompt p.
Control tokens written in a prompt count as such, because whoever sends a bare prompt formats it himself; in a chat's messages
they do not.
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from qwenkit.engine.request import Delta, TokenLogprob
from qwenkit.serve.api.prepare import (
    Prepared,
    check_grammar,
    check_limits,
    events,
    limit,
    namespace_of,
    sampling,
)
from qwenkit.serve.api.prompt import answer_room, encode, off_loop
from qwenkit.serve.api.protocol import CompletionRequest
from qwenkit.serve.api.reply import Frame, Usage, finite, prompt_logprobs, visible_logprobs, well_formed
from qwenkit.serve.api.stream import DONE, STREAMED, EventStream
from qwenkit.serve.api.structured import grammar_of
from qwenkit.serve.body import JsonRoute
from qwenkit.serve.errors import ApiError
from qwenkit.serve.server import Server, the_server
from qwenkit.text.tokenizer import Tokenizer

router = APIRouter(route_class=JsonRoute)

DEFAULT_MAX_TOKENS = 16

Step = tuple[int, Delta]  # number of the prompt, and what was added to one of its answers


@router.post("/v1/completions", response_model=None, responses=STREAMED)
async def completions(
    body: CompletionRequest, http: Request, server: Annotated[Server, Depends(the_server)]
) -> Response:
    """Continue a text; streamed as server-sent events with `stream: true`."""
    prepared, texts = await off_loop(server, http, lambda: _prepared(server, body))
    await check_grammar(server, prepared[0])
    frame = Frame("text_completion", "cmpl", prepared[0].model, body)
    usage = Usage(sum(len(one.prompt_ids) for one in prepared))
    num_answers = prepared[0].params.n
    choices = [
        Choice(place * num_answers + index, server.tokenizer, one, body, text)
        for place, (one, text) in enumerate(zip(prepared, texts, strict=True))
        for index in range(num_answers)
    ]
    steps = _steps(server, prepared, http)
    if body.stream:
        first = await anext(steps)  # what is refused before it is a status, not an event
        return EventStream(_chunks(first, steps, frame, usage, choices, num_answers, body))
    async with aclosing(steps):
        async for place, delta in steps:
            _count(usage, delta, body)
            mine = choices[place * num_answers : (place + 1) * num_answers]
            if delta.prompt_logprobs is not None:
                for choice in mine:
                    choice.prompt_logprobs = delta.prompt_logprobs
            mine[delta.index].take(delta)
    return frame.whole([choice.piece() for choice in choices], usage)


async def _chunks(
    first: Step,
    steps: AsyncGenerator[Step, None],
    frame: Frame,
    usage: Usage,
    choices: Sequence[Choice],
    num_answers: int,
    body: CompletionRequest,
) -> AsyncGenerator[bytes, None]:
    """The events of a stream: the pieces of each answer, then the usage and [DONE]."""
    async with aclosing(steps):
        step: Step | None = first
        while step is not None:
            place, delta = step
            _count(usage, delta, body)
            if delta.prompt_logprobs is not None:
                for choice in choices[place * num_answers : (place + 1) * num_answers]:
                    choice.prompt_logprobs = delta.prompt_logprobs
            choice = choices[place * num_answers + delta.index]
            choice.take(delta)
            if choice.has_news:
                yield frame.chunk(choice.piece(), usage)
            step = await anext(steps, None)
    yield frame.usage_chunk(usage) + DONE


def _count(usage: Usage, delta: Delta, body: CompletionRequest) -> None:
    usage.count(delta.index, (), replace(delta, token_ids=()) if body.max_tokens == 0 else delta)


def _prepared(server: Server, body: CompletionRequest) -> tuple[list[Prepared], list[str]]:
    """The prompts, and what `echo` puts before the answers to each."""
    prepared = prepare_completion(server, body)
    return prepared, _texts(server.tokenizer, body, prepared)


def prepare_completion(server: Server, body: CompletionRequest) -> list[Prepared]:
    """One Prepared for each prompt, all with the same params but max_tokens. Raises ApiError."""
    adapter = server.adapter_of(body.model)
    check_limits(server, body)
    if (body.logprobs or 0) > server.config.max_logprobs:
        raise limit("logprobs", body.logprobs or 0, server.config.max_logprobs)
    if body.best_of not in (None, body.n or 1):
        raise ApiError(
            400, f"best_of is {body.best_of}, allowed is n ({body.n or 1}): all answers are given", param="best_of"
        )
    if body.stream and body.prompt_logprobs is not None:
        raise ApiError(400, "prompt_logprobs cannot be streamed, ask with stream: false", param="prompt_logprobs")
    prompts = _prompts(server, body)
    asked = grammar_of(body)
    known = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        known = max(known or 0, body.logprobs)
    wanted = (
        DEFAULT_MAX_TOKENS if body.max_tokens is None else max(body.max_tokens, 1) if body.max_tokens >= 0 else None
    )
    prepared = []
    for prompt_ids in prompts:
        if not prompt_ids:
            raise ApiError(400, "prompt is empty, at least one token is needed", param="prompt", code="invalid_value")
        clip = body.max_tokens is None or not server.config.strict  # the default of 16 is nobody's wish
        room = answer_room(server, prompt_ids, wanted, "prompt", clip=clip)
        params = sampling(server, body, max_tokens=room, logprobs=body.logprobs)
        params = replace(params, prompt_logprobs=known, grammar=asked[0] if asked else None)
        prepared.append(
            Prepared(
                prompt_ids,
                params,
                adapter=adapter,
                model=adapter or server.model_name,
                cache_namespace=namespace_of(body),
                grammar_field=asked[1] if asked else "",
            )
        )
    return prepared


def _prompts(server: Server, body: CompletionRequest) -> list[list[int]]:
    prompt: Any = body.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        prompt = [prompt]
    if len(prompt) > server.config.max_prompts:
        raise limit("prompt", len(prompt), server.config.max_prompts)
    ids = [encode(server, one, "prompt") if isinstance(one, str) else one for one in prompt]
    return [_around(server, one, body.suffix) for one in ids] if body.suffix else ids


def _around(server: Server, prompt_ids: list[int], suffix: str) -> list[int]:
    """The prompt by which Qwen's coders fill in what is missing between a text and `suffix`."""
    tokens = [server.tokenizer.token_id(f"<|fim_{word}|>") for word in ("prefix", "suffix", "middle")]
    before, behind, middle = tokens
    if before is None or behind is None or middle is None:
        raise ApiError(
            400,
            "suffix: this vocabulary has no tokens to fill in the middle (<|fim_prefix|>, <|fim_suffix|>, <|fim_middle|>)",
            param="suffix",
            code="invalid_value",
        )
    return [before, *prompt_ids, behind, *encode(server, suffix, "suffix"), middle]


def _texts(tokenizer: Tokenizer, body: CompletionRequest, prepared: Sequence[Prepared]) -> list[str]:
    """What `echo` puts before each answer."""
    if not body.echo:
        return [""] * len(prepared)
    given: Any = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if isinstance(given[0], str):
        return [well_formed(text) for text in given]
    return [tokenizer.decode(one.prompt_ids, skip_special=False) for one in prepared]


async def _steps(server: Server, prepared: Sequence[Prepared], http: Request) -> AsyncGenerator[Step, None]:
    """The steps of all prompts as they come. One that fails ends all of them."""
    if len(prepared) == 1:
        only = events(server, prepared[0], http)
        async with aclosing(only):  # type: ignore[type-var]
            async for _, _, delta in only:
                yield 0, delta
        return
    inbox: asyncio.Queue[Step | Exception | None] = asyncio.Queue()

    async def run(place: int) -> None:
        try:
            one = events(server, prepared[place], http)
            async with aclosing(one):  # type: ignore[type-var]
                async for _, _, delta in one:
                    inbox.put_nowait((place, delta))
            inbox.put_nowait(None)
        except Exception as error:
            inbox.put_nowait(error)

    tasks = [asyncio.create_task(run(place)) for place in range(len(prepared))]
    try:
        running = len(tasks)
        while running:
            item = await inbox.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Choice:
    """One answer as it grows: what has come since the last piece was told, and where in the text it stands."""

    def __init__(
        self, index: int, tokenizer: Tokenizer, prepared: Prepared, body: CompletionRequest, prompt: str
    ) -> None:
        self.prompt_logprobs: Sequence[TokenLogprob | None] | None = None
        self._index = index
        self._tokenizer = tokenizer
        self._prompt_ids = prepared.prompt_ids
        self._body = body
        self._skip_special = prepared.params.skip_special_tokens
        self._echo: str | None = prompt if body.echo else None  # until it has been told
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._token_ids: list[int] = []
        self._finish_reason: str | None = None
        self._stop_reason: int | str | None = None
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._told = False

    def take(self, delta: Delta) -> None:
        """Add a step. With max_tokens 0 the one token that the engine made to read the prompt is dropped."""
        if self._body.max_tokens == 0:
            self._finish_reason = "length"
            return
        self._texts.append(delta.text)
        self._logprobs += visible_logprobs(delta)
        self._token_ids += delta.token_ids
        self._finish_reason, self._stop_reason = delta.finish_reason, delta.stop_reason

    @property
    def has_news(self) -> bool:
        return self._echo is not None or self._finish_reason is not None or any(self._texts)

    def piece(self) -> dict[str, Any]:
        """What has come since the last piece, in OpenAI's shape."""
        body = self._body
        choice: dict[str, Any] = {
            "index": self._index,
            "text": (self._echo or "") + "".join(self._texts),
            "logprobs": None if body.logprobs is None else self._described(),
            "finish_reason": self._finish_reason,
            "stop_reason": self._stop_reason,
        }
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(self._tokenizer, self.prompt_logprobs)
        if body.return_token_ids:
            choice["token_ids"] = self._token_ids
            if not self._told:
                choice["prompt_token_ids"] = self._prompt_ids
        self._echo, self._told = None, True
        self._texts, self._logprobs, self._token_ids = [], [], []
        return choice

    def _described(self) -> dict[str, Any]:
        """The old shape: parallel lists of tokens, their log-probabilities, the likeliest, and where each begins in the text."""
        told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if self._echo is not None:
            known = self.prompt_logprobs or [None] * len(self._prompt_ids)
            for token, one in zip(self._prompt_ids, known, strict=True):
                self._describe(told, token, one, skip_special=False)
            self._offset = len(self._echo)
            self._decoder.reset()
        for one in self._logprobs:
            self._describe(told, one.token_id, one, skip_special=self._skip_special)
        return told

    def _describe(
        self, told: dict[str, list[Any]], token: int, one: TokenLogprob | None, *, skip_special: bool
    ) -> None:
        told["tokens"].append(self._word(token))
        told["text_offset"].append(self._offset)
        told["token_logprobs"].append(None if one is None else finite(one.logprob))
        top = None
        if one is not None:
            count = self._body.logprobs or 0
            top = {self._word(token): finite(logprob) for token, logprob in reversed(one.top[:count])}
            top[self._word(one.token_id)] = finite(one.logprob)
        told["top_logprobs"].append(top)
        if not (skip_special and self._tokenizer.is_special(token)):
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token)))

    def _word(self, token: int) -> str:
        """A token's text, or as OpenAI writes them the bytes of one that is no whole text."""
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
