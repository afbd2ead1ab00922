"""The doors between a network and the routes, from the outside in: Envelope, Gate, BodyLimit. All are plain ASGI.

In: a request. Out: the same with an id, known to come from somebody who may ask, its body within bounds; or the refusal. Every
route needs a key once keys are set, but for OPEN_ROUTES; those of ADMIN_ROUTES need the admin key whatever else is set.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from urllib.parse import urlsplit

from fastapi.exceptions import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwenkit.serve.caller import SCOPE_KEY, Caller, caller
from qwenkit.serve.config import ServeConfig
from qwenkit.serve.errors import ApiError, internal_error, is_anthropic, log
from qwenkit.serve.keys import Keys
from qwenkit.serve.limits import MinuteLimits
from qwenkit.serve.logs import log_access
from qwenkit.serve.metrics import Metrics
from qwenkit.serve.tracing import Tracing

OPEN_ROUTES = frozenset({"/health", "/ready", "/"})
"""Whoever watches the server has no key, and the page must load before a key can be typed into it."""

ADMIN_ROUTES = ("/admin/", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
UNCOUNTED_ROUTES = frozenset({"/render"})
"""The page asks for its markdown several times a second while an answer streams: CPU seconds limit that (page/worker.py)."""

UPLOADS = frozenset({"/v1/files"})
SLOWEST_BODY = 1024  # bytes a second that a body must arrive with, on the whole

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_ID_KEY = "qwenkit.request_id"
_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class Envelope:
    """Gives each request an id and each answer its headers, its line in the log, its count, and 500 where a route has a bug."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing) -> None:
        self.app = app
        self.metrics = metrics
        self.tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        scope[_ID_KEY] = request_id = self._id_of(scope)
        began, status, cut = time.monotonic(), 0, False

        async def send_dressed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if is_anthropic(scope["path"]):
                    headers["request-id"] = request_id
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        token = caller.set(replace(caller.get(), request_id=request_id))  # refusals name it before anybody is known
        with self.tracing.request(scope, request_id) as span:
            try:
                await self.app(scope, receive, send_dressed)
            except Exception:
                log.exception("request %s failed", request_id)
                if status:
                    cut = True
                    raise  # the answer has begun: only a broken connection can still tell the client
                await internal_error(request_id).response(scope["path"])(scope, receive, send_dressed)
            finally:
                caller.reset(token)
                route = getattr(scope.get("route"), "path", "")
                self.metrics.http(scope["method"] if route else "", route, status)
                span.ended(scope["method"], route, status)
                who = scope.get(SCOPE_KEY, Caller())
                log_access(scope, request_id, who.name, status, time.monotonic() - began, cut)

    @staticmethod
    def _id_of(scope: Scope) -> str:
        if SCOPE_KEY in scope:
            return str(scope[SCOPE_KEY].request_id)
        given = Headers(scope=scope).get("x-request-id", "")
        return given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"


class Gate:
    """Lets in whom the keys know, and leaves the Caller in the scope and in the task's context."""

    def __init__(self, app: ASGIApp, config: ServeConfig, keys: Keys, limits: MinuteLimits, metrics: Metrics) -> None:
        self.app = app
        self.config = config
        self.keys = keys
        self.limits = limits
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            who = scope.get(SCOPE_KEY) or self._admit(scope)
            self._count(scope, who)
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, send)
            return
        scope[SCOPE_KEY] = who
        token = caller.set(who)
        try:
            await self.app(scope, receive, send)
        finally:
            caller.reset(token)

    def _admit(self, scope: Scope) -> Caller:
        path = scope["path"]
        headers = Headers(scope=scope)
        who = self.keys.owner(_candidates(headers))
        if path.startswith(ADMIN_ROUTES):
            self._check_admin(who)
        elif path not in OPEN_ROUTES and self.keys.are_set and who is None:
            self.metrics.rejected("unauthorized")
            raise _unauthorized("this server needs an API key: Authorization: Bearer KEY, or x-api-key: KEY")
        if not self.keys.are_set and not self.config.allow_no_key:
            self._check_origin(headers)
        return replace(who or Caller(is_limited=True), request_id=scope[_ID_KEY])

    def _count(self, scope: Scope, who: Caller) -> None:
        """Count a request to the caller's minute, a batch's line like one from the network. Raises ApiError 429."""
        if scope["method"] != "POST" or scope["path"] in UNCOUNTED_ROUTES or who.is_admin:
            return
        try:
            self.limits.take_request(who)
        except ApiError:
            self.metrics.rejected("rate_limit")
            raise

    def _check_admin(self, who: Caller | None) -> None:
        if not self.keys.admin_is_set:
            raise ApiError(
                403, "administration is closed, the server was started without an admin key", code="no_admin_key"
            )
        if who is None:
            raise _unauthorized("this route needs the admin key")
        if not who.is_admin:
            raise ApiError(403, "this route needs the admin key, given was another one", "permission_error")

    def _check_origin(self, headers: Headers) -> None:
        """Without keys, being on this machine is what gives access; a page of a foreign site in a browser here has it not."""
        host = _host_of(headers.get("host", ""))
        if host and not _is_here(host, (self.config.host, *self.config.allowed_host)):
            raise ApiError(
                403,
                f"host {host[:100]!r} is not a name of this server: start it with --allowed-host {host[:100]}, or with --api-key",
                "permission_error",
                code="wrong_host",
            )
        origin = headers.get("origin")
        if origin is None or origin in self.config.cors_origin:
            return
        if urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
            raise ApiError(
                403, f"pages of {origin[:100]!r} may not call this server", "permission_error", code="wrong_origin"
            )


class BodyLimit:
    """Refuses bodies that are longer than allowed, whether they say so or not, and those that never arrive."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self.app = app
        self.most = config.bytes_of("max_body")
        self.most_upload = config.bytes_of("max_file") + 65536  # the other parts of the form
        self.patience = config.header_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or SCOPE_KEY not in scope:
            await self.app(scope, receive, send)
            return
        most = self.most_upload if scope["path"] in UPLOADS else self.most
        said = Headers(scope=scope).get("content-length", "0")
        if not said.isdigit() or int(said[:20]) > most:
            await _too_long(most).response(scope["path"])(scope, receive, send)
            return
        began, received, complete = time.monotonic(), 0, False

        async def receive_bounded() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            deadline = began + self.patience + received / SLOWEST_BODY
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except asyncio.TimeoutError:
                raise HTTPException(408, "the body took too long to arrive", {"Connection": "close"}) from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > most:
                raise HTTPException(413, _too_long(most).message, {"Connection": "close"})
            return message

        await self.app(scope, receive_bounded, send)


def _too_long(most: int) -> ApiError:
    return ApiError(
        413, f"the body is longer than {most} bytes, which is all this server takes", code="body_too_large",
        headers={"Connection": "close"},
    )  # fmt: skip


def _unauthorized(message: str) -> ApiError:
    return ApiError(
        401, message, "authentication_error", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
    )


def _candidates(headers: Headers) -> list[bytes]:
    """Keys that a request carries, as OpenAI's clients and as Anthropic's send them."""
    found = [headers.get("x-api-key", "").encode("latin-1")]
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        found.append(token.strip().encode("latin-1"))
    return [key for key in found if key]


def _host_of(header: str) -> str:
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return "?"


def _is_here(host: str, allowed: Sequence[str]) -> bool:
    """Whether a Host header names this server in a way that no foreign name server decides about, or is allowed."""
    if host == "localhost" or host.endswith(".localhost") or host in map(str.lower, allowed):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
