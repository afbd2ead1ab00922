"""Checkpoints of GPTQ and AWQ: written here in plain numpy as their formats are documented, with their values by definition."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qwenkit import LLM
from qwenkit.linear.packed import packed_matrices
from qwenkit.model.config import ModelConfig
from qwenkit.model.context import pack
from qwenkit.ops.packed import PackedWeight, dequantize
from qwenkit.weights.checkpoint import open_checkpoint
from qwenkit.weights.gptq_awq import Quantization, with_weights
from qwenkit.weights.load import load_model
from qwenkit.weights.pack import pack_stored, packing
from qwenkit.weights.repacked import load_packed
from qwenkit.weights.stored import StoredTensor
from tests.tiny_models import tiny_reference, write_model, write_tokenizer

SIZES = {"hidden_size": 64, "intermediate_size": 128}
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # the column that each nibble of a word holds


@dataclass
class Codes:
    """A quantized matrix: codes (in, out), zeros and scales (groups, out), the group of each input."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    group_of: np.ndarray

    @property
    def values(self) -> torch.Tensor:
        """(out, in) in fp64, input by input."""
        rows = [
            (self.codes[k].astype(np.float64) - self.zeros[g]) * self.scales[g].astype(np.float64)
            for k, g in enumerate(self.group_of)
        ]
        return torch.from_numpy(np.stack(rows).T.copy())


