"""Server-sent events: an async generator of bytes as a response.

In: complete events (`data: ...` and an empty line). Out: the response, in the task of the request. What goes wrong after the
first byte becomes an error event, in the shape that `error_event` gives it, and the end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qwenkit.serve.caller import caller
from qwenkit.serve.errors import ApiError, internal_error

log = logging.getLogger("qwenkit.serve")

DONE = b"data: [DONE]\n\n"
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}
"""What the OpenAPI document says of the answers of a route that streams where it is asked to."""

COMMENT = b": keep-alive\n\n"  # clients pass over it
SILENT_SECONDS = 1.0


class Silence:
    """How long a stream has sent nothing, while the model writes what is held back: a call is told when it is complete."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def breaks(self, sending: bool) -> bool:
        """Called at each step of the engine; whether something has to be sent so that the client sees a living stream."""
        now = time.monotonic()
        if not sending and now - self._last < SILENT_SECONDS:
            return False
        self._last = now
        return not sending


def openai_error(error: ApiError) -> bytes:
    """An error as OpenAI's streams tell it."""
    return b"data: " + orjson.dumps(error.body()) + b"\n\n"


class EventStream(Response):
    """Sends what `chunks` yields, each at once, and closes the generator whichever way it ends."""

    media_type = "text/event-stream"

    def __init__(
        self, chunks: AsyncGenerator[bytes, None], error_event: Callable[[ApiError], bytes] = openai_error
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._error_event = error_event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._chunks) as chunks:
            try:
                async for chunk in chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except OSError:  # the connection broke while it was written to
                return
            except ApiError as error:
                if error.status == 499:
                    return
                await send({"type": "http.response.body", "body": self._error_event(error), "more_body": True})
            except Exception:
                log.exception("a stream failed")
                told = self._error_event(internal_error(caller.get().request_id))
                await send({"type": "http.response.body", "body": told, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
