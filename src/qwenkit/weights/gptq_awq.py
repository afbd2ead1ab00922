"""Matrices that GPTQ or AWQ stored as whole numbers. In: a folder's tensors and its quantization_config. Out: the same list with
each `qweight`, `qzeros`, `scales` (and `g_idx`) become one `weight`, (out, in), that reads as fp32 or, raw, as codes.

w = scale * (q - zero), with one scale and zero point for each output and group of inputs. Layouts: AutoGPTQ's and GPTQModel's
QuantLinear, AutoAWQ's WQLinear_GEMM. Raw rows of "CODES4G128" are runs of 128 inputs: the scale (fp16), the zero point (int16),
and a byte for each code; of "CODES4G128S" the same with every zero point in the middle.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwenkit.errors import FieldError, shorten
from qwenkit.files import has_file, read_json
from qwenkit.weights.safetensors_files import has_safetensors
from qwenkit.weights.stored import Bytes, StoredTensor

logger = logging.getLogger(__name__)

METHODS = ("gptq", "awq")
AUTO_ROUND = "auto-round"
BITS = (4, 8)
RUNS = (128, 64, 32)  # inputs that packed weights can give one scale

_LARGEST_GROUP = 2**24
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_AUTO_ROUND_PACKINGS = {
    f"{prefix}{ours}{method}": method for prefix in ("auto_round:", "") for ours in ("auto_", "") for method in METHODS
}
_FORMATS = {"gptq": 1, "gptq_v2": 0}  # how much too small a zero point is stored
# AWQ writes the 8 columns of a word in the order 0 2 4 6 1 3 5 7; column c is nibble _AWQ_NIBBLE[c].
_AWQ_NIBBLE = [0, 4, 1, 5, 2, 6, 3, 7]


@dataclass(frozen=True)
class Quantization:
    """What a checkpoint says of its quantization. `group_size` -1: all inputs; `missing`: what its zero points are short of;
    `base`: the name of its files before .safetensors."""

    method: str
    bits: int
    group_size: int
    missing: int = 0
    mixed: bool = False  # single matrices may have other bits and groups than these
    base: str = "model"

    @classmethod
    def of(cls, folder: Path, config: Mapping[str, Any]) -> Quantization | None:
        """From config.json's quantization_config, else quantize_config.json; None for a checkpoint that is not quantized.

        Raises ValueError for a method, a format or bits that cannot be read.
        """
        where = "config.json: quantization_config"
        given = config.get("quantization_config")
        if given is None and has_file(folder / "quantize_config.json"):
            where, given = (
                "quantize_config.json:",
                {"quant_method": "gptq"} | read_json(folder / "quantize_config.json"),
            )
        if given is None:
            return None
        where = f"{folder}/{where}"
        if not isinstance(given, dict):
            raise ValueError(f"{where} must be an object, found {shorten(given)}")
        method = given.get("quant_method", given.get("method"))
        if method == AUTO_ROUND:
            method = _packing_of_auto_round(where, given)
        if not isinstance(method, str) or method not in METHODS:
            raise FieldError("quant_method", method, " or ".join((*METHODS, AUTO_ROUND)), source=where)
        bits = _number(where, given, ("bits", "w_bit", "wbits"), 4)
        group_size = _number(where, given, ("group_size", "q_group_size"), 128)
        allowed = BITS if method == "gptq" else (4,)
        if bits not in allowed:
            raise ValueError(
                f"{where}.bits is {shorten(bits)}, allowed are {' and '.join(map(str, allowed))} ({method})"
            )
        if group_size != -1 and not 1 <= group_size <= _LARGEST_GROUP:
            raise ValueError(
                f"{where}.group_size is {shorten(group_size)}, allowed are -1 and whole numbers of at least 1"
            )
        if method == "awq":
            version = given.get("version", "gemm")
            if not isinstance(version, str) or version.lower() != "gemm":
                raise ValueError(f"{where}.version is {shorten(version)}, allowed is 'gemm'")
            return cls(method, bits, group_size, base=_base(folder, where, given, bits, group_size))
        stored_as = "marlin" if given.get("is_marlin_format") else given.get("checkpoint_format", given.get("format"))
        stored_as = "gptq" if stored_as is None else stored_as
        if not isinstance(stored_as, str) or stored_as not in _FORMATS:
            raise ValueError(f"{where}.checkpoint_format is {shorten(stored_as)}, allowed are {', '.join(_FORMATS)}")
        base = _base(folder, where, given, bits, group_size)
        return cls(
            method,
            bits,
            group_size,
            _FORMATS[stored_as],
            mixed=bool(given.get("dynamic") or given.get("extra_config")),
            base=base,
        )


def _packing_of_auto_round(where: str, given: Mapping[str, Any]) -> str:
    """gptq or awq: AutoRound finds other codes, and packs them as one of the two. Its own third packing is not read."""
    if given.get("data_type", "int") != "int":
        raise FieldError("data_type", given["data_type"], "'int'", source=where)
    packing = given.get("packing_format", given.get("backend"))
    found = _AUTO_ROUND_PACKINGS.get(packing) if isinstance(packing, str) else None
    if found is None:
        raise FieldError("packing_format", packing, " or ".join(map(repr, _AUTO_ROUND_PACKINGS)), source=where)
    return found


def _base(folder: Path, where: str, given: Mapping[str, Any], bits: int, group_size: int) -> str:
    """The files that are there: model, what the configuration calls them, or AutoGPTQ's own name for them."""
    named = given.get("model_file_base_name")
    if named is not None and (not isinstance(named, str) or named in ("", ".", "..") or set(named) & set("/\\\0")):
        raise ValueError(f"{where}.model_file_base_name is {shorten(named)}, which is no plain file name")
    candidates = ("model", named, f"gptq_model-{bits}bit-{group_size}g")
    return next((base for base in candidates if base and has_safetensors(folder, base)), "model")


