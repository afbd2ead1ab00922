"""Data read while training: bounded memory whatever the size of the files, and a state from which reading goes on exactly.

In: data sets' files. Out: sequences of items, as from stored data, after mixing by weight and a shuffle buffer. The state holds
places in files, never tokens: what was in the buffers is read again. Every process reads everything, so the state is the same
in all of them and fits any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qwenkit.text.chat import ChatFormat
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.train.batch import Pair, Sample
from qwenkit.train.config import TrainConfig
from qwenkit.train.data.cache import config_key, fingerprint
from qwenkit.train.data.files import file_kind, read_records
from qwenkit.train.data.packing import Chunker, Packer
from qwenkit.train.data.pipeline import DataError, Pipeline, Prepared, Report
from qwenkit.train.data.registry import find_sources
from qwenkit.train.data.render import Item, samples_of

_BY_ROW = ("parquet", "arrow", "mindrecord")  # a single row is dear to find, a stretch of them is not


class Place(NamedTuple):
    """Where an item comes from: data set, file, cursor and line of its record, and which of the record's items it is."""

    source: int
    file: int
    cursor: int
    line: int
    part: int


class Placed(NamedTuple):
    place: Place
    item: Item

    @property
    def length(self) -> int:
        return sum(len(sample.ids) for sample in samples_of(self.item))


class _Cursor:
    """One data set, read item by item. skipped: records at the beginning that belong to the other split; limit: those that
    do not."""

    def __init__(self, number: int, pipeline: Pipeline, first: int, last: int | None, report: Report) -> None:
        self._number, self._pipeline, self._first, self._last = number, pipeline, first, last
        self._report = report
        self.passes = 0
        """How often it was gone through to the end."""
        self._begin(0, 0, 1, 0, 0)

    def restart(self) -> None:
        """A new epoch: from the beginning, which was not reached yet."""
        self.passes = 0
        self._begin(0, 0, 1, 0, 0)

    def _begin(self, file: int, cursor: int, line: int, taken: int, part: int) -> None:
        self._at = (file, cursor, line, taken)  # of the record whose items are waiting, or of the next one
        self._part = part
        self._waiting: list[Placed] = []
        self._prepared: Prepared | None = None
        self._records: Iterator[Prepared] = self._pipeline.records(file, cursor, line, taken)

    def next(self) -> Placed | None:
        """None at the end; then it begins anew."""
        while not self._waiting:
            self._pass_record()
            if self._last is not None and self._at[3] >= self._last:
                break
            prepared = next(self._records, None)
            if prepared is None:
                break
            self._take(prepared)
        else:
            self._part += 1
            return self._waiting.pop(0)
        self.passes += 1
        self._begin(0, 0, 1, 0, 0)
        return None

    def _take(self, prepared: Prepared) -> None:
        record = prepared.record
        self._at = (prepared.file, record.cursor, record.line, self._at[3])
        self._prepared = prepared
        if self._at[3] < self._first:
            return
        if self.passes == 0 and self._part == 0:
            self._report.add(self._pipeline.source.name, prepared)
        if any(issue.action == "error" for issue in prepared.issues):
            raise DataError(self._report)
        places = [Place(self._number, *self._at[:3], part) for part in range(len(prepared.items))]
        self._waiting = [Placed(*pair) for pair in zip(places, prepared.items, strict=True)][self._part :]

    def _pass_record(self) -> None:
        """All of the record's items were given: the place is the one behind it."""
        if self._prepared is not None:
            record = self._prepared.record
            self._at = (self._prepared.file, record.end, record.end_line, self._at[3] + 1)
            self._prepared, self._part = None, 0

    def state(self) -> list[int]:
        return [*self._at, self._part, self.passes]

    def load(self, state: Sequence[int]) -> None:
        self.passes = state[5]
        self._begin(*state[:5])

    def find(self, places: set[Place]) -> dict[Place, Item]:
        """The items at places noted earlier."""
        found: dict[Place, Item] = {}
        source = self._pipeline.source
        for number in sorted({place.file for place in places}):
            wanted: dict[int, list[Place]] = {}
            for place in places:
                if place.file == number:
                    wanted.setdefault(place.cursor, []).append(place)
            if file_kind(source.files[number]) in _BY_ROW:
                first, last = min(wanted), max(wanted)
                for record in read_records(source.files[number], first, first + 1):
                    if record.cursor in wanted:
                        items = self._pipeline.prepare(record, number).items
                        found |= {place: items[place.part] for place in wanted[record.cursor]}
                    if record.cursor >= last:
                        break
                continue
            for cursor, here in sorted(wanted.items()):
                items = self._pipeline.one(number, cursor, here[0].line).items
                found |= {place: items[place.part] for place in here}
        return found


