"""What flows through training: samples (one document each), pairs of them, and batches.

In: token ids and labels made by the one chat renderer. Out: documents laid end to end, without padding. Labels are the ids
that are learned and IGNORE elsewhere; they are not shifted: the loss predicts labels[i] from what stands before i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

IGNORE = -100


@dataclass(frozen=True)
class Sample:
    """One document. `labels[i]` is ids[i] where it is trained, IGNORE elsewhere. `origin` is "file:line", for messages."""

    ids: list[int]
    labels: list[int]
    origin: str = ""

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.labels):
            raise ValueError(f"{self.origin or 'a sample'}: {len(self.ids)} ids, but {len(self.labels)} labels")

    @property
    def num_targets(self) -> int:
        """Tokens that the loss counts; the first of a document has nothing before it and is never one."""
        return sum(label != IGNORE for label in self.labels[1:])


@dataclass(frozen=True)
class Pair:
    """A preference: two answers to one prompt, or (kto) one answer in `chosen` and whether it was liked."""

    chosen: Sample
    rejected: Sample | None = None
    liked: bool = True


@dataclass(frozen=True)
class PairIndex:
    """Where a Pair went in a batch: the numbers of its documents."""

    chosen: int
    rejected: int | None = None
    liked: bool = True


@dataclass(frozen=True)
class TrainBatch:
    """Documents end to end: ids and labels (T,) int64, `lengths` of the documents (their sum is T), where each came from.

    The label of a document's first token is always IGNORE. `pairs` is set for preference stages only.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    lengths: list[int]
    origins: list[str]
    pairs: list[PairIndex] | None = None

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> TrainBatch:
        """Lay samples end to end, in their order. ValueError for an empty sample or none at all."""
        if not samples or not all(sample.ids for sample in samples):
            raise ValueError("a batch needs at least one sample, and no sample may be empty")
        return cls(
            ids=torch.tensor([token for sample in samples for token in sample.ids]),
            labels=torch.tensor([label for sample in samples for label in (IGNORE, *sample.labels[1:])]),
            lengths=[len(sample.ids) for sample in samples],
            origins=[sample.origin for sample in samples],
        )

    @classmethod
    def of_pairs(cls, pairs: Sequence[Pair]) -> TrainBatch:
        """Lay the documents of pairs end to end: of each pair first the chosen one, then the rejected one if there is one."""
        samples: list[Sample] = []
        places: list[PairIndex] = []
        for pair in pairs:
            chosen = len(samples)
            samples.append(pair.chosen)
            if pair.rejected is not None:
                samples.append(pair.rejected)
            places.append(PairIndex(chosen, None if pair.rejected is None else chosen + 1, pair.liked))
        batch = cls.of(samples)
        return cls(batch.ids, batch.labels, batch.lengths, batch.origins, places)

    @property
    def num_tokens(self) -> int:
        return self.ids.shape[0]

    @property
    def num_targets(self) -> int:
        """Tokens that the loss counts."""
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device | str) -> TrainBatch:
        return TrainBatch(
            self.ids.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.lengths,
            self.origins,
            self.pairs,
        )

    def halves(self) -> list[TrainBatch]:
        """Two batches of about as many tokens each, cut between documents (between pairs where there are any).

        One batch, this one, where nothing can be cut: a single document, or a single pair.
        """
        groups = [[i] for i in range(len(self.lengths))]
        if self.pairs is not None:
            groups = [[p.chosen] if p.rejected is None else [p.chosen, p.rejected] for p in self.pairs]
        if len(groups) < 2:
            return [self]
        sizes = [sum(self.lengths[i] for i in group) for group in groups]
        cut = min(range(1, len(groups)), key=lambda k: abs(2 * sum(sizes[:k]) - sum(sizes)))
        return [self._part(0, cut, groups), self._part(cut, len(groups), groups)]

    def _part(self, start: int, end: int, groups: list[list[int]]) -> TrainBatch:
        documents = [i for group in groups[start:end] for i in group]
        ids, labels = self.ids.split(self.lengths), self.labels.split(self.lengths)
        pairs = None
        if self.pairs is not None:
            place = {document: i for i, document in enumerate(documents)}
            pairs = [
                PairIndex(place[p.chosen], None if p.rejected is None else place[p.rejected], p.liked)
                for p in self.pairs[start:end]
            ]
        return TrainBatch(
            torch.cat([ids[i] for i in documents]),
            torch.cat([labels[i] for i in documents]),
            [self.lengths[i] for i in documents],
            [self.origins[i] for i in documents],
            pairs,
        )


def halved(batches: Sequence[TrainBatch], times: int) -> list[TrainBatch]:
    """Every batch cut into two, `times` times over, as far as it can be cut."""
    pieces = list(batches)
    for _ in range(times):
        pieces = [half for piece in pieces for half in piece.halves()]
    return pieces
