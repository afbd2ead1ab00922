"""Whole models inside a GGUF: configuration, parameters and what may be wrong with them, for every architecture.

The files are written as llama.cpp's conversion writes them: names from the gguf package's table, q and k of the llama
architecture permuted, experts stacked, vectors in fp32.
"""

import contextlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenkit.model.config import ModelConfig
from qwenkit.model.qwen import Qwen
from qwenkit.weights.gguf_file import read_gguf
from qwenkit.weights.gguf_model import GgufCheckpoint
from qwenkit.weights.load import load_model
from tests.tiny_models import FAMILIES, SIZES

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
}


def tiny_config(model_type: str, **changes: Any) -> dict[str, Any]:
    """Rows of 64 and 32 elements, so that they divide into blocks."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "moe_intermediate_size": 32}
    sizes |= {"shared_expert_intermediate_size": 64, "rms_norm_eps": 2.0**-20, "mlp_only_layers": []}
    return SIZES | FAMILIES[model_type] | sizes | {"model_type": model_type} | changes


def random_model(config: dict[str, Any]) -> Qwen:
    torch.manual_seed(0)
    model = Qwen(ModelConfig.from_dict(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def llama_cpp_tensors(model: Qwen, arch: gguf.MODEL_ARCH) -> dict[str, np.ndarray]:
    config = model.config
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found: dict[str, np.ndarray] = {}
    stacks: dict[str, list[np.ndarray]] = {}
    for name, parameter in model.named_parameters():
        data = parameter.detach().numpy()
        if arch is gguf.MODEL_ARCH.LLAMA and (".q_proj." in name or ".k_proj." in name):
            halves = data.reshape(-1, 2, config.head_dim // 2, *data.shape[1:])
            data = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(data.shape)
        if name.endswith("shared_expert_gate.weight"):
            data = data[0]
        before, is_expert, after = name.partition(".experts.")
        if is_expert:
            stacked = table.get_name(f"{before}.experts.{after.partition('.')[2]}", try_suffixes=(".weight",))
            stacks.setdefault(str(stacked), []).append(data)
        else:
            found[str(table.get_name(name, try_suffixes=(".weight", ".bias")))] = data
    return found | {name: np.stack(experts) for name, experts in stacks.items()}


def write(
    path: Path, model: Qwen, *, kind: str = "F32", tensors: dict[str, np.ndarray] | None = None, **metadata: Any
) -> dict[str, np.ndarray]:
    """Write the model; return what its tensors are worth after quantization, under llama.cpp's names."""
    config = model.config
    arch = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    if config.model_type == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    if config.moe:
        writer.add_expert_count(config.moe.num_experts)
        writer.add_expert_used_count(config.moe.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe.intermediate_size)
        if config.moe.shared_expert_intermediate_size:
            writer.add_expert_shared_feed_forward_length(config.moe.shared_expert_intermediate_size)
    for key, value in metadata.items():
        add = {
            str: writer.add_string,
            bool: writer.add_bool,
            float: writer.add_float32,
            int: writer.add_uint64,
            list: writer.add_array,
        }[type(value)]
        add(key.replace("__", "."), value)
    worth: dict[str, np.ndarray] = {}
    for name, data in (tensors or llama_cpp_tensors(model, arch)).items():
        number = GGMLQuantizationType[kind if data.ndim > 1 else "F32"]
        blocks = quantize(data, number)
        worth[name] = dequantize(blocks, number)
        writer.add_tensor(name, blocks, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return worth


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_configuration_and_parameters_come_back(tmp_path: Path, model_type: str) -> None:
    model = random_model(tiny_config(model_type))
    write(tmp_path / "x.gguf", model)
    loaded = load_model(tmp_path / "x.gguf")
    assert loaded.config == model.config
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert torch.equal(loaded.get_parameter(name), parameter), name
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == model.config.tie_word_embeddings


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_biases(tmp_path: Path, model_type: str) -> None:
    """Biases of q and k are permuted in llama files as their weights are."""
    biases = {"attention_bias": True} | ({"mlp_bias": True} if model_type == "llama" else {})
    model = random_model(tiny_config(model_type, **biases))
    write(tmp_path / "x.gguf", model)
    loaded = load_model(tmp_path / "x.gguf")
    assert loaded.config == model.config
    assert torch.equal(
        loaded.get_parameter("model.layers.1.self_attn.k_proj.bias"),
        model.get_parameter("model.layers.1.self_attn.k_proj.bias"),
    )


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
def test_quantized_models(tmp_path: Path, kind: str) -> None:
    """Values are those of the blocks, read after whatever reorders rows; raw blocks keep the same order."""
    path = tmp_path / "x.gguf"
    worth = write(path, random_model(tiny_config("llama")), kind=kind)
    checkpoint = GgufCheckpoint.open(path)
    assert checkpoint.config["dtype"] == {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
    stored = {tensor.name: tensor for tensor in checkpoint.tensors()}
    up = stored["model.layers.0.mlp.up_proj.weight"]
    assert up.dtype == kind
    assert torch.equal(up.load().float(), torch.from_numpy(worth["blk.0.ffn_up.weight"]))
    q = stored["model.layers.0.self_attn.q_proj.weight"]
    expected = worth["blk.0.attn_q.weight"].reshape(4, 8, 2, 64).swapaxes(1, 2).reshape(64, 64)
    assert torch.equal(q.load().float(), torch.from_numpy(expected))
    raw = q.raw()
    if kind in ("F16", "BF16"):
        assert raw is None
    else:
        assert raw is not None
        np.testing.assert_array_equal(dequantize(raw, GGMLQuantizationType[kind]), expected)
    model = load_model(path, dtype=torch.bfloat16)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, torch.from_numpy(expected).bfloat16())


def test_raw_blocks_of_one_expert(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    worth = write(path, random_model(tiny_config("qwen3_moe")), kind="Q4_1")
    stored = {tensor.name: tensor for tensor in GgufCheckpoint.open(path).tensors()}
    raw = stored["model.layers.2.mlp.experts.4.down_proj.weight"].raw()
    assert raw is not None
    expected = worth["blk.2.ffn_down_exps.weight"][4]
    np.testing.assert_array_equal(dequantize(raw, GGMLQuantizationType.Q4_1), expected)


def qwen1_gguf(path: Path) -> dict[str, torch.Tensor]:
    """Qwen-1 as llama.cpp writes it; returns what should be loaded."""
    torch.manual_seed(0)
    hidden, inner, layers, vocab = 32, 48, 2, 64
    writer = gguf.GGUFWriter(path, "qwen")
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(2 * inner)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(16)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(2.0**-20)
    writer.add_eos_token_id(62)
    writer.add_token_list([f"t{i}" for i in range(62)] + ["<|endoftext|>", "<|im_end|>"])
    expected: dict[str, torch.Tensor] = {}

    def add(name: str, ours: str | list[str], *shape: int) -> None:
        data = torch.randn(shape)
        writer.add_tensor(name, data.numpy())
        targets = [ours] if isinstance(ours, str) else ours
        expected.update(zip(targets, data.chunk(len(targets)), strict=True))

    add("token_embd.weight", "model.embed_tokens.weight", vocab, hidden)
    add("output_norm.weight", "model.norm.weight", hidden)
    add("output.weight", "lm_head.weight", vocab, hidden)
    for i in range(layers):
        layer = f"model.layers.{i}"
        add(f"blk.{i}.attn_norm.weight", f"{layer}.input_layernorm.weight", hidden)
        add(f"blk.{i}.ffn_norm.weight", f"{layer}.post_attention_layernorm.weight", hidden)
        for kind, shape in (("weight", (3 * hidden, hidden)), ("bias", (3 * hidden,))):
            add(f"blk.{i}.attn_qkv.{kind}", [f"{layer}.self_attn.{x}_proj.{kind}" for x in "qkv"], *shape)
        add(f"blk.{i}.attn_output.weight", f"{layer}.self_attn.o_proj.weight", hidden, hidden)
        add(f"blk.{i}.ffn_gate.weight", f"{layer}.mlp.gate_proj.weight", inner, hidden)
        add(f"blk.{i}.ffn_up.weight", f"{layer}.mlp.up_proj.weight", inner, hidden)
        add(f"blk.{i}.ffn_down.weight", f"{layer}.mlp.down_proj.weight", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def test_qwen1(tmp_path: Path) -> None:
    expected = qwen1_gguf(tmp_path / "x.gguf")
    checkpoint = GgufCheckpoint.open(tmp_path / "x.gguf")
    model = load_model(checkpoint)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    assert all(torch.equal(parameters[name], value) for name, value in expected.items())
    assert (model.config.rope.theta, model.config.max_position_embeddings) == (5000.0, 128)
    assert (model.config.logn_length, model.config.rope.dynamic_ntk_length) == (None, None)
    assert checkpoint.eos_token_ids == (62, 63)


def test_end_tokens_and_sampling_defaults(tmp_path: Path) -> None:
    ids = {"tokenizer__ggml__eos_token_id": 7, "tokenizer__ggml__eot_token_id": 5}
    sampling = {"general__sampling__temp": 0.5, "general__sampling__top_k": 20}
    write(tmp_path / "x.gguf", random_model(tiny_config("qwen2")), **ids, **sampling)
    checkpoint = GgufCheckpoint.open(tmp_path / "x.gguf")
    assert checkpoint.eos_token_ids == (7, 5)
    assert checkpoint.config["eos_token_id"] == 7
    assert checkpoint.generation_config == {"temperature": 0.5, "top_k": 20}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e6}


@pytest.mark.parametrize(
    ("rope", "metadata"),
    [
        ({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}, {"type": "linear", "factor": 4.0}),
        (YARN, {"type": "yarn", "factor": 4.0, "original_context_length": 64}),
        (
            YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
            {
                "type": "yarn",
                "factor": 4.0,
                "original_context_length": 64,
                "yarn_beta_fast": 16.0,
                "yarn_beta_slow": 2.0,
            },
        ),
        ({"rope_type": "default", "rope_theta": 1e6}, {"type": "none"}),
    ],
)
def test_rope_scaling(tmp_path: Path, rope: dict[str, Any], metadata: dict[str, Any]) -> None:
    model = random_model(tiny_config("qwen2", rope_parameters=rope))
    write(tmp_path / "x.gguf", model, **{f"qwen2__rope__scaling__{key}": value for key, value in metadata.items()})
    assert load_model(tmp_path / "x.gguf").config.rope == model.config.rope


def test_rope_attention_factor(tmp_path: Path) -> None:
    metadata = {"type": "yarn", "factor": 4.0, "original_context_length": 64, "attn_factor": 2.0}
    prefixed = {f"qwen2__rope__scaling__{key}": value for key, value in metadata.items()}
    write(tmp_path / "x.gguf", random_model(tiny_config("qwen2")), **prefixed)
    config = ModelConfig.from_dict(GgufCheckpoint.open(tmp_path / "x.gguf").config)
    assert config.rope.attention_factor == pytest.approx(2.0 * (0.1 * np.log(4.0) + 1.0))


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"split__count": 3}, "one of 3 parts"),
        ({"qwen2__rope__scaling__type": "longrope"}, "'longrope'; known are none, linear and yarn"),
        ({"qwen2__rope__scaling__type": "linear"}, r"qwen2\.rope\.scaling\.factor is missing"),
        ({"qwen2__rope__scaling__type": "linear", "qwen2__rope__scaling__factor": float("nan")}, "a positive number"),
        ({"qwen2__attention__value_length": 8}, "value_length differs from the key length 16"),
    ],
)
def test_metadata_that_cannot_be_followed(tmp_path: Path, metadata: dict[str, Any], words: str) -> None:
    path = tmp_path / "x.gguf"
    write(path, random_model(tiny_config("qwen2")), **metadata)
    with pytest.raises(ValueError, match=words) as caught:
        GgufCheckpoint.open(path)
    assert "x.gguf" in str(caught.value)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"'mamba' is not supported; known are llama, qwen, qwen2, qwen3, qwen2moe"):
        GgufCheckpoint.open(tmp_path / "x.gguf")


