"""Reading JSON bodies: one strict parser, limits before it, and validation that stops at the first errors.

In: the body of a request to a route whose parameter is a `RequestModel`. Out: the validated model, or ApiError 400 or 415. A body
over INLINE_BYTES is parsed and validated in a thread. Parser and validator keep the interpreter lock while they run, so a body
with more fields or values than any valid request has is refused by counting them first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError, from_json
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from qwenkit.serve.caller import caller
from qwenkit.serve.errors import ApiError, client_gone, refusal
from qwenkit.serve.executor import FairExecutor

INLINE_BYTES = 16_384  # longest body that is parsed on the event loop
MAX_FIELDS = 100_000  # objects, lists and fields of objects in one body
MIN_VALUES = 400_000  # items of lists and fields of objects, in a model whose context is shorter than that
MAX_UNKNOWN = 16  # unknown fields of one object that are reported

_CHUNK = 1 << 18  # bytes whose structure is counted at a time
_QUOTE, _BACKSLASH = ord('"'), ord("\\")
_COMMA, _COLON, _BRACKET, _BRACE = map(ord, ",:[{")

M = TypeVar("M", bound=BaseModel)


class RequestModel(BaseModel):
    """Base of all JSON bodies: unknown fields are errors, and no value is converted to another type.

    One wrong object gives at most MAX_UNKNOWN errors for unknown fields. Lists of subclasses must be declared with `fail_fast`
    and dictionaries of typed values with `at_most`, so that a body gives few errors however long it is.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=(), frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _few_unknown(cls, value: Any) -> Any:
        if not isinstance(value, dict) or len(value) <= MAX_UNKNOWN:
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        if len(value) <= len(known) or cls.model_config.get("extra") != "forbid":
            return value
        unknown = islice((name for name in value if name not in known), MAX_UNKNOWN)
        return {name: value[name] for name in known if name in value} | {name: value[name] for name in unknown}


def at_most(number: int) -> Callable[[Any], Any]:
    """A validator, run before the items are looked at, that refuses a dictionary of more than `number` items."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > number:
            sentence = "Dictionary should have at most {allowed} items, not {given}"
            raise PydanticCustomError("too_long", sentence, {"allowed": number, "given": len(value)})
        return value

    return check


class JsonRoute(APIRoute):
    """A route that reads its JSON body by the app's BodyReader; documented as FastAPI documents it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        model = _model_of(self.endpoint)
        if model is None:
            return handler

        async def handle(request: Request) -> Response:
            body = await reader_of(request.app).read(request, model)
            return await handler(_ReadRequest(request.scope, request.receive, body))

        return handle


class _ReadRequest(Request):
    """A request whose body has been read and validated. FastAPI takes an instance of the model as it is."""

    def __init__(self, scope: Scope, receive: Receive, value: BaseModel) -> None:
        super().__init__(scope, receive)
        self._value = value

    async def body(self) -> bytes:
        return b"{}"

    async def json(self) -> Any:
        return self._value


def _model_of(endpoint: Callable[..., Any]) -> type[RequestModel] | None:
    """The model that a route's function takes as its body."""
    for parameter in inspect.signature(endpoint, eval_str=True).parameters.values():
        kind = parameter.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            assert issubclass(kind, RequestModel), f"{kind.__name__} is no RequestModel"
            return kind
    return None


class BodyReader:
    """Reads the JSON bodies of one app, whose `app.state.bodies` it is. `max_prompt`: token ids of the longest valid prompt."""

    def __init__(self, max_prompt: int = 0) -> None:
        self.max_values = max(MIN_VALUES, max_prompt) + MAX_FIELDS  # items of lists and fields of objects
        # One thread: parser and validator keep the interpreter lock, and two of them would keep it from the event loop.
        self._executor = FairExecutor(1, "bodies")

    async def read(self, request: Request, model: type[M]) -> M:
        """The body as `model`. Raises ApiError: 415 for another content type, 400 for what is not JSON or not valid."""
        try:
            data = await request.body()
        except ClientDisconnect:
            raise client_gone() from None
        if not data:
            raise ApiError(400, "the body is missing", code="missing_required_parameter")
        given = request.headers.get("content-type") or "missing"
        if not _is_json(given):
            sentence = f"the header Content-Type is {given[:100]}, allowed is application/json"
            raise ApiError(415, sentence, code="unsupported_media_type")
        if len(data) <= INLINE_BYTES:
            return parse(data, model, self.max_values)
        parsed: M = await self._executor.run(caller.get().namespace, parse, data, model, self.max_values)
        return parsed


