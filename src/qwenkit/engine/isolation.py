"""A step that raises is computed again in parts, until the rows at fault stand alone.

In: a way to compute rows that changes nothing while it raises, a way to tell whether anything can be computed at all, and the
rows. Out: for each row, in order, what was computed for it, or the exception that ended it. A device that is broken (a CUDA error
stays until the process ends) makes every part raise; that is no row's fault, and looking for one would double each step's cost.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

Row = TypeVar("Row")
Result = TypeVar("Result")

log = logging.getLogger("qwenkit.engine")


def compute_apart(
    compute: Callable[[list[Row]], list[Result]],
    rows: list[Row],
    works: Callable[[], bool] = lambda: True,
) -> Iterator[tuple[Row, Result | Exception]]:
    """Compute the rows together; where that raises, halve by halve, as long as the engine `works`.

    Of N rows with one at fault it takes about 2 log2 N tries. Where nothing works any more, all rows of a part end with what the
    part raised: two tries for the whole step.
    """
    try:
        results = compute(rows)
    except Exception as error:
        if not works():
            log.error("the engine cannot compute", exc_info=error)
            yield from ((row, error) for row in rows)
        elif len(rows) == 1:
            log.error("a request made the engine's step raise", exc_info=error)
            yield rows[0], error
        else:
            middle = len(rows) // 2
            yield from compute_apart(compute, rows[:middle], works)
            yield from compute_apart(compute, rows[middle:], works)
    else:
        yield from zip(rows, results, strict=True)
