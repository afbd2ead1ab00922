"""Operations as data. Eager: an operation is run at once. While recording: it is run and also kept, to be replayed.

In: kernels' arguments as torch tensors and numbers. Out: `Op` structures for the library. What a recorded `Program` names stays
valid: it holds on to its inputs, and results lie in buffers that are never given back. Whoever replays it writes new inputs into
the same tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    SAMPLE = 10


class Program:
    """A list of operations with the fewest waits between them that their reads and writes allow."""

    def __init__(self) -> None:
        self._ops: list[Op] = []
        self._tensors: list[torch.Tensor] = []
        self._read: set[int] = set()
        self._written: set[int] = set()

    def append(
        self, op: Op, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor], hold: Sequence[torch.Tensor]
    ) -> None:
        """Add an operation, and hold on to tensors. Threads must meet before it if it touches what one since the last meeting
        has written, or writes what one has read.
        """
        read = {tensor.untyped_storage().data_ptr() for tensor in reads}
        written = {tensor.untyped_storage().data_ptr() for tensor in writes}
        op.wait = bool(read & self._written or written & (self._written | self._read))
        if op.wait:
            self._read, self._written = set(), set()
        self._read |= read
        self._written |= written
        self._ops.append(op)
        self._tensors += hold

    def finish(self, library: Library) -> Replay:
        return Replay(library, self._ops, self._tensors)


class Replay:
    """A finished program: calling it computes everything again from what its input tensors now hold."""

    def __init__(self, library: Library, ops: list[Op], tensors: list[torch.Tensor]) -> None:
        self._library = library
        self._ops = (Op * len(ops))(*ops)
        self._tensors = tensors

    def __call__(self) -> None:
        self._library.run(self._ops)


class Executor:
    """Runs operations, and lets one recording at a time listen."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.recording: Program | None = None
        # Recorded programs run one after the other and may share their buffers; but a replay writes to its own whenever it likes,
        # so results of single ops, which somebody may hold, lie elsewhere.
        self._buffers, self._recorded_buffers = Buffers(keep=False), Buffers(keep=True)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Memory for a result."""
        buffers = self._buffers if self.recording is None else self._recorded_buffers
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
        if self.recording is not None:
            targets = {id(tensor) for tensor in writes}
            reads = [tensor for tensor in (*pointers, *also) if tensor is not None and id(tensor) not in targets]
            hold = [tensor for tensor in (*reads, *writes) if not self._recorded_buffers.owns(tensor)]
            self.recording.append(op, reads, writes, hold)

    @contextmanager
    def record(self) -> Iterator[Program]:
        """Operations inside the block are run and kept."""
        assert self.recording is None, "one recording at a time"
        self.recording = Program()
        try:
            yield self.recording
        finally:
            self.recording = None