def reader_of(app: FastAPI) -> BodyReader:
    """The reader of an app, made when it is first asked for."""
    if not hasattr(app.state, "bodies"):
        app.state.bodies = BodyReader()
    reader = app.state.bodies
    assert isinstance(reader, BodyReader)
    return reader


def parse(data: bytes, model: type[M], values: int) -> M:
    """JSON as `model`. Raises ApiError 400, with the first few things that are wrong."""
    value = strict_json(data, values)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise refusal(error.errors(include_url=False)) from None


def strict_json(data: bytes, values: int) -> Any:
    """The value of JSON text. Raises ApiError 400 for any other text: NaN, half a surrogate pair, nesting beyond 200 levels.

    Also for more than `values` values or MAX_FIELDS fields, before anything is made of them.
    """
    if len(data) > MAX_FIELDS:
        commas, fields = count_structure(data, values, MAX_FIELDS)
        if fields > MAX_FIELDS:
            raise _too_many("fields, objects and lists", MAX_FIELDS)
        if commas > values:
            raise _too_many("values", values)
    try:
        return from_json(data.removeprefix(b"\xef\xbb\xbf"), allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="bad_json") from None


def _too_many(what: str, number: int) -> ApiError:
    return ApiError(400, f"the body has more than {number} {what}, which no valid request has", code="limit_exceeded")


def count_structure(data: bytes, max_commas: int, max_fields: int) -> tuple[int, int]:
    """(commas, colons and opening brackets) outside of the strings of JSON text; exact up to the first syntax error.

    Where all of them, those in strings included, are few, the counts of all are returned. Counting stops above a limit.
    """
    commas, fields = data.count(b","), sum(map(data.count, (b":", b"[", b"{")))
    if commas <= max_commas and fields <= max_fields:
        return commas, fields
    commas = fields = 0
    is_inside, is_escaped = False, False  # at the start of a chunk: within a string; after an odd run of backslashes
    whole = np.frombuffer(data, np.uint8)
    for start in range(0, len(whole), _CHUNK):
        chunk = whole[start : start + _CHUNK]
        quotes = chunk == _QUOTE
        backslashes = chunk == _BACKSLASH
        if is_escaped or backslashes.any():
            place = np.arange(1, len(chunk) + 1, dtype=np.int32)
            last_other = np.maximum.accumulate(np.where(backslashes, 0, place))  # 0: only backslashes so far
            runs = (
                place - last_other + ((last_other == 0) & is_escaped)
            )  # length, by its parity, of the run that ends here
            odd = (runs & 1).astype(bool)
            quotes[1:] &= ~odd[:-1]
            quotes[0] &= not is_escaped
            is_escaped = bool(odd[-1])
        inside = np.logical_xor.accumulate(quotes) ^ is_inside
        is_inside = bool(inside[-1])
        outside = ~inside
        commas += int(np.count_nonzero((chunk == _COMMA) & outside))
        opening = (chunk == _COLON) | (chunk == _BRACKET) | (chunk == _BRACE)
        fields += int(np.count_nonzero(opening & outside))
        if commas > max_commas or fields > max_fields:
            break
    return commas, fields


def _is_json(content_type: str) -> bool:
    kind, _, subtype = content_type.partition(";")[0].strip().lower().partition("/")
    return kind == "application" and (subtype == "json" or subtype.endswith("+json"))
