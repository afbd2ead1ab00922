"""GPTQ's tensors. In: a quantized matrix. Out: qweight, qzeros, scales and g_idx as AutoGPTQ's QuantLinear stores them.

Codes are packed along inputs, zero points along outputs, low bits first. The first format stores zero points less one, each
field masked by itself, so that a zero point of 0 borrows nothing from its neighbours (readers add one and mask again).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qwenkit.quant.gptq import Quantized


def gptq_tensors(matrices: Sequence[Quantized], bits: int, *, v2: bool = False) -> dict[str, torch.Tensor]:
    """Matrices that read the same inputs, their outputs one after the other, as the parts of one Linear.

    qweight int32 (in * bits / 32, out), qzeros int32 (groups, out * bits / 32), scales fp16 (groups, out), g_idx int32 (in,).
    """
    codes, scales, zeros = (
        torch.cat([getattr(matrix, part) for matrix in matrices]).cpu() for part in ("codes", "scales", "zeros")
    )
    group_of = matrices[0].group_of.cpu()
    assert all(torch.equal(matrix.group_of.cpu(), group_of) for matrix in matrices)
    mask = 2**bits - 1
    stored_zeros = zeros.T.numpy().astype(np.int64) - (0 if v2 else 1) & mask
    return {
        "qweight": _words(codes.T.numpy(), bits),
        "qzeros": _words(np.ascontiguousarray(stored_zeros.T), bits).T.contiguous(),
        "scales": scales.T.contiguous(),
        "g_idx": group_of.to(torch.int32),
    }


def _words(values: np.ndarray, bits: int) -> torch.Tensor:
    """Values (n, m) below 2^bits -> int32 (n * bits / 32, m), each word of consecutive rows."""
    per_word = 32 // bits
    words = np.zeros((values.shape[0] // per_word, values.shape[1]), dtype=np.uint32)
    for place in range(per_word):
        words |= values[place::per_word].astype(np.uint32) << np.uint32(place * bits)
    return torch.from_numpy(words.view(np.int32))
