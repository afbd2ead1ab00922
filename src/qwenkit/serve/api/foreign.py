"""What the routes of other shapes than chat's share: the way into a chat request and out of it, the events on the wire.

In: fields that messages_protocol and responses_protocol translated, events as objects. Out: a ChatRequest or the ApiError that
says in the caller's words why not, and what a Writer makes of the answer: JSON, or named server-sent events.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, Protocol, TypeVar

import orjson
from fastapi import Response
from pydantic import ValidationError

from qwenkit.engine.request import Delta
from qwenkit.serve.api.prepare import Prepared, events
from qwenkit.serve.api.protocol import ChatRequest
from qwenkit.serve.api.reply import Usage
from qwenkit.serve.api.stream import EventStream, Silence
from qwenkit.serve.errors import ApiError, refusal
from qwenkit.serve.server import Server
from qwenkit.text.answer import AnswerEvent

R = TypeVar("R")
Events = list[dict[str, Any]]


def chat_request(chat_fields: Callable[[R], dict[str, Any]], body: R) -> ChatRequest:
    """The chat request that `body` stands for. Raises ApiError 400 for one that contradicts itself."""
    try:
        return ChatRequest.model_validate(chat_fields(body))
    except ValidationError as error:
        raise refusal(error.errors()) from None
    except ValueError as error:
        raise ApiError(400, str(error), code="invalid_value") from None


@contextmanager
def in_words_of(names: Mapping[str, str]) -> Iterator[None]:
    """Errors that name a field of the chat request name the one that the caller wrote: `names` has chat's names as keys."""
    try:
        yield
    except ApiError as error:
        field, dot, rest = (error.param or "").partition(".")
        name, bracket, index = field.partition("[")
        if name in names:
            error.param = names[name] + bracket + index + dot + rest
            error.message = error.message.replace(name, names[name], 1)
        raise


class Writer(Protocol):
    """Writes one answer in its API's shape: `start`, `push` for each piece, then `finish` or `fail`: each gives events."""

    def start(self, usage: Usage, /) -> Events: ...
    def push(self, events: Sequence[AnswerEvent], /) -> Events: ...
    def finish(self, last: Delta, usage: Usage, /) -> Events: ...
    def fail(self, error: ApiError, /) -> Events: ...
    def whole(self) -> dict[str, Any]: ...
    def keep_alive(self) -> bytes:
        """What tells a client that the answer is still being written."""
        ...


async def respond(server: Server, prepared: Prepared, http: Any, writer: Writer, *, stream: bool) -> Response:
    """The answer as `writer` puts it: its events as they come, or the whole of it at the end."""
    steps = _steps(server, prepared, http, writer)
    if stream:
        first = await anext(steps)  # here, and not in the stream, it is seen whether the request is accepted at all
        return EventStream(_on_the_wire(first, steps, writer), lambda error: _bytes(writer.fail(error)))
    async for _ in steps:
        pass
    return json_response(writer.whole())


async def _steps(server: Server, prepared: Prepared, http: Any, writer: Writer) -> AsyncGenerator[Events, None]:
    """The events that each step of the engine makes due, also if there are none.

    A model whose answers have no format gives plain text.
    """
    think_end_id = None if server.answer_format is None else server.answer_format.think_end_id
    usage = Usage(len(prepared.prompt_ids), think_end_id)
    started = False
    async with aclosing(events(server, prepared, http)) as pieces:  # type: ignore[type-var]
        async for index, found, delta in pieces:
            if prepared.parser is None and delta.text:
                found = [AnswerEvent("content", delta.text)]
            usage.count(index, found, delta)
            out = [] if started else writer.start(usage)
            started = True
            out += writer.push(found)
            if delta.finish_reason is not None:
                out += writer.finish(delta, usage)
            yield out


async def _on_the_wire(
    first: Events, rest: AsyncGenerator[Events, None], writer: Writer
) -> AsyncGenerator[bytes, None]:
    silence = Silence()
    async with aclosing(rest):
        yield _bytes(first)
        async for step in rest:
            if silence.breaks(bool(step)):
                yield writer.keep_alive()
            elif step:
                yield _bytes(step)


def _bytes(events: Events) -> bytes:
    return b"".join(map(named_event, events))


def json_response(value: Any) -> Response:
    return Response(as_json(value), media_type="application/json")


def named_event(event: Mapping[str, Any]) -> bytes:
    """An event on the wire, under the name that its type is."""
    return b"event: " + event["type"].encode() + b"\ndata: " + as_json(event) + b"\n\n"


def as_json(value: Any) -> bytes:
    """`value` as JSON, also with what orjson has no words for: whole numbers of more than 64 bits, half a surrogate pair.

    The latter becomes U+FFFD: requests that hold one are refused, and what the server gives out it takes back. Raises ApiError
    400 for what is nested so deeply that Python cannot write it.
    """
    try:
        try:
            return orjson.dumps(value)
        except TypeError:
            plain = json.loads(json.dumps(value), parse_constant=lambda name: None)  # NaN is null, as it is to orjson
            text = json.dumps(plain, ensure_ascii=False)
            return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()
    except RecursionError:
        raise ApiError(400, "the request is nested too deeply", code="invalid_value") from None