def _number(where: str, given: Mapping[str, Any], names: tuple[str, ...], default: int) -> int:
    name = next((name for name in names if given.get(name) is not None), names[0])
    value = given.get(name, default)
    if type(value) is not int:
        raise ValueError(f"{where}.{name} is {shorten(value)}, a whole number is needed")
    return value


def with_weights(folder: Path, tensors: list[StoredTensor], quantization: Quantization) -> list[StoredTensor]:
    """The tensors with every quantized matrix as one `weight`.

    Reads what decides how a matrix can be packed: its groups and zero points, about a hundredth of the whole.
    Raises ValueError for parts that are missing, misshapen or out of range.
    """
    by_module: dict[str, dict[str, StoredTensor]] = {}
    found: list[StoredTensor] = []
    for tensor in tensors:
        module, _, part = tensor.name.rpartition(".")
        if part in _PARTS:
            by_module.setdefault(module, {})[part] = tensor
        else:
            found.append(tensor)
    latest = _Latest()
    matrices = [_matrix(folder, module, parts, quantization, latest) for module, parts in by_module.items()]
    shuffled = [matrix.name for matrix in matrices if matrix.read_raw is None]
    if shuffled:
        logger.warning(
            "%s: %d quantized matrices (the first is %s) have groups that are no runs of inputs (desc_act), or scales that "
            "fp16 cannot hold: packed weights keep them in 16 bits",
            *(folder, len(shuffled), shuffled[0]),
        )
    return found + matrices


@dataclass(frozen=True)
class _Read:
    """A matrix in memory: `words` int32 as stored, scales (groups, out), zeros (groups, out) int16, group_of (in,) int64."""

    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    group_of: torch.Tensor


