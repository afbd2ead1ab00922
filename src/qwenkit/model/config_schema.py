"""The keys of config.json for every family: type, range and default of each, and which others would change the arithmetic.

In: the dictionary of a config.json. Out: the same keys checked, under one spelling, with the family's defaults. A default is
that of the family's own configuration class in transformers (for Qwen-1: of configuration_qwen.py).
Keys that no family here knows are left alone unless a model with them computes something else: those are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from qwenkit.errors import FieldError, shorten

SOURCE = "config"
LARGEST_SIZE = 2**24  # no dimension of any model comes near; a hostile file must not make us count to it
MAX_LAYERS = 4096
MAX_EXPERTS = 2**16
DTYPES = ("float32", "float16", "bfloat16")
LAYER_TYPES = ("full_attention", "sliding_attention")


class Kind(Protocol):
    """What may stand at a key."""

    @property
    def words(self) -> str:
        """In words, as part of an error sentence."""

    def accepts(self, value: Any) -> bool:
        """True if the value has the type and lies in the range."""


@dataclass(frozen=True)
class Whole:
    """A whole number from `low` to `high`."""

    low: int = 1
    high: int = LARGEST_SIZE

    @property
    def words(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    def accepts(self, value: Any) -> bool:
        return type(value) is int and self.low <= value <= self.high


@dataclass(frozen=True)
class Number:
    """A finite number from `low` to `high`, both included."""

    low: float
    high: float

    @property
    def words(self) -> str:
        return f"{self.low:g}" if self.low == self.high else f"a number from {self.low:g} to {self.high:g}"

    def accepts(self, value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(_float(value)) and self.low <= value <= self.high


@dataclass(frozen=True)
class Truth:
    """true or false; neither a text nor a number is a truth value."""

    words = "true or false"

    def accepts(self, value: Any) -> bool:
        return type(value) is bool


@dataclass(frozen=True)
class Choice:
    """One of some texts, `prefix` before it or not."""

    values: tuple[str, ...]
    prefix: str = ""

    @property
    def words(self) -> str:
        return ", ".join(map(repr, self.values[:-1])) + f" or {self.values[-1]!r}"

    def accepts(self, value: Any) -> bool:
        return type(value) is str and value.removeprefix(self.prefix) in self.values


@dataclass(frozen=True)
class ListOf:
    """A list whose items are all of one kind."""

    item: Kind

    @property
    def words(self) -> str:
        return f"a list, each item {self.item.words}"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, list | tuple) and all(map(self.item.accepts, value))


@dataclass(frozen=True)
class AnyObject:
    """A JSON object; its keys are checked by whoever reads it."""

    words = "an object"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, Mapping)


@dataclass(frozen=True)
class Key:
    """A key of a file: what may stand there, what a missing one means, other spellings. A required one has no default.

    null is the same as missing where the default is None or the key is `nullable`; elsewhere it is refused.
    """

    kind: Kind
    default: Any = None
    aliases: tuple[str, ...] = ()
    required: bool = False
    nullable: bool = False


Schema = Mapping[str, Key]


def read_keys(given: Mapping[str, Any], schema: Schema, source: str = SOURCE, prefix: str = "") -> dict[str, Any]:
    """The value of every key of `schema`: what the file says, else the default. Keys that the schema lacks are not looked at.

    `prefix` goes before a key in errors ("rope_scaling."). Raises FieldError for a value that the key does not allow, for two
    spellings of a key with different values, and for a required key that is missing.
    """
    values: dict[str, Any] = {}
    for name, key in schema.items():
        nullable = key.nullable or key.default is None
        found = [(n, given[n]) for n in (name, *key.aliases) if n in given and not (nullable and given[n] is None)]
        for spelling, value in found:
            if not key.kind.accepts(value):
                raise FieldError(prefix + spelling, value, key.kind.words, source=source)
            if value != found[0][1]:
                raise FieldError(
                    prefix + spelling,
                    value,
                    f"only {shorten(found[0][1])}, which {prefix}{found[0][0]} says: the two mean the same",
                    source=source,
                )
        if not found and key.required:
            raise ValueError(f"{source}: {prefix}{name} is missing, {key.kind.words} is needed")
        values[name] = found[0][1] if found else key.default
    return values


def refuse_foreign_keys(config: Mapping[str, Any], model_type: str) -> None:
    """Raise FieldError for a key, unknown to the family, with a value that stands for other arithmetic."""
    neutral_values = _FOREIGN | (_FOREIGN_TO_QWEN3 if model_type.startswith("qwen3") else {})
    for name, neutral in neutral_values.items():
        value = config.get(name)
        if name in FAMILIES[model_type] or value is None or value in neutral:
            continue
        allowed = " or ".join(("null", *map(repr, neutral)))
        raise FieldError(name, value, f"{allowed}: a model of type {model_type} has nothing of the kind", source=SOURCE)


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


_SIZE = Whole()
_THETA = Number(1.0001, 1e18)  # YaRN divides by its logarithm
_EPS = Number(1e-30, 1.0)  # in fp32 a smaller one is as good as none, and a vector of zeros would become NaN
_DTYPE = Choice((*DTYPES, "auto"), prefix="torch.")
_LENGTH = Whole(1)

_ANY_FAMILY: dict[str, Key] = {
    "vocab_size": Key(_SIZE, required=True),
    "hidden_size": Key(_SIZE, required=True),
    "num_hidden_layers": Key(Whole(1, MAX_LAYERS), required=True),
    "num_attention_heads": Key(_SIZE, required=True),
    "intermediate_size": Key(_SIZE, required=True),
    "tie_word_embeddings": Key(Truth(), False),
    "dtype": Key(_DTYPE),
    "torch_dtype": Key(_DTYPE),
}

# What Qwen2 and later share with Llama. `head_dim` None: hidden_size / num_attention_heads.
_MODERN: dict[str, Key] = _ANY_FAMILY | {
    "num_key_value_heads": Key(_SIZE, nullable=True),
    "head_dim": Key(_SIZE, nullable=True),
    "hidden_act": Key(Choice(("silu", "swish")), "silu"),
    "max_position_embeddings": Key(_LENGTH, 32768),
    "rms_norm_eps": Key(_EPS, 1e-6),
    "attention_bias": Key(Truth(), False),
    "mlp_bias": Key(Truth(), False),
    "qkv_bias": Key(Truth(), True),
    "rope_theta": Key(_THETA),
    "partial_rotary_factor": Key(Number(1.0, 1.0)),
    "original_max_position_embeddings": Key(_LENGTH),
    "rope_parameters": Key(AnyObject()),
    "rope_scaling": Key(AnyObject()),
    "use_sliding_window": Key(Truth(), False),
    "sliding_window": Key(Whole(0)),
    "max_window_layers": Key(Whole(0), 28),
    "layer_types": Key(ListOf(Choice(LAYER_TYPES))),
}

_MOE: dict[str, Key] = _MODERN | {
    "num_experts": Key(Whole(1, MAX_EXPERTS), aliases=("num_local_experts",)),
    "num_experts_per_tok": Key(Whole(1, MAX_EXPERTS)),
    "moe_intermediate_size": Key(_SIZE),
    "shared_expert_intermediate_size": Key(_SIZE, 5632),
    "decoder_sparse_step": Key(Whole(1), 1),
    "mlp_only_layers": Key(ListOf(Whole(0)), (), nullable=True),
    "norm_topk_prob": Key(Truth(), False),
}

_QWEN1: dict[str, Key] = _ANY_FAMILY | {
    "hidden_size": Key(_SIZE, aliases=("n_embd",), required=True),
    "num_hidden_layers": Key(Whole(1, MAX_LAYERS), aliases=("n_layer",), required=True),
    "num_attention_heads": Key(_SIZE, aliases=("n_head",), required=True),
    "intermediate_size": Key(Whole(2), aliases=("ffn_hidden_size",), required=True),
    "kv_channels": Key(_SIZE, 128),
    "seq_length": Key(Whole(2)),  # LogN divides by its logarithm
    "n_positions": Key(Whole(2)),
    "max_position_embeddings": Key(Whole(2)),
    "rotary_emb_base": Key(_THETA, 10000.0),
    "rotary_pct": Key(Number(1e-4, 1.0), 1.0),
    "use_dynamic_ntk": Key(Truth(), True),
    "use_logn_attn": Key(Truth(), True),
    "layer_norm_epsilon": Key(_EPS, 1e-6),
    "no_bias": Key(Truth(), True),
    "bf16": Key(Truth(), False),
    "fp16": Key(Truth(), False),
    "fp32": Key(Truth(), False),
}


def _with_defaults(schema: dict[str, Key], **defaults: Any) -> dict[str, Key]:
    return schema | {name: replace(schema[name], default=default) for name, default in defaults.items()}


FAMILIES: dict[str, dict[str, Key]] = {
    "qwen": _QWEN1,
    "qwen2": _with_defaults(_MODERN, num_key_value_heads=32),
    "qwen3": _with_defaults(_MODERN, num_key_value_heads=32, head_dim=128),
    "llama": _with_defaults(_MODERN, max_position_embeddings=2048),
    "qwen2_moe": _with_defaults(
        _MOE, num_key_value_heads=16, num_experts=60, num_experts_per_tok=4, moe_intermediate_size=1408
    ),
    "qwen3_moe": _with_defaults(
        _MOE, num_key_value_heads=4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768
    ),
}

_POSITIVE = Number(1e-6, 1000.0)
_OR_ZERO = Number(0.0, 1000.0)

# rope_parameters (transformers 5) and rope_scaling (before). A zero is YaRN's default, as in transformers.
ROPE: dict[str, Key] = {
    "rope_type": Key(Choice(("default", "linear", "yarn")), aliases=("type",)),
    "rope_theta": Key(_THETA),
    "partial_rotary_factor": Key(Number(1.0, 1.0)),
    "factor": Key(Number(1.0, 1e6)),
    "original_max_position_embeddings": Key(_LENGTH),
    "attention_factor": Key(_POSITIVE),
    "attn_factor": Key(_POSITIVE),
    "beta_fast": Key(_OR_ZERO),
    "beta_slow": Key(_OR_ZERO),
    "mscale": Key(_OR_ZERO),
    "mscale_all_dim": Key(_OR_ZERO),
    "truncate": Key(Truth()),
    "extrapolation_factor": Key(Number(1.0, 1.0)),
    "finetuned": Key(Truth()),  # a note of who made the model
}

# Keys of other architectures that change what a layer computes, with the values (besides null) that change nothing.
_FOREIGN: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "attention_scale": (),
    "attn_temperature_tuning": (False,),
    "clip_qkv": (),
    "scale_embeddings": (False,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "use_qk_norm": (False,),
    "qk_norm": (False,),
    "qk_layernorm": (False,),
    "attn_output_gate": (False,),
    "attention_sink": (False,),
    "alibi": (False,),
    "is_causal": (True,),
    "no_rope_layers": ([],),
    "attention_chunk_size": (),
    "full_attention_interval": (1,),
    "linear_num_value_heads": (),
    "hidden_activation": ("silu", "swish"),
    "activation": ("swiglu", "silu", "swish"),
    "swiglu_limit": (),
    "norm_type": ("rms_norm", "rmsnorm"),
    "position_embedding_type": ("rope", "rotary"),
    "pos_emb": ("rotary",),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "rotary_pct": (1,),
    "rope_interleave": (False,),
    "rope_interleaved": (False,),
    "rope_local_base_freq": (),
    "routed_scaling_factor": (1,),
    "scoring_func": ("softmax",),
    "n_group": (1,),
    "topk_group": (1,),
    "n_shared_experts": (0,),
    "first_k_dense_replace": (0,),
}
_FOREIGN_TO_QWEN3: dict[str, tuple[Any, ...]] = {"use_qk_norm": (True,), "qk_norm": (True,), "qk_layernorm": (True,)}
