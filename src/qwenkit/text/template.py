"""Runs a model's own chat template safely: the program in jinja2's sandbox, callers' strings as inert data.

In: the template's text, and the variables it sees. Out: text in which whatever came from a caller is disguised: each
control token written in a message, a tool definition or an argument is replaced, before the template runs, by
characters that nothing else contains, and put back after the rendered text has been cut at the true control tokens.
`{% generation %}` blocks leave marks in the text.
"""

import json
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# A noncharacter, never meant for interchange, then a private-use character saying what stands here. A caller's own
# U+FDD0 is disguised as well (code 0), so that after rendering each one begins a disguise or a mark.
_ESCAPE = "\ufdd0"
_FIRST_CODE = 0xF0000
GENERATION_START = _ESCAPE + chr(_FIRST_CODE + 1)
GENERATION_END = _ESCAPE + chr(_FIRST_CODE + 2)


class ChatTemplate:
    """A compiled template. Raises ValueError where the source does not parse."""

    def __init__(self, source: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"the chat template does not parse: {error}") from None
        self.marks_generation = re.search(r"{%-?\s*generation\b", source) is not None

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text, with disguises and marks in it. Raises ValueError, with the template's own words, if it refuses."""
        try:
            return self._template.render(variables)
        except Exception as error:  # the template is a foreign program: anything may come out of it
            raise ValueError(f"the chat template refuses these messages: {error}") from error


class Disguise:
    """Keeps the control tokens that callers write from becoming control tokens."""

    def __init__(self, control_tokens: Iterable[str]) -> None:
        written = [_ESCAPE, "", "", *(token for token in control_tokens if token)]
        codes = {text: _ESCAPE + chr(_FIRST_CODE + code) for code, text in enumerate(written) if text}
        self._codes = codes
        self._texts = {code: text for text, code in codes.items()}
        self._written = re.compile("|".join(map(re.escape, sorted(codes, key=len, reverse=True))))
        self._coded = re.compile("|".join(map(re.escape, self._texts)))

    def put_on(self, value: Any, field: str) -> Any:
        """A copy of a JSON value in which each string is disguised. Raises ValueError naming `field` if it is not JSON.

        Copying also means that a template sees plain lists and dicts only, never an object with methods.
        """
        if isinstance(value, str):
            return self._written.sub(lambda match: self._codes[match.group()], value)
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {self.put_on(key, field): self.put_on(item, f"{field}.{key}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.put_on(item, f"{field}[{index}]") for index, item in enumerate(value)]
        raise ValueError(
            f"{field} is a {type(value).__name__}; allowed are text, numbers, booleans, null, lists and objects of them"
        )

    def take_off(self, text: str) -> str:
        """What the caller wrote."""
        return self._coded.sub(lambda match: self._texts[match.group()], text)


class _GenerationBlock(Extension):
    """{% generation %} ... {% endgeneration %}: the body as it is, between two marks."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it a plain set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, end = (
            nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (GENERATION_START, GENERATION_END)
        )
        return [start, *body, end]


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter escapes for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
