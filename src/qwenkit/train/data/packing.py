"""Which samples share a pack: best fit into a bounded number of open packs, and texts laid end to end and cut.

In: lengths in the order in which samples come. Out: packs of at most `capacity` tokens. No sample is cut by packing, none is
lost or comes twice; a pack only ever holds whole documents, so that attention keeps them apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        self._open: list[tuple[int, list[T]]] = []  # tokens used, samples; in the order of opening

    def add(self, sample: T, length: int) -> list[T] | None:
        """Take one sample; gives a pack when one is ready. A sample longer than the capacity has a pack to itself."""
        best = None
        for index, (used, _) in enumerate(self._open):
            if used + length <= self._capacity and (best is None or used > self._open[best][0]):
                best = index
        if best is None:
            self._open.append((length, [sample]))
            best = len(self._open) - 1
        else:
            used, samples = self._open[best]
            self._open[best] = (used + length, [*samples, sample])
        if self._open[best][0] >= self._capacity:
            return self._open.pop(best)[1]
        if len(self._open) > self._max_open:
            return self._pop_fullest()
        return None

    def pop(self) -> list[T] | None:
        """The fullest of the open packs; None when none is open."""
        return self._pop_fullest() if self._open else None

    def _pop_fullest(self) -> list[T]:
        fullest = max(range(len(self._open)), key=lambda index: (self._open[index][0], -index))
        return self._open.pop(fullest)[1]

    @property
    def open_packs(self) -> list[tuple[int, list[T]]]:
        """(tokens, samples) of each open pack."""
        return [(used, list(samples)) for used, samples in self._open]

    @open_packs.setter
    def open_packs(self, packs: Sequence[tuple[int, Sequence[T]]]) -> None:
        self._open = [(used, list(samples)) for used, samples in packs]


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

    def __init__(self, sequences: Iterator[list[tuple[int, int, int]]] | Sequence[list[tuple[int, int, int]]]) -> None:
        slices: list[tuple[int, int, int]] = []
        ends = [0]
        for sequence in sequences:
            slices += sequence
            ends.append(len(slices))
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

    return Plan([[(item, 0, int(lengths[item])) for item in pack] for pack in packs()])


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
    return Plan([[(int(item), 0, int(lengths[item]))] for item in items])
