"""The op table: for each op the implementation that runs here, chosen once at start by `use`.

An op goes to the native library where it was chosen and can take the tensors (contiguous fp32 on the CPU), else to the
reference; where gradients are wanted, to its kernels for training, if it has any. Callers write `ops.rms_norm(...)`, never ask.
"""

from __future__ import annotations

import os
from typing import ClassVar

import torch

from qwenkit.ops import reference
from qwenkit.ops.cache import KVCache
from qwenkit.ops.cpu.library import find_library, open_library
from qwenkit.ops.cpu.native import NativeOps
from qwenkit.ops.cpu.program import Executor
from qwenkit.ops.cpu.training import TrainingOps, open_training
from qwenkit.ops.packed import PackedWeight

IMPLEMENTATIONS = ("auto", "reference", "avx2", "avx512")
NATIVE = (
    "rms_norm",
    "add_rms_norm",
    "silu_mul",
    "add",
    "rotate",
    "write_cache",
    "paged_attention",
    "packed_linear",
    "embedding",
    "penalize",
    "sample",
)
REFERENCE_ONLY = ("attention", "packed_attention")


class _Table:
    native: NativeOps | None = None
    training: TrainingOps | None = None
    asked: str | None = None
    opened: ClassVar[
        dict[str, tuple[NativeOps | None, TrainingOps | None]]
    ] = {}  # one for each implementation asked for


def use(implementation: str | None = None) -> None:
    """Choose for this process: the reference, an instruction set of the native library, or auto, the best there is.

    None stands for what the environment variable QWENKIT_OPS says, else auto.
    Raises ValueError for an unknown name, or for an instruction set that this machine or build does not have.
    """
    implementation = implementation or os.environ.get("QWENKIT_OPS") or "auto"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"ops implementation is {implementation!r}, allowed are {', '.join(IMPLEMENTATIONS)}")
    if implementation == _Table.asked:
        return
    library = None
    if implementation != "reference":
        library = open_library(None if implementation == "auto" else implementation)
    made = (None, None) if library is None else (NativeOps(Executor(library)), open_training(library))
    # Threads that choose at the same time all get the ops of the first: recordings listen to one executor.
    _Table.native, _Table.training = _Table.opened.setdefault(implementation, made)
    _Table.asked = implementation


def native() -> NativeOps | None:
    """The native ops, if they were chosen: for threads and recording."""
    return _Table.native


def implementations() -> dict[str, str]:
    """Which implementation runs for each op; that of cross_entropy_ also for the others where gradients are wanted."""
    name = "reference" if _Table.native is None else f"native ({_Table.native.executor.library.instruction_set})"
    told = dict.fromkeys(sorted(NATIVE), name) | dict.fromkeys(REFERENCE_ONLY, "reference")
    return told | {"cross_entropy_": "reference" if _Table.training is None else name}


def why_no_native() -> str | None:
    """The sentence for `doctor` where the native library cannot run; None where it can."""
    if _Table.native is not None:
        return None
    if find_library() is None:
        return "the native library was not built: install a C++ compiler and install qwenkit again (x86-64 Linux only)"
    if open_library() is None:
        return "the native library needs AVX2, which this processor does not have"
    return None


def _native_for(*tensors: torch.Tensor) -> NativeOps | None:
    chosen = _Table.native
    if chosen is None:
        return None
    for tensor in tensors:
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return None
        if tensor.requires_grad and torch.is_grad_enabled():
            return None
    return chosen


def _training_for(*tensors: torch.Tensor) -> TrainingOps | None:
    chosen = _Table.training
    if chosen is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    for tensor in tensors:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):  # sharded, or traced
            return None
        if tensor.dtype != torch.float32 or tensor.device.type not in ("cpu", "meta") or not tensor.is_contiguous():
            return None
    return chosen if any(tensor.requires_grad for tensor in tensors) and tensors[0].numel() else None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    chosen = _native_for(x, weight) or _training_for(x, weight)
    return reference.rms_norm(x, weight, eps) if chosen is None else chosen.rms_norm(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = _native_for(x, y, weight) or _training_for(x, y, weight)
    return reference.add_rms_norm(x, y, weight, eps) if chosen is None else chosen.add_rms_norm(x, y, weight, eps)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    chosen = _native_for(gate, up) or _training_for(gate, up)
    return reference.silu_mul(gate, up) if chosen is None else chosen.silu_mul(gate, up)


def add(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    chosen = _native_for(a, b)
    return reference.add(a, b) if chosen is None else chosen.add(a, b)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    chosen = _native_for(x, cos, sin) or _training_for(x, cos, sin)
    return reference.rotate(x, cos, sin) if chosen is None else chosen.rotate(x, cos, sin)


def cross_entropy_(logits: torch.Tensor, targets: torch.Tensor, *, gradient: bool) -> torch.Tensor:
    chosen = _Table.training
    plain = type(logits) is torch.Tensor and logits.dtype == torch.float32 and logits.device.type == "cpu"
    if chosen is None or not plain or not logits.is_contiguous() or torch.compiler.is_compiling():
        return reference.cross_entropy_(logits, targets, gradient=gradient)
    return chosen.cross_entropy_(logits, targets, gradient=gradient)


def embedding(ids: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    chosen = _native_for() if ids.device.type == "cpu" else None
    return reference.embedding(ids, weight) if chosen is None else chosen.embedding(ids, weight)


def packed_linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    chosen = _native_for(x)
    return reference.packed_linear(x, weight, bias) if chosen is None else chosen.packed_linear(x, weight, bias)


def penalize(
    logits: torch.Tensor, ids: torch.Tensor, counts: torch.Tensor, lengths: torch.Tensor, penalties: torch.Tensor
) -> None:
    chosen = _native_for(logits)
    implementation = reference if chosen is None else chosen
    implementation.penalize(logits, ids, counts, lengths, penalties)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    chosen = _native_for(logits)
    implementation = reference if chosen is None else chosen
    return implementation.sample(logits, temperature, top_k, top_p, min_p, uniform)


def write_cache(
    k: torch.Tensor, v: torch.Tensor, cache: KVCache, slots: torch.Tensor, places: torch.Tensor | None = None
) -> None:
    chosen = _native_for(k, v)
    if chosen is None or not chosen.can_cache(cache):
        reference.write_cache(k, v, cache, slots, places)
    else:
        chosen.write_cache(k, v, cache, slots, places)


def paged_attention(
    q: torch.Tensor,
    cache: KVCache,
    query_starts: torch.Tensor,
    context_lengths: torch.Tensor,
    block_tables: torch.Tensor,
    window: int | None = None,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    chosen = _native_for(q)
    if chosen is None or not chosen.can_cache(cache) or not chosen.can_attend(q, cache):
        return reference.paged_attention(q, cache, query_starts, context_lengths, block_tables, window, places)
    return chosen.paged_attention(q, cache, query_starts, context_lengths, block_tables, window, places)
