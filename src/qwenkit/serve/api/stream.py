"""Server-sent events: an async generator of bytes as a response.

In: complete events (`data: ...` and an empty line). Out: the response, in the task of the request. What goes wrong after the
first byte becomes an error event, in the shape that `error_event` gives it, and the end.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qwenkit.serve.caller import caller
from qwenkit.serve.errors import ApiError, internal_error

log = logging.getLogger("qwenkit.serve")

DONE = b"data: [DONE]\n\n"


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
