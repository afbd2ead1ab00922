"""Hidden states of the calibration text on their way through one block after the other. In: documents, and blocks as they are
loaded. Out: what chosen Linears of a block read, chunk by chunk, and the hidden states after it.

A block is run once for each stage of quantizing it, each time with the weights that it has by then. What no longer changes is
kept: the output of attention once its weights are final, and the inner activations of a plain MLP. So only one block is in
memory, beside the hidden states and what is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qwenkit.model.config import ModelConfig
from qwenkit.model.context import Packed, pack
from qwenkit.model.layers import MLP
from qwenkit.model.positions import Positions
from qwenkit.model.qwen import Block

CHUNK_TOKENS = 4096  # run at once
KEPT_BYTES = 3 << 29  # of an MLP's inner activations; beyond it they are computed a second time


@dataclass(frozen=True)
class _Chunk:
    start: int
    stop: int
    positions: Positions
    ctx: Packed


class Stream:
    """`hidden` (T, hidden_size) fp32 of all documents, end to end."""

    def __init__(
        self, config: ModelConfig, documents: Sequence[Sequence[int]], embedding: torch.Tensor, device: torch.device
    ) -> None:
        """`embedding` (vocab, hidden_size) is only looked up."""
        chunks: list[list[Sequence[int]]] = []
        tokens = CHUNK_TOKENS
        for document in documents:
            if tokens + len(document) > CHUNK_TOKENS:
                chunks.append([])
                tokens = 0
            chunks[-1].append(document)
            tokens += len(document)
        self.chunks: list[_Chunk] = []
        rows = []
        for chunk in chunks:
            ids, positions, ctx = pack(chunk, config)
            start = self.chunks[-1].stop if self.chunks else 0
            alpha = None if ctx.rope_alpha is None else ctx.rope_alpha.to(device)
            angles = Positions.of(config, positions.to(device), alpha)
            self.chunks.append(_Chunk(start, start + ids.shape[0], angles, Packed(ctx.lengths, alpha)))
            rows.append(embedding[ids].float().to(device))
        self.hidden = torch.cat(rows)

    def copy(self) -> Stream:
        """The same documents with hidden states of their own."""
        other = object.__new__(Stream)
        other.chunks, other.hidden = self.chunks, self.hidden.clone()
        return other


class BlockRun:
    """One block over one stream: `inputs` any number of times, then `finish`."""

    def __init__(self, stream: Stream, block: Block) -> None:
        self._stream = stream
        self._block = block
        self.chunk = 0  # the one that is run
        self._attention: _KeptOutput | None = None
        self._mlp: _KeptInner | None = None

    def keep_attention(self) -> None:
        """From now on the weights of attention are final: it runs once more."""
        self._attention = _KeptOutput(self._block.self_attn, self)
        self._block.self_attn = self._attention  # type: ignore[assignment]

    def keep_inner(self) -> None:
        """From now on those of gate and up are. (Experts are run again: tokens are scattered over them.)"""
        if isinstance(self._block.mlp, MLP):
            self._mlp = _KeptInner(self._block.mlp, self)
            self._block.mlp = self._mlp  # type: ignore[assignment]

    def inputs(self, linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, torch.Tensor]]:
        """For each chunk what the named Linears read, (tokens, in). One that no token reaches (an expert) is not in it."""
        seen: dict[str, torch.Tensor] = {}

        def tap(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                seen[name] = args[0]
                if self._mlp is not None:
                    self._mlp.keep(args[0])
                if len(linears) == 1:
                    raise _Enough

            return hook

        handles = [linear.register_forward_pre_hook(tap(name)) for name, linear in linears.items()]
        try:
            for number in range(len(self._stream.chunks)):
                seen.clear()
                with contextlib.suppress(_Enough):
                    self._run(number)
                yield dict(seen)
        finally:
            for handle in handles:
                handle.remove()

    def finish(self) -> None:
        """Move the stream's hidden states to behind the block, and leave the block as it came."""
        for number, chunk in enumerate(self._stream.chunks):
            self._stream.hidden[chunk.start : chunk.stop] = self._run(number)
        for name, kept in (("self_attn", self._attention), ("mlp", self._mlp)):
            if kept is not None:
                setattr(self._block, name, kept.inner)

    def _run(self, number: int) -> torch.Tensor:
        self.chunk = number
        chunk = self._stream.chunks[number]
        return self._block(self._stream.hidden[chunk.start : chunk.stop], chunk.positions, chunk.ctx)


class _Enough(Exception):  # noqa: N818
    """The last input that was wanted has been seen."""


class _KeptOutput(nn.Module):
    def __init__(self, inner: nn.Module, run: BlockRun) -> None:
        super().__init__()
        self.inner = inner
        self._run = run
        self._outputs: dict[int, torch.Tensor] = {}

    def forward(self, *args: Any) -> torch.Tensor:
        if self._run.chunk not in self._outputs:
            self._outputs[self._run.chunk] = self.inner(*args)
        return self._outputs[self._run.chunk]


class _KeptInner(nn.Module):
    def __init__(self, inner: MLP, run: BlockRun) -> None:
        super().__init__()
        self.inner = inner
        self._run = run
        self._kept: dict[int, torch.Tensor] = {}
        self._bytes = 0

    def keep(self, x: torch.Tensor) -> None:
        if self._bytes + x.nbytes <= KEPT_BYTES:
            self._bytes += x.nbytes
            self._kept[self._run.chunk] = x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = self._kept.pop(self._run.chunk, None)
        return self.inner(x) if kept is None else self.inner.down_proj(kept)