def test_tensors_that_contradict_the_metadata(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    model = random_model(tiny_config("qwen3_moe"))
    good = llama_cpp_tensors(model, gguf.MODEL_ARCH.QWEN3MOE)
    without_layer = {name: data for name, data in good.items() if not name.startswith("blk.2.")}
    write(path, model, tensors=without_layer)
    with pytest.raises(ValueError, match=r"block_count is 3, but tensors of 2 layers found"):
        GgufCheckpoint.open(path)
    write(path, model, tensors=good | {"blk.0.ffn_gate_exps.weight": good["blk.0.ffn_gate_exps.weight"][:5]})
    with pytest.raises(
        ValueError, match=r"expert_count is 6, but tensor blk\.0\.ffn_gate_exps\.weight holds 5 experts"
    ):
        GgufCheckpoint.open(path)
    write(path, model, tensors={name: data for name, data in good.items() if name != "token_embd.weight"})
    with pytest.raises(ValueError, match=r"token_embd\.weight is missing"):
        GgufCheckpoint.open(path)
    write(path, model, tensors=good | {"blk.1.ffn_gate_exps.weight": good["blk.1.ffn_gate_exps.weight"][:5]})
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_gate_exps\.weight: its shape .* into 6 equal parts"):
        load_model(path)
    write(path, model, tensors=good | {"blk.1.ssm_a.weight": np.ones((2, 2), dtype=np.float32)})
    with pytest.raises(ValueError, match=r"1 surplus: blk\.1\.ssm_a\.weight \(found \[2, 2\]\)"):
        load_model(path)
    write(path, model, tensors={name: data for name, data in good.items() if name != "blk.1.attn_q_norm.weight"})
    with pytest.raises(ValueError, match=r"1 missing: model\.layers\.1\.self_attn\.q_norm\.weight \(expected \[16\]\)"):
        load_model(path)


@pytest.mark.parametrize("key", ["embedding_length", "attention__key_length", "feed_forward_length"])
def test_absurd_sizes_are_refused_before_anything_is_built(tmp_path: Path, key: str) -> None:
    write(tmp_path / "x.gguf", random_model(tiny_config("qwen2")), **{f"qwen2__{key}": 2**23})
    with pytest.raises(ValueError, match=r"value_length differs|is \d{7,}, but the largest tensor has only"):
        load_model(tmp_path / "x.gguf")


def test_rope_factors(tmp_path: Path) -> None:
    """Factors of one change nothing; Llama 3.1's would."""
    path = tmp_path / "x.gguf"
    model = random_model(tiny_config("llama"))
    good = llama_cpp_tensors(model, gguf.MODEL_ARCH.LLAMA)
    write(path, model, tensors=good | {"rope_freqs.weight": np.ones(8, dtype=np.float32)})
    assert load_model(path).config == model.config
    write(path, model, tensors=good | {"rope_freqs.weight": np.full(8, 8.0, dtype=np.float32)})
    with pytest.raises(ValueError, match="Llama 3's rotary scaling, which is not supported"):
        GgufCheckpoint.open(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzz_ends_in_value_error_or_success(tmp_path: Path, data: st.DataObject) -> None:
    """Damage in header, metadata and table: whatever the sizes say now, no other error, no huge model, no hang."""
    sound = tmp_path / "sound.gguf"
    if not sound.exists():
        config = tiny_config("qwen3_moe", num_hidden_layers=1, num_experts=2, vocab_size=8)
        write(sound, random_model(config), kind="Q8_0")
    damaged = bytearray(sound.read_bytes())
    table_end = min(entry.offset for entry in read_gguf(sound).entries)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(8, table_end))
        fault = data.draw(
            st.one_of(st.binary(min_size=1, max_size=2), st.sampled_from([bytes(4), b"\xff\xff\xff\x7f"]))
        )
        damaged[at : at + len(fault)] = fault
    path = tmp_path / "x.gguf"
    path.write_bytes(damaged)
    with contextlib.suppress(ValueError):
        checkpoint = GgufCheckpoint.open(path)
        assert all(isinstance(token, int) for token in checkpoint.eos_token_ids)
        load_model(checkpoint)
