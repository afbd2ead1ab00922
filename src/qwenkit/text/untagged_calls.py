"""Answers that are a call without its tags: bare JSON, JSON in a fence or in the prompt's tags <tools>, bare XML.

In: content as it arrives. Out: whether a call can still come of it, so that other text is held back no longer than needed,
and at the end of the answer the calls. It is one only if it is the whole answer and names a tool of the request.
"""

import re
from collections.abc import Callable, Collection
from typing import Protocol, TypeVar

from qwenkit.text.call_repair import Named, without_fence

_BLANK = " \t\r\n"
C = TypeVar("C", bound=Named)


class Untagged(Protocol):
    """Content that may be a call."""

    def add(self, text: str) -> bool: ...
    def calls(self, read: Callable[[str], list[C] | None]) -> list[C] | None: ...


KEYS = ("name", "arguments", "parameters")
_ARGUMENTS = re.compile(r'"(?:arguments|parameters|args|input)"[ \t\r\n]*:')
MAX_OPENING = 300  # characters before it is clear whether an answer begins like a call


class UntaggedCall:
    """An answer that may be a call without its tags: bare, in a fence, or in the tags <tools> of the prompt.

    It is one only if it is the whole answer and names a tool of the request; quoted, it is text.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._text = ""
        self._rest: list[str] = []
        self._certain = False  # the name is a tool's, or comes later

    def add(self, text: str) -> bool:
        """Take the next piece; False if no call can come of it any more."""
        if self._certain:
            self._rest.append(text)
            return True
        self._text += text
        verdict = self._verdict(self._text)
        self._certain = verdict is True
        return verdict is not False and (self._certain or len(self._text) <= MAX_OPENING)

    def calls(self, read: Callable[[str], list[C] | None]) -> list[C] | None:
        """The calls that the answer is, as `read` understands them; None if it is text."""
        body = "".join((self._text, *self._rest)).strip(_BLANK)
        if not self._certain:
            return None
        if body.startswith("<tools>"):
            body = body.removeprefix("<tools>").removesuffix("</tools>").strip(_BLANK)
        elif body.startswith("```"):
            if not body.endswith("```"):
                return None
            body = without_fence(body)
        calls = read(body) if _ARGUMENTS.search(body) else None
        return calls if calls and all(call.name in self._names for call in calls) else None

    def _verdict(self, text: str) -> bool | None:
        """Whether this beginning is that of a call; None: it is too short to tell."""
        text = text.lstrip(_BLANK)
        for opening in ("```", "<tools>"):
            if opening.startswith(text):
                return None
            if text.startswith(opening):
                text = text[len(opening) :]
                text = (re.sub(r"\A[\w-]+", "", text) if opening == "```" else text).lstrip(_BLANK)
                break
        position = 0
        for mark in '{"':
            if not text[position:]:
                return None
            if text[position] != mark:
                return False
            position = position + 1 + len(text[position + 1 :]) - len(text[position + 1 :].lstrip(_BLANK))
        key, quote, rest = text[text.index('"') + 1 :].partition('"')
        if not quote:
            return None if any(known.startswith(key) for known in KEYS) else False
        if key != "name":
            return key in KEYS
        for mark in ':"':
            rest = rest.lstrip(_BLANK)
            if not rest:
                return None
            if rest[0] != mark:
                return False
            rest = rest[1:]
        name, quote, _ = rest.partition('"')
        if quote:
            return name in self._names
        return None if any(known.startswith(name) for known in self._names) else False


class UntaggedXmlCall:
    """The same of calls in XML: an answer that begins with <function=NAME>, where NAME is a tool's."""

    def __init__(self, names: Collection[str]) -> None:
        self._openings = [f"<function={name}>" for name in names]
        self._text = ""
        self._rest: list[str] = []
        self._certain = False

    def add(self, text: str) -> bool:
        if self._certain:
            self._rest.append(text)
            return True
        self._text = (self._text + text).lstrip(_BLANK)
        self._certain = any(self._text.startswith(opening) for opening in self._openings)
        return self._certain or any(opening.startswith(self._text) for opening in self._openings)

    def calls(self, read: Callable[[str], list[C] | None]) -> list[C] | None:
        if not self._certain:
            return None
        return read("".join((self._text, *self._rest)).strip(_BLANK).removesuffix("</tool_call>"))
