"""Scheduler: who runs in this step, and how many tokens of each.

A step has a budget of tokens. Sequences that run get theirs first, by rank (one token while decoding, a chunk of the prompt
before that); what is left admits waiting ones. A sequence is admitted when blocks for all its tokens are free; when a running one
needs a block and none is free, the last in rank is preempted: it loses its blocks, keeps its tokens, and waits first in line to
be computed again.

Rank is priority, then turn, then age. The *turn* of a sequence is how many older ones of its principal (API key) run at its
priority, so that principals go round robin: the first sequence of each comes before the second of any. A waiting sequence takes
the seat or the blocks that it needs from running ones of lower priority, and from those of a later turn: newcomers are seated at
the expense of whoever has most, until all have equal shares or all they can use. One principal alone goes by priority and age.

Tokens of a step go round in the same way: each principal has an equal quantum of them, and what it leaves is for the others. This
is deficit round robin (Shreedhar and Varghese, Efficient Fair Queuing Using Deficit Round Robin, 1996); no deficit is carried
over, since a prompt can be cut to its quantum. VTC (Sheng et al., Fairness in Serving Large Language Models, 2024) counts the
tokens that each has had instead and never preempts; then a newcomer waits for the long answers of others to end. And because a
step takes as long as all its tokens, one that brings a principal's first token leaves out those who would get more than it, at
most every second time.

Every sequence finishes. The first in rank of all, the oldest of the highest priority, is not preempted for others and fits alone.
While it waits its principal has no seat at its priority (of one principal those that run are older than those that wait), so it
is the next to be admitted; nobody passes it, and those that run end, since the first of them computes at least a token in every
second step.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import Counter
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
        self.running: list[Sequence] = []  # by rank
        self._lines: dict[str, list[Sequence]] = {}  # those that wait, of each principal, by priority and age
        self._seats: Counter[tuple[str, int]] = Counter()  # running sequences of a principal at a priority
        self._next_order = 0
        self.num_preemptions = 0
        self._shortened = False  # the last step left rows out for the sake of a first token

    @property
    def has_work(self) -> bool:
        return bool(self._lines or self.running)

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences that wait to be admitted, those of one principal in their order."""
        return [sequence for line in list(self._lines.values()) for sequence in line]

    def add(self, sequence: Sequence) -> None:
        sequence.order = self._next_order
        self._next_order += 1
        self._wait(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a finished or aborted sequence out, wherever it is, and give its blocks back."""
        if sequence in self.running:
            self._unseat(sequence)
        elif sequence in self._lines.get(sequence.principal, ()):
            self._leave_line(sequence)
        self._release(sequence)

    def reset(self) -> None:
        """Forget all sequences, whatever state they are in."""
        self.running.clear()
        self._lines.clear()
        self._seats.clear()

    def schedule(self) -> list[Row]:
        """The rows of the next step; empty only when there is no work."""
        budget = self.config.max_batch_tokens
        tokens: dict[Sequence, int] = {}  # of this step, by rank; of running sequences the first len(tokens) are in it
        level: int | None = None  # the priority whose turn it is
        quantum, taken = (
            0,
            Counter[str](),
        )  # of `level`: the tokens that each principal gets first, and that it has so far
        first = self._first_waiting()
        while budget:
            place = len(tokens)
            if first is not None and self._is_next(first, place):
                first = self._first_waiting() if self._admit(first, place) else None
                continue
            if place == len(self.running):
                break
            sequence = self.running[place]
            if sequence.priority != level:
                budget = self._give_rest(tokens, budget)
                level, taken = sequence.priority, Counter()
                quantum = max(budget // self._num_principals(level), 1)
            count = min(sequence.num_pending, budget, quantum - taken[sequence.principal])
            preempted = self.num_preemptions
            if not self._grow(sequence, count):
                break
            if self.num_preemptions > preempted:
                first = None
            tokens[sequence] = count
            taken[sequence.principal] += count
            budget -= count
        self._give_rest(tokens, budget)
        rows = [Row(sequence, count) for sequence, count in tokens.items() if count]
        assert rows or not self.has_work, "there is work but nothing can run"
        if len(self._seats) > 1 and not self._shortened:
            short = _for_first_tokens(rows)
            self._shortened = len(short) < len(rows)
            return short
        self._shortened = False
        return rows

    def _give_rest(self, tokens: dict[Sequence, int], budget: int) -> int:
        """Hand out, by rank, what no quantum took of the budget, at nobody's cost; returns what is left then."""
        for sequence, count in tokens.items():
            more = min(sequence.num_pending - count, budget)
            if more > 0 and self._need(sequence, count + more) <= self.pool.num_free:
                self._grow(sequence, count + more)
                tokens[sequence] += more
                budget -= more
        return budget

    def _num_principals(self, priority: int) -> int:
        """How many principals have something to run or to admit at a priority."""
        running = {principal for principal, at in self._seats if at == priority}
        return len(running | {name for name, line in self._lines.items() if line[0].priority == priority})

    def _first_waiting(self) -> Sequence | None:
        """The waiting sequence that is to be admitted next."""
        heads = [line[0] for line in self._lines.values()]
        for sequence in heads:
            sequence.turn = self._seats[sequence.principal, sequence.priority]
        return min(heads, key=_rank, default=None)

    def _is_next(self, sequence: Sequence, place: int) -> bool:
        """Whether a waiting sequence's turn comes before that of the running one at `place`."""
        return place == len(self.running) or _rank(sequence) < _rank(self.running[place])

    def _need(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that a running sequence lacks for its next `num_tokens`."""
        return self._blocks_for(sequence.num_computed + num_tokens) - len(sequence.block_table)

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Hold the blocks for a running sequence's next tokens, at the cost of lower ranks; False when it had to go itself."""
        need = self._need(sequence, num_tokens)
        while need > self.pool.num_free:
            if self._preempt() is sequence:
                return False
        if need > 0:
            sequence.block_table += self.pool.allocate(need)
        return True

    def _preempt(self) -> Sequence:
        """Send the last in rank of those running back to wait."""
        victim = self.running[-1]
        self._unseat(victim)
        self._release(victim)
        self._wait(victim)
        self.num_preemptions += 1
        return victim

    def _gives_way(self, sequence: Sequence, place: int) -> bool:
        """Whether the last in rank must go for the sake of a waiting sequence. Running ones before `place` have been given tokens
        in this step; they outrank it.
        """
        if place == len(self.running):
            return False
        last = self.running[-1]
        return last.priority < sequence.priority or (last.priority == sequence.priority and last.turn > sequence.turn)

    def _admit(self, sequence: Sequence, place: int) -> bool:
        """Let the first in line run, if there is a seat and blocks for all its tokens."""
        if len(self.running) >= self.config.max_num_seqs:
            if not self._gives_way(sequence, place):
                return False
            self._preempt()
        shared = self.pool.share(self._known_prefix(sequence))
        need = self._blocks_for(len(sequence.tokens)) - len(shared)
        while need > self.pool.num_free and self._gives_way(sequence, place):
            self._preempt()
        if need > self.pool.num_free:
            self.pool.release(shared)
            return False
        self._leave_line(sequence)
        self._seats[sequence.principal, sequence.priority] += 1
        insort(self.running, sequence, key=_rank)
        sequence.block_table = shared + self.pool.allocate(need)
        sequence.num_computed = len(shared) * self.config.block_size
        if sequence.num_output == 0:
            sequence.num_cached = sequence.num_computed
            sequence.admitted_at = time.monotonic()
        return True

    def _wait(self, sequence: Sequence) -> None:
        insort(self._lines.setdefault(sequence.principal, []), sequence, key=_seniority)

    def _leave_line(self, sequence: Sequence) -> None:
        line = self._lines[sequence.principal]
        line.remove(sequence)
        if not line:
            del self._lines[sequence.principal]

    def _unseat(self, sequence: Sequence) -> None:
        """Take a running sequence out; the younger ones of its principal move up a turn."""
        self.running.remove(sequence)
        group = sequence.principal, sequence.priority
        self._seats[group] -= 1
        if sequence.turn < self._seats[group]:
            for other in self.running:
                if (other.principal, other.priority) == group and other.turn > sequence.turn:
                    other.turn -= 1
            self.running.sort(key=_rank)
        if not self._seats[group]:
            del self._seats[group]

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
        """Assert that every block is accounted for, and that ranks are what they should be."""
        self.pool.check(sequence.block_table for sequence in (*self.running, *self.waiting))
        assert self.running == sorted(self.running, key=_rank)
        seats: Counter[tuple[str, int]] = Counter()
        for sequence in sorted(self.running, key=_seniority):
            assert sequence.turn == seats[sequence.principal, sequence.priority]
            seats[sequence.principal, sequence.priority] += 1
        assert seats == self._seats

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = 0

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size)


def _for_first_tokens(rows: list[Row]) -> list[Row]:
    """Rows of a step without the principals that would get more tokens in it than one whose first token it brings."""
    tokens: Counter[str] = Counter()
    for row in rows:
        tokens[row.sequence.principal] += row.num_tokens
    most = min(
        (
            tokens[row.sequence.principal]
            for row in rows
            if row.samples and not row.sequence.num_output and row.sequence.priority == rows[0].sequence.priority
        ),
        default=None,
    )
    return rows if most is None else [row for row in rows if tokens[row.sequence.principal] <= most]


def _seniority(sequence: Sequence) -> tuple[int, int]:
    """Who goes first within a principal: the higher priority, then who came first."""
    return -sequence.priority, sequence.order


def _rank(sequence: Sequence) -> tuple[int, int, int]:
    """Who goes first: the higher priority, then the earlier turn, then who came first."""
    return -sequence.priority, sequence.turn, sequence.order
