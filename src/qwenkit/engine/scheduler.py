"""Scheduler: who runs in this step, and how many tokens of each.

A step has a budget of tokens. Sequences that run get theirs first, oldest first (one token while decoding, a chunk of the prompt
before that); what is left admits waiting ones. A sequence is admitted when blocks for all its tokens are free; when a running one
needs a block and none is free, the youngest running sequence is preempted: it loses its blocks, keeps its tokens, and waits first
in line to be computed again. Priority comes before age in both lines: one that waits goes ahead of running ones of lower
priority, and preempts them where it needs their seat or their blocks. Since the first in rank is never preempted for others and
fits alone, every sequence finishes.
"""

from __future__ import annotations

import time
from bisect import insort
from dataclasses import dataclass

from qwenkit.engine.blocks import BlockPool
from qwenkit.engine.config import EngineConfig
from qwenkit.engine.request import Sequence


@dataclass(frozen=True)
class Row:
    """`num_tokens` of a sequence's pending tokens that this step computes; their blocks are held."""

    sequence: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether this step reaches the sequence's last token, so that the next one can be sampled."""
        return self.num_tokens == self.sequence.num_pending


class Scheduler:
    def __init__(self, config: EngineConfig, pool: BlockPool) -> None:
        self.config = config
        self.pool = pool
        self.waiting: list[Sequence] = []  # both by rank
        self.running: list[Sequence] = []
        self._next_order = 0
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        sequence.order = self._next_order
        self._next_order += 1
        insort(self.waiting, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        """Take a finished or aborted sequence out, wherever it is, and give its blocks back."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)

    def schedule(self) -> list[Row]:
        """The rows of the next step; empty only when there is no work."""
        budget = self.config.max_batch_tokens
        rows: list[Row] = []
        admitting = True
        while budget:
            place = len(rows)
            if admitting and self.waiting and self._is_next(self.waiting[0], place):
                admitting = self._admit(self.waiting[0])
            elif place == len(self.running):
                break
            else:
                row = Row(self.running[place], min(self.running[place].num_pending, budget))
                preempted = self.num_preemptions
                grown = self._grow(row)
                admitting = admitting and self.num_preemptions == preempted
                if not grown:
                    break
                rows.append(row)
                budget -= row.num_tokens
        assert rows or not self.has_work, "there is work but nothing can run"
        return rows

    def _is_next(self, sequence: Sequence, place: int) -> bool:
        """Whether a waiting sequence's turn comes before that of the running one at `place`."""
        return place == len(self.running) or _rank(sequence) < _rank(self.running[place])

    def _grow(self, row: Row) -> bool:
        """Hold the blocks that a running row needs, at the cost of lower ranks; False when the row itself had to go."""
        need = self._blocks_for(row.sequence.num_computed + row.num_tokens) - len(row.sequence.block_table)
        while need > self.pool.num_free:
            if self._preempt() is row.sequence:
                return False
        if need > 0:
            row.sequence.block_table += self.pool.allocate(need)
        return True

    def _preempt(self) -> Sequence:
        """Send the last in rank of those running back to wait."""
        victim = self.running.pop()
        self._release(victim)
        insort(self.waiting, victim, key=_rank)
        self.num_preemptions += 1
        return victim

    def _outranked(self, sequence: Sequence) -> bool:
        """Whether something runs that must give way to `sequence`. It has no row in this step yet: rows are given by rank."""
        return bool(self.running) and self.running[-1].priority < sequence.priority

    def _admit(self, sequence: Sequence) -> bool:
        """Let the first in line run, if there is a seat and blocks for all its tokens."""
        if len(self.running) >= self.config.max_num_seqs:
            if not self._outranked(sequence):
                return False
            self._preempt()
        shared = self.pool.share(self._known_prefix(sequence))
        need = self._blocks_for(len(sequence.tokens)) - len(shared)
        while need > self.pool.num_free and self._outranked(sequence):
            self._preempt()
        if need > self.pool.num_free:
            self.pool.release(shared)
            return False
        assert self.waiting[0] is sequence, "who is preempted ranks lower"
        self.waiting.pop(0)
        insort(self.running, sequence, key=_rank)
        sequence.block_table = shared + self.pool.allocate(need)
        sequence.num_computed = len(shared) * self.config.block_size
        if sequence.num_output == 0:
            sequence.num_cached = sequence.num_computed
            sequence.admitted_at = time.monotonic()
        return True

    def _known_prefix(self, sequence: Sequence) -> list[bytes]:
        """Hashes that may be looked up. The last token is always computed, for its logits; prompt log-probabilities need
        all of them.
        """
        if not self.config.prefix_cache or (sequence.prompt_logprobs is not None and sequence.num_output == 0):
            return []
        size = self.config.block_size
        return sequence.extend_hashes(size)[: (len(sequence.tokens) - 1) // size]

    def computed(self, row: Row) -> None:
        """Note that a row's keys and values are in the cache; blocks that became full may now be shared."""
        sequence, size = row.sequence, self.config.block_size
        before = sequence.num_computed // size
        sequence.num_computed += row.num_tokens
        if self.config.prefix_cache:
            hashes = sequence.extend_hashes(size)
            for place in range(before, sequence.num_computed // size):
                self.pool.publish(sequence.block_table[place], hashes[place])

    def check(self) -> None:
        """Assert that every block is accounted for."""
        self.pool.check(sequence.block_table for sequence in (*self.running, *self.waiting))

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = 0

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size)


def _rank(sequence: Sequence) -> tuple[int, int]:
    """Who goes first: the higher priority, then who came first. A running sequence outranks all that wait at its priority."""
    return -sequence.priority, sequence.order
