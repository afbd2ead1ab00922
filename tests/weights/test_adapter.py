"""LoRA adapters on disk: what peft saves computes here what it computes there, and what does not fit is refused in a sentence."""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenkit.linear.lora import AdaptedLinear, Routing, features, linears, put
from qwenkit.model.context import pack
from qwenkit.model.qwen import Qwen
from qwenkit.weights.adapter import read_adapter
from tests.tiny_models import tiny_pair


def shapes_of(model: Qwen) -> dict[str, tuple[int, int]]:
    return {name: features(linear) for name, linear in linears(model).items()}


def save_adapter(reference: Any, folder: Path, seed: int = 1, **settings: Any) -> Any:
    """A random adapter by peft, saved; and the peft model, which changes the reference in place."""
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | settings))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # peft asks transformers in a way that transformers wants to leave behind
        model = peft.get_peft_model(reference, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


FORMS: dict[str, dict[str, Any]] = {
    "list": {},
    "expression": {"target_modules": r".*\.(0|2)\.self_attn\.(q|v)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "ranks": {
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {"k_proj": 2, "^model.layers.1.mlp.up_proj": 7},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 32, "up_proj": 3},
    },
    "taken away": {"lora_alpha": -8},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "some layers": {"layers_to_transform": [1]},
    "dropout": {"lora_dropout": 0.5, "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("form", FORMS)
def test_it_computes_what_peft_computes(tmp_path: Path, form: str) -> None:
    reference, model = tiny_pair("qwen2")
    expected = save_adapter(reference, tmp_path, **FORMS[form])
    updates = read_adapter(tmp_path, shapes_of(model))
    for name, update in updates.items():
        linear = AdaptedLinear(model.get_submodule(name), Routing((("x", None),)))
        linear.updates["x"] = update
        put(model, name, linear)
    prompt = [5, 9, 200, 31]
    with torch.no_grad():
        logits = model.logits(model(*pack([prompt], model.config)))
        torch.testing.assert_close(logits, expected(torch.tensor([prompt])).logits[0], atol=1e-5, rtol=1e-5)
        with expected.disable_adapter():
            assert (logits - expected(torch.tensor([prompt])).logits[0]).abs().max() > 0.01


def test_names_of_the_first_qwen(tmp_path: Path) -> None:
    """One update of c_attn is three of ours, which share lora_A; w2 is the gate."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 32), torch.randn(96, 2)
    tensors = {"attn.c_attn.lora_A": a, "attn.c_attn.lora_B": b, "mlp.w2.lora_A": a, "mlp.w2.lora_B": b[:48]}
    prefix = "base_model.model.transformer.h.0."
    save_file(
        {f"{prefix}{name}.weight": tensor.contiguous().clone() for name, tensor in tensors.items()},
        tmp_path / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["c_attn", "w2"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    attention = {f"model.layers.0.self_attn.{x}_proj": (32, 32) for x in "qkv"}
    updates = read_adapter(tmp_path, attention | {"model.layers.0.mlp.gate_proj": (32, 48)}, qwen1=True)
    assert len(updates) == 4
    for place, name in enumerate(attention):
        torch.testing.assert_close(updates[name].matrix(), 3 * (b[32 * place : 32 * place + 32] @ a))
    torch.testing.assert_close(updates["model.layers.0.mlp.gate_proj"].matrix(), 3 * (b[:48] @ a))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, int]]]:
    folder = tmp_path_factory.mktemp("adapter")
    reference, model = tiny_pair("qwen2")
    save_adapter(reference, folder)
    return folder, shapes_of(model)


def changed_config(key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return change


def changed_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")

    return rewrite


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
SECOND = FIRST.replace("lora_A", "lora_B")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (changed_config("peft_type", "IA3"), "peft_type is 'IA3', allowed is 'LORA'"),
        (changed_config("use_dora", True), "use_dora is True, but DoRA is not supported"),
        (changed_config("modules_to_save", ["lm_head"]), r"modules_to_save is \['lm_head'\], but whole modules"),
        (changed_config("lora_bias", True), "lora_bias is True"),
        (changed_config("trainable_token_indices", [1]), "trained token embeddings"),
        (changed_config("bias", "all"), "bias is 'all', allowed is 'none'"),
        (changed_config("init_lora_weights", "pissa"), "init_lora_weights is 'pissa', which changes the model's own"),
        (changed_config("use_rslora", "yes"), "use_rslora is 'yes', allowed are true and false"),
        (changed_config("r", 0), "r is 0, allowed is a whole number from 1"),
        (changed_config("r", 1024), "the rank is 1024, allowed are 1 to 512"),
        (changed_config("lora_alpha", "8"), "lora_alpha is '8', allowed is a number from -1e\\+09 to 1e\\+09"),
        (changed_config("lora_alpha", float("nan")), "'lora_alpha' is nan"),
        (changed_config("target_modules", 3), "target_modules is 3, allowed is a list of names or a string"),
        (changed_config("target_modules", ["q_proj"]), "mlp.down_proj, which target_modules does not name"),
        (changed_config("alpha_pattern", {"(a+)+": 1}), r"alpha_pattern has the key '\(a\+\)\+', allowed are names"),
        (changed_config("alpha_pattern", [1]), r"alpha_pattern is \[1\], allowed is an object"),
        (changed_config("rank_pattern", {"q_proj": 2.5}), "rank_pattern.q_proj is 2.5, allowed is a whole number"),
        (changed_config("rank_pattern", {"q_proj": 2}), r"q_proj has lora_A \[4, 32\] .* rank 2 need \[2, 32\]"),
        (
            changed_tensors(lambda t: t.update({FIRST: t[FIRST][:, :5]})),
            r"lora_A \[4, 5\] .* need \[4, 32\] and \[32, 4\]",
        ),
        (changed_tensors(lambda t: t.update({SECOND: t[SECOND][:5]})), r"lora_B \[5, 4\], the model and rank 4 need"),
        (
            changed_tensors(lambda t: t.pop(SECOND)),
            "has lora_A of model.layers.0.self_attn.q_proj but not the other half",
        ),
        (changed_tensors(lambda t: t.clear()), "has no tensors"),
        (changed_tensors(lambda t: t.update({FIRST: t[FIRST] / 0})), "has values that are not finite"),
        (changed_tensors(lambda t: t.update({FIRST: t[FIRST].int()})), "is I32, allowed are F32"),
        (
            changed_tensors(
                lambda t: t.update({FIRST.replace("lora_A.weight", "lora_magnitude_vector"): t[FIRST].clone()})
            ),
            "lora_magnitude_vector is not supported, allowed are",
        ),
        (
            changed_tensors(lambda t: t.update({"q.lora_C.weight": t.pop(FIRST)})),
            r"tensor q\.lora_C\.weight is not supported",
        ),
        (
            changed_tensors(lambda t: t.update({n.replace("s.0", "s.7"): t.pop(n) for n in (FIRST, SECOND)})),
            r"model\.layers\.7\.self_attn\.q_proj, but the model has no such Linear",
        ),
        (lambda f: (f / "adapter_config.json").write_text("{"), "is not valid JSON"),
        (
            lambda f: (f / "adapter_config.json").write_text(" " * (2 << 20)),
            "has 2,097,152 bytes, allowed are at most 1,048,576",
        ),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 99), "no safetensors file"),
        (
            lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
            "adapter_model.bin is truncated, or no file that torch.save",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, saved: tuple[Path, dict[str, tuple[int, int]]], change: Callable[[Path], Any], sentence: str
) -> None:
    folder, shapes = saved
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    read_adapter(tmp_path, shapes)
    change(tmp_path)
    with pytest.raises(ValueError, match=sentence) as caught:
        read_adapter(tmp_path, shapes)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_files_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json, so it is no adapter"):
        read_adapter(tmp_path, {})
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": []}')
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors"):
        read_adapter(tmp_path, {})


def test_a_file_larger_than_any_adapter(tmp_path: Path, saved: tuple[Path, dict[str, tuple[int, int]]]) -> None:
    folder = shutil.copytree(saved[0], tmp_path / "large")
    os.truncate(folder / "adapter_model.safetensors", 1 << 40)  # sparse: nothing is written
    with pytest.raises(ValueError, match="bytes, but an adapter of this model has at most"):
        read_adapter(folder, saved[1])
