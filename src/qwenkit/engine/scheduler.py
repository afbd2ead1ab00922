"""Scheduler: who runs in this step, and how many tokens of each.

A step has a budget of tokens. Sequences that run get theirs first, oldest first (one token while decoding, a chunk of the prompt
before that); what is left admits waiting ones. A sequence is admitted when blocks for all its tokens are free; when a running one
needs a block and none is free, the youngest running sequence is preempted: it loses its blocks, keeps its tokens, and waits first
in line to be computed again. Since the oldest is never preempted for others and fits alone, every sequence finishes.
"""

from __future__ import annotations

from collections import deque
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
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

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
        preempted = self.num_preemptions
        rows: list[Row] = []
        while len(rows) < len(self.running) and budget:
            sequence = self.running[len(rows)]
            row = Row(sequence, min(sequence.num_pending, budget))
            if not self._grow(row):
                break
            rows.append(row)
            budget -= row.num_tokens
        if self.num_preemptions == preempted:
            self._admit(rows, budget)
        assert rows or not self.has_work, "there is work but nothing can run"
        return rows

    def _grow(self, row: Row) -> bool:
        """Hold the blocks that a running row needs, at the cost of younger ones; False when the row itself had to go."""
        need = self._blocks_for(row.sequence.num_computed + row.num_tokens) - len(row.sequence.block_table)
        while need > self.pool.num_free:
            victim = self.running.pop()
            self._release(victim)
            self.waiting.appendleft(victim)
            self.num_preemptions += 1
            if victim is row.sequence:
                return False
        if need > 0:
            row.sequence.block_table += self.pool.allocate(need)
        return True

    def _admit(self, rows: list[Row], budget: int) -> None:
        while self.waiting and budget and len(self.running) < self.config.max_num_seqs:
            sequence = self.waiting[0]
            shared = self.pool.share(self._known_prefix(sequence))
            need = self._blocks_for(len(sequence.tokens)) - len(shared)
            if need > self.pool.num_free:
                self.pool.release(shared)
                return
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.block_table = shared + self.pool.allocate(need)
            sequence.num_computed = len(shared) * self.config.block_size
            if sequence.num_output == 0:
                sequence.num_cached = sequence.num_computed
            rows.append(Row(sequence, min(sequence.num_pending, budget)))
            budget -= rows[-1].num_tokens

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
