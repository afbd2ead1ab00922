"""ModelConfig: the sizes and switches of one Qwen, read from a checkpoint's config.json.

In: the dictionary of config.json of any supported `model_type` (old and new spellings of the same key).
Out: one frozen dataclass that the model, the loader and the engine share. Nothing here is a table of known models: every size
comes from the file; a key that would change the arithmetic in a way this model cannot follow is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qwenkit.model.rope import RopeConfig

MODEL_TYPES = ("qwen", "qwen2", "qwen3", "llama", "qwen2_moe", "qwen3_moe")


@dataclass(frozen=True)
class MoeConfig:
    """Mixture-of-experts sizes; `sparse_layers` are the layers that hold experts, the others have a plain MLP."""

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    norm_topk_prob: bool
    shared_expert_intermediate_size: int | None
    sparse_layers: frozenset[int]


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shape and the arithmetic of the network.

    `sliding_windows[i]` is layer i's attention window in tokens (the query's own position included), or None for full attention.
    `logn_length` is the trained length of Qwen-1's LogN query scaling, or None where it is off.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: RopeConfig
    rms_norm_eps: float = 1e-6
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    logn_length: int | None = None
    sliding_windows: tuple[int | None, ...] = ()
    moe: MoeConfig | None = None
    dtype: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in _SIZES:
            _check_size(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config: num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2 or self.rope.rotary_dim % 2 or self.rope.rotary_dim > self.head_dim:
            raise ValueError(
                f"config: head_dim ({self.head_dim}) and the rotary width ({self.rope.rotary_dim}) must be even, "
                "and the rotary width at most head_dim"
            )
        if not self.sliding_windows:
            object.__setattr__(self, "sliding_windows", (None,) * self.num_hidden_layers)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read a config.json dictionary.

        Raises ValueError naming the key when model_type is unknown, a size is missing or impossible, or the file asks for
        arithmetic that this model does not have (another activation, another rope type).
        """
        model_type = config.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ValueError(
                f"config: model_type {model_type!r} is not supported; known types are {', '.join(MODEL_TYPES)}"
            )
        if model_type == "qwen":
            return _from_qwen1(config)
        activation = config.get("hidden_act", "silu")
        if activation != "silu":
            raise ValueError(f"config: hidden_act is {activation!r}, but only 'silu' is supported")
        heads = _size(config, "num_attention_heads")
        hidden_size = _size(config, "hidden_size")
        layers = _size(config, "num_hidden_layers")
        head_dim = config.get("head_dim") or (128 if model_type.startswith("qwen3") else hidden_size // heads)
        max_position = config.get("max_position_embeddings", 32768)
        attention_bias = bool(config.get("attention_bias", False))
        return cls(
            model_type=model_type,
            vocab_size=_size(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_size(config, "intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            max_position_embeddings=max_position,
            rope=RopeConfig.from_dict(config, head_dim=head_dim, max_position=max_position),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            qkv_bias={"qwen2": True, "qwen2_moe": bool(config.get("qkv_bias", True))}.get(model_type, attention_bias),
            o_bias=attention_bias and not model_type.startswith("qwen2"),
            mlp_bias=bool(config.get("mlp_bias", False)) and model_type == "llama",
            qk_norm=model_type.startswith("qwen3"),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            sliding_windows=_sliding_windows(config, layers),
            moe=_moe(config, layers) if model_type.endswith("_moe") else None,
            dtype=config.get("dtype") or config.get("torch_dtype"),
        )


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


LARGEST_SIZE = 2**24  # no dimension of any model comes near; a hostile file must not make us count to it


def _check_size(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_SIZE:
        raise ValueError(f"config: {name} is {value!r}, but a whole number from 1 to {LARGEST_SIZE} is needed")
    return value


def _size(config: Mapping[str, Any], *names: str) -> int:
    """The first of `names` that the file has; sizes have no default, a file without one is not a model."""
    for name in names:
        if config.get(name) is not None:
            return _check_size(name, config[name])
    raise ValueError(f"config: {names[0]} is missing")


def _from_qwen1(config: Mapping[str, Any]) -> ModelConfig:
    """Qwen-1's own key names, the earliest 7B-Chat spellings included.

    Its `intermediate_size` counts gate and up together, twice the width of the MLP (modeling_qwen.py of the original).
    """
    heads = _size(config, "num_attention_heads", "n_head")
    hidden_size = _size(config, "hidden_size", "n_embd")
    layers = _size(config, "num_hidden_layers", "n_layer")
    head_dim = config.get("kv_channels") or hidden_size // heads
    trained_length = _size(config, "seq_length", "n_positions", "max_position_embeddings")
    # Trained at 8K, the 7B says 32K in max_position_embeddings: NTK stretches it, so the longer number is the context.
    dynamic = bool(config.get("use_dynamic_ntk", True))
    context = config.get("max_position_embeddings") or config.get("n_positions") or trained_length
    return ModelConfig(
        model_type="qwen",
        vocab_size=_size(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_size(config, "intermediate_size", "ffn_hidden_size") // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_dim,
        max_position_embeddings=max(context, trained_length),
        rope=RopeConfig(
            theta=config.get("rotary_emb_base", 10000.0),
            rotary_dim=int(head_dim * config.get("rotary_pct", 1.0)),
            dynamic_ntk_length=trained_length if dynamic else None,
        ),
        rms_norm_eps=config.get("layer_norm_epsilon", 1e-6),
        qkv_bias=True,
        o_bias=not config.get("no_bias", True),
        mlp_bias=not config.get("no_bias", True),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        logn_length=trained_length if config.get("use_logn_attn", True) else None,
        dtype=config.get("dtype")
        or config.get("torch_dtype")
        or next((name for key, name in _QWEN1_DTYPES if config.get(key)), None),
    )


_QWEN1_DTYPES = (("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32"))


def _sliding_windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Which layers see only a window: `layer_types` where the file lists them, else each family's published rule."""
    window = config.get("sliding_window")
    if not config.get("use_sliding_window", False) or not window:
        return (None,) * layers
    types = config.get("layer_types")
    if types is not None:
        if len(types) != layers or not set(types) <= {"sliding_attention", "full_attention"}:
            raise ValueError(
                f"config: layer_types must list {layers} times sliding_attention or full_attention, found {types!r}"
            )
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    max_window_layers = config.get("max_window_layers", 28)
    rule = {
        "qwen2_moe": lambda i: i % 2 == 0 and i < max_window_layers,
        "qwen3_moe": lambda i: True,
    }.get(config["model_type"], lambda i: i >= max_window_layers)
    return tuple(window if rule(i) else None for i in range(layers))


def _moe(config: Mapping[str, Any], layers: int) -> MoeConfig:
    num_experts = _size(config, "num_experts", "num_local_experts")
    per_token = _size(config, "num_experts_per_tok")
    if per_token > num_experts:
        raise ValueError(f"config: num_experts_per_tok ({per_token}) is larger than num_experts ({num_experts})")
    dense = set(config.get("mlp_only_layers") or ())
    step = config.get("decoder_sparse_step", 1)
    shared = config.get("shared_expert_intermediate_size", 5632) if config["model_type"] == "qwen2_moe" else None
    return MoeConfig(
        num_experts=num_experts,
        num_experts_per_tok=per_token,
        intermediate_size=_size(config, "moe_intermediate_size"),
        norm_topk_prob=bool(config.get("norm_topk_prob", False)),
        shared_expert_intermediate_size=shared,
        sparse_layers=frozenset(i for i in range(layers) if i not in dense and (i + 1) % step == 0),
    )
