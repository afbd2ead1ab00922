"""Which samples share a pack: best fit into a bounded number of open packs, and texts laid end to end and cut.

In: lengths in the order in which samples come. Out: packs of at most `capacity` tokens. No sample is cut by packing, none is
lost or comes twice; a pack only ever holds whole documents, so that attention keeps them apart.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")
OPEN_PACKS = 128


class Packer(Generic[T]):
    """Best fit: a sample goes to the fullest open pack that has room, else opens a new one.

    When more than max_open are open, the fullest is given out. What is open is the packing buffer: `open_packs` of it goes into
    a checkpoint and back.
    """

    def __init__(self, capacity: int, max_open: int = OPEN_PACKS) -> None:
        self._capacity, self._max_open = capacity, max_open
        self._order: list[tuple[int, int]] = []  # (tokens used, number) of the open packs, sorted
        self._packs: dict[int, list[T]] = {}
        self._next_number = 0

    def add(self, sample: T, length: int) -> list[T] | None:
        """Take one sample; gives a pack when one is ready. A sample longer than the capacity has a pack to itself."""
        place = bisect.bisect_left(self._order, (self._capacity - length + 1, -1)) - 1
        used, number = 0, self._next_number
        if place >= 0:
            used, number = self._order.pop(place)
        else:
            self._next_number += 1
            self._packs[number] = []
        self._packs[number].append(sample)
        if used + length >= self._capacity:
            return self._packs.pop(number)
        bisect.insort(self._order, (used + length, number))
        return self.pop() if len(self._order) > self._max_open else None

    def pop(self) -> list[T] | None:
        """The fullest of the open packs; None when none is open."""
        return self._packs.pop(self._order.pop()[1]) if self._order else None

    @property
    def open_packs(self) -> list[tuple[int, list[T]]]:
        """(tokens, samples) of each open pack, the fullest last. Setting them goes on exactly where they were read."""
        return [(used, list(self._packs[number])) for used, number in self._order]

    @open_packs.setter
    def open_packs(self, packs: Sequence[tuple[int, Sequence[T]]]) -> None:
        self._order = [(used, number) for number, (used, _) in enumerate(packs)]
        self._packs = {number: list(samples) for number, (_, samples) in enumerate(packs)}
        self._next_number = len(packs)


class Chunker(Generic[T]):
    """Documents end to end, cut every `capacity` tokens: slices (document, start, stop), the stops within the document."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._waiting = 0  # tokens in `slices`
        self.slices: list[tuple[T, int, int]] = []
        """What was taken and not given out yet: the packing buffer of a checkpoint."""

    def add(self, document: T, length: int) -> None:
        """Take one document."""
        self.slices.append((document, 0, length))
        self._waiting += length

    def pop(self, *, rest: bool = False) -> list[tuple[T, int, int]] | None:
        """A full chunk, if there is one; with `rest`, also what is left at the end."""
        if self._waiting < self._capacity and not (rest and self._waiting):
            return None
        chunk: list[tuple[T, int, int]] = []
        room = self._capacity
        for document, start, stop in self.slices:
            taken = min(room, stop - start)
            if not taken:
                break
            chunk.append((document, start, start + taken))
            room -= taken
        last, _, cut = chunk[-1]
        _, _, stop = self.slices[len(chunk) - 1]
        self.slices = ([(last, cut, stop)] if cut < stop else []) + self.slices[len(chunk) :]
        self._waiting -= self._capacity - room
        return chunk

    def load(self, slices: Sequence[tuple[T, int, int]]) -> None:
        """Take up `slices` of an earlier chunker."""
        self.slices = list(slices)
        self._waiting = sum(stop - start for _, start, stop in slices)


class Plan:
    """Sequences of slices of items, kept flat: what a run over stored data goes through in one epoch.

    Each sequence is one row of a micro-batch: a pack, a chunk, or a single item.
    """

    def __init__(self, sequences: Iterable[Sequence[tuple[int, int, int]]]) -> None:
        slices, ends = array("q"), array("q", [0])
        for sequence in sequences:
            for part in sequence:
                slices.extend(part)
            ends.append(len(slices) // 3)
        self._slices = np.array(slices, np.int64).reshape(-1, 3)
        self._ends = np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> list[tuple[int, int, int]]:
        """(item, start, stop) of each part of a sequence, in their order."""
        return [
            (item, start, stop)
            for item, start, stop in self._slices[self._ends[index] : self._ends[index + 1]].tolist()
        ]

    def sizes(self) -> np.ndarray:
        """(n,) tokens of each sequence."""
        totals = np.concatenate([[0], np.cumsum(self._slices[:, 2] - self._slices[:, 1])])
        return np.diff(totals[self._ends])


def plan_packs(items: Sequence[int] | np.ndarray, lengths: np.ndarray, capacity: int) -> Plan:
    """Whole items in packs of at most `capacity` tokens. items: numbers in the order they come; lengths by number."""

    def packs() -> Iterator[list[int]]:
        packer: Packer[int] = Packer(capacity)
        for item in items:
            pack = packer.add(int(item), int(lengths[item]))
            if pack is not None:
                yield pack
        while (last := packer.pop()) is not None:
            yield last

    return Plan([(item, 0, int(lengths[item])) for item in pack] for pack in packs())


def plan_chunks(items: Sequence[int] | np.ndarray, lengths: np.ndarray, capacity: int) -> Plan:
    """Items end to end, cut every `capacity` tokens."""

    def chunks() -> Iterator[list[tuple[int, int, int]]]:
        chunker: Chunker[int] = Chunker(capacity)
        for item in items:
            chunker.add(int(item), int(lengths[item]))
            while (chunk := chunker.pop()) is not None:
                yield chunk
        if (chunk := chunker.pop(rest=True)) is not None:
            yield chunk

    return Plan(chunks())


def plan_singles(items: Sequence[int] | np.ndarray, lengths: np.ndarray) -> Plan:
    """Each item a sequence of its own."""
    return Plan([(int(item), 0, int(lengths[item]))] for item in items)
