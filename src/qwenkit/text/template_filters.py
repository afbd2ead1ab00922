"""What chat templates may call, each with a look at sizes before the work: operators, methods, filters, tests, output.

In: the values that a template hands over. Out: what jinja2 and Python make of them, or LimitError where that takes too much.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import TemplateError
from jinja2.environment import Environment
from jinja2.nodes import EvalContext
from jinja2.runtime import Context, LoopContext
from jinja2.runtime import markup_join as join_markup
from jinja2.utils import generate_lorem_ipsum
from markupsafe import Markup, escape

from qwenkit.text.template_budget import MAX_WIDTH, SCALARS, Counted, LimitError, budget

BUILTINS = (str, bytes, int, float, list, tuple, dict, range)
_SLOW = 100_000  # characters for what takes more than linear time
_MAX_ARGUMENT = 1_000  # characters of an argument that is repeated for each match or line
_WIDTH = re.compile(r"\d{5,}")
_PERCENT = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d*)(?:\.(\*|\d*))?")
_NESTED_FIELD = re.compile(r"\{[^{}]*\{")
_CODECS = frozenset({"utf8", "utf16", "utf32", "ascii", "latin1", "utf16le", "utf16be", "utf32le", "utf32be"})


# Called by the Python code of a template.


def tick() -> None:
    budget().tick()


def to_text(value: Any = "") -> str:
    """str(value)."""
    if type(value) is str:
        return value
    budget().walk(value)
    return str(value)


def limited_escape(value: Any) -> Markup:
    if type(value) not in SCALARS:
        budget().walk(value)
    return escape(value)


def str_join(values: Iterable[Any]) -> str:
    """The operator ~."""
    return concat(map(to_text, values))


def markup_join(values: Iterable[Any]) -> str:
    """The operator ~ where text is escaped."""
    known = [value if isinstance(value, str) else to_text(value) for value in values]
    budget().make(6 * sum(map(len, known)))
    return join_markup(known)


def concat(pieces: Iterable[str]) -> str:
    """One text of all pieces, which may be many times the same one."""
    limit = budget()
    size, found = 0, []
    for piece in pieces:
        size += len(piece)
        if size > limit.max_size:
            limit.check(size)
        found.append(piece)
    text: str = limit.made("".join(found))
    return text


def sliced(value: Any) -> Any:
    """A slice that was taken."""
    return budget().made(value)


def scalar(value: Any) -> Any:
    """A value that will be compared or hashed."""
    limit = budget()
    limit.tick()
    if type(value) not in SCALARS:
        limit.walk(value)
    return value


def contains(item: Any, values: Any) -> bool:
    """The operator `in`."""
    limit = budget()
    limit.tick()
    size = 1 if type(item) in SCALARS else limit.walk(item)
    if isinstance(values, str | bytes | list | tuple):
        limit.check(size * len(values))
        limit.tick(len(values) >> 8)
    return item in values


# Operators.


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Raise LimitError if the result would be too large."""
    limit = budget()
    limit.tick()
    for value in (left, right):
        if type(value) is int and -(1 << 32) < value < 1 << 32:
            continue
        if isinstance(value, int):
            limit.check_bits(value.bit_length())
    sized = (str, bytes, list, tuple)
    if operator == "+":
        if isinstance(left, sized) and isinstance(right, sized):
            limit.check(len(left) + len(right))
    elif operator == "*":
        for one, other in ((left, right), (right, left)):
            if isinstance(one, sized) and isinstance(other, int):
                limit.check(len(one) * max(other, 0))
        if isinstance(left, int) and isinstance(right, int):
            limit.check_bits(left.bit_length() + right.bit_length())
    elif operator == "**":
        if isinstance(left, int) and isinstance(right, int) and abs(left) > 1 and right > 0:
            limit.check_bits(left.bit_length() * right)
    elif operator == "%" and isinstance(left, str | bytes):
        check_percent(left.decode("latin-1") if isinstance(left, bytes) else left, right)


def check_percent(template: str, values: Any) -> None:
    """The same for `template % values`."""
    limit = budget()
    fields = 0
    for field in _PERCENT.finditer(template):
        fields += 1
        for width in field.groups():
            if width == "*" or len(width or "") > 5 or int(width or 0) > MAX_WIDTH:
                raise LimitError(f"pads a text to {(width or '')[:20]} characters")
    limit.check(len(template) + fields * (MAX_WIDTH if _WIDTH.search(template) else 1))
    limit.make(len(template) + fields * limit.walk(values))


