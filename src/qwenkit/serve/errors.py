"""What goes wrong, in the shape that clients of OpenAI's and Anthropic's APIs understand.

In: ApiError raised by a route, a request that its model refuses, an unknown path, a bug. Out: a status and a JSON body with
message, type, param and code; under /v1/messages the body is Anthropic's. A bug is logged with the request's id and answered
500 with that id and nothing else of it.
"""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from qwenkit.serve.caller import caller

log = logging.getLogger("qwenkit.serve")

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}
_MAX_MESSAGE = 1000  # characters of a validator's sentence, which may quote the request
_ANTHROPIC_PATH = "/v1/messages"


class Told(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Refusal(BaseModel):
    """OpenAI's shape of an error."""

    error: Told


class ToldToAnthropic(BaseModel):
    type: str
    message: str


class RefusalToAnthropic(BaseModel):
    """Anthropic's shape of an error."""

    type: Literal["error"]
    error: ToldToAnthropic
    request_id: str | None


DOCUMENTED: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Refusal | RefusalToAnthropic, "description": "Refused; the message says why"},
    "5XX": {"description": "The server failed, or is about to stop"},
}
"""What the OpenAPI document says of every route besides its answers."""


def is_anthropic(path: str) -> bool:
    """Whether a path belongs to Anthropic's API."""
    return path == _ANTHROPIC_PATH or path.startswith(_ANTHROPIC_PATH + "/")


class ApiError(Exception):
    """An answer other than 200. `param` is the dotted path of the field at fault, `code` a stable word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        anthropic_message: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.anthropic_message = anthropic_message  # where Anthropic's clients look for other words
        self.type = type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self, path: str = "") -> dict[str, Any]:
        """The JSON body; `path` is the request's, which decides between OpenAI's shape and Anthropic's."""
        if is_anthropic(path):
            kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
            told = {"type": kind, "message": self.anthropic_message or self.message}
            return {"type": "error", "error": told, "request_id": caller.get().request_id or None}
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self, path: str = "") -> JSONResponse:
        return JSONResponse(self.body(path), self.status, headers=self.headers)


def context_too_long(num_prompt: int, num_answer: int, max_model_len: int, param: str = "messages") -> ApiError:
    """400 for a prompt, or a prompt and the answer asked for (0: any), that the context cannot hold."""
    if num_prompt < max_model_len:
        sentence = (
            f"This model's maximum context length is {max_model_len} tokens, but the prompt has {num_prompt} tokens and "
            f"{num_answer} were asked for as the answer"
        )
        return ApiError(400, sentence, param=param, code="context_length_exceeded")
    return _too_long(f"{num_prompt} tokens", num_answer, max_model_len, param)


def text_too_long(size: str, max_model_len: int, param: str) -> ApiError:
    """400 for a text that is not tokenized, or not to its end; `size` says how long it is at least."""
    return _too_long(size, 0, max_model_len, param)


def _too_long(size: str, num_answer: int, max_model_len: int, param: str) -> ApiError:
    """The words by which clients decide to shorten a conversation: LiteLLM's and LangChain's of both APIs."""
    asked = f" and {num_answer} were asked for as the answer" if num_answer else ""
    return ApiError(
        400,
        f"This model's maximum context length is {max_model_len} tokens and the prompt is too long: it has {size}{asked}",
        param=param,
        code="context_length_exceeded",
        anthropic_message=f"prompt is too long: {size} > {max_model_len - 1} maximum",
    )


def client_gone() -> ApiError:
    """Ends the route of a request whose connection was closed. Nobody reads the answer; the log has it."""
    return ApiError(499, "the client closed the connection", code="client_closed_request")


def internal_error(request_id: str) -> ApiError:
    """500 that says where to look and nothing of what happened."""
    where = f" (request id {request_id})" if request_id else ""
    return ApiError(500, f"the server failed at this request{where}", type="server_error", code="internal_error")


def install_handlers(app: FastAPI) -> None:
    """Every error of the app in one shape. A bug that no route caught is answered by access.RequestScope, outside the app."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)


def _on_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response(request.url.path)


def _on_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    path = request.url.path
    sentences = {
        404: (f"there is no route {path}", "not_found"),
        405: (f"{request.method} is not allowed at {path}", "method_not_allowed"),
    }
    detail = str(error.detail)
    message, code = sentences.get(error.status_code, (detail[:1].lower() + detail[1:], None))
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    return ApiError(error.status_code, message, kind, code=code, headers=error.headers).response(path)


def _on_validation(request: Request, error: Exception) -> JSONResponse:
    """Parameters of the path and the query; bodies are read by body.BodyReader."""
    assert isinstance(error, RequestValidationError)
    return refusal(error.errors()).response(request.url.path)


def refusal(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """400 from pydantic's list of errors: the first thing that is wrong."""
    first = errors[0]
    param = _path(first["loc"]) or None
    message = str(first["msg"])[:_MAX_MESSAGE]
    message = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if first["type"] == "missing":
        message = f"{param or 'the body'} is missing"
        return ApiError(400, message, param=param, code="missing_required_parameter")
    given = f" (given: {_short(first.get('input'))})" if first["type"] != "value_error" else ""
    lead = f"{param}: " if param and first["type"] != "value_error" else ""
    return ApiError(400, f"{lead}{message[:1].lower() + message[1:]}{given}", param=param, code="invalid_value")


def _path(loc: Sequence[Any]) -> str:
    """Dotted path of a field, without the words that pydantic puts in for the branches of a union."""
    parts = [str(part)[:100] for part in loc if isinstance(part, int) or _is_field(part)]
    return ".".join(parts[1:] if parts and parts[0] in ("body", "query", "path", "header") else parts)


def _is_field(part: str) -> bool:
    return not ("[" in part or part in ("str", "int", "float", "bool", "dict", "constrained-str") or part[:1].isupper())


class _Repr(reprlib.Repr):
    """Short forms of values of any size: only what is shown is looked at."""

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        if level <= 0:
            return "{...}"
        shown = [f"{self.repr1(key, level - 1)}: {self.repr1(x[key], level - 1)}" for key in islice(x, self.maxdict)]
        return "{" + ", ".join(shown + ["..."] * (len(x) > self.maxdict)) + "}"

    def repr_str(self, x: str, level: int) -> str:
        return repr(x[:100])


_REPR = _Repr()
_REPR.maxlist = _REPR.maxdict = 20
_REPR.maxlong = 100


def _short(value: Any) -> str:
    text = _REPR.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
