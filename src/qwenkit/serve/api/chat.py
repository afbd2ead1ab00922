"""POST /v1/chat/completions: OpenAI's chat, with thinking as `reasoning_content` and with vLLM's extra fields.

In: a ChatRequest. Out: one `chat.completion`, or its pieces as events. Both come from the same Choice, fed by the same events, so
that the deltas of a stream add up to the answer that is not streamed.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from qwenkit.engine.request import Delta
from qwenkit.serve.api.prepare import Prepared, events, prepare
from qwenkit.serve.api.protocol import ChatRequest
from qwenkit.serve.api.reply import Frame, Usage, chat_logprob, prompt_logprobs, visible_logprobs
from qwenkit.serve.api.stream import COMMENT, DONE, STREAMED, EventStream, Silence
from qwenkit.serve.body import JsonRoute
from qwenkit.serve.config import REASONING_FIELDS
from qwenkit.serve.server import Server, the_server
from qwenkit.text.answer import AnswerEvent
from qwenkit.text.tokenizer import Tokenizer

router = APIRouter(route_class=JsonRoute)

Step = tuple[int, list[AnswerEvent], Delta]


@router.post("/v1/chat/completions", response_model=None, responses=STREAMED)
async def chat_completions(
    body: ChatRequest, http: Request, server: Annotated[Server, Depends(the_server)]
) -> Response:
    """Answer a conversation; streamed as server-sent events with `stream: true`."""
    prepared = await prepare(server, lambda: body, http)
    frame = Frame("chat.completion.chunk" if body.stream else "chat.completion", "chatcmpl", prepared.model, body)
    think_end_id = None if server.answer_format is None else server.answer_format.think_end_id
    usage = Usage(len(prepared.prompt_ids), think_end_id)
    thinks = server.answer_format is not None and server.answer_format.thinks
    fields = REASONING_FIELDS[server.config.reasoning_field] if thinks else ()
    choices = [Choice(index, server.tokenizer, prepared, body, fields) for index in range(prepared.params.n)]
    steps = events(server, prepared, http)
    if body.stream:
        first = await anext(steps)  # what is refused before it is a status, not an event
        return EventStream(_chunks(first, steps, frame, usage, choices, body, prepared))
    told: dict[str, Any] = {}
    async with aclosing(steps):  # type: ignore[type-var]
        async for index, found, delta in steps:
            usage.count(index, found, delta)
            choices[index].take(found, delta)
            if delta.prompt_logprobs is not None:
                told["prompt_logprobs"] = prompt_logprobs(server.tokenizer, delta.prompt_logprobs)
    if body.return_token_ids:
        told["prompt_token_ids"] = prepared.prompt_ids
    return frame.whole([choice.whole() for choice in choices], usage, **told)


async def _chunks(
    first: Step,
    steps: AsyncIterator[Step],
    frame: Frame,
    usage: Usage,
    choices: Sequence[Choice],
    body: ChatRequest,
    prepared: Prepared,
) -> AsyncGenerator[bytes, None]:
    """The events of a stream: for each answer the role, its pieces, its end; then the usage and [DONE]."""
    prompt_ids = {"prompt_token_ids": prepared.prompt_ids} if body.return_token_ids else {}
    silence = Silence()
    async with aclosing(steps):  # type: ignore[type-var]
        step: Step | None = first
        while step is not None:
            index, found, delta = step
            usage.count(index, found, delta)
            choice = choices[index]
            chunk = b"" if choice.started else frame.chunk(choice.opening() | prompt_ids, usage)
            for piece in choice.pieces(found, delta):
                chunk += frame.chunk(piece, usage)
            if silence.breaks(bool(chunk)):
                chunk = COMMENT
            if chunk:
                yield chunk
            step = await anext(steps, None)
    yield frame.usage_chunk(usage) + DONE


class Choice:
    """One answer as it grows, in OpenAI's words."""

    def __init__(
        self, index: int, tokenizer: Tokenizer, prepared: Prepared, body: ChatRequest, fields: Sequence[str] = ()
    ) -> None:
        self.index = index
        # Clients of models that think read the field of every message and delta, thought or not.
        self._thought: dict[str, Any] = {"reasoning_content": None} if fields else {}
        self._fields = fields or ("reasoning_content",)  # of the thought in a delta
        self._named = prepared.tools.named
        self.started = False
        self._tokenizer = tokenizer
        self._legacy = prepared.tools.legacy
        self._wants_ids = bool(body.return_token_ids)
        self._wants_logprobs = bool(body.logprobs)
        self._own_stops = body.stop or []
        self._texts: dict[str, list[str]] = {"content": [], "reasoning": []}
        self._calls: list[dict[str, Any]] = []
        self._logprobs: list[dict[str, Any]] = []
        self._token_ids: list[int] = []
        self._finish_reason: str | None = None
        self._stop_reason: int | str | None = None

    def take(self, found: Sequence[AnswerEvent], delta: Delta) -> None:
        """Add a step."""
        for event in found:
            if event.kind == "tool_call":
                self._calls.append(self._opened(event.text))
            elif event.kind == "arguments":
                self._calls[event.tool_index]["function"]["arguments"] += event.text
            else:
                self._texts[event.kind].append(event.text)
        self._note(delta)

    def whole(self) -> dict[str, Any]:
        """The choice of an answer that is not streamed."""
        content, reasoning = "".join(self._texts["content"]), "".join(self._texts["reasoning"])
        message: dict[str, Any] = {"role": "assistant", "content": content if content or not self._calls else None}
        message |= self._thought
        if reasoning:
            message |= {"reasoning_content": reasoning, "reasoning": reasoning}
        if self._calls and self._legacy:
            message["function_call"] = self._calls[0]["function"]
        elif self._calls:
            message["tool_calls"] = self._calls
        choice = {
            "index": self.index,
            "message": message,
            "logprobs": {"content": self._logprobs, "refusal": None} if self._wants_logprobs else None,
            "finish_reason": self._finish_reason,
            "stop_reason": self._stop_reason,
        }
        return choice | {"token_ids": self._token_ids} if self._wants_ids else choice

    def opening(self) -> dict[str, Any]:
        """The first piece, which says who speaks."""
        self.started = True
        return self._choice({"role": "assistant", "content": ""} | self._nothing)

    def pieces(self, found: Sequence[AnswerEvent], delta: Delta) -> Iterator[dict[str, Any]]:
        """The streamed choices of a step: what it says, and then, with nothing to say, how the answer ended."""
        told: dict[str, Any] = {}
        calls: dict[int, dict[str, Any]] = {}
        for event in found:
            if event.kind == "tool_call":
                opened = self._opened(event.text)
                self._calls.append(opened)
                calls[event.tool_index] = {"index": event.tool_index, **opened}
            elif event.kind == "arguments":
                call = calls.setdefault(event.tool_index, {"index": event.tool_index, "function": {"arguments": ""}})
                call["function"]["arguments"] += event.text
            elif event.kind == "content":
                told["content"] = told.get("content", "") + event.text
            else:
                told |= {name: told.get(name, "") + event.text for name in self._fields}
        if calls and self._legacy:
            told["function_call"] = calls[0]["function"]
        elif calls:
            told["tool_calls"] = list(calls.values())
        self._note(delta)
        if told:
            yield self._with_tokens(self._choice(self._nothing | told, ended=False))
        if self._finish_reason is not None:
            yield self._with_tokens(self._choice(self._nothing))

    @property
    def _nothing(self) -> dict[str, Any]:
        return dict.fromkeys(self._fields) if self._thought else {}

    def _with_tokens(self, choice: dict[str, Any]) -> dict[str, Any]:
        """What was asked for about the tokens since the last choice."""
        if self._wants_logprobs:
            choice["logprobs"] = {"content": self._logprobs, "refusal": None}
            self._logprobs = []
        if self._wants_ids:
            choice["token_ids"] = self._token_ids
            self._token_ids = []
        return choice

    def _choice(self, told: dict[str, Any], *, ended: bool = True) -> dict[str, Any]:
        choice = {"index": self.index, "delta": told, "logprobs": None, "finish_reason": None}
        if ended:
            choice["finish_reason"] = self._finish_reason
        return choice if not ended or self._stop_reason is None else choice | {"stop_reason": self._stop_reason}

    def _opened(self, name: str) -> dict[str, Any]:
        function = {"name": name, "arguments": ""}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}

    def _note(self, delta: Delta) -> None:
        """What a step says besides the text."""
        if self._wants_logprobs:
            self._logprobs += [chat_logprob(self._tokenizer, one) for one in visible_logprobs(delta)]
        if self._wants_ids:
            self._token_ids += delta.token_ids
        reason = delta.finish_reason
        if reason is None:
            return
        if reason == "stop" and self._calls and not self._named:  # a call that was asked for by name is the answer
            reason = "function_call" if self._legacy else "tool_calls"
        self._finish_reason = reason
        # a stop string that the format of tool calls needs is nobody's business
        if not isinstance(delta.stop_reason, str) or delta.stop_reason in self._own_stops:
            self._stop_reason = delta.stop_reason
