"""One epoch over tokenized data on disk: which items, in which order, in which sequences.

In: the Stores of all data sets. Out: a Plan, the same in every process, and the order of each epoch. Mixture and packing depend
on the seed only, so that every epoch has the same number of sequences; their order is another in each epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qwenkit.text.chat import ChatFormat
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.train.config import TrainConfig
from qwenkit.train.data.cache import fingerprint, open_store
from qwenkit.train.data.packing import plan_chunks, plan_packs, plan_singles
from qwenkit.train.data.pipeline import Report, split_size
from qwenkit.train.data.registry import DataSource, find_sources
from qwenkit.train.data.render import Item

# What a random number is for; each has its own stream of them.
_SPLIT, _MIX, _NUMBER, _ORDER, _EPOCH = range(5)


class StoredData:
    """The sequences of one split. Raises ValueError where nothing is left to train on."""

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, chat: ChatFormat | None, split: str) -> None:
        names = config.eval_dataset if split == "eval" and config.eval_dataset else config.dataset
        sources = find_sources(names, Path(config.dataset_dir))
        if not sources:
            raise ValueError("dataset is empty, at least one name or file is needed")
        ids_hash = fingerprint(tokenizer, chat)
        self._stores = [open_store(config, source, tokenizer, chat, ids_hash) for source in sources]
        self._firsts = np.cumsum([0, *(len(store) for store in self._stores)])
        self._shuffles = config.shuffle and split == "train"
        self._seed = config.seed
        self.report = Report()
        for store in self._stores:
            self.report.merge(store.report)
        lengths = np.concatenate([store.lengths for store in self._stores])
        items = self._mixed(config, sources, split)
        if not len(items):
            raise ValueError(f"the data sets hold nothing for {split}:\n{self.report}")
        if config.stage == "pt" and config.packs:
            self.plan = plan_chunks(items, lengths, config.cutoff_len)
        elif config.packs:
            self.plan = plan_packs(items, lengths, config.cutoff_len)
        else:
            self.plan = plan_singles(items, lengths)
        self.fingerprint = "-".join(store.key[:16] for store in self._stores)
        self._epoch, self._epoch_order = -1, np.empty(0, np.int64)

    def sequence(self, epoch: int, index: int) -> list[Item]:
        """The items of the sequence that comes at place `index` of an epoch."""
        if epoch != self._epoch:
            self._epoch, self._epoch_order = epoch, self._shuffled(len(self.plan), _EPOCH, epoch)
        parts = self.plan[int(self._epoch_order[index])]
        items = []
        for item, start, stop in parts:
            store = int(np.searchsorted(self._firsts, item, side="right")) - 1
            items.append(self._stores[store].item(item - int(self._firsts[store]), start, stop))
        return items

    def _random(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *purpose])

    def _shuffled(self, count: int, *purpose: int) -> np.ndarray:
        return self._random(*purpose).permutation(count) if self._shuffles else np.arange(count)

    def _mixed(self, config: TrainConfig, sources: Sequence[DataSource], split: str) -> np.ndarray:
        """Numbers of the items of all stores, end to end, that this split goes through, in order."""
        held_out = self._held_out(config, split)
        chosen = []
        for number, (store, source) in enumerate(zip(self._stores, sources, strict=True)):
            items = np.flatnonzero(held_out[number][store.records] == (split == "eval"))
            if config.eval_dataset or not config.val_size:
                items = np.arange(len(store))
            wanted = source.num_samples
            if wanted is not None and split == "train" and len(items):
                rounds = [self._random(_NUMBER, number, n).permutation(items) for n in range(-(-wanted // len(items)))]
                items = np.concatenate(rounds)[:wanted]
            chosen.append(items + self._firsts[number])
        if config.mix_strategy == "concat" or split == "eval" or len(chosen) == 1:
            items = np.concatenate(chosen)
            return items[self._shuffled(len(items), _ORDER)]
        return self._interleaved(chosen, config)

    def _held_out(self, config: TrainConfig, split: str) -> list[np.ndarray]:
        """For each store, which of its records are split off. Whole records: their samples share text."""
        counts = [store.num_records for store in self._stores]
        held_out = np.zeros(sum(counts), bool)
        if wanted := split_size(config, len(held_out)):
            held_out[self._random(_SPLIT).permutation(len(held_out))[:wanted]] = True
        return np.split(held_out, np.cumsum(counts)[:-1])

    def _interleaved(self, chosen: Sequence[np.ndarray], config: TrainConfig) -> np.ndarray:
        """Draw a set by weight, then its next item, until the first (under) or the last (over) set has been gone through."""
        if not all(len(items) for items in chosen):
            raise ValueError("mix_strategy: a data set without samples cannot be interleaved")
        weights = np.array(config.mix_weights or [1.0] * len(chosen))
        random = self._random(_MIX)
        order: list[int] = []
        places, passes = [0] * len(chosen), [0] * len(chosen)
        queues = [items[self._shuffled(len(items), _ORDER, n, 0)] for n, items in enumerate(chosen)]
        needed = {n for n, weight in enumerate(weights) if weight > 0}
        while True:
            for draw in random.choice(len(chosen), size=4096, p=weights / weights.sum()).tolist():
                if places[draw] == len(queues[draw]):
                    passes[draw] += 1
                    if config.mix_strategy == "interleave_under":
                        return np.array(order, np.int64)
                    needed.discard(draw)
                    if not needed:
                        return np.array(order, np.int64)
                    places[draw] = 0
                    shuffled = self._shuffled(len(chosen[draw]), _ORDER, draw, passes[draw])
                    queues[draw] = chosen[draw][shuffled]
                order.append(int(queues[draw][places[draw]]))
                places[draw] += 1
