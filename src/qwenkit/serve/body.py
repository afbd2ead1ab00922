"""Reading JSON bodies: one strict parser, limits before it, and validation that stops at the first errors.

In: the body of a request to a route whose parameter is a `RequestModel`. Out: the validated model, or ApiError 400 or 415. A body
over INLINE_BYTES is parsed and validated in a thread. Parser and validator keep the interpreter lock while they run, so a body
with more fields or values than any valid request has is refused by counting them first.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Annotated, Any, ClassVar, TypeVar

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError, from_json
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from qwenkit.serve.caller import caller
from qwenkit.serve.errors import ApiError, client_gone, refusal
from qwenkit.serve.executor import FairExecutor

INLINE_BYTES = 16_384  # longest body that is parsed on the event loop
MAX_FIELDS = 100_000  # objects, lists and fields of objects in one body
MIN_VALUES = 400_000  # items of lists and fields of objects, in a model whose context is shorter than that
MAX_UNKNOWN = 16  # unknown fields that are named
MAX_NAME = 64  # characters of the name of one
IGNORED_HEADER = "x-ignored-fields"

MAX_LOGGED = 256  # lines in the log about such fields

_CHUNK = 1 << 18  # bytes whose structure is counted at a time
_QUOTE, _BACKSLASH = ord('"'), ord("\\")
_COMMA, _COLON, _BRACKET, _BRACE = map(ord, ",:[{")

M = TypeVar("M", bound="RequestModel")

log = logging.getLogger("qwenkit.serve")


class RequestModel(BaseModel):
    """Base of all JSON bodies and of the objects in them.

    null is a missing field, unknown fields are left out, and no value is converted to another type (but see `Whole`). Lists of
    subclasses must be declared with `fail_fast` and dictionaries of typed values with `at_most`, so that a body gives few errors
    however long it is.
    """

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, protected_namespaces=(), frozen=True)

    UNSUPPORTED: ClassVar[Mapping[str, Unsupported]] = {}
    """Fields that a body may have at its top, but only with a value that asks for nothing."""
    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset()
    """Fields that a body may have at its top, with any value."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return without_nulls(value)

    @classmethod
    def simplify(cls, body: dict[str, Any], left_out: LeftOut) -> dict[str, Any]:
        """The body in the fields and forms of this model. What cannot be obeyed goes into `left_out`. Raises ApiError 400."""
        names = _field_names(cls)
        for name in body.keys() - names:
            unsupported = cls.UNSUPPORTED.get(name)
            if unsupported is not None:
                unsupported.check(name, body[name])
            elif name not in cls.WITHOUT_EFFECT:
                left_out.add(name)
        return {name: value for name, value in body.items() if name in names}


def without_nulls(value: Any) -> Any:
    """A JSON object without the members that are null; other values as they are."""
    if isinstance(value, dict) and any(item is None for item in value.values()):
        return {name: item for name, item in value.items() if item is not None}
    return value


@cache
def _field_names(model: type[BaseModel]) -> frozenset[str]:
    return frozenset(field.alias or name for name, field in model.model_fields.items())


