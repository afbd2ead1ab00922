"""Calls with a slip: text between the tags of a call that a person would read at once and a JSON parser would not.

In: the text, and a reader of well-formed text. Out: what the reader makes of the text once braces at its very end, doubled
braces, a list or a fence around it are mended; and, where the result is one call to a known tool, commas too many, single
quotes and Python's words. What stands inside of strings is never guessed at.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator
from typing import Protocol, TypeVar

_BLANK = " \t\r\n"
_FENCED = re.compile(r"\A```[\w-]*[ \t]*\r?\n?(.*?)(?:```)?\Z", re.DOTALL)
_DECODER = json.JSONDecoder(strict=False)
_WORDS = {"True": "true", "False": "false", "None": "null"}
# A string in double quotes, one in single quotes that holds no quote of either kind, a word, anything else.
_TOKEN = re.compile(r"""("(?:[^"\\]|\\.)*")|'([^'"\\]*)'(?=[ \t\r\n]*[,:}\]])|([A-Za-z_]+)|(.)""", re.DOTALL)
_LAST_COMMA = re.compile(r"""("(?:[^"\\]|\\.)*")|,[ \t\r\n]*(?=[}\]])""", re.DOTALL)


class Named(Protocol):
    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=Named)


def repaired(body: str, read: Callable[[str], list[C] | None], names: Collection[str]) -> list[C] | None:
    """The calls in `body`, which `read` does not understand as it stands; None if no repair makes it understood."""
    body = without_fence(body)
    for text in _structures(body):
        if calls := read(text):
            return calls
    lenient = _strict_json(body)
    if lenient is not None and lenient != body:
        for text in _structures(lenient):
            calls = read(text)
            if calls and len(calls) == 1 and calls[0].name in names:
                return calls
    return None


def without_fence(body: str) -> str:
    """The text inside of the one code fence that is around all of it."""
    found = _FENCED.match(body)
    return found[1].strip(_BLANK) if found else body


def _structures(body: str) -> Iterator[str]:
    """`body` and what it may stand for if braces or brackets around it are wrong."""
    yield body
    if body.startswith("["):
        listed = _listed(body)
        if listed is not None:
            yield listed
        return
    yield from _balanced(body)
    if body[1:].lstrip(_BLANK).startswith("{"):
        yield from _balanced(body[1:].lstrip(_BLANK))


def _listed(body: str) -> str | None:
    """The items of a JSON list one after the other."""
    items: list[str] = []
    position = 1
    try:
        while True:
            start = len(body) - len(body[position:].lstrip(_BLANK))
            _, position = _DECODER.raw_decode(body, start)
            items.append(body[start:position])
            rest = body[position:].lstrip(_BLANK)
            if rest == "]":
                return "\n".join(items)
            if not rest.startswith(",") or len(items) > 64:
                return None
            position = len(body) - len(rest) + 1
    except (ValueError, RecursionError):
        return None


def _balanced(body: str) -> Iterator[str]:
    """`body` with as many closing braces at its end as it needs, if only those are wrong."""
    open: list[str] = []
    string = escaped = False
    for position, character in enumerate(body):
        if escaped:
            escaped = False
        elif string:
            string, escaped = character != '"', character == "\\"
        elif character == '"':
            string = True
        elif character in "{[":
            open.append("}" if character == "{" else "]")
        elif character in "}]":
            if not open and character == "}" and not body[position:].strip(_BLANK + "}"):
                yield body[:position]
                return
            if not open or open.pop() != character:
                return
    if not string:
        if open and set(open) == {"}"}:
            yield body + "}" * len(open)
        elif not open:
            yield body


def _strict_json(body: str) -> str | None:
    """`body` in JSON's own words where it has Python's words, single quotes or a comma after the last item; None if it
    holds a word that is none, or a quote of which it is not certain where the string ends."""
    parts: list[str] = []
    for double, single, word, other in _TOKEN.findall(body):
        if double or other:
            if other in ("'", '"'):
                return None
            parts.append(double or other)
        elif word:
            if word not in _WORDS and word not in ("true", "false", "null", "e", "E"):
                return None
            parts.append(_WORDS.get(word, word))
        else:
            parts.append(json.dumps(single, ensure_ascii=False))
    return _LAST_COMMA.sub(lambda found: found[1] or "", "".join(parts))
