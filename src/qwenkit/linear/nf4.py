"""NF4: a frozen Linear in 4 bits a weight, the base of QLoRA (arXiv 2305.14314).

In: a float matrix, whole or a few rows at a time. Out: codes of the 16 quantiles of a normal distribution, one absolute maximum
for each 64 inputs of a row; with double quantization those maxima take 8 bits too, with a mean and a step for each 256 of them:
4.13 bits a weight instead of 4.5. The matrix is dequantized for each use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qwenkit.linear.frozen import Place, frozen_linear

BLOCK = 64  # inputs that share an absolute maximum
GROUP = 256  # maxima that share a mean and a step
ROWS = 256  # rows quantized at once: their maxima fill whole groups, whatever the width

# Appendix E of the paper: each value stands for an equal share of a normal distribution, 0 and both ends are exact.
CODEBOOK = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class NF4Linear(nn.Module):
    """y = x W^T + bias with W in NF4. Its tensors are parameters that want no gradient, of plain types.

    codes (out, blocks * 32) uint8, two inputs a byte, the earlier in the low half; a row's last block is filled up with zeros.
    maxima (out, blocks): int8, with groups (ceil(out * blocks / 256), 2) fp32 of mean and step; or fp32, without groups.
    """

    def __init__(self, linear: nn.Linear, *, double_quantization: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.blocks = -(-self.in_features // BLOCK)
        rows, device = self.out_features, linear.weight.device
        kind = torch.int8 if double_quantization else torch.float32
        self.codes = _frozen(torch.empty(rows, self.blocks * BLOCK // 2, dtype=torch.uint8, device=device))
        self.maxima = _frozen(torch.empty(rows, self.blocks, dtype=kind, device=device))
        self.groups = None
        if double_quantization:
            self.groups = _frozen(torch.empty(-(-rows * self.blocks // GROUP), 2, device=device))
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)

    @classmethod
    def of(cls, linear: nn.Linear, *, double_quantization: bool = True) -> NF4Linear:
        """A Linear that has its values already, quantized."""
        made = cls(linear, double_quantization=double_quantization)
        made.take(linear.weight.detach())
        return made

    def fill(self, kind: str, stored: Any) -> None:
        """Take the checkpoint's weight, some rows at a time."""
        self.fill_part(kind, stored, _all)

    def fill_part(self, kind: str, stored: Any, place: Place) -> None:
        """The same where a process holds only some rows of each tensor: `place` gives what it holds and where that begins.

        Rows that nothing here comes from are not read.
        """
        assert kind == "weight"
        self._fill(stored.read, place)

    def take(self, weight: torch.Tensor) -> None:
        """Quantize a matrix (out, in)."""
        self._fill(lambda start, stop: weight[start:stop], _all)

    @torch.no_grad()
    def _fill(self, read: Callable[[int, int], torch.Tensor], place: Place) -> None:
        held = {name: place(tensor) for name, tensor in self.named_parameters(recurse=False) if name != "bias"}
        for start in range(0, self.out_features, ROWS):
            stop = min(start + ROWS, self.out_features)
            rows, groups = (start, stop), (start * self.blocks // GROUP, -(-stop * self.blocks // GROUP))
            wanted = []
            for name, (part, (first, *_)) in held.items():
                low, high = groups if name == "groups" else rows
                low, high = max(low, first), min(high, first + len(part))
                if low < high:
                    wanted.append(
                        (name, part[low - first : high - first], low - (groups if name == "groups" else rows)[0])
                    )
            if wanted:
                made = self._quantized(read(start, stop))
                for name, part, skipped in wanted:
                    part.copy_(made[name][skipped : skipped + len(part)])

    def _quantized(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Codes, maxima and groups of some rows."""
        made = {}
        wide = weight.to(self.codes.device, torch.float32)
        short = self.blocks * BLOCK - self.in_features
        blocks = (F.pad(wide, (0, short)) if short else wide).unflatten(1, (-1, BLOCK))
        made["maxima"] = maxima = blocks.abs().amax(-1)  # (rows, blocks)
        if self.groups is not None:
            quantized, groups = _quantize_maxima(maxima.flatten())
            made["groups"] = groups
            made["maxima"] = quantized.view(maxima.shape)
            # Codes are chosen for the maxima that will be read back, not for those that were.
            maxima = _dequantize_maxima(quantized, groups).view(maxima.shape)
        scaled = blocks / torch.where(maxima > 0, maxima, 1.0)[..., None]
        values = torch.tensor(CODEBOOK, device=scaled.device)
        codes = torch.bucketize(scaled, (values[1:] + values[:-1]) / 2).to(torch.uint8).flatten(1)
        made["codes"] = codes[:, ::2] | codes[:, 1::2] << 4
        return made

    @torch.no_grad()
    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix (out, in)."""
        if dtype.itemsize > 4:
            return self.dequantized().to(dtype)
        maxima = self.maxima if self.groups is None else _dequantize_maxima(self.maxima.flatten(), self.groups)
        values = _look_up(self.codes.detach(), dtype).view(self.out_features, self.blocks, BLOCK)
        weight = values.mul_(maxima.view(self.out_features, self.blocks, 1).to(dtype)).flatten(1)
        return weight if weight.shape[1] == self.in_features else weight[:, : self.in_features]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (T, in) -> (T, out)."""
        return frozen_linear(x, self.dequantized, self.bias)


def _all(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    return tensor.detach(), (0, 0)


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _quantize_maxima(maxima: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maxima (n,) as int8 (n,) and mean and step (groups, 2) of each 256.

    Steps are equal, where the paper's 8-bit floats have finer ones near the mean: over the narrow spread of maxima the largest
    error counts, and it is smaller so.
    """
    short = -maxima.shape[0] % GROUP
    grouped = (F.pad(maxima[None], (0, short), mode="replicate")[0] if short else maxima).view(-1, GROUP)
    mean = grouped.mean(1)
    step = (grouped - mean[:, None]).abs().amax(1) / 127
    codes = ((grouped - mean[:, None]) / torch.where(step > 0, step, 1.0)[:, None]).round().to(torch.int8)
    return codes.flatten()[: maxima.shape[0]], torch.stack((mean, step), 1)


def _dequantize_maxima(codes: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """The inverse of `_quantize_maxima`, (n,) fp32."""
    grouped = F.pad(codes.detach(), (0, -codes.shape[0] % GROUP)).view(-1, GROUP).float()
    return (grouped * groups[:, 1:] + groups[:, :1]).clamp_min_(0).flatten()[: codes.shape[0]]


def _look_up(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Both values of every byte, (bytes * 2,)."""
    table = _pairs(codes.device, dtype)
    # numpy takes by bytes twenty times as fast; of a copy, since fsdp frees what it has gathered
    if codes.device.type == "cpu":
        return torch.from_numpy(table.numpy().take(codes.flatten().clone().numpy())).view(dtype)
    return table.index_select(0, codes.flatten().int()).view(dtype)


@cache
def _pairs(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """What each of the 256 bytes stands for: two values of `dtype` seen as one integer of twice their width."""
    values = torch.tensor(CODEBOOK, dtype=dtype, device=device)
    byte = torch.arange(256, device=device)
    pairs = torch.stack((values[byte & 15], values[byte >> 4]), 1)
    return pairs.view({2: torch.int32, 4: torch.int64}[dtype.itemsize]).flatten()