def limited_format(method: Any, function: Callable[..., str]) -> Callable[..., str]:
    """str.format and str.format_map of one text."""
    template: str = method.__self__

    @wraps(function)
    def format_text(*args: Any, **kwargs: Any) -> str:
        limit = budget()
        if _WIDTH.search(template) or _NESTED_FIELD.search(template):
            raise LimitError("pads a text to a width that is large or a variable")
        limit.make(len(template) + template.count("{") * (MAX_WIDTH // 100 + limit.walk(*args, kwargs)))
        return function(*args, **kwargs)

    return format_text


# Methods.


def check_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """For a function that looks at what its arguments contain."""
    for value in (*args, *kwargs.values()):
        if type(value) not in SCALARS:
            budget().walk(value)


def check_method(owner: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Raise LimitError if a method of a built-in type would take too much. Returns the arguments to call it with."""
    limit = budget()
    args = tuple(list(value) if isinstance(value, Iterator) else value for value in args)
    check_arguments(args, kwargs)
    size = len(owner) if isinstance(owner, str | bytes | list | tuple | dict) else 1
    limit.tick(1 + (size >> 8))
    numbers = [abs(value) for value in (*args, *kwargs.values()) if isinstance(value, int)]
    largest = max(numbers, default=0)
    if isinstance(owner, str | bytes):
        _check_text_method(owner, name, args, kwargs, largest)
    elif isinstance(owner, int | float):
        limit.check(largest)
    elif isinstance(owner, list | tuple):
        limit.check(size * max([1, *(limit.walk(value) for value in args if type(value) not in SCALARS)]))
    return args


def _check_text_method(
    owner: str | bytes, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], largest: int
) -> None:
    limit, size = budget(), len(owner)
    if name in ("center", "ljust", "rjust", "zfill"):
        limit.check(max(size, largest))
    elif name == "expandtabs":
        limit.check(size + size * (largest or 8))
    elif name == "join":
        limit.make(limit.walk(*args) * (1 + size))
    elif name == "replace" and len(args) >= 2:
        _check_replaced(owner, args[0], args[1])
    elif name == "translate":
        limit.check(size * max(1, limit.walk(*args)))
    elif name in ("split", "rsplit", "splitlines"):
        separator = args[0] if args else kwargs.get("sep")
        parts = owner.count(separator) if isinstance(separator, str | bytes) and separator else size // 2
        limit.make(1 + parts, 64)
        limit.make(size, 4)
    elif name in ("encode", "decode"):
        codec = args[0] if args else kwargs.get("encoding", "utf-8")
        if str(codec).lower().replace("-", "").replace("_", "") not in _CODECS:
            raise LimitError(f"uses the codec {str(codec)[:20]!r}")
        limit.make(size, 4)


def _check_replaced(text: Any, old: Any, new: Any) -> None:
    if isinstance(old, str | bytes) and isinstance(new, str | bytes):
        matches: int = text.count(old) if old else len(text) + 1
        budget().make(len(text) + matches * len(new))


# Filters and tests. Each check gets the filter's arguments, the value first.


def _check_center(value: Any, width: Any = 80) -> None:
    budget().check(max(len(str(value)), int(width)))


def _check_replace(value: Any, old: Any = "", new: Any = "", count: Any = None) -> None:
    _check_replaced(str(value), str(old), str(new))


def _check_join(value: Any, d: Any = "", attribute: Any = None) -> None:
    size = len(value) if isinstance(value, list | tuple | dict | str) else 0
    budget().make(size * len(str(d)) + (0 if isinstance(value, Counted) else budget().walk(value)))


def _check_indent(value: Any, width: Any = 4, first: Any = False, blank: Any = False) -> None:
    text = str(value)
    each = len(width) if isinstance(width, str) else int(width)
    budget().make(len(text) + (len(text.splitlines()) + 2) * max(each, 0))


def _check_wordwrap(
    value: Any, width: Any = 79, break_long_words: Any = True, wrapstring: Any = None, break_on_hyphens: Any = True
) -> None:
    text = str(value)
    lines = len(text) // max(int(width), 1) + len(text.split()) + text.count("\n")
    budget().make(len(text) + lines * len(str(wrapstring or "\n")))
    if len(text) ** 2 // max(int(width), 1) > 40 * budget().max_size:
        raise LimitError("wraps a long text into short lines")


def _check_format(value: Any, *args: Any, **kwargs: Any) -> None:
    check_percent(str(value), kwargs or args)


def _check_round(value: Any, precision: Any = 0, method: Any = "common") -> None:
    if isinstance(precision, int) and abs(precision) > 300:
        raise LimitError("rounds to more than 300 digits")


def _check_batch(value: Any, linecount: Any = 1, fill_with: Any = None) -> None:
    budget().check(int(linecount))


def _check_sum(value: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, int | float):
        items = len(value) if isinstance(value, list | tuple | dict) else budget().max_size
        budget().check(items * max(1, 0 if isinstance(value, Counted) else budget().walk(value) >> 4))


def _check_short(value: Any, *args: Any, **kwargs: Any) -> None:
    size = budget().walk(value, *args, kwargs)
    if size > _SLOW or any(len(one) > _MAX_ARGUMENT for one in (*args, *kwargs.values()) if isinstance(one, str)):
        raise LimitError(f"uses a slow filter on {size} characters, allowed are {_SLOW}")


def _check_pprint(value: Any) -> None:
    if (size := budget().walk(value)) > _SLOW // 10:
        raise LimitError(f"prints {size} characters or items in columns, allowed are {_SLOW // 10}")


_CHECKS: dict[str, Callable[..., None]] = {
    "center": _check_center,
    "replace": _check_replace,
    "join": _check_join,
    "indent": _check_indent,
    "wordwrap": _check_wordwrap,
    "format": _check_format,
    "round": _check_round,
    "batch": _check_batch,
    "slice": _check_batch,
    "sum": _check_sum,
    "urlize": _check_short,
    "striptags": _check_short,
    "xmlattr": _check_short,
    "pprint": _check_pprint,
}
# Filters that look at no more than the outermost list or dictionary.
_SHALLOW = frozenset({
    "abs", "attr", "batch", "count", "d", "default", "first", "items", "last", "length", "list", "map", "random", "reject",
    "rejectattr", "reverse", "select", "selectattr", "slice",
})  # fmt: skip
_COMPARING_TESTS = frozenset({
    "eq", "==", "equalto", "ne", "!=", "gt", ">", "greaterthan", "ge", ">=", "lt", "<", "lessthan", "le", "<=", "in",
})  # fmt: skip


def limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of jinja2 that asks the budget before and counts what it made."""
    check = _CHECKS.get(name)
    deep = name not in _SHALLOW

    @wraps(function)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        limit = budget()
        limit.tick()
        skip = sum(isinstance(value, Context | EvalContext | Environment) for value in args[:1])
        values = list(args[skip:])
        for index, value in enumerate(values):
            kind = type(value)
            if kind is str:
                limit.tick(len(value) >> 10)
            elif kind in SCALARS:
                continue
            elif isinstance(value, Iterator) and not isinstance(value, LoopContext):
                counted = value if isinstance(value, Counted) else Counted(value, limit)
                values[index] = counted.deep() if deep else counted
            elif deep:
                limit.walk(value)
            elif isinstance(value, list | tuple | dict | range):
                limit.tick(len(value) >> 6)
        if check is not None:
            check(*values, **kwargs)
        return limit.made(function(*args[:skip], *values, **kwargs))

    return filtered


def limited_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A test of jinja2; those that compare look at the sizes first."""
    if name not in _COMPARING_TESTS:
        return function
    if name == "in":
        return contains

    @wraps(function)
    def tested(*args: Any) -> Any:
        return function(*map(scalar, args))

    return tested


# What templates have besides jinja2's own.


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter escapes for HTML, which no model was trained on."""
    limit = budget()
    limit.make(limit.walk(value), 6 if ensure_ascii else 1)
    if isinstance(separators, list | tuple) and sum(len(str(one)) for one in separators) > 16:
        raise LimitError("writes JSON with long separators")
    if indent is None:
        return json.dumps(value, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys)
    if len(indent if isinstance(indent, str) else str(indent)) > 64 or (isinstance(indent, int) and indent > 64):
        raise LimitError("writes JSON with deep indentation")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return concat(Counted(encoder.iterencode(value), limit))


def lipsum(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
    """jinja2's filler text; seldom used, for it is random."""
    if n * max > 10_000:
        raise LimitError("writes more than 10000 words of filler text")
    return generate_lorem_ipsum(n, html, min, max)


def raise_exception(message: str) -> None:
    raise TemplateError(to_text(message)[:2000])


def strftime_now(format: str) -> str:
    if len(format) > 200:
        raise LimitError("asks for a date in a format of more than 200 characters")
    return datetime.now().strftime(format)
