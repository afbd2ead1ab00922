"""The filters, tests and functions of chat templates, each with a look at sizes before the work.

In: the values that a template hands over. Out: what jinja2 makes of them, or LimitError where that takes too much.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import TemplateError
from jinja2.environment import Environment
from jinja2.nodes import EvalContext
from jinja2.runtime import Context, LoopContext
from jinja2.utils import generate_lorem_ipsum

from qwenkit.text.template_budget import SCALARS, Counted, LimitError, budget
from qwenkit.text.template_operators import check_percent, check_replaced, concat, contains, scalar, to_text

_SLOW = 100_000  # characters for what takes more than linear time
_MAX_ARGUMENT = 1_000  # characters of an argument that is repeated for each match or line

# Filters and tests. Each check gets the filter's arguments, the value first.


def _check_center(value: Any, width: Any = 80) -> None:
    budget().check(max(len(str(value)), int(width)))


def _check_replace(value: Any, old: Any = "", new: Any = "", count: Any = None) -> None:
    check_replaced(str(value), str(old), str(new))


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
