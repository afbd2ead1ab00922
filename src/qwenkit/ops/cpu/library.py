"""Finds the native library, chooses the best instruction set of this machine, and runs programs on its threads."""

from __future__ import annotations

import ctypes
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

NAME = "libqwenkit_cpu.so"
INSTRUCTION_SETS = ("avx512", "avx2")  # best first


class Op(ctypes.Structure):
    """One operation, as program.h declares it."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("wait", ctypes.c_int32),
        ("p", ctypes.c_void_p * 12),
        ("n", ctypes.c_int64 * 12),
        ("x", ctypes.c_double),
    )


@dataclass(frozen=True)
class Library:
    """The loaded library, set to one instruction set and a number of threads."""

    handle: ctypes.CDLL
    instruction_set: str

    def run(self, ops: ctypes.Array[Op], count: int | None = None) -> None:
        """Run a program, or its first `count` operations, on all threads; returns when it is done. The GIL is free meanwhile."""
        self.handle.qk_run(ops, len(ops) if count is None else count)

    def use_threads(self, threads: int) -> None:
        """Run programs on at most `threads` threads: on fewer while other processes keep cores busy."""
        failed = self.handle.qk_configure(self.instruction_set.encode(), threads)
        assert not failed

    @property
    def active_threads(self) -> int:
        """Threads that the next program runs on, unless it tries more."""
        return int(self.handle.qk_active_threads())


def find_library() -> Path | None:
    """Where the build put the library: in this folder, or, for an editable install, in the environment's."""
    beside = Path(__file__).with_name(NAME)
    installed = Path(sysconfig.get_path("platlib")) / "qwenkit" / "ops" / "cpu" / NAME
    return next((path for path in (beside, installed) if path.is_file()), None)


def open_library(instruction_set: str | None = None) -> Library | None:
    """The library with the given instruction set, or the best that this machine has; None where there is neither.

    Raises ValueError when an instruction set is asked for by name that is unknown or not there.
    """
    path = find_library()
    if path is None:
        if instruction_set is not None:
            raise ValueError(f"instruction set {instruction_set!r} needs the native library, which was not built")
        return None
    handle = ctypes.CDLL(str(path))
    handle.qk_op_size.restype = ctypes.c_int64
    handle.qk_run.argtypes = [ctypes.POINTER(Op), ctypes.c_int64]
    assert handle.qk_op_size() == ctypes.sizeof(Op), f"{path} was built from other sources: install qwenkit again"
    there = [name for name in INSTRUCTION_SETS if handle.qk_supports(name.encode())]
    if instruction_set is not None and instruction_set not in there:
        raise ValueError(
            f"instruction set is {instruction_set!r}, this machine has {', '.join(there) or 'none of ours'}"
        )
    chosen = instruction_set or next(iter(there), None)
    if chosen is None:
        return None
    library = Library(handle, chosen)
    library.use_threads(min(torch.get_num_threads(), os.cpu_count() or 1))
    return library
