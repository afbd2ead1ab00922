"""The JSON files of a model folder and of an adapter, mutated: what is opened is sane, everything else is one sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qwenkit import SamplingParams
from qwenkit.linear.lora import features, linears
from qwenkit.weights.adapter import read_whole_adapter
from qwenkit.weights.checkpoint import open_checkpoint
from qwenkit.weights.load import load_model
from tests.tiny_models import tiny_pair, write_model

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-2, 300)
    | st.sampled_from([2**31, 2**63, 10**30, -(10**30), 0.0, 0.5, 1e308])
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.sampled_from(["", "x", "gptq", "awq", "auto-round", "default", "{{ x }}", "<|im_end|>", "float16"])
    | st.text(max_size=3)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
QUANTIZATION = ["quant_method", "bits", "group_size", "checkpoint_format", "version", "dynamic", "packing_format"]
KEYS = {
    "config.json": ["eos_token_id", "bos_token_id", "dtype", "torch_dtype", "model_type", "quantization_config"],
    "generation_config.json": [
        *("eos_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "chat_format"),
        "max_window_size",
    ],
    "tokenizer_config.json": ["chat_template", "eos_token", "bos_token", "added_tokens_decoder", "tokenizer_class"],
    "model.safetensors.index.json": ["weight_map", "metadata"],
}
ADAPTER = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("mutated") / "model")


def open_everything(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert all(0 <= token < 2**31 for token in checkpoint.eos_token_ids)
    params = SamplingParams.from_generation_config(checkpoint.generation_config)
    assert params.temperature is not None
    assert all(isinstance(token, str) for token in checkpoint.named_tokens().values())
    checkpoint.chat()
    assert all(parameter.isfinite().all() for parameter in load_model(checkpoint).parameters())


def assert_opens_or_one_sentence(attempt: Callable[[], None]) -> None:
    try:
        attempt()
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        assert text
        assert "\n" not in text
        assert len(text) < 1000, text


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_file_of_a_model_folder(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(KEYS)))
    path, key = folder / name, data.draw(st.sampled_from(KEYS[name]))
    value = data.draw(values)
    if key == "quantization_config" and data.draw(st.booleans()):
        value = {inner: data.draw(values) for inner in data.draw(st.lists(st.sampled_from(QUANTIZATION), min_size=1))}
    before = path.read_bytes() if path.exists() else None
    single = folder / "model.safetensors"
    try:
        if before is None:
            single.rename(folder / "model-00001.safetensors")
        path.write_text(json.dumps((json.loads(before) if before else {"weight_map": {}}) | {key: value}))
        assert_opens_or_one_sentence(lambda: open_everything(folder))
    finally:
        if before is None:
            path.unlink()
            (folder / "model-00001.safetensors").rename(single)
        else:
            path.write_bytes(before)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(sorted(ADAPTER)), value=values)
def test_a_mutated_adapter_config(tmp_path: Path, key: str, value: Any) -> None:
    model = tiny_pair("qwen2")[1]
    name = "model.layers.0.self_attn.q_proj"
    inputs, outputs = features(linears(model)[name])
    prefix = f"base_model.model.{name}"
    pair = {f"{prefix}.lora_A.weight": torch.ones(2, inputs), f"{prefix}.lora_B.weight": torch.ones(outputs, 2)}
    save_file(pair, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER | {key: value}))
    shapes = {name: features(linear) for name, linear in linears(model).items()}
    sizes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def attempt() -> None:
        adapter = read_whole_adapter(tmp_path, shapes, sizes)
        update = adapter.updates[name]
        assert torch.tensor(update.scaling).isfinite()
        assert update.to(torch.device("cpu")).merged(torch.zeros(outputs, inputs)).isfinite().all()

    assert_opens_or_one_sentence(attempt)


@pytest.mark.parametrize("bad", [10**12, -1, True, 1.0, "7", [[1]], {"a": 1}])
def test_end_tokens_are_ids(folder: Path, bad: Any) -> None:
    path = folder / "generation_config.json"
    before = path.read_bytes()
    path.write_text(json.dumps({"eos_token_id": bad}))
    try:
        with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must be a token id or a list"):
            _ = open_checkpoint(folder).eos_token_ids
    finally:
        path.write_bytes(before)