@dataclass(frozen=True)
class Unsupported:
    """A field of other servers that would change the answer, in a way that is not offered here.

    instead: a sentence that says what to use. neutral: values that ask for nothing; false and empty ones do too, unless
    `falsy` says that they ask for something.
    """

    instead: str
    neutral: tuple[Any, ...] = ()
    falsy: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raises ApiError 400 for a value that asks for what is not offered."""
        if value in self.neutral or (not self.falsy and value in (False, 0, "", [], {})):
            return
        raise ApiError(400, f"{name} is not supported: {self.instead}", param=name, code="unsupported_parameter")


class LeftOut:
    """Parts of a request that are not obeyed and do no harm: told in a header and in the log, refused under --strict."""

    def __init__(self, *, strict: bool = False) -> None:
        self._strict = strict
        self._names: set[str] = set()

    def add(self, name: str) -> None:
        """Note a field by its name or dotted path."""
        self._names.add(re.sub(r"[^\x21-\x2b\x2d-\x7e]", "?", name[:MAX_NAME]))

    @cached_property
    def names(self) -> list[str]:
        """The first MAX_UNKNOWN names, fit for a header. Sorted once, by whoever parses the body, after the last `add`."""
        return sorted(self._names)[:MAX_UNKNOWN]

    def header(self) -> str:
        """The names as the value of a header; empty if nothing was left out."""
        return ", ".join(self.names + ["..."] * (len(self._names) > MAX_UNKNOWN))

    def check(self) -> None:
        """Raises ApiError 400, naming what was left out, under --strict."""
        names = self.names
        if self._strict and names:
            sentence = f"unknown field{'s' * (len(names) > 1)}: {', '.join(names)}"
            raise ApiError(400, sentence, param=names[0], code="unknown_parameter")


def whole(value: Any) -> Any:
    """A float without a fraction as the integer that it is."""
    return int(value) if type(value) is float and value.is_integer() and abs(value) < 2**63 else value


Whole = Annotated[int, BeforeValidator(whole, json_schema_input_type=int)]
"""An integer field: 256.0 is 256, as programs write whole numbers that have no integers."""


def at_most_minus_one(value: Any) -> Any:
    """-1, which other servers take for no limit, as a missing field."""
    value = whole(value)
    return None if value == -1 and not isinstance(value, bool) else value


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
            body, ignored = await reader_of(request.app).read(request, model)
            response = await handler(_ReadRequest(request.scope, request.receive, body))
            if ignored:
                response.headers[IGNORED_HEADER] = ignored
            return response

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
    """Reads the JSON bodies of one app, whose `app.state.bodies` it is.

    max_prompt: token ids of the longest valid prompt. strict: refuse what is otherwise left out.
    """

    def __init__(self, max_prompt: int = 0, *, strict: bool = False) -> None:
        self.max_values = max(MIN_VALUES, max_prompt) + MAX_FIELDS  # items of lists and fields of objects
        self._strict = strict
        self._logged: set[tuple[str, str]] = set()
        # One thread: parser and validator keep the interpreter lock, and two of them would keep it from the event loop.
        self._executor = FairExecutor(1, "bodies")

    async def read(self, request: Request, model: type[M]) -> tuple[M, str]:
        """The body as `model`, and the names of what was left out of it as text.

        Raises ApiError: 415 for another content type, 400 for what is not JSON or not valid.
        """
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
        left_out = LeftOut(strict=self._strict)
        parsed: M
        if len(data) <= INLINE_BYTES:
            parsed = parse(data, model, self.max_values, left_out)
        else:
            parsed = await self._executor.run(caller.get().namespace, parse, data, model, self.max_values, left_out)
        self._tell(request.url.path, left_out)
        return parsed, left_out.header()

    def _tell(self, path: str, left_out: LeftOut) -> None:
        """Log once for each name and path what is not obeyed."""
        new = [name for name in left_out.names if (path, name) not in self._logged]
        if new and len(self._logged) < MAX_LOGGED:
            self._logged.update((path, name) for name in new)
            log.warning("requests to %s have fields that are not known and are left out: %s", path, ", ".join(new))


def reader_of(app: FastAPI) -> BodyReader:
    """The reader of an app, made when it is first asked for."""
    if not hasattr(app.state, "bodies"):
        app.state.bodies = BodyReader()
    reader = app.state.bodies
    assert isinstance(reader, BodyReader)
    return reader


def parse(data: bytes, model: type[M], values: int, left_out: LeftOut | None = None) -> M:
    """JSON as `model`; what is not obeyed goes into `left_out`. Raises ApiError 400, with the first few things that are wrong."""
    value = without_nulls(strict_json(data, values))
    left_out = LeftOut() if left_out is None else left_out
    if isinstance(value, dict):
        value = model.simplify(value, left_out)
    try:
        parsed = model.model_validate(value)
    except ValidationError as error:
        raise refusal(error.errors(include_url=False)) from None
    left_out.check()
    return parsed


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
