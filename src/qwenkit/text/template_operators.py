"""What the Python code of a chat template calls: output, operators and methods, each with a look at sizes before the work.

In: the values that a template hands over. Out: what Python makes of them, or LimitError where that takes too much.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any

from jinja2.runtime import markup_join as join_markup
from markupsafe import Markup, escape

from qwenkit.text.template_budget import MAX_WIDTH, SCALARS, LimitError, budget

BUILTINS = (str, bytes, int, float, list, tuple, dict, range)
_SHORT = 4_096  # characters of a text with which anything that makes no longer one may be done
_CHEAP_METHODS = frozenset({
    "get", "items", "keys", "values", "startswith", "endswith", "strip", "lstrip", "rstrip", "split", "rsplit", "partition",
    "find", "rfind", "index", "count", "lower", "upper", "removeprefix", "removesuffix", "splitlines", "title", "capitalize",
})  # fmt: skip
_FORMAT = re.compile(r"\{[^{}]*:([^{}]*)\}")
_NUMBER = re.compile(r"\d+")
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
    kind = type(value)
    if kind not in SCALARS:
        budget().walk(value)
    elif kind is str and len(value) > _SHORT:
        budget().tick(len(value) >> 10)
    return value


def contains(item: Any, values: Any) -> bool:
    """The operator `in`."""
    if type(values) is dict and type(item) is str:
        return item in values
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
    if operator == "+" and type(left) is str and type(right) is str:
        limit.check(len(left) + len(right))
        return
    for value in (left, right):
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
    widths = 0
    for field in _PERCENT.finditer(template):
        fields += 1
        for width in field.groups():
            if width == "*":
                raise LimitError("pads a text to a width that is a variable")
            widths += _width(width or "0")
    limit.check(len(template) + widths)
    limit.make(len(template) + widths + fields * limit.walk(values))


def _width(digits: str) -> int:
    if len(digits) > 6 or int(digits) > MAX_WIDTH:
        raise LimitError(f"pads a text to {digits[:20]} characters")
    return int(digits)


def limited_format(method: Any, function: Callable[..., str]) -> Callable[..., str]:
    """str.format and str.format_map of one text."""
    template: str = method.__self__

    @wraps(function)
    def format_text(*args: Any, **kwargs: Any) -> str:
        limit = budget()
        if _NESTED_FIELD.search(template):
            raise LimitError("pads a text to a width that is a variable")
        widths = sum(_width(digits) for field in _FORMAT.findall(template) for digits in _NUMBER.findall(field))
        limit.make(len(template) + widths + template.count("{") * limit.walk(*args, kwargs))
        return function(*args, **kwargs)

    return format_text


# Methods.


def check_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """For a function that looks at what its arguments contain."""
    for value in (*args, *kwargs.values()):
        if type(value) not in SCALARS:
            budget().walk(value)


def is_cheap(owner: Any, name: str, args: tuple[Any, ...]) -> bool:
    """True for methods of short texts and of dictionaries that make nothing large."""
    if name not in _CHEAP_METHODS or any(type(value) not in SCALARS for value in args):
        return False
    return type(owner) is dict or (type(owner) is str and len(owner) <= _SHORT)


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


def _check_text_method(owner: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], largest: int) -> None:
    limit, size = budget(), len(owner)
    if name in ("center", "ljust", "rjust", "zfill"):
        limit.check(max(size, largest))
    elif name == "expandtabs":
        limit.check(size + size * (largest or 8))
    elif name == "join":
        limit.make(limit.walk(*args) * (1 + size))
    elif name == "replace" and len(args) >= 2:
        check_replaced(owner, args[0], args[1])
    elif name == "translate":
        limit.check(size * max(1, limit.walk(*args)))
    elif name in ("split", "rsplit", "splitlines"):
        separator: Any = args[0] if args else kwargs.get("sep")
        parts = owner.count(separator) if isinstance(separator, str | bytes) and separator else size // 2
        limit.make(1 + parts, 64)
        limit.make(size, 4)
    elif name in ("encode", "decode"):
        codec = args[0] if args else kwargs.get("encoding", "utf-8")
        if str(codec).lower().replace("-", "").replace("_", "") not in _CODECS:
            raise LimitError(f"uses the codec {str(codec)[:20]!r}")
        limit.make(size, 4)


def check_replaced(text: Any, old: Any, new: Any) -> None:
    """The same for text.replace(old, new)."""
    if not isinstance(old, str | bytes) or not isinstance(new, str | bytes):
        return
    matches = len(text) + 1
    if old:
        matches = text.count(old)
    budget().make(len(text) + matches * len(new))
