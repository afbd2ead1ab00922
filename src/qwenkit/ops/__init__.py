"""Arithmetic that has more than one implementation. Imports nothing of qwenkit outside this folder.

Callers write `ops.rms_norm(...)`; dispatch.py decides what runs, reference.py says what it means.
"""

from qwenkit.ops.dispatch import (
    IMPLEMENTATIONS,
    add,
    add_rms_norm,
    cross_entropy_,
    embedding,
    implementations,
    native,
    packed_linear,
    paged_attention,
    penalize,
    rms_norm,
    rotate,
    sample,
    silu_mul,
    use,
    why_no_native,
    write_cache,
)
from qwenkit.ops.reference import attention, packed_attention

__all__ = [
    "IMPLEMENTATIONS",
    "add",
    "add_rms_norm",
    "attention",
    "cross_entropy_",
    "embedding",
    "implementations",
    "native",
    "packed_attention",
    "packed_linear",
    "paged_attention",
    "penalize",
    "rms_norm",
    "rotate",
    "sample",
    "silu_mul",
    "use",
    "why_no_native",
    "write_cache",
]
