"""Who is asking: the key's name, what it keeps apart from others, how urgent it is, and the request's id.

access.py sets it at the door for the task that answers a request; the driver reads it where a route says nothing else, so that
no route can forget it. A batch worker that calls the app in its own process puts a Caller into the ASGI scope itself, under
SCOPE_KEY: nothing that comes from the network can do that.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

SCOPE_KEY = "qwenkit.caller"


@dataclass(frozen=True)
class Caller:
    """`name` is the key's name in logs and metrics, "" without keys; `namespace` separates prefix cache, files and batches.

    Limits of tokens a minute hold for a caller that `is_limited`. An answer ends where they do, unless the caller `may_owe`: then
    it is finished, and what it has too much is taken from the following minutes.
    """

    name: str = ""
    namespace: str = ""
    is_admin: bool = False
    priority: int = 0
    request_id: str = ""
    is_limited: bool = False
    may_owe: bool = False

    @property
    def principal(self) -> str:
        """Who is counted, limited and served in turn with others: the key, whatever its name is today."""
        return self.namespace or self.name


_NOBODY = Caller()
caller: ContextVar[Caller] = ContextVar("caller", default=_NOBODY)
"""The one whose request the running task answers."""
