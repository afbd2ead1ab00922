"""Errors that know which field they are about. A `FieldError` is a ValueError whose text is one sentence for the user; callers
that answer in another form (JSON, a command line) read its attributes instead of parsing the sentence.
"""

from __future__ import annotations

import reprlib

_REPR = reprlib.Repr()
_REPR.maxlevel = 3
_REPR.maxstring = _REPR.maxother = 80
_REPR.maxlong = 50


class FieldError(ValueError):
    """A value that is not allowed. `field` is its name, `given` the value, `allowed` says in words what may stand there.

    `source` is the file or object that the field belongs to; it is put before the sentence.
    """

    def __init__(self, field: str, given: object, allowed: str, *, source: object = None) -> None:
        self.field = field
        self.given = given
        self.allowed = allowed
        self.source = source
        where = "" if source is None else f"{source}: "
        super().__init__(f"{where}{field} is {shorten(given)}, allowed is {allowed}")


def shorten(value: object) -> str:
    """The repr of a value on one line, at most some eighty characters a part; safe for values of any size and depth."""
    try:
        return " ".join(_REPR.repr(value).split())
    except (ValueError, RecursionError):  # an integer of thousands of digits; a deeply nested list
        return f"{type(value).__name__} too large to print"
