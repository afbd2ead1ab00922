"""What a server writes down: one line for each HTTP request, one for each answer of the engine, and what went wrong.

In: counts, times and ids. Out: lines of text, or of JSON for machines, on standard error. Prompts and answers are in them only
where whoever started the server asked for it.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, TextIO

from starlette.types import Scope

access = logging.getLogger("qwenkit.access")
answers = logging.getLogger("qwenkit.answers")
QUIET_ROUTES = frozenset({"/health", "/ready", "/metrics", "/render"})  # asked often, by machines and by the page


def configure(log_format: str, stream: TextIO | None = None) -> None:
    """Send the lines of qwenkit and uvicorn to `stream` (standard error), as `log_format` says: text or json."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_json() if log_format == "json" else _Text())
    for name, level in (("qwenkit", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False


def log_access(scope: Scope, request_id: str, key: str, status: int, seconds: float, cut: bool) -> None:
    """One HTTP request, without its query, headers or body. `cut`: the answer broke off because of a bug."""
    level = logging.DEBUG if scope["path"] in QUIET_ROUTES and status < 400 else logging.INFO
    if not access.isEnabledFor(level):
        return
    fields = {
        "request_id": request_id,
        "key": key,
        "client": (scope.get("client") or ("",))[0],
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": status,
        "ms": round(seconds * 1000, 1),
    }
    access.log(level, "request", extra=fields | ({"cut": True} if cut else {}))


def log_answer(fields: dict[str, Any]) -> None:
    """One request to the engine that is over."""
    answers.info("answer", extra=fields)


def _json() -> logging.Formatter:
    from pythonjsonlogger.json import JsonFormatter

    return JsonFormatter(
        "%(asctime)s %(levelname)s %(name)s %(message)s",
        rename_fields={"asctime": "time", "levelname": "level", "name": "logger", "message": "event"},
    )


_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "color_message"}


class _Text(logging.Formatter):
    """`time level event field=value …`"""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        fields = (f"{name}={_plain(value)}" for name, value in record.__dict__.items() if name not in _STANDARD)
        return " ".join((super().formatMessage(record), *fields))


def _plain(value: Any) -> str:
    text = str(value)
    return text if text.isprintable() and " " not in text and text else repr(text)