class _Latest:
    """The matrix read last. Its words lie by input, and are wanted a few outputs at a time: they are read once for all."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._read: _Read | None = None

    def get(self, name: str, read: Callable[[], _Read]) -> _Read:
        if self._name != name or self._read is None:
            self._read = None  # before the next is read, so that there are never two
            self._name, self._read = name, read()
        return self._read


def _matrix(
    folder: Path, module: str, parts: Mapping[str, StoredTensor], quantization: Quantization, latest: _Latest
) -> StoredTensor:
    where = f"{folder}: tensor {module}"
    for part in _PARTS[:3]:
        if part not in parts:
            raise ValueError(f"{where}.{part} is missing, but {module}.{next(iter(parts))} is there")
    awq = quantization.method == "awq"
    words, qzeros, scales = (parts[part] for part in _PARTS[:3])
    for tensor in parts.values():
        wanted = (
            ("F16", "BF16", "F32") if tensor is scales else ("I32", "I64") if tensor is parts.get("g_idx") else ("I32",)
        )
        dims = 1 if tensor is parts.get("g_idx") else 2
        if tensor.dtype not in wanted or len(tensor.shape) != dims or 0 in tensor.shape:
            raise ValueError(
                f"{folder}: tensor {tensor.name} is {tensor.dtype} of shape {list(tensor.shape)}, "
                f"allowed is {' or '.join(wanted)} of {dims} dimensions"
            )
    groups, outputs = scales.shape
    bits = 32 * qzeros.shape[1] // outputs if quantization.mixed else quantization.bits
    per_word = 32 // bits if bits in BITS else 0
    inputs = words.shape[0] * (1 if awq else per_word)
    if (
        not per_word
        or qzeros.shape != (groups, outputs // per_word)
        or outputs % per_word
        or words.shape[1] * (per_word if awq else 1) != outputs
        or ("g_idx" in parts and parts["g_idx"].shape != (inputs,))
    ):
        shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in parts.items())
        raise ValueError(f"{where} has parts that do not fit {quantization.bits} bits: {shapes}")

    def group_of() -> torch.Tensor:
        if "g_idx" in parts and not awq:
            index = parts["g_idx"].load().long()
        else:
            size = inputs if quantization.group_size == -1 else quantization.group_size
            index = torch.arange(inputs) // size
        if int(index.min()) < 0 or int(index.max()) >= groups:
            raise ValueError(f"{where} has {groups} groups, but its inputs name groups {index.min()} to {index.max()}")
        return index

    def zeros() -> torch.Tensor:
        columns = _by_column(qzeros.load(), bits, awq)
        return torch.from_numpy((columns + np.uint8(quantization.missing)) & np.uint8(2**bits - 1)).to(torch.int16)

    def whole() -> _Read:
        return latest.get(module, lambda: _Read(words.load(), scales.load(), zeros(), group_of()))

    def codes(held: _Read, start: int, stop: int) -> torch.Tensor:
        if not awq:
            return torch.from_numpy(_by_input(held.words[:, start:stop].contiguous(), bits))
        first = start // per_word
        columns = _by_column(held.words[:, first : -(-stop // per_word)].contiguous(), bits, awq)
        return torch.from_numpy(columns[:, start - first * per_word :][:, : stop - start].T)

    def dequantized(start: int, stop: int) -> torch.Tensor:
        held = whole()
        zero, scale = (values[:, start:stop].T.float()[:, held.group_of] for values in (held.zeros, held.scales))
        return (codes(held, start, stop) - zero) * scale

    run = next((run for run in RUNS if inputs % run == 0 and _constant(group_of().unflatten(0, (-1, run)))), 0)
    symmetric = bool((zeros() == 1 << (bits - 1)).all())
    name, shape = f"{module}.weight", (outputs, inputs)
    if not run or not _fits_fp16(scales):
        return StoredTensor(name, shape, f"CODES{bits}", dequantized)

    def raw(start: int, stop: int) -> Bytes:
        held = whole()
        first = held.group_of[::run]  # the group of each run
        blocks = np.empty((stop - start, inputs // run, 4 + run), dtype=np.uint8)
        blocks[..., :2] = _bytes(held.scales[:, start:stop].T[:, first].to(torch.float16))
        blocks[..., 2:4] = _bytes(held.zeros[:, start:stop].T[:, first])
        blocks[..., 4:] = codes(held, start, stop).unflatten(1, (-1, run)).numpy()
        return blocks.reshape(stop - start, -1)

    kind = f"CODES{bits}G{run}{'S' if symmetric else ''}"
    return replace(StoredTensor(name, shape, kind, dequantized), read_raw=raw)


def _by_input(words: torch.Tensor, bits: int) -> Bytes:
    """int32 words (in / per word, n), each of consecutive inputs, low bits first -> codes (n, in)."""
    split = words.numpy().view(np.uint8).reshape(*words.shape, 4)  # little-endian: the first byte has the lowest bits
    if bits == 4:
        split = np.stack((split & 15, split >> 4), axis=-1)
    return split.swapaxes(0, 1).reshape(words.shape[1], -1)


def _by_column(words: torch.Tensor, bits: int, awq: bool) -> Bytes:
    """int32 words (n, out / per word), each of consecutive outputs -> codes (n, out)."""
    split = words.numpy().view(np.uint8).reshape(*words.shape, 4)
    if bits == 4:
        split = np.stack((split & 15, split >> 4), axis=-1).reshape(*words.shape, 8)
    if awq:
        split = split[..., _AWQ_NIBBLE]
    return split.reshape(words.shape[0], -1)


def _constant(runs: torch.Tensor) -> bool:
    return bool((runs == runs[:, :1]).all())


def _fits_fp16(scales: StoredTensor) -> bool:
    if scales.dtype == "F16":
        return True
    values = scales.load().float()
    return torch.equal(values.to(torch.float16).float(), values)


def _bytes(values: torch.Tensor) -> Bytes:
    """Two-byte values (rows, runs) -> (rows, runs, 2)."""
    return values.contiguous().numpy().view(np.uint8).reshape(*values.shape, 2)
