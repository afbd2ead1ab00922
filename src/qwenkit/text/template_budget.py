"""What rendering a chat template may take: CPU time, sizes of values, and bytes made in all.

A template is a foreign program in this process. Its loops, calls and comparisons `tick`; whatever makes a text, list or number
asks here first how long it will be (template_sandbox.py). The sizes that are allowed grow with the messages.
"""

from __future__ import annotations

import threading
import time
from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Any

from jinja2.runtime import LoopContext
from jinja2.utils import Namespace

SECONDS = 1.0  # CPU time of a render
SECONDS_PER_ITEM = 5e-7  # and for each character or value of the messages
MAX_SIZE = 2_000_000  # characters of a text, items of a list
SIZE_PER_ITEM = 8
MAX_TOTAL = 96 << 20  # bytes of all values made, whether they still exist or not
TOTAL_PER_ITEM = 64
MAX_BITS = 32_768  # of a whole number
MAX_WIDTH = 10_000  # of a padded field
TICKS = 256  # between two looks at the clock
SCALARS = frozenset({str, int, bool, float, type(None)})


class LimitError(Exception):
    """A template exceeds a limit. No ValueError: jinja2's filters catch those."""


class Budget:
    """The limits of one render, for messages of `size` characters and values."""

    def __init__(self, size: int) -> None:
        self.max_size = MAX_SIZE + SIZE_PER_ITEM * size
        self._seconds = SECONDS + SECONDS_PER_ITEM * size
        self._deadline = time.thread_time() + self._seconds
        self._bytes_left = MAX_TOTAL + TOTAL_PER_ITEM * size
        self._ticks = TICKS

    def tick(self, work: int = 1) -> None:
        """Count `work` small steps. Raises LimitError when the time is over."""
        self._ticks -= work
        if self._ticks < 0:
            self._ticks = TICKS
            if time.thread_time() > self._deadline:
                raise LimitError(f"takes more than {self._seconds:.3g} seconds")

    def check(self, size: int) -> None:
        """Refuse a value of `size` characters or items before it is made."""
        if size > self.max_size:
            raise LimitError(f"makes a value of {size if size < 1 << 64 else 'countless'} characters or items")
        self.tick(1 + (size >> 10))

    def make(self, size: int, width: int = 1) -> None:
        """`check`, and count the `size` items of `width` bytes among all that was made."""
        self.check(size)
        self._bytes_left -= size * width
        if self._bytes_left < 0:
            raise LimitError("makes too many large values")

    def made(self, value: Any) -> Any:
        """Count a value that exists; iterators count what they give. Returns it."""
        kind = type(value)
        if kind is str:
            if len(value) > 64:
                self.make(len(value), 1 if value.isascii() else 4)
        elif isinstance(value, str | bytes):
            self.make(len(value), 4)
        elif isinstance(value, list | tuple | dict):
            self.make(len(value), 40)
        elif isinstance(value, int):
            self.check_bits(value.bit_length())
        elif isinstance(value, Iterator) and not isinstance(value, Counted | LoopContext):
            return Counted(value, self)
        return value

    def check_bits(self, bits: int) -> None:
        if bits > MAX_BITS:
            raise LimitError(f"makes a number of {bits if bits < 1 << 64 else 'countless'} bits")

    def walk(self, *values: Any) -> int:
        """Characters and values in all of `values`, those within others too, each as often as it would be printed or compared."""
        total = 0
        waiting = list(values)
        while waiting:
            value = waiting.pop()
            kind = type(value)
            total += 1
            if kind in SCALARS:
                if kind is str:
                    total += len(value)
                continue
            children: Any = ()
            if isinstance(value, list | tuple):
                children = value
            elif isinstance(value, Mapping):
                children = [*value.keys(), *value.values()]
            elif isinstance(value, KeysView | ValuesView | ItemsView):
                children = list(value)
            elif isinstance(value, str | bytes | range):
                total += len(value)
            elif isinstance(value, Namespace):
                raise LimitError("prints or compares a namespace")  # it may contain itself
            if total + len(children) > self.max_size:
                raise LimitError(f"uses a value of more than {self.max_size} characters or items")
            waiting += children
        self.check(total)
        self.tick(total >> 4)
        return total


def measure(value: Any) -> int:
    """Characters and values in JSON-like data."""
    total, waiting = 0, [value]
    while waiting:
        value = waiting.pop()
        total += 1
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, dict):
            waiting += value.keys()
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
    return total


class Counted(Iterator[Any]):
    """An iterator each of whose items is a tick."""

    def __init__(self, items: Iterator[Any], budget: Budget, *, deep: bool = False) -> None:
        self._items, self._budget, self._deep = items, budget, deep

    def __next__(self) -> Any:
        self._budget.tick()
        item = next(self._items)
        if self._deep and type(item) not in SCALARS:
            self._budget.walk(item)
        return item

    def deep(self) -> Counted:
        """The same for who compares, hashes or prints the items."""
        return Counted(self._items, self._budget, deep=True)


_active = threading.local()


class Rendering:
    """Context in which `budget()` is this budget, in this thread."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget

    def __enter__(self) -> Budget:
        _active.budget = self._budget
        return self._budget

    def __exit__(self, *_: object) -> None:
        del _active.budget


def budget() -> Budget:
    """The budget of the render in this thread. LimitError without one: jinja2 computes constants when it compiles."""
    try:
        found: Budget = _active.budget
    except AttributeError:
        raise LimitError("is not being rendered") from None
    return found
