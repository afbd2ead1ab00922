"""What a token may attend to is its context's business, not the model's.

The model hands q, k, v of one layer to `attend` and gets the attended values back. `Packed` (documents end to end, no cache)
serves scoring, calibration and training; the engine has its own context over a paged cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from qwenkit import ops
from qwenkit.model.config import ModelConfig
from qwenkit.model.rope import ntk_alpha


class Context(Protocol):
    """The one seam between the model and whoever runs it.

    `rope_alpha` (T,) fp32 is the rotary stretch of each token's request (Qwen-1's dynamic NTK), None where there is none: it
    depends on the length of the whole prompt, which only the context knows.
    """

    @property
    def rope_alpha(self) -> torch.Tensor | None: ...

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, window: int | None
    ) -> torch.Tensor:
        """q (T, H, D), k and v (T, K, D) of this step's tokens -> (T, H, D)."""
        ...


@dataclass(frozen=True)
class Packed:
    """Several documents end to end; each token sees the earlier tokens of its own document."""

    lengths: tuple[int, ...]
    rope_alpha: torch.Tensor | None = None

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, window: int | None
    ) -> torch.Tensor:
        return ops.packed_attention(q, k, v, self.lengths, window)


def pack(
    documents: Sequence[Sequence[int]], config: ModelConfig, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, Packed]:
    """Lay documents of token ids end to end: (ids (T,), positions (T,), their context)."""
    lengths = tuple(len(document) for document in documents)
    ids = torch.tensor([token for document in documents for token in document], device=device)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    alpha = None
    if config.rope.dynamic_ntk_length is not None:
        alphas = torch.tensor([ntk_alpha(length, config.rope.dynamic_ntk_length) for length in lengths], device=device)
        alpha = alphas.float().repeat_interleave(torch.tensor(lengths, device=device))
    return ids, positions, Packed(lengths, alpha)
