"""config.json from strangers: a configuration whose every number is sane, or one sentence that names a key of the file."""

import dataclasses
import json
import lzma
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenkit.errors import FieldError
from qwenkit.model.config import ModelConfig
from qwenkit.model.config_schema import FAMILIES, LARGEST_SIZE, ROPE
from qwenkit.model.context import pack
from qwenkit.model.qwen import Qwen
from qwenkit.model.rope import cos_sin, logn_scale, ntk_alpha
from tests.conftest import ROOT

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "torch_dtype": "float32",
}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
QWEN1 = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_channels": 8,
    "seq_length": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
BASES: dict[str, dict[str, Any]] = {
    "qwen": QWEN1,
    "qwen2": TINY | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": TINY | {"rope_scaling": YARN},
    "llama": TINY,
    "qwen2_moe": TINY | EXPERTS | {"shared_expert_intermediate_size": 8, "mlp_only_layers": [1]},
    "qwen3_moe": TINY | EXPERTS | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
}

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.sampled_from([2**31, 2**63, -(2**63), 10**30, 10**400, LARGEST_SIZE, LARGEST_SIZE + 1])
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.floats(0, 3)
    | st.sampled_from(["", "x", "true", "8", "silu", "default", "yarn", "full_attention", "torch.float32"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
ropes = st.dictionaries(st.sampled_from([*ROPE, "type"]), scalars, max_size=4)
KEYS = {
    family: sorted({n for name, key in schema.items() for n in (name, *key.aliases)})
    for family, schema in FAMILIES.items()
}


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    family = draw(st.sampled_from(sorted(FAMILIES)))
    config = {"model_type": family} | BASES[family]
    for key in draw(st.lists(st.sampled_from(KEYS[family]), min_size=1, max_size=3)):
        if draw(st.integers(0, 5)) == 0:
            config.pop(key, None)
        elif key.startswith("rope_") and key != "rope_theta":
            config[key] = (config.get(key) or {}) | draw(ropes)
        else:
            config[key] = draw(values)
    return config


def numbers(value: Any) -> Iterator[float]:
    """Every number inside a configuration."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from numbers(getattr(value, field.name))
    elif isinstance(value, tuple | frozenset):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value
    else:
        assert value is None or isinstance(value, str), value


def assert_one_sentence(error: ValueError, config: dict[str, Any]) -> None:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 800
    names = [*config, *KEYS[config["model_type"]]]
    assert any(name in text for name in names), text


def assert_sane(config: ModelConfig) -> None:
    assert all(math.isfinite(number) for number in numbers(config))
    assert config.rms_norm_eps > 0
    assert config.rope.theta > 1
    assert len(config.sliding_windows) == config.num_hidden_layers
    length = config.max_position_embeddings
    positions = torch.tensor([0, 1, length // 2, length - 1])
    alpha = None
    if config.rope.dynamic_ntk_length is not None:
        alpha = torch.tensor([ntk_alpha(int(p) + 1, config.rope.dynamic_ntk_length) for p in positions])
    if config.rope.rotary_dim < 2**16:
        assert all(part.isfinite().all() for part in cos_sin(config.rope, positions, alpha))
    if config.logn_length is not None:
        assert logn_scale(positions, config.logn_length).isfinite().all()


def is_small(config: ModelConfig) -> bool:
    moe = config.moe
    sizes = [
        config.vocab_size,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads * config.head_dim,
    ]
    if moe is not None:
        sizes += [moe.num_experts, moe.intermediate_size, moe.shared_expert_intermediate_size or 0]
    return max(sizes) <= 256 and config.num_hidden_layers <= 4


@settings(max_examples=400, deadline=None)
@given(mutated())
def test_a_mutated_configuration_is_sane_or_refused_by_name(config: dict[str, Any]) -> None:
    try:
        read = ModelConfig.from_dict(config)
    except ValueError as error:
        assert_one_sentence(error, config)
        return
    assert_sane(read)
    if is_small(read):
        torch.manual_seed(0)
        with torch.inference_mode():
            model = Qwen(read).float()
            assert model.logits(model(*pack([[0, read.vocab_size - 1, 0]], read))).isfinite().all()


def published_cases() -> list[dict[str, Any]]:
    with lzma.open(ROOT / "tests" / "data" / "security" / "config_json.jsonl.xz", "rt") as file:
        return [json.loads(line) for line in file]


def test_configurations_that_once_ended_in_a_traceback_are_refused_by_name() -> None:
    cases = published_cases()
    assert len(cases) == 484
    for case in cases:
        key = case["desc"].split("=")[0].split()[-1]
        with pytest.raises(ValueError, match=key) as caught:
            ModelConfig.from_dict(case["config"])
        assert_one_sentence(caught.value, case["config"])


def test_an_error_knows_its_field() -> None:
    with pytest.raises(FieldError) as caught:
        ModelConfig.from_dict(TINY | {"model_type": "qwen3", "rms_norm_eps": "0"})
    error = caught.value
    assert (error.field, error.given, error.allowed) == ("rms_norm_eps", "0", "a number from 1e-30 to 1")
    assert str(error) == "config: rms_norm_eps is '0', allowed is a number from 1e-30 to 1"


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("logit_scale", 0.5),
        ("is_causal", False),
        ("alibi", True),
        ("scale_attn_weights", False),
        ("no_rope_layers", [1, 0]),
    ],
)
def test_keys_of_other_architectures_are_refused_by_name(family: str, key: str, value: Any) -> None:
    config = {"model_type": family} | BASES[family]
    with pytest.raises(ValueError, match=f"^config: {key} is "):
        ModelConfig.from_dict(config | {key: value})
    assert ModelConfig.from_dict(config | {key: None}) == ModelConfig.from_dict(config)


def test_neutral_values_of_foreign_keys_pass() -> None:
    ModelConfig.from_dict(QWEN1 | {"model_type": "qwen", "scale_attn_weights": True, "pos_emb": "rotary"})
    ModelConfig.from_dict(TINY | {"model_type": "qwen3", "use_qk_norm": True, "is_causal": True, "logit_scale": 1.0})
    with pytest.raises(ValueError, match="use_qk_norm is True"):
        ModelConfig.from_dict(TINY | {"model_type": "qwen2", "use_qk_norm": True})


def read(model_type: str, *without: str, **changes: Any) -> ModelConfig:
    config = {"model_type": model_type} | TINY | (EXPERTS if "moe" in model_type else {}) | changes
    return ModelConfig.from_dict({key: value for key, value in config.items() if key not in without})


def test_defaults_are_those_of_the_family() -> None:
    assert read("qwen3_moe", "head_dim").head_dim == 4
    assert read("qwen3", "head_dim").head_dim == 128
    assert read("qwen2", "head_dim").head_dim == 4
    assert read("llama", "max_position_embeddings").max_position_embeddings == 2048
    assert read("qwen2", "max_position_embeddings").max_position_embeddings == 32768
    assert read("llama", "num_key_value_heads").num_key_value_heads == 4
    assert read("qwen3_moe", "num_key_value_heads").num_key_value_heads == 4
    assert read("qwen2", num_key_value_heads=None).num_key_value_heads == 4
    missing = read("qwen2_moe", *EXPERTS, num_attention_heads=16, num_key_value_heads=16)
    assert missing.moe is not None
    assert (missing.moe.num_experts, missing.moe.num_experts_per_tok, missing.moe.intermediate_size) == (60, 4, 1408)
    qwen1 = ModelConfig.from_dict({"model_type": "qwen", **{k: v for k, v in QWEN1.items() if k != "kv_channels"}})
    assert qwen1.head_dim == 128


def test_spellings_of_one_value() -> None:
    assert read("qwen2", hidden_act="swish") == read("qwen2")
    assert read("qwen2", torch_dtype="torch.bfloat16").dtype == "bfloat16"
    assert read("qwen2", torch_dtype="auto").dtype is None
    renamed = read("qwen3_moe", "num_experts", num_local_experts=2)
    assert renamed == read("qwen3_moe")
    with pytest.raises(ValueError, match="num_local_experts is 3, allowed is only 2, which num_experts says"):
        read("qwen3_moe", num_local_experts=3)


@pytest.mark.parametrize("text", ["true", "false", 1, 0])
def test_only_true_and_false_are_truth_values(text: Any) -> None:
    with pytest.raises(ValueError, match=r"tie_word_embeddings is .*, allowed is true or false"):
        read("qwen2", tie_word_embeddings=text)


def test_windows_are_those_of_the_familys_own_code() -> None:
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    full = {"layer_types": ["full_attention"] * 2}
    assert read("llama", **window).sliding_windows == (None, None)
    assert read("qwen3_moe", **window, **full).sliding_windows == (8, 8)
    assert read("qwen3", **window).sliding_windows == (None, 8)
    assert read("qwen3", **window, **full).sliding_windows == (None, None)
    assert read("qwen2_moe", **window).sliding_windows == (8, None)
    assert read("qwen2_moe", sliding_window=0).sliding_windows == (
        None,
        None,
    )  # as transformers saves one without windows
    with pytest.raises(ValueError, match="sliding_window is 0"):
        read("qwen2", use_sliding_window=True, sliding_window=0)
    with pytest.raises(ValueError, match=r"layer_types is .* where use_sliding_window is false"):
        read("qwen2", layer_types=["sliding_attention", "full_attention"])


def test_rope_scaling_beside_rope_parameters() -> None:
    """A model card says to add the one, and transformers 5 has written the other."""
    both = read(
        "qwen2", "rope_theta", rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rope_scaling=YARN
    ).rope
    assert (both.kind, both.factor, both.theta, both.original_length) == ("yarn", 4.0, 1e6, 32)
    with pytest.raises(ValueError, match=r"rope_scaling\.factor is 2\.0, allowed is only 4\.0, which rope_parameters"):
        read("qwen2", rope_parameters=YARN, rope_scaling=YARN | {"factor": 2.0})
    with pytest.raises(ValueError, match=r"rope_scaling\.rope_type is 'linear'.* which rope_parameters\.rope_type"):
        read("qwen2", rope_parameters=YARN, rope_scaling={"rope_type": "linear", "factor": 4.0})
    with pytest.raises(ValueError, match=r"rope_theta is 10000\.0, allowed is only 1000000\.0"):
        read("qwen2", rope_parameters={"rope_type": "default", "rope_theta": 1e6})


def test_the_length_that_yarn_starts_from_may_stand_beside_the_rope_object() -> None:
    beside = read("qwen2", rope_scaling={"type": "yarn", "factor": 4.0}, original_max_position_embeddings=32)
    assert beside.rope == read("qwen2", rope_scaling=YARN).rope
    with pytest.raises(ValueError, match="original_max_position_embeddings is 64, allowed is only 32"):
        read("qwen2", rope_scaling=YARN, original_max_position_embeddings=64)


def test_yarns_temperature() -> None:
    own = 0.1 * math.log(4.0) + 1.0
    assert read("qwen3", rope_scaling=YARN).rope.attention_factor == pytest.approx(own)
    assert read("qwen3", rope_scaling=YARN | {"attention_factor": 0.8}).rope.attention_factor == 0.8
    assert read("qwen3", rope_scaling=YARN | {"attn_factor": 1 / own}).rope.attention_factor == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"rope_scaling\.attn_factor is 0\.9, allowed is null beside attention_factor"):
        read("qwen3", rope_scaling=YARN | {"attention_factor": 0.8, "attn_factor": 0.9})


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"full_attention": YARN}, "rope_parameters.full_attention is .*, allowed is no object: all layers"),
        ({"rope_type": "default", "factor": 4.0}, "rope_parameters.factor is 4.0, .* rope type 'default' has none"),
        ({"rope_type": "linear", "factor": 2.0, "mscale": 1.0}, "rope_parameters.mscale is 1.0"),
        ({"rope_type": "linear"}, "rope_parameters.factor is None, allowed is a number of at least 1"),
        ({"type": "linear", "rope_type": "yarn", "factor": 2.0}, "rope_parameters.type is 'linear', .* only 'yarn'"),
        (YARN | {"long_factor": [1.0]}, "rope_parameters.long_factor is .*, allowed is null: known are"),
        (YARN | {"extrapolation_factor": 0.5}, "rope_parameters.extrapolation_factor is 0.5, allowed is 1"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "rope_parameters.partial_rotary_factor is 0.5"),
    ],
)
def test_rope_settings_that_would_be_dropped_are_refused(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read("qwen2", "rope_theta", rope_parameters=rope)


def test_partial_rotary_turns_nothing_in_these_families() -> None:
    with pytest.raises(ValueError, match=r"partial_rotary_factor is 0\.5, allowed is 1"):
        read("qwen2", partial_rotary_factor=0.5)
    assert read("qwen2", partial_rotary_factor=1.0) == read("qwen2")
    with pytest.raises(ValueError, match="use_dynamic_ntk needs a rotary width of at least 4"):
        ModelConfig.from_dict(QWEN1 | {"model_type": "qwen", "rotary_pct": 0.25})