def random_codes(
    inputs: int, outputs: int, bits: int, group: int, *, sym: bool, shuffle: bool = False, seed: int = 0
) -> Codes:
    rng = np.random.default_rng(seed)
    size = inputs if group == -1 else group
    groups = -(-inputs // size)
    group_of = np.arange(inputs) // size
    if shuffle:
        rng.shuffle(group_of)
    zeros = np.full((groups, outputs), 2 ** (bits - 1)) if sym else rng.integers(1, 2**bits, (groups, outputs))
    scales = (rng.random((groups, outputs)) * 0.02 + 0.001).astype(np.float16)
    return Codes(rng.integers(0, 2**bits, (inputs, outputs)), zeros, scales, group_of)


def words(values: np.ndarray, bits: int, axis: int, order: list[int] | None = None) -> torch.Tensor:
    """Consecutive values along an axis in int32 words, one at a time: value `order[j]` of each word at bit j * bits."""
    values = np.moveaxis(values, axis, -1).astype(np.uint64)
    count = 32 // bits
    out = np.zeros((values.shape[0], values.shape[1] // count), dtype=np.uint64)
    for j, place in enumerate(order or range(count)):
        out |= values[:, place::count] << np.uint64(j * bits)
    packed = out.astype(np.uint32).view(np.int32)
    return torch.from_numpy(np.ascontiguousarray(packed.T if axis == 0 else packed))


def gptq_tensors(codes: Codes, bits: int, *, v2: bool = False, g_idx: bool = True) -> dict[str, torch.Tensor]:
    stored_zeros = codes.zeros if v2 else (codes.zeros - 1) % 2**bits
    parts = {
        "qweight": words(codes.codes, bits, 0),
        "qzeros": words(stored_zeros, bits, 1),
        "scales": torch.from_numpy(codes.scales),
        "g_idx": torch.from_numpy(codes.group_of.astype(np.int32)),
    }
    return parts if g_idx else {name: part for name, part in parts.items() if name != "g_idx"}


def awq_tensors(codes: Codes) -> dict[str, torch.Tensor]:
    return {
        "qweight": words(codes.codes, 4, 1, AWQ_ORDER),
        "qzeros": words(codes.zeros, 4, 1, AWQ_ORDER),
        "scales": torch.from_numpy(codes.scales),
    }


NAMES = {torch.int32: "I32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


def as_stored(parts: dict[str, torch.Tensor], prefix: str = "m") -> list[StoredTensor]:
    def one(name: str, tensor: torch.Tensor) -> StoredTensor:
        return StoredTensor(
            f"{prefix}.{name}", tuple(tensor.shape), NAMES[tensor.dtype], lambda i, j: tensor[i:j].clone()
        )

    return [one(name, tensor) for name, tensor in parts.items()]


def weight_of(parts: dict[str, torch.Tensor], quantization: Quantization) -> StoredTensor:
    (weight,) = with_weights(Path("folder"), as_stored(parts), quantization)
    assert weight.name == "m.weight"
    return weight


def assert_packed(found: PackedWeight, codes: Codes, bits: int, *, exact: bool) -> None:
    """The values that the kernels compute with: exact, or with offsets that fp16 rounds."""
    values = dequantize(found).double()
    assert found.bits == bits
    if exact:
        assert torch.equal(values, codes.values)
        return
    scales = torch.from_numpy(codes.scales.astype(np.float64))[codes.group_of].T
    zeros = torch.from_numpy(codes.zeros.astype(np.float64))[codes.group_of].T
    bound = scales * zeros * 2.0**-11 + 1e-6 * values.abs()
    assert ((values - codes.values).abs() <= bound).all()
    assert (bound <= scales * (0.0075 if bits == 4 else 0.13)).all()


@given(
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([32, 64, 128, 256, -1]),
    sym=st.booleans(),
    v2=st.booleans(),
    g_idx=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gptq_is_read_exactly(bits: int, group: int, sym: bool, v2: bool, g_idx: bool, seed: int) -> None:
    codes = random_codes(256, 40, bits, group, sym=sym, seed=seed)
    stored = weight_of(gptq_tensors(codes, bits, v2=v2, g_idx=g_idx), Quantization("gptq", bits, group, 0 if v2 else 1))
    assert torch.equal(stored.load().double(), codes.values)
    assert torch.equal(stored.read(7, 33).double(), codes.values[7:33])
    weight = pack_stored(stored, 16)
    assert weight.group == min(128, 256 if group == -1 else group)
    assert_packed(weight, codes, bits, exact=sym)


@given(group=st.sampled_from([32, 64, 128, -1]), seed=st.integers(0, 99), start=st.integers(0, 39))
def test_awq_is_read_exactly(group: int, seed: int, start: int) -> None:
    codes = random_codes(256, 40, 4, group, sym=False, seed=seed)
    stored = weight_of(awq_tensors(codes), Quantization("awq", 4, group))
    assert torch.equal(stored.load().double(), codes.values)
    assert torch.equal(stored.read(start, 40).double(), codes.values[start:])
    assert_packed(pack_stored(stored, 4), codes, 4, exact=False)


def test_a_last_group_may_be_short() -> None:
    """320 inputs in groups of 128: the runs that every group is made of are 64 long."""
    codes = random_codes(320, 32, 4, 128, sym=True)
    assert codes.scales.shape[0] == 3
    weight = pack_stored(weight_of(gptq_tensors(codes, 4), Quantization("gptq", 4, 128, 1)), 8)
    assert weight.group == 64
    assert_packed(weight, codes, 4, exact=True)


def test_zero_points_wrap_around_as_writers_wrote_them() -> None:
    """The first format stores the zero point 0 as 15, and a reader's 15 + 1 is 0 again; AutoGPTQ's own words."""
    codes = random_codes(32, 8, 4, 32, sym=False)
    codes.zeros[0] = [0, 5, 9, 3, 0, 8, 15, 1]
    parts = gptq_tensors(codes, 4)
    assert parts["qzeros"].numpy().view(np.uint32)[0, 0] == 0x0E7F284F
    stored = weight_of(parts, Quantization("gptq", 4, 32, 1))
    assert torch.equal(stored.load().double(), codes.values)
    symmetric = gptq_tensors(random_codes(32, 8, 4, 32, sym=True), 4)["qzeros"]
    assert symmetric.tolist() == [[0x77777777]]


def test_shuffled_groups_are_read_and_packed_in_16_bits(caplog: pytest.LogCaptureFixture) -> None:
    codes = random_codes(128, 40, 4, 32, sym=True, shuffle=True)
    with caplog.at_level(logging.WARNING):
        stored = weight_of(gptq_tensors(codes, 4), Quantization("gptq", 4, 32, 1))
    assert "1 quantized matrices (the first is m.weight) have groups that are no runs of inputs" in caplog.text
    assert torch.equal(stored.load().double(), codes.values)
    weight = pack_stored(stored, 4)
    assert weight.bits == 16
    assert torch.equal(dequantize(weight), codes.values.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_that_fp16_cannot_hold(dtype: torch.dtype) -> None:
    """Packed codes need scales in fp16; others are kept by packing 16 bits."""
    codes = random_codes(64, 8, 4, 32, sym=True)
    parts = gptq_tensors(codes, 4)
    held = parts["scales"] = parts["scales"].to(dtype)
    quantization = Quantization("gptq", 4, 32, 1)
    codes.scales = held.float().numpy()
    assert pack_stored(weight_of(parts, quantization), 8).bits == 4
    parts["scales"] = held * torch.tensor(1e-7).to(dtype)
    codes.scales = parts["scales"].float().numpy()
    stored = weight_of(parts, quantization)
    assert torch.equal(stored.load(), codes.values.float())
    assert pack_stored(stored, 8).bits == 16


def test_bits_of_a_single_matrix() -> None:
    """GPTQModel's `dynamic` gives some matrices other bits and groups."""
    quantization = Quantization.of(
        Path("x"), {"quantization_config": {"quant_method": "gptq", "dynamic": {"+:m": {"bits": 8}}}}
    )
    assert quantization == Quantization("gptq", 4, 128, 1, mixed=True)
    codes = random_codes(64, 32, 8, 32, sym=True)
    assert_packed(pack_stored(weight_of(gptq_tensors(codes, 8), quantization), 4), codes, 8, exact=True)


GPTQ = {"quant_method": "gptq", "bits": 4}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "data_type": "int"}


@pytest.mark.parametrize(
    ("given_config", "expected"),
    [
        (GPTQ, Quantization("gptq", 4, 128, 1)),
        (GPTQ | {"bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"}, Quantization("gptq", 8, -1, 0)),
        (GPTQ | {"format": "gptq_v2"}, Quantization("gptq", 4, 128, 0)),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"}, Quantization("awq", 4, 64)),
        (AUTO_ROUND | {"packing_format": "auto_round:auto_gptq"}, Quantization("gptq", 4, 128, 1)),
        (AUTO_ROUND | {"backend": "auto_round:gptq"}, Quantization("gptq", 4, 128, 1)),
        (AUTO_ROUND | {"packing_format": "auto_round:auto_awq"}, Quantization("awq", 4, 128)),
        (
            AUTO_ROUND | {"packing_format": "auto_round:auto_gptq", "extra_config": {"m": {"bits": 8}}},
            Quantization("gptq", 4, 128, 1, mixed=True),
        ),
    ],
)
def test_quantization_config(given_config: dict[str, Any], expected: Quantization, tmp_path: Path) -> None:
    assert Quantization.of(tmp_path, {"quantization_config": given_config}) == expected
    assert Quantization.of(tmp_path, {}) is None
    (tmp_path / "quantize_config.json").write_text(json.dumps(given_config))
    assert Quantization.of(tmp_path, {}) == expected


@pytest.mark.parametrize(
    ("given_config", "sentence"),
    [
        ("gptq", "must be an object, found 'gptq'"),
        ({"quant_method": "fp8"}, "quant_method is 'fp8', allowed is gptq or awq or auto-round"),
        ({"bits": 4}, "quant_method is None, allowed is"),
        ({"quant_method": ["gptq"]}, r"quant_method is \['gptq'\]"),
        (AUTO_ROUND, "packing_format is None, allowed is 'auto_round:auto_gptq'"),
        (AUTO_ROUND | {"packing_format": "auto_round"}, "packing_format is 'auto_round', allowed is"),
        (AUTO_ROUND | {"packing_format": "auto_gptq", "data_type": "mx_fp"}, "data_type is 'mx_fp', allowed is 'int'"),
        (GPTQ | {"group_size": 10**30}, "group_size is 1000.*, allowed are -1 and"),
        (GPTQ | {"bits": 3}, "bits is 3, allowed are 4 and 8"),
        (GPTQ | {"bits": "4"}, "bits is '4', a whole number is needed"),
        (GPTQ | {"group_size": 0}, "group_size is 0, allowed are -1 and"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin', allowed are gptq, gptq_v2"),
        (GPTQ | {"is_marlin_format": True}, "checkpoint_format is 'marlin'"),
        ({"quant_method": "awq", "bits": 8}, "bits is 8, allowed are 4"),
        ({"quant_method": "awq", "version": "gemv"}, "version is 'gemv', allowed is 'gemm'"),
    ],
)
def test_quantizations_that_cannot_be_read(given_config: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        Quantization.of(tmp_path, {"quantization_config": given_config})


def test_parts_that_do_not_fit() -> None:
    def attempt(change: Callable[[dict[str, torch.Tensor]], None], sentence: str) -> None:
        parts = gptq_tensors(random_codes(64, 32, 4, 32, sym=True), 4)
        change(parts)
        with pytest.raises(ValueError, match=sentence):
            weight_of(parts, Quantization("gptq", 4, 32, 1))

    attempt(lambda parts: parts.pop("qzeros").sum(), r"m\.qzeros is missing, but m\.qweight is there")
    attempt(lambda parts: parts.update(qweight=parts["qweight"][:, :9]), "parts that do not fit 4 bits: qweight")
    attempt(lambda parts: parts.update(qweight=parts["qweight"][:5]), "parts that do not fit 4 bits")
    attempt(lambda parts: parts.update(g_idx=parts["g_idx"] + 1), "has 2 groups, but its inputs name groups 1 to 2")
    attempt(lambda parts: parts.update(g_idx=parts["g_idx"] - 1), "name groups -1 to 0")
    attempt(
        lambda parts: parts.update(scales=parts["scales"][0]), r"m\.scales is F16 of shape \[32\], allowed is F16 or"
    )
    attempt(lambda parts: parts.update(qweight=parts["qweight"].float()), r"m\.qweight is F32")
    attempt(lambda parts: parts.update(scales=parts["scales"][:, :0]), r"m\.scales is F16 of shape \[2, 0\]")


def quantized_folder(
    folder: Path, method: str, bits: int = 4, *, sym: bool = True, shuffle: bool = False, model_type: str = "qwen2"
) -> dict[str, Codes]:
    """A model's folder with every Linear of its layers quantized, and what they hold."""
    sizes = SIZES | ({"moe_intermediate_size": 32} if "moe" in model_type else {})
    tiny_reference(model_type, **sizes).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    held: dict[str, Codes] = {}
    for name, tensor in list(tensors.items()):
        if not name.endswith("proj.weight"):
            tensors[name] = tensor.half()
            continue
        module = name.removesuffix(".weight")
        outputs, inputs = tensors.pop(name).shape
        codes = held[module] = random_codes(inputs, outputs, bits, 32, sym=sym, shuffle=shuffle, seed=len(held))
        parts = awq_tensors(codes) if method == "awq" else gptq_tensors(codes, bits)
        tensors |= {f"{module}.{part}": value for part, value in parts.items()}
        if method == "gptq":  # AutoGPTQ's habit
            tensors.setdefault(f"{module}.bias", torch.zeros(outputs, dtype=torch.float16))
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float16"
    config["quantization_config"] = {
        "quant_method": method,
        "bits": bits,
        "group_size": 32,
        "sym": sym,
        "desc_act": shuffle,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return held


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
@pytest.mark.parametrize(("method", "bits"), [("gptq", 4), ("gptq", 8), ("awq", 4)])
def test_a_model_keeps_its_own_values(tmp_path: Path, method: str, bits: int, weights: str) -> None:
    """As float and packed; and the same again from the packed file."""
    held = quantized_folder(tmp_path / "model", method, bits, sym=method == "gptq")
    model = load_model(tmp_path / "model")
    assert model.lm_head.weight.dtype == torch.float32
    for name, codes in held.items():
        assert torch.equal(model.get_submodule(name).weight.double(), codes.values)  # type: ignore[union-attr,operator]
    for _ in range(2):
        packed = load_packed(open_checkpoint(tmp_path / "model"), weights, tmp_path / "cache", smallest=0)
        matrices = packed_matrices(packed)
        for name, codes in held.items():
            assert_packed(matrices[name].weight, codes, bits, exact=method == "gptq")
        assert matrices["lm_head"].weight.bits == (16 if weights == "bf16" else 8)
    if weights == "bf16":
        with torch.no_grad():
            logits = [each.logits(each(*pack([[1, 2, 3]], each.config))) for each in (model, packed)]
        assert torch.cosine_similarity(*logits).min() > 0.999


def test_experts(tmp_path: Path) -> None:
    held = quantized_folder(tmp_path, "gptq", model_type="qwen3_moe")
    config = ModelConfig.from_dict(open_checkpoint(tmp_path).config)
    matrices = packed_matrices(load_model(tmp_path, dtype=torch.float32, swaps=[packing(config, "int8")]))
    assert sum("experts" in name for name in held) == 3 * 6 * 3
    for name, codes in held.items():
        assert_packed(matrices[name].weight, codes, 4, exact=True)


def test_an_answer_is_that_of_the_float_model(tmp_path: Path) -> None:
    """Act-order's shuffled groups included."""
    for shuffle in (False, True):
        folder = tmp_path / str(shuffle)
        quantized_folder(folder, "gptq", shuffle=shuffle)
        write_tokenizer(folder)
        model = load_model(folder)
        expected = tmp_path / f"{shuffle}-float"
        write_model(expected, **SIZES)
        save_file(dict(model.state_dict()), expected / "model.safetensors")
        answers = [
            LLM(path, weights="float", dtype="float32", kv_memory="1MiB").generate([1, 2, 3])
            for path in (folder, expected)
        ]
        assert answers[0][0].completions[0].token_ids == answers[1][0].completions[0].token_ids


def test_the_first_qwen(tmp_path: Path) -> None:
    """c_attn is cut into thirds of its outputs, codes and all."""
    codes = random_codes(64, 96, 4, 32, sym=True)
    tensors = {f"transformer.h.0.attn.c_attn.{part}": value for part, value in gptq_tensors(codes, 4).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"model_type": "qwen", "quantization_config": GPTQ | {"group_size": 32}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for place, stored in enumerate(open_checkpoint(tmp_path).tensors()):
        assert stored.name == f"model.layers.0.self_attn.{'qkv'[place]}_proj.weight"
        third = codes.values[32 * place : 32 * place + 32]
        assert torch.equal(stored.load().double(), third)
        assert torch.equal(dequantize(pack_stored(stored, 4)).double(), third)


def test_a_bias_that_is_not_zero_is_not_dropped(tmp_path: Path) -> None:
    quantized_folder(tmp_path, "gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.bias"][3] = 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 surplus: model\.layers\.1\.mlp\.up_proj\.bias"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gptq_model-4bit-32g.safetensors", {}),
        ("qwen-int4.safetensors", {"model_file_base_name": "qwen-int4"}),
        ("model.safetensors", {"model_file_base_name": "qwen-int4"}),
    ],
)
def test_files_under_other_names(name: str, said: dict[str, str], tmp_path: Path) -> None:
    """AutoGPTQ's own, and what its configuration says."""
    held = quantized_folder(tmp_path, "gptq")
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config") | said))
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_model(tmp_path)
    for module, codes in held.items():
        assert torch.equal(model.get_submodule(module).weight.double(), codes.values)  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("name", ["../model", "", "a/b", 7])
def test_file_names_that_lead_elsewhere(name: object, tmp_path: Path) -> None:
    config = {"quantization_config": GPTQ | {"model_file_base_name": name}}
    with pytest.raises(ValueError, match=r"model_file_base_name is .*, which is no plain file name"):
        Quantization.of(tmp_path, config)