class StreamedData:
    """Sequences of one split, epoch after epoch. Raises ValueError for settings that need all data at once."""

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, chat: ChatFormat | None, split: str) -> None:
        own_eval = split == "eval" and bool(config.eval_dataset)
        sources = find_sources(config.eval_dataset if own_eval else config.dataset, Path(config.dataset_dir))
        if not sources:
            raise ValueError("dataset is empty, at least one name or file is needed")
        for source in sources:
            if source.num_samples is not None:
                raise ValueError(f"{source.name}: num_samples needs all data at once, streaming does not allow it")
        if config.val_size and config.val_size < 1:
            raise ValueError(f"val_size is {config.val_size:g}, streaming allows a number of records")
        self.report = Report()
        self._split = split
        weights = list(config.mix_weights) if config.mix_weights and not own_eval else [1.0] * len(sources)
        held_out = [0] * len(sources) if config.eval_dataset else _shares(int(config.val_size), weights)
        self._cursors = []
        for number, source in enumerate(sources):
            pipeline = Pipeline(config, source, tokenizer, chat)
            first, last = (0, held_out[number]) if split == "eval" and not own_eval else (held_out[number], None)
            self._cursors.append(_Cursor(number, pipeline, first, last, self.report))
        # Reading the files' bytes would defeat streaming: their names and sizes have to do.
        files = [[source.settings, [[f.name, f.stat().st_size] for f in source.files]] for source in sources]
        reading = [config_key(config), fingerprint(tokenizer, chat), files, split, weights, config.mix_strategy]
        self._fingerprint = hashlib.sha256(json.dumps(reading, sort_keys=True).encode()).hexdigest()[:32]
        self._weights = weights
        self._strategy = "concat" if split == "eval" or len(sources) == 1 else config.mix_strategy
        self._buffer_size = config.buffer_size if config.shuffle and split == "train" else 1
        self._seed = config.seed
        self._packer: Packer[Placed] | None = None
        self._chunker: Chunker[Placed] | None = None
        if config.packs and config.stage == "pt":
            self._chunker = Chunker(config.cutoff_len)
        elif config.packs:
            self._packer = Packer(config.cutoff_len)
        self.epoch = 0
        self._draws = 0  # random numbers used in this epoch
        self._buffer: list[Placed] = []
        self._ended = False  # the sources have nothing more in this epoch
        self._ahead: list[list[tuple[Placed, int, int]]] = []  # at most one sequence: shows whether another one follows

    def take(self, count: int) -> list[list[Item]]:
        """The next sequences, `count` or, at the end of an epoch, fewer. With the last ones the next epoch has begun."""
        taken: list[list[tuple[Placed, int, int]]] = []
        while len(taken) < count and (sequence := self._pull()) is not None:
            taken.append(sequence)
        if not taken:
            raise ValueError(f"the data sets hold nothing for {self._split}:\n{self.report}")
        following = self._pull()
        if following is not None:
            self._ahead = [following]
        else:
            self.epoch, self._draws, self._ended = self.epoch + 1, 0, False
            for cursor in self._cursors:
                cursor.restart()
        return [[_cut(placed.item, start, stop) for placed, start, stop in sequence] for sequence in taken]

    def _pull(self) -> list[tuple[Placed, int, int]] | None:
        if self._ahead:
            return self._ahead.pop()
        while True:
            if self._chunker is not None and (chunk := self._chunker.pop()) is not None:
                return chunk
            placed = self._shuffled()
            if placed is None:
                if self._chunker is not None:
                    return self._chunker.pop(rest=True)
                pack = self._packer.pop() if self._packer is not None else None
            elif self._chunker is not None:
                self._chunker.add(placed, placed.length)
                continue
            elif self._packer is not None:
                pack = self._packer.add(placed, placed.length)
                if pack is None:
                    continue
            else:
                pack = [placed]
            return None if pack is None else [(each, 0, each.length) for each in pack]

    def _shuffled(self) -> Placed | None:
        """The next item out of the shuffle buffer, which is kept full as long as there is something to fill it with."""
        while not self._ended and len(self._buffer) < self._buffer_size:
            placed = self._mixed()
            if placed is None:
                self._ended = True
            else:
                self._buffer.append(placed)
        if not self._buffer:
            return None
        if self._buffer_size == 1:
            return self._buffer.pop()
        index = self._random().randrange(len(self._buffer))
        self._buffer[index], self._buffer[-1] = self._buffer[-1], self._buffer[index]
        return self._buffer.pop()

    def _mixed(self) -> Placed | None:
        if self._strategy == "concat":
            for cursor in self._cursors:
                if cursor.passes == 0 and (placed := cursor.next()) is not None:
                    return placed
            return None
        while True:
            cursor = self._random().choices(self._cursors, self._weights)[0]
            placed = cursor.next()
            if placed is not None:
                return placed
            done = [c.passes > 0 for c, weight in zip(self._cursors, self._weights, strict=True) if weight > 0]
            if self._strategy == "interleave_under" or all(done):
                return None

    def _random(self) -> random.Random:
        """Random numbers that depend on how many came before and on nothing else."""
        self._draws += 1
        return random.Random(f"{self._seed}/{self.epoch}/{self._draws}")

    def state(self) -> dict[str, Any]:
        return {
            "data": self._fingerprint,
            "epoch": self.epoch,
            "draws": self._draws,
            "ended": self._ended,
            "sources": [cursor.state() for cursor in self._cursors],
            "buffer": [list(placed.place) for placed in self._buffer],
            "packs": [[list(p.place) for p in pack] for _, pack in self._packer.open_packs] if self._packer else [],
            "chunk": _slices_state(self._chunker.slices) if self._chunker else [],
            "ahead": [_slices_state(sequence) for sequence in self._ahead],
        }

    def load(self, state: dict[str, Any]) -> None:
        if state["data"] != self._fingerprint:
            raise ValueError("the data, or how it is read, has changed since the checkpoint was written")
        self.epoch, self._draws, self._ended = state["epoch"], state["draws"], state["ended"]
        for cursor, cursor_state in zip(self._cursors, state["sources"], strict=True):
            cursor.load(cursor_state)
        slices = [*state["chunk"], *(part for sequence in state["ahead"] for part in sequence)]
        packed = [place for pack in state["packs"] for place in pack]
        wanted = {Place(*place) for place in (*state["buffer"], *packed, *(place for place, _, _ in slices))}
        found: dict[Place, Item] = {}
        for number, cursor in enumerate(self._cursors):
            found |= cursor.find({place for place in wanted if place.source == number})

        def placed(place: Sequence[int]) -> Placed:
            return Placed(Place(*place), found[Place(*place)])

        self._buffer = [placed(place) for place in state["buffer"]]
        self._ahead = [[(placed(p), start, stop) for p, start, stop in sequence] for sequence in state["ahead"]]
        if self._packer is not None:
            packs = [[placed(place) for place in pack] for pack in state["packs"]]
            self._packer.open_packs = [(sum(p.length for p in pack), pack) for pack in packs]
        if self._chunker is not None:
            self._chunker.load([(placed(place), start, stop) for place, start, stop in state["chunk"]])


def _shares(count: int, weights: Sequence[float]) -> list[int]:
    """`count` divided in proportion to weights, by largest remainders."""
    exact = [count * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    for index in sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])[: count - sum(shares)]:
        shares[index] += 1
    return shares


def _slices_state(slices: Sequence[tuple[Placed, int, int]]) -> list[list[Any]]:
    return [[list(placed.place), start, stop] for placed, start, stop in slices]


def _cut(item: Item, start: int, stop: int) -> Item:
    if isinstance(item, Pair):
        return item
    return Sample(item.ids[start:stop], item.labels[start:stop], item.origin)
