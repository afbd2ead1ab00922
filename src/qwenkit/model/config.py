"""ModelConfig: the sizes and switches of one Qwen, read from a checkpoint's config.json.

In: the dictionary of config.json of any supported `model_type` (old and new spellings of the same key).
Out: one frozen dataclass that the model, the loader and the engine share. Nothing here is a table of known models: every size
comes from the file. config_schema.py says what may stand at each key; a key that would change the arithmetic in a way that this
model cannot follow is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qwenkit.errors import FieldError, shorten
from qwenkit.model.config_schema import FAMILIES, LARGEST_SIZE, SOURCE, Whole, read_keys, refuse_foreign_keys
from qwenkit.model.rope import RopeConfig

MODEL_TYPES = tuple(FAMILIES)


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
            if not Whole().accepts(getattr(self, name)):
                raise FieldError(name, getattr(self, name), Whole().words, source=SOURCE)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config: num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        rotary_dim = self.rope.rotary_dim
        if self.head_dim % 2 or rotary_dim % 2 or not 2 <= rotary_dim <= self.head_dim:
            raise ValueError(
                f"config: head_dim ({self.head_dim}) and the rotary width ({rotary_dim}) must be even, "
                "and the rotary width from 2 to head_dim"
            )
        if self.rope.dynamic_ntk_length is not None and rotary_dim < 4:  # the base is raised to r / (r - 2)
            raise ValueError(f"config: use_dynamic_ntk needs a rotary width of at least 4, head_dim gives {rotary_dim}")
        if not self.sliding_windows:
            object.__setattr__(self, "sliding_windows", (None,) * self.num_hidden_layers)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read a config.json dictionary.

        Raises ValueError naming the key when model_type is unknown, a size is missing or impossible, a value has another type
        than the key, or the file asks for arithmetic that this model does not have (another activation, another rope type).
        """
        model_type = config.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ValueError(
                f"config: model_type {shorten(model_type)} is not supported; known types are {', '.join(MODEL_TYPES)}"
            )
        keys = read_keys(config, FAMILIES[model_type])
        refuse_foreign_keys(config, model_type)
        if model_type == "qwen":
            return _from_qwen1(keys)
        heads, hidden_size, layers = keys["num_attention_heads"], keys["hidden_size"], keys["num_hidden_layers"]
        head_dim = keys["head_dim"] or hidden_size // heads
        if head_dim < 1:
            raise FieldError("num_attention_heads", heads, f"at most hidden_size, {hidden_size}", source=SOURCE)
        no_groups = "num_key_value_heads" in config and config["num_key_value_heads"] is None
        attention_bias = keys["attention_bias"]
        rope = RopeConfig.from_keys(keys, head_dim=head_dim)
        context = keys["max_position_embeddings"]
        if rope.kind == "yarn":  # whose length the file keeps as that of training
            context = max(context, int(rope.factor * rope.original_length))
        return cls(
            model_type=model_type,
            vocab_size=keys["vocab_size"],
            hidden_size=hidden_size,
            intermediate_size=keys["intermediate_size"],
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=(None if no_groups else keys["num_key_value_heads"]) or heads,
            head_dim=head_dim,
            max_position_embeddings=context,
            rope=rope,
            rms_norm_eps=float(keys["rms_norm_eps"]),
            qkv_bias={"qwen2": True, "qwen2_moe": keys["qkv_bias"]}.get(model_type, attention_bias),
            o_bias=attention_bias and not model_type.startswith("qwen2"),
            mlp_bias=keys["mlp_bias"] and model_type == "llama",
            qk_norm=model_type.startswith("qwen3"),
            tie_word_embeddings=keys["tie_word_embeddings"],
            sliding_windows=_sliding_windows(keys, model_type, layers),
            moe=_moe(keys, model_type, layers) if model_type.endswith("_moe") else None,
            dtype=_dtype(keys),
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


def _from_qwen1(keys: Mapping[str, Any]) -> ModelConfig:
    """Qwen-1, the earliest 7B-Chat spellings included.

    Its `intermediate_size` counts gate and up together, twice the width of the MLP (modeling_qwen.py of the original).
    """
    head_dim = keys["kv_channels"]
    trained_length = keys["seq_length"] or keys["n_positions"] or keys["max_position_embeddings"]
    if trained_length is None:
        raise ValueError("config: seq_length is missing")
    # Trained at 8K, the 7B says 32K in max_position_embeddings: NTK stretches it, so the longer number is the context.
    context = keys["max_position_embeddings"] or keys["n_positions"] or trained_length
    return ModelConfig(
        model_type="qwen",
        vocab_size=keys["vocab_size"],
        hidden_size=keys["hidden_size"],
        intermediate_size=keys["intermediate_size"] // 2,
        num_hidden_layers=keys["num_hidden_layers"],
        num_attention_heads=keys["num_attention_heads"],
        num_key_value_heads=keys["num_attention_heads"],
        head_dim=head_dim,
        max_position_embeddings=max(context, trained_length),
        rope=RopeConfig(
            theta=float(keys["rotary_emb_base"]),
            rotary_dim=int(head_dim * keys["rotary_pct"]),
            dynamic_ntk_length=trained_length if keys["use_dynamic_ntk"] else None,
        ),
        rms_norm_eps=float(keys["layer_norm_epsilon"]),
        qkv_bias=True,
        o_bias=not keys["no_bias"],
        mlp_bias=not keys["no_bias"],
        tie_word_embeddings=keys["tie_word_embeddings"],
        logn_length=trained_length if keys["use_logn_attn"] else None,
        dtype=_dtype(keys) or next((name for key, name in _QWEN1_DTYPES if keys[key]), None),
    )


_QWEN1_DTYPES = (("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32"))


def _dtype(keys: Mapping[str, Any]) -> str | None:
    name = keys["dtype"] or keys["torch_dtype"]
    return None if name in (None, "auto") else str(name).removeprefix("torch.")


def _sliding_windows(keys: Mapping[str, Any], model_type: str, layers: int) -> tuple[int | None, ...]:
    """Which layers see only a window, as each family's own code decides: Qwen3-MoE all or none, Llama none, the others those of
    `layer_types` where the file lists them, else by a rule.
    """
    window, types = keys["sliding_window"], keys["layer_types"]
    if types is not None and len(types) != layers:
        raise FieldError(
            "layer_types", types, f"a list of {layers} items, one for each of num_hidden_layers", source=SOURCE
        )
    if model_type == "llama":
        return (None,) * layers
    if not keys["use_sliding_window"]:
        if types is not None and model_type != "qwen3_moe" and "sliding_attention" in types:
            raise FieldError(
                "layer_types", types, "only 'full_attention' where use_sliding_window is false", source=SOURCE
            )
        return (None,) * layers
    if window is None:
        return (None,) * layers
    if window < 1:
        allowed = f"a whole number from 1 to {LARGEST_SIZE} where use_sliding_window is true"
        raise FieldError("sliding_window", window, allowed, source=SOURCE)
    if model_type == "qwen3_moe":
        return (window,) * layers
    if types is not None:
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    first, alternate = keys["max_window_layers"], model_type == "qwen2_moe"
    return tuple(window if (i % 2 == 0 and i < first if alternate else i >= first) else None for i in range(layers))


def _moe(keys: Mapping[str, Any], model_type: str, layers: int) -> MoeConfig:
    num_experts, per_token = keys["num_experts"], keys["num_experts_per_tok"]
    if per_token > num_experts:
        raise ValueError(f"config: num_experts_per_tok ({per_token}) is larger than num_experts ({num_experts})")
    dense, step = set(keys["mlp_only_layers"]), keys["decoder_sparse_step"]
    return MoeConfig(
        num_experts=num_experts,
        num_experts_per_tok=per_token,
        intermediate_size=keys["moe_intermediate_size"],
        norm_topk_prob=keys["norm_topk_prob"],
        shared_expert_intermediate_size=keys["shared_expert_intermediate_size"] if model_type == "qwen2_moe" else None,
        sparse_layers=frozenset(i for i in range(layers) if i not in dense and (i + 1) % step == 0),
    )
