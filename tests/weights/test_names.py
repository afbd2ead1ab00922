"""Foreign names: every one leads to one parameter, every parameter is reached once."""

import gguf
import pytest
import torch

from qwenkit.model.config import ModelConfig
from qwenkit.model.qwen import Qwen
from qwenkit.weights.names import Part, apply, from_gguf, from_hugging_face, from_qwen1
from qwenkit.weights.stored import StoredTensor
from tests.tiny_models import FAMILIES, SIZES

QWEN1 = {
    "model_type": "qwen",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_channels": 16,
    "seq_length": 8,
}
ARCHITECTURES = {
    "llama": ("llama", gguf.MODEL_ARCH.LLAMA),
    "qwen2": ("qwen2", gguf.MODEL_ARCH.QWEN2),
    "qwen3": ("qwen3", gguf.MODEL_ARCH.QWEN3),
    "qwen2_moe": ("qwen2moe", gguf.MODEL_ARCH.QWEN2MOE),
    "qwen3_moe": ("qwen3moe", gguf.MODEL_ARCH.QWEN3MOE),
}


def parameters(config: ModelConfig) -> list[str]:
    with torch.device("meta"):
        return [name for name, _ in Qwen(config).named_parameters()]


def qwen1_names(layers: int) -> list[str]:
    """Written out from modeling_qwen.py."""
    names = ["transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight"]
    for i in range(layers):
        names += [f"transformer.h.{i}.attn.c_attn.bias"]
        names += [
            f"transformer.h.{i}.{module}.weight"
            for module in ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
        ]
    return names


def test_qwen1_names_are_a_bijection() -> None:
    reached = [part.name for name in qwen1_names(2) for part in from_qwen1(name)]
    assert sorted(reached) == sorted(parameters(ModelConfig.from_dict(QWEN1)))


def test_qwen1_with_biases_everywhere() -> None:
    names = qwen1_names(2)
    names += [
        f"transformer.h.{i}.{m}.bias" for i in range(2) for m in ("attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
    ]
    reached = [part.name for name in names for part in from_qwen1(name)]
    assert sorted(reached) == sorted(parameters(ModelConfig.from_dict(QWEN1 | {"no_bias": False})))


def test_qwen1_gate_is_w2() -> None:
    assert from_qwen1("transformer.h.7.mlp.w2.weight") == (Part("model.layers.7.mlp.gate_proj.weight"),)
    assert from_qwen1("transformer.h.7.mlp.w1.weight") == (Part("model.layers.7.mlp.up_proj.weight"),)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_gguf_names_are_a_bijection(model_type: str) -> None:
    """The other direction is the gguf package's own table."""
    architecture, number = ARCHITECTURES[model_type]
    config = ModelConfig.from_dict(SIZES | FAMILIES[model_type] | {"model_type": model_type, "mlp_only_layers": []})
    table = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    ours = parameters(config)
    theirs = set()
    for name in ours:
        before, expert, after = name.partition(".experts.")
        stacked = f"{before}.experts.{after.partition('.')[2]}" if expert else name
        foreign = table.get_name(stacked, try_suffixes=(".weight", ".bias"))
        assert foreign is not None, name
        theirs.add(foreign)
    num_experts = config.moe.num_experts if config.moe else 0
    reached = [
        part.name
        for name in theirs
        for part in from_gguf(name, architecture=architecture, head_dim=config.head_dim, num_experts=num_experts)
    ]
    assert sorted(reached) == sorted(ours)


def test_gguf_qwen1_names_are_a_bijection() -> None:
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN, 2)
    theirs = [table.get_name(name, try_suffixes=(".weight", ".bias")) for name in qwen1_names(2)]
    reached = [
        part.name for name in theirs for part in from_gguf(str(name), architecture="qwen", head_dim=16, num_experts=0)
    ]
    assert sorted(reached) == sorted(parameters(ModelConfig.from_dict(QWEN1)))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "transformer.rotary_emb.inv_freq",
        "transformer.h.3.attn.bias",
        "transformer.h.3.attn.masked_bias",
    ],
)
def test_buffers_of_old_checkpoints_are_no_parameters(name: str) -> None:
    assert from_hugging_face(name) == ()
    assert from_qwen1(name) == ()


def test_unknown_names_pass_unchanged() -> None:
    for name in ("model.visual.weight", "transformer.h.0.attn.c_attn.qweight", "transformer.h.0.new.weight"):
        assert from_hugging_face(name) == (Part(name),)
        assert from_qwen1(name) == (Part(name),)
    for name in ("blk.0.ssm_a", "blk.0.ffn_gate.0.weight", "v.patch.weight", "blk.x.attn_q.weight"):
        assert from_gguf(name, architecture="qwen2", head_dim=16, num_experts=0) == (Part(name),)
    name = "blk.0.ffn_up_exps.weight"
    assert from_gguf(name, architecture="qwen2", head_dim=16, num_experts=0) == (Part(name),)


def stored(tensor: torch.Tensor) -> StoredTensor:
    return StoredTensor(
        "x",
        tuple(tensor.shape),
        "F32",
        lambda start, stop: tensor[start:stop].clone(),
        lambda start, stop: tensor[start:stop].numpy(),
    )


def assert_is(part: StoredTensor, expected: torch.Tensor) -> None:
    """Whole, raw, and in any run of rows."""
    assert part.shape == tuple(expected.shape)
    assert torch.equal(part.load(), expected)
    raw = part.raw()
    assert raw is not None
    assert torch.equal(torch.from_numpy(raw.copy()), expected)
    for start in range(len(expected)):
        for stop in range(start + 1, len(expected) + 1):
            assert torch.equal(part.read(start, stop), expected[start:stop])


@pytest.mark.parametrize("shape", [(12,), (12, 5)])
def test_thirds_of_a_fused_projection(shape: tuple[int, ...]) -> None:
    fused = torch.randn(shape)
    for index, expected in enumerate(fused.chunk(3)):
        assert_is(apply(Part("y", index, 3), stored(fused)), expected)


@pytest.mark.parametrize("num_experts", [1, 3])
def test_one_expert_of_a_stack(num_experts: int) -> None:
    stack = torch.randn(num_experts, 4, 5)
    for index in range(num_experts):
        assert_is(apply(Part("y", index, num_experts), stored(stack)), stack[index])


@pytest.mark.parametrize("shape", [(24,), (24, 5)])
def test_interleaved_rows(shape: tuple[int, ...]) -> None:
    """`permute` is what llama.cpp's conversion does to q and k."""
    heads = 3
    weight = torch.randn(shape)
    permute = weight.reshape(heads, 2, 4, *shape[1:]).swapaxes(1, 2).reshape(shape)
    assert not torch.equal(permute, weight)
    assert_is(apply(Part("y", interleaved=8), stored(permute)), weight)


def test_a_vector_as_a_row() -> None:
    vector = torch.randn(5)
    assert_is(apply(Part("y", as_row=True), stored(vector)), vector[None])
    assert_is(apply(Part("y", as_row=True), stored(vector[None])), vector[None])


@pytest.mark.parametrize(
    ("part", "shape"),
    [
        (Part("y", 0, 3), (4, 2)),
        (Part("y", 0, 3), (2, 3, 3)),
        (Part("y"), (2, 3, 3)),
        (Part("y", 0, 3), ()),
        (Part("y", interleaved=8), (12, 2)),
        (Part("y", interleaved=3), (12, 2)),
        (Part("y", interleaved=8), ()),
    ],
)
def test_shapes_that_do_not_divide_are_named(part: Part, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"tensor x: its .* does not divide"):
        apply(part, stored(torch.zeros(shape)))
