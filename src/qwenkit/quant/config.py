"""QuantConfig: everything a user may decide about quantizing a model. The flags of `qwenkit quantize` are generated from it.

In: values. Out: one frozen dataclass, checked field by field; what depends on the model (whether groups divide its widths) is
checked against its matrices by `fitted`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

METHODS = ("gptq", "rtn")
BITS = (4, 8)
GROUPS = (32, 64, 128, -1)
FORMATS = ("auto", "gptq", "gptq_v2")
NARROWEST = 32  # packed weights hold whole runs of so many inputs


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class QuantConfig:
    """How to quantize. Raises ValueError naming the field for a value that is not allowed."""

    method: str = _option("gptq", "gptq, or rtn (round to nearest: needs no calibration, loses more)")
    bits: int = _option(4, "bits a weight: 4 or 8")
    group_size: int | None = _option(
        None, "inputs that share a scale: 32, 64, 128, or -1 for all (default: the largest that divides all widths)"
    )
    short_groups: bool = _option(
        False, "let the last group of a row be shorter where group-size does not divide it (vLLM refuses such files)"
    )
    sym: bool = _option(True, "the same range on both sides of zero; without it a zero point for each group")
    desc_act: bool = _option(False, "quantize inputs by importance, groups mixed: slow in most kernels")
    static_groups: bool = _option(False, "scales fixed before the first rounding; with desc-act groups stay in order")
    group_aware: bool = _option(True, "quantize inputs by importance, groups kept whole: costs nothing later")
    mse: float = _option(
        2.0, "choose scales by the sum of |error|^mse, inputs that matter weighing more; 0 takes the range, as rtn does"
    )
    refine: int = _option(2, "rounds in which scales are fitted to codes, and codes chosen again; 0 is off")
    gptaq: bool = _option(False, "GPTAQ: also make up for what earlier layers lost (takes up to twice the time)")
    alpha: float = _option(0.25, "share of that loss which GPTAQ makes up for, 0 to 1")
    damp: float = _option(0.05, "added to the Hessian's diagonal, as a share of its mean; grows where it must")
    samples: int = _option(128, "calibration samples")
    length: int = _option(512, "tokens of a calibration sample, at most")
    seed: int = _option(0, "which samples are taken")
    format: str = _option(
        "auto",
        "layout of the files: gptq (zero points stored less one) or gptq_v2 (auto: gptq, which every reader knows; without sym "
        "gptq_v2, since GPTQModel refuses the other)",
    )
    device: str = _option("auto", "where to compute: auto, cpu, cuda, cuda:1")

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("bits", self.bits, BITS)
        if self.group_size is not None:
            _one_of("group_size", self.group_size, GROUPS)
        _one_of("format", self.format, FORMATS)
        for name, least in (("samples", 1), ("length", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, allowed are whole numbers of at least {least}")
        if not 0 <= self.refine <= 100:
            raise ValueError(f"refine is {self.refine}, allowed are whole numbers from 0 to 100")
        if not 0 < self.damp < 1:
            raise ValueError(f"damp is {self.damp}, allowed is more than 0 and less than 1")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}, allowed is 0 to 1")
        if self.mse and not 1 <= self.mse <= 8:
            raise ValueError(f"mse is {self.mse}, allowed are 0 (off) and 1 to 8")

    def fitted(self, shapes: Mapping[str, tuple[int, int]]) -> QuantConfig:
        """With a format, and a group size for these matrices, name -> (out, in).

        ValueError naming the first matrix that the layout cannot hold.
        """
        if self.format == "auto":
            return replace(self, format="gptq" if self.sym else "gptq_v2").fitted(shapes)
        per_word = 32 // self.bits
        for name, (outputs, inputs) in shapes.items():
            if inputs % NARROWEST or outputs % per_word:
                raise ValueError(
                    f"{name} has {inputs} inputs and {outputs} outputs; at {self.bits} bits inputs must be a multiple "
                    f"of {NARROWEST} and outputs of {per_word}"
                )
        if self.group_size is None:
            whole = (g for g in (128, 64, 32) if all(inputs % g == 0 for _, inputs in shapes.values()))
            return replace(self, group_size=next(whole))
        for name, (_, inputs) in shapes.items():
            if self.group_size > 0 and inputs % self.group_size and not self.short_groups:
                fitting = [str(g) for g in GROUPS if g < self.group_size and (g == -1 or inputs % g == 0)]
                raise ValueError(
                    f"group_size is {self.group_size}, but {name} has {inputs} inputs, which it does not divide: take "
                    f"{' or '.join(fitting)}, or --short-groups (files that qwenkit and GPTQModel read, vLLM does not)"
                )
        return self


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, allowed are {', '.join(map(str, allowed))}")
