"""Rotary position embedding in the variants that Qwen checkpoints use, and Qwen-1's LogN query scaling.

In: positions (T,) and, for Qwen-1, a stretch `alpha` per token that the request's context decides.
Out: cos and sin (T, rotary_dim / 2) in fp32, computed once a forward pass and shared by all layers.
Sources: RoFormer (arXiv 2104.09864); linear interpolation (2306.15595); YaRN (2309.00071); dynamic NTK and LogN as the original
Qwen-1 code computes them (golden data in the tests).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qwenkit.errors import FieldError, shorten
from qwenkit.model.config_schema import ROPE, SOURCE, read_keys


@dataclass(frozen=True)
class RopeConfig:
    """Rotary settings. `factor`, `original_length` and the betas are read only by the types that use them.

    `dynamic_ntk_length` is the trained length of Qwen-1's per-request NTK stretch, None where it is off.
    """

    theta: float
    rotary_dim: int
    kind: str = "default"
    factor: float = 1.0
    original_length: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    dynamic_ntk_length: int | None = None

    @classmethod
    def from_keys(cls, keys: Mapping[str, Any], *, head_dim: int) -> RopeConfig:
        """Rotary settings from the checked keys of a config.json (`config_schema.read_keys`).

        `rope_parameters` (new files) and `rope_scaling` with `rope_theta` (older ones) are read as one object. Raises ValueError,
        naming the key, where they or the keys beside them contradict one another, and for a setting that the rope type lacks.
        """
        given = _merged(keys)
        kind = given["rope_type"] or "default"
        theta = float(_one_of(given, keys, "rope_theta") or 10000.0)
        original = _one_of(given, keys, "original_max_position_embeddings") or keys["max_position_embeddings"]
        where = "rope_scaling" if keys["rope_scaling"] else "rope_parameters"
        for name in _ONLY_FOR.get(kind, ()):
            if given[name] not in (None, *_NEUTRAL.get(name, ())):
                neutral = " or ".join(map(repr, ("null", *_NEUTRAL.get(name, ()))))
                raise FieldError(
                    f"{where}.{name}", given[name], f"{neutral}: rope type {kind!r} has none", source=SOURCE
                )
        if kind == "default":
            return cls(theta=theta, rotary_dim=head_dim)
        factor = given["factor"]
        if factor is None and kind == "yarn":
            factor = keys["max_position_embeddings"] / original
        if factor is None or factor < 1:
            raise FieldError(f"{where}.factor", factor, "a number of at least 1", source=SOURCE)
        return cls(
            theta=theta,
            rotary_dim=head_dim,
            kind=kind,
            factor=float(factor),
            original_length=original,
            beta_fast=float(given["beta_fast"] or 32.0),
            beta_slow=float(given["beta_slow"] or 1.0),
            attention_factor=_attention_factor(given, float(factor), where) if kind == "yarn" else 1.0,
            truncate=given["truncate"] is not False,
        )


# Settings that other rope types than the named one have, and the values with which they would change nothing.
_OF_YARN = ("attention_factor", "attn_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
_ONLY_FOR = {"default": ("factor", *_OF_YARN), "linear": _OF_YARN}
_NEUTRAL: dict[str, tuple[Any, ...]] = {"factor": (1,), "attention_factor": (1,), "attn_factor": (1,)}


def _merged(keys: Mapping[str, Any]) -> dict[str, Any]:
    """rope_parameters and rope_scaling as one: a model card says to add the latter, and the file may have the former already.

    A rope type other than default counts; everything else that both have must be equal.
    """
    merged: dict[str, Any] = dict.fromkeys(ROPE)
    for where in ("rope_parameters", "rope_scaling"):
        given = keys[where] or {}
        for name, value in given.items():
            if isinstance(value, Mapping):
                raise FieldError(
                    _key(where, name), value, "no object: all layers have the same rope settings", source=SOURCE
                )
        spellings = {each for name, key in ROPE.items() for each in (name, *key.aliases)}
        unknown = [name for name, value in given.items() if name not in spellings and value is not None]
        if unknown:
            known = f"null: known are {', '.join(sorted(spellings))}"
            raise FieldError(_key(where, unknown[0]), given[unknown[0]], known, source=SOURCE)
        for name, value in read_keys(given, ROPE, prefix=f"{where}.").items():
            before = merged[name]
            weak = ("default",) if name == "rope_type" else ()
            if before in (None, *weak):
                merged[name] = before if value is None else value
            elif value not in (None, before, *weak):
                raise FieldError(
                    f"{where}.{name}", value, f"only {before!r}, which rope_parameters.{name} says", source=SOURCE
                )
    return merged


def _key(where: str, name: object) -> str:
    is_word = isinstance(name, str) and name.isidentifier() and len(name) < 80
    return f"{where}.{name if is_word else shorten(name)}"


def _one_of(given: Mapping[str, Any], keys: Mapping[str, Any], name: str) -> Any:
    """A setting that stands in the rope object, beside it, or in both with one value."""
    inside, beside = given[name], keys[name]
    if inside is not None and beside is not None and inside != beside:
        raise FieldError(name, beside, f"only {inside!r}, which the rope settings say", source=SOURCE)
    return beside if inside is None else inside


def _attention_factor(given: Mapping[str, Any], factor: float, where: str) -> float:
    """YaRN's temperature on the attention logits, folded into cos and sin (2309.00071, section 3.4).

    `attention_factor` replaces it; `attn_factor` (vLLM's and llama.cpp's) multiplies it.
    """
    if given["attention_factor"] is not None:
        if given["attn_factor"] is not None:
            raise FieldError(
                f"{where}.attn_factor", given["attn_factor"], "null beside attention_factor", source=SOURCE
            )
        return float(given["attention_factor"])

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    above, below = given["mscale"], given["mscale_all_dim"]
    temperature = mscale(above) / mscale(below) if above and below else mscale(1.0)
    return temperature * float(given["attn_factor"] or 1.0)


def inverse_frequencies(config: RopeConfig, device: torch.device) -> torch.Tensor:
    """Angle per position of each rotated pair: (rotary_dim / 2,) fp32."""
    dim = config.rotary_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    plain = 1.0 / (config.theta**exponents)
    if config.kind == "default":
        return plain
    if config.kind == "linear":
        return plain / config.factor

    def pair_with(rotations: float) -> float:  # the (fractional) pair that turns so often over the trained length
        return dim * math.log(config.original_length / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = pair_with(config.beta_fast), pair_with(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / ((high - low) or 0.001)
    interpolated = ramp.clamp(0, 1)
    return plain / config.factor * interpolated + plain * (1 - interpolated)


def cos_sin(
    config: RopeConfig, positions: torch.Tensor, alpha: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin of every token's angles, each (T, rotary_dim / 2) fp32.

    `alpha` (T,) fp32 stretches the base by alpha^(r / (r - 2)) for each token: Qwen-1's dynamic NTK.
    """
    if alpha is None:
        angles = positions.float()[:, None] * inverse_frequencies(config, positions.device)
    else:
        dim = config.rotary_dim
        base = config.theta * alpha ** (dim / (dim - 2))
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
        angles = positions.float()[:, None] / base[:, None] ** exponents
    return angles.cos() * config.attention_factor, angles.sin() * config.attention_factor


def ntk_alpha(length: int, trained_length: int) -> float:
    """Qwen-1's stretch for a prompt of `length` tokens: 1 up to the trained length, then 3 up to twice, 7 up to four times, …

    It is chosen once, from the prompt, and kept while the answer grows.
    """
    return max(2 ** math.ceil(math.log2(length / trained_length) + 1) - 1, 1)


def logn_scale(positions: torch.Tensor, trained_length: int) -> torch.Tensor:
    """Qwen-1's query scale (T,) fp32: log of the position in base `trained_length` beyond that length, 1 before."""
    count = (positions + 1).float()
    return torch.where(count > trained_length, count.log() / math.log(trained_length), 1.0)
