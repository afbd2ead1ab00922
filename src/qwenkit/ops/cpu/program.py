"""Operations as data. Eager: an operation is run at once. While recording: it is run and also kept, to be replayed.

In: kernels' arguments as torch tensors and numbers. Out: `Op` structures for the library. What a recorded `Program` names stays
valid: it holds on to its inputs, and results lie in buffers that are never given back. Whoever replays it writes new inputs into
the same tensors. Any number of Python threads may run and record operations at the same time: see `Executor`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum

import torch

from qwenkit.ops.cpu.buffers import Buffers
from qwenkit.ops.cpu.library import Library, Op


class Kind(IntEnum):
    """The kernels, numbered as in program.h."""

    EMBED = 0
    RMS_NORM = 1
    QUANTIZE = 2
    LINEAR = 3
    LINEAR_BF16 = 4
    ROTATE = 5
    WRITE_CACHE = 6
    ATTEND = 7
    SILU_MUL = 8
    ADD = 9
    PENALIZE = 10
    PEAKS = 11
    SAMPLE = 12


@dataclass(frozen=True)
class _Step:
    """An operation, and the addresses of the memory that it reads and writes."""

    op: Op
    reads: frozenset[int]
    writes: frozenset[int]


class Program:
    """A list of operations with the fewest waits between them that their reads and writes allow.

    An operation that goes on with what the one before it gave becomes part of it where a kernel does both in one pass.
    """

    def __init__(self, buffers: Buffers) -> None:
        """`buffers`: memory of the results."""
        self.buffers = buffers
        self._steps: list[_Step] = []
        self._tensors: list[torch.Tensor] = []
        self._unwritten: set[int] = set()  # results that exist no more, since what read them does their work too

    def __len__(self) -> int:
        return len(self._steps)

    def append(
        self, op: Op, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor], hold: Sequence[torch.Tensor]
    ) -> None:
        """Add an operation, and hold on to tensors."""
        read = frozenset(tensor.untyped_storage().data_ptr() for tensor in reads)
        written = frozenset(tensor.untyped_storage().data_ptr() for tensor in writes)
        step = _Step(op, read, written)
        last = self._steps[-1] if self._steps else None
        # what one pass reads it may not write: each thread needs all of a row
        joined = None if last is None or last.reads & written else join(last.op, op)
        if joined is not None and last is not None:
            del self._steps[-1]
            whole = joined.kind == Kind.WRITE_CACHE  # the rotated keys go to the cache only
            self._unwritten |= last.writes if whole else frozenset()
            step = _Step(joined, last.reads | (read - last.writes), written if whole else last.writes | written)
        assert not step.reads & self._unwritten, "an operation reads what an earlier one no longer writes"
        self._unwritten -= step.writes
        self._steps.append(step)
        self._tensors += hold

    def finish(self, library: Library) -> Replay:
        """Threads must meet before an operation that touches what one since the last meeting has written, or writes what one
        has read.
        """
        read: frozenset[int] = frozenset()
        written: frozenset[int] = frozenset()
        for step in self._steps:
            step.op.wait = bool(step.reads & written or step.writes & (written | read))
            if step.op.wait:
                read = written = frozenset()
            read, written = read | step.reads, written | step.writes
        return Replay(library, [step.op for step in self._steps], (self.buffers, *self._tensors))


def join(first: Op, second: Op) -> Op | None:
    """One operation that does the work of two successive ones, where there is a kernel for it; the places of pointers and
    numbers are those that the kernels name.
    """
    kinds = (first.kind, second.kind)
    if kinds == (Kind.ADD, Kind.RMS_NORM) and second.p[1] == first.p[0] and second.p[3] is None:
        if first.n[0] != second.n[0] * second.n[1]:
            return None
        op = _copy(second)
        op.p[1], op.p[3], op.p[4] = first.p[1], first.p[2], first.p[0]
        return op
    if kinds == (Kind.RMS_NORM, Kind.QUANTIZE) and second.p[3] == first.p[0] and first.p[5] is None:
        if first.n[0:2] != second.n[0:2]:
            return None
        op = _copy(first)
        op.p[5:8], op.n[2] = second.p[0:3], second.n[2]
        return op
    if kinds == (Kind.SILU_MUL, Kind.QUANTIZE) and second.p[3] == first.p[0] and first.p[3] is None:
        op = _copy(first)
        op.p[3:6], op.n[1:3] = second.p[0:3], second.n[1:3]
        return op
    if kinds == (Kind.ROTATE, Kind.WRITE_CACHE) and second.p[0] == first.p[0] != second.p[1]:
        op = _copy(second)
        op.p[0], op.p[10:12], op.n[7] = first.p[1], first.p[2:4], first.n[3]
        return op
    return None


def _copy(op: Op) -> Op:
    return Op.from_buffer_copy(op)


class Replay:
    """A finished program: calling it computes everything again from what its input tensors now hold, or what its first `count`
    operations computed."""

    def __init__(self, library: Library, ops: list[Op], memory: tuple[object, ...]) -> None:
        self._library = library
        self._ops = (Op * len(ops))(*ops)
        self._memory = memory  # keeps alive what the operations point to

    def __call__(self, count: int | None = None) -> None:
        self._library.run(self._ops, count)


class _ThreadState(threading.local):
    """What an executor keeps for each Python thread: memory of results, and the recording that listens."""

    def __init__(self) -> None:
        self.buffers = Buffers(keep=False)
        self.recording: Program | None = None
        self.last: deque[object] = deque(maxlen=2)  # touched by the last ops: what joins them may not write there


class Executor:
    """Runs operations, and lets one recording in each Python thread listen.

    Threads share nothing but the library, which runs one program after the other: there is no lock that a forked child could
    find taken.
    """

    def __init__(self, library: Library) -> None:
        self.library = library
        self._local = _ThreadState()

    @property
    def recording(self) -> Program | None:
        """The recording of this thread."""
        return self._local.recording

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Memory for a result."""
        local = self._local
        buffers = local.buffers if local.recording is None else local.recording.buffers
        return buffers.empty(*shape, dtype=dtype)

    def submit(
        self,
        kind: Kind,
        pointers: Sequence[torch.Tensor | None],
        numbers: Sequence[int],
        *,
        writes: Sequence[torch.Tensor],
        also: Sequence[torch.Tensor] = (),
        x: float = 0.0,
    ) -> None:
        """Run an operation. `pointers` are in the kernel's order; those not in `writes` are read, and so are those in `also`."""
        op = Op(kind, 0)
        for place, tensor in enumerate(pointers):
            op.p[place] = None if tensor is None else tensor.data_ptr()
        op.n[: len(numbers)] = list(numbers)
        op.x = x
        self.library.run((Op * 1)(op))
        local = self._local
        if local.recording is not None:
            targets = {id(tensor) for tensor in writes}
            reads = [tensor for tensor in (*pointers, *also) if tensor is not None and id(tensor) not in targets]
            hold = [tensor for tensor in (*reads, *writes) if not local.recording.buffers.owns(tensor)]
            local.recording.append(op, reads, writes, hold)
            local.last.append((pointers, also))

    @contextmanager
    def record(self, buffers: Buffers | None = None) -> Iterator[Program]:
        """Operations of this thread inside the block are run and kept.

        `buffers` (keep=True) is memory for results. Programs may share it that never run at the same time, and whose results are
        read before another of them runs. Single operations never do: their results may be held while a program is replayed.
        """
        local = self._local
        assert local.recording is None, "one recording at a time"
        local.recording = Program(Buffers(keep=True) if buffers is None else buffers)
        try:
            yield local.recording
        finally:
            local.recording = None
            local.last.clear()
