"""What users write, read the same way everywhere: sizes in bytes, and names that are misspelt.

In: the name of a field and what was given for it. Out: a number, or a ValueError with one sentence that names the field. One
parser serves flags, YAML keys and Python arguments, so that `2G` means the same for memory and for files.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from decimal import Decimal

_UNITS = {"B": 1} | {
    unit: factor
    for power, letter in enumerate("KMGT", start=1)
    for unit, factor in ((letter, 1024**power), (letter + "IB", 1024**power), (letter + "B", 1000**power))
}
_MAX_SIZE = 2**63 - 1


def parse_size(field: str, given: object, *, unit: str = "B", example: str = "2GiB") -> int:
    """Bytes of `2GiB` or `2G` (both 2 * 1024**3), `2GB` (2 * 1000**3), `500 MB`, or a plain number of `unit`.

    Raises ValueError naming `field`, with `example`, for anything else, and for less than one byte.
    """
    match = (
        None
        if isinstance(given, bool)
        else re.fullmatch(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z]*)\s*", str(given))
    )
    factor = _UNITS.get((match[2] or unit).upper()) if match is not None else None
    if match is not None and factor is not None:
        size = int(Decimal(match[1]) * factor)
        if 1 <= size <= _MAX_SIZE:
            return size
    plain = "a number of bytes" if unit == "B" else f"a number of {unit}"
    raise ValueError(f"{field} is {given!r}, allowed is a size such as {example} (G means GiB), or {plain}")


def near(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `name` is a slip of: three quarters of their letters are the same, in the same order."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)
    return found[0] if found else None


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: which known one was probably meant, else all of them."""
    known = list(known)
    meant = near(name, known)
    return f"known are {', '.join(known)}" if meant is None else f"did you mean {meant}?"
