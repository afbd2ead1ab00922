"""config.json as published over the years, and what is said about the ones that cannot be run."""

from typing import Any

import pytest

from qwenkit.model.config import MODEL_TYPES, ModelConfig

QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "max_window_layers": 21,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
QWEN1_7B = {
    "model_type": "qwen",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "seq_length": 8192,
    "max_position_embeddings": 32768,
    "rotary_emb_base": 10000,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "bf16": True,
}
MOE = QWEN2 | {
    "model_type": "qwen2_moe",
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
}


def test_qwen2() -> None:
    config = ModelConfig.from_dict(QWEN2)
    assert (config.head_dim, config.qkv_bias, config.qk_norm, config.tie_word_embeddings) == (64, True, False, True)
    assert (config.rope.theta, config.rope.kind, config.dtype) == (1e6, "default", "bfloat16")
    assert config.sliding_windows == (None,) * 24


def test_old_and_new_spelling_of_yarn_are_one() -> None:
    old = QWEN2 | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}
    new = {key: value for key, value in QWEN2.items() if key != "rope_theta"} | {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        }
    }
    assert ModelConfig.from_dict(old).rope == ModelConfig.from_dict(new).rope


def test_sliding_windows_by_layer() -> None:
    config = ModelConfig.from_dict(QWEN2 | {"use_sliding_window": True, "sliding_window": 1024})
    assert config.sliding_windows == (None,) * 21 + (1024,) * 3
    listed = QWEN2 | {
        "use_sliding_window": True,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", *["full_attention"] * 23],
    }
    assert ModelConfig.from_dict(listed).sliding_windows == (9,) + (None,) * 23


def test_qwen1() -> None:
    config = ModelConfig.from_dict(QWEN1_7B)
    assert (config.intermediate_size, config.num_key_value_heads, config.head_dim) == (11008, 32, 128)
    assert (config.rope.dynamic_ntk_length, config.logn_length, config.max_position_embeddings) == (8192, 8192, 32768)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.dtype) == (True, False, False, "bfloat16")


def test_the_earliest_spelling_of_qwen1() -> None:
    renamed = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "hidden_size": "n_embd"}
    renamed |= {"intermediate_size": "ffn_hidden_size"}
    old = {renamed.get(key, key): value for key, value in QWEN1_7B.items()}
    assert ModelConfig.from_dict(old) == ModelConfig.from_dict(QWEN1_7B)


def test_moe_layers() -> None:
    config = ModelConfig.from_dict(MOE | {"decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert config.moe is not None
    assert config.moe.sparse_layers == frozenset(range(1, 24, 2)) - {3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, f"model_type 'mistral' is not supported; known types are {', '.join(MODEL_TYPES)}"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "896"}, "hidden_size is '896', allowed is a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(14\) is not a multiple of num_key_value_heads \(3\)"),
        ({"head_dim": 63}, r"head_dim \(63\)"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0}},
            "rope_scaling.type is 'llama3', allowed is 'default',",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor is 0.5, allowed is a number from 1"),
        (
            {"use_sliding_window": True, "layer_types": ["full_attention"]},
            r"layer_types is \['full_attention'\], allowed is a list of 24 items",
        ),
    ],
)
def test_what_cannot_be_run_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^config: {message}") as caught:
        ModelConfig.from_dict(QWEN2 | changes)
    assert "\n" not in str(caught.value)


def test_more_experts_per_token_than_experts() -> None:
    with pytest.raises(ValueError, match=r"num_experts_per_tok \(61\) is larger than num_experts \(60\)"):
        ModelConfig.from_dict(MOE | {"num_experts_per_tok": 61})


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}, 64),
        ({"rope_type": "linear", "factor": 4.0}, 64),
        (None, 64),
    ],
)
def test_yarn_lengthens_the_context(scaling: Any, context: int) -> None:
    config = QWEN2 | {"max_position_embeddings": 64, "rope_scaling": scaling}
    assert ModelConfig.from_dict(config).max_position_embeddings == context
