"""What becomes of a stored tensor when it is packed: the values of its own format, or rounded as the user chose."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf import quants as gguf_quants
from torch import nn

from qwenkit.linear.packed import PackedEmbedding, PackedLinear, packed_matrices
from qwenkit.ops import packed
from qwenkit.ops.packed import PackedWeight, dequantize
from qwenkit.weights import pack
from qwenkit.weights.gguf_file import read_gguf
from qwenkit.weights.load import load_model
from qwenkit.weights.pack import pack_stored, packing
from qwenkit.weights.stored import StoredTensor
from tests.tiny_models import tiny_reference


def stored(weight: torch.Tensor) -> StoredTensor:
    return StoredTensor("w", tuple(weight.shape), "F32", lambda start, stop: weight[start:stop].clone())


def stored_blocks(path: Path, values: np.ndarray, kind: str) -> tuple[StoredTensor, torch.Tensor]:
    """A tensor of a GGUF file, and what its values are by the gguf package."""
    number = GGMLQuantizationType[kind]
    blocks = gguf_quants.quantize(values, number)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", blocks, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = read_gguf(path).tensors()
    return tensor, torch.from_numpy(gguf_quants.dequantize(blocks, number))


def assert_same(found: PackedWeight, expected: PackedWeight) -> None:
    for name in ("bits", "rows", "cols", "group"):
        assert getattr(found, name) == getattr(expected, name), name
    for name in ("q", "scale", "offset", "row_scale"):
        left, right = getattr(found, name), getattr(expected, name)
        assert (left is None) == (right is None), name
        assert left is None or (left.dtype == right.dtype and torch.equal(left, right)), name


@pytest.mark.parametrize("chunk_rows", [4096, 32, 1])
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("rows", [70, 64, 1])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_blocks_of_a_gguf_keep_their_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, rows: int, bits: int, chunk_rows: int
) -> None:
    """Bit for bit, whatever packing was chosen."""
    monkeypatch.setattr(pack, "CHUNK_ELEMENTS", chunk_rows * 96)
    values = np.random.default_rng(rows).standard_normal((rows, 96), dtype=np.float32)
    tensor, expected = stored_blocks(tmp_path / "x.gguf", values, kind)
    weight = pack_stored(tensor, bits)
    assert (weight.bits, weight.rows, weight.cols, weight.group) == (4 if kind.startswith("Q4") else 8, rows, 96, 32)
    assert torch.equal(dequantize(weight), expected)


def test_other_quantized_types_become_bfloat16(tmp_path: Path) -> None:
    """Their values are not rounded a second time to 4 or 8 bits."""
    number = GGMLQuantizationType.Q6_K
    _, num_bytes = gguf.GGML_QUANT_SIZES[number]
    blocks = np.random.default_rng(0).integers(0, 256, (3, 2 * num_bytes), dtype=np.uint8)
    blocks.reshape(3, 2, num_bytes)[..., -2:] = np.array([0.01], dtype=np.float16).view(np.uint8)  # each block's scale
    values = torch.from_numpy(gguf_quants.dequantize(blocks, number))
    tensor = StoredTensor("w", (3, 512), "Q6_K", lambda i, j: values[i:j].clone(), lambda i, j: blocks[i:j])
    weight = pack_stored(tensor, 4)
    assert weight.bits == 16
    assert torch.equal(dequantize(weight), values.bfloat16().float())


@pytest.mark.parametrize("chunk_rows", [4096, 1, 32, 64])
@pytest.mark.parametrize("rows", [70, 128, 17])
@pytest.mark.parametrize(("bits", "group"), [(4, None), (4, 32), (8, None), (8, 32), (16, None)])
def test_plain_tensors_are_packed_as_chosen(
    monkeypatch: pytest.MonkeyPatch, bits: int, group: int | None, rows: int, chunk_rows: int
) -> None:
    """However many pieces they are read in."""
    monkeypatch.setattr(pack, "CHUNK_ELEMENTS", chunk_rows * 192)
    torch.manual_seed(rows)
    weight = torch.randn(rows, 192)
    expected = packed.pack_bfloat16(weight) if bits == 16 else packed.quantize(weight, bits, group)
    assert_same(pack_stored(stored(weight), bits, group), expected)


def saved(folder: Path, model_type: str, **changes: object) -> Path:
    tiny_reference(model_type, **({"intermediate_size": 64} | changes)).save_pretrained(folder)
    return folder


def loaded(folder: Path, weights: str) -> nn.Module:
    config = load_model(folder).config
    return load_model(folder, dtype=torch.float32, swaps=[packing(config, weights)])


@pytest.mark.parametrize(("weights", "bits", "head_bits"), [("bf16", 16, 16), ("int8", 8, 8), ("int4", 4, 8)])
def test_a_tied_head_and_its_embedding_are_one_matrix(tmp_path: Path, weights: str, bits: int, head_bits: int) -> None:
    model = loaded(saved(tmp_path, "qwen3"), weights)
    embedding, head = model.get_submodule("model.embed_tokens"), model.get_submodule("lm_head")
    assert isinstance(embedding, PackedEmbedding)
    assert isinstance(head, PackedLinear)
    assert embedding.matrix is head.matrix
    assert not list(model.get_submodule("lm_head").parameters())
    found = {name: matrix.weight.bits for name, matrix in packed_matrices(model).items()}
    assert found.pop("model.embed_tokens") == head_bits
    assert "lm_head" not in found
    assert set(found.values()) == {bits}
    assert len(found) == 3 * 7


@pytest.mark.parametrize(("weights", "group", "head_group"), [("int8", 32, 16), ("int4", 64, 64)])
def test_activations_are_rounded_in_short_groups_where_all_weights_have_eight_bits(
    tmp_path: Path, weights: str, group: int, head_group: int
) -> None:
    model = loaded(saved(tmp_path, "qwen2", hidden_size=64), weights)
    found = {name: matrix.weight.group for name, matrix in packed_matrices(model).items()}
    assert (found["model.layers.0.mlp.up_proj"], found["lm_head"]) == (group, head_group)


@pytest.mark.parametrize(
    ("weights", "heads", "bits"), [("int8", 3, 16), ("int8", 2, 8), ("int4", 3, 4), ("bf16", 3, 16)]
)
def test_few_values_keep_16_bits_beside_eight(tmp_path: Path, weights: str, heads: int, bits: int) -> None:
    sizes = {"hidden_size": 96, "num_attention_heads": heads, "num_key_value_heads": 1, "head_dim": 32}
    found = packed_matrices(loaded(saved(tmp_path, "qwen3", **sizes), weights))
    assert found["model.layers.1.self_attn.v_proj"].weight.bits == bits
    assert found["model.layers.1.self_attn.k_proj"].weight.bits == {"int8": 8, "int4": 4, "bf16": 16}[weights]


def test_an_untied_embedding_is_looked_up_in_bfloat16(tmp_path: Path) -> None:
    model = loaded(saved(tmp_path, "qwen2"), "int4")
    found = {name: matrix.weight.bits for name, matrix in packed_matrices(model).items()}
    assert (found["model.embed_tokens"], found["lm_head"], found["model.layers.0.mlp.up_proj"]) == (16, 8, 4)


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_routers_and_their_like_stay_as_they_are(tmp_path: Path, weights: str) -> None:
    sizes = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "mlp_only_layers": []}
    model = loaded(saved(tmp_path, "qwen2_moe", **sizes), weights)
    plain = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert plain == {f"model.layers.{i}.mlp.{gate}" for i in range(3) for gate in ("gate", "shared_expert_gate")}
    assert "model.layers.2.mlp.experts.5.down_proj" in packed_matrices(model)


def test_shapes_that_cannot_be_packed_stay_as_they_are(tmp_path: Path) -> None:
    """Rows of 56 inputs do not divide into groups of 32, but do into pairs."""
    folder = saved(tmp_path, "qwen3", intermediate_size=56)
    expected = load_model(folder)
    for weights, left in (("int4", 3), ("int8", 3), ("bf16", 0)):
        model = loaded(folder, weights)
        plain = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        assert len(plain) == left
        for name, module in plain.items():
            assert name.endswith("mlp.down_proj")
            assert torch.equal(module.weight, expected.get_parameter(f"{name}.weight"))
