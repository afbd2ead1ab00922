"""What is trained, and what is saved of it: peft loads our adapters and we load peft's, with equal logits."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from qwenkit.linear.frozen import PackedBase
from qwenkit.linear.lora import LoRALinear, linears
from qwenkit.linear.nf4 import NF4Linear
from qwenkit.model.context import pack
from qwenkit.model.qwen import Qwen
from qwenkit.train.config import TrainConfig
from qwenkit.train.methods import prepare_model, save_trained, trainable_parameters
from qwenkit.train.targets import choose_linears
from qwenkit.weights.checkpoint import open_checkpoint
from qwenkit.weights.load import load_model
from tests.tiny_models import write_model, write_tokenizer
from tests.weights.test_gguf_model import random_model, tiny_config
from tests.weights.test_gguf_model import write as write_gguf
from tests.weights.test_gptq_awq import quantized_folder

PROMPT = [5, 9, 200, 31]
SIZES = {"hidden_size": 64, "intermediate_size": 128}


def config(folder: Path, **settings: Any) -> TrainConfig:
    return TrainConfig(**({"model": str(folder), "lora_rank": 4, "dtype": "float32"} | settings))


def prepared(folder: Path, **settings: Any) -> tuple[Qwen, TrainConfig]:
    chosen = config(folder, **settings)
    return prepare_model(chosen, open_checkpoint(folder), "cpu"), chosen


@torch.no_grad()
def shake(model: torch.nn.Module) -> None:
    """As if it had been trained: everything that wants a gradient moves."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.1)


@torch.no_grad()
def logits(model: Qwen) -> torch.Tensor:
    model.eval()
    return model.logits(model(*pack([PROMPT], model.config)))


@torch.no_grad()
def reference_logits(model: Any) -> torch.Tensor:
    return model.eval()(torch.tensor([PROMPT])).logits[0]


def load_with_peft(base: Path, adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return peft.PeftModel.from_pretrained(reference, adapter)


FORMS: dict[str, dict[str, Any]] = {
    "all": {},
    "some": {"lora_target": ("q_proj", "model.layers.1.mlp.down_proj", "*.2.*.up_proj")},
    "rslora and alpha": {"use_rslora": True, "lora_alpha": 3.0, "lora_dropout": 0.1},
    "dora": {"use_dora": True},
    "modules": {"modules_to_save": ("embed_tokens", "lm_head")},
    "dora and a norm": {"use_dora": True, "modules_to_save": ("model.norm",)},
    "every bias": {"lora_bias": "all", "lora_target": ("q_proj",)},
    "biases of adapters": {"lora_bias": "lora_only"},
    "head": {"lora_target": ("all", "lm_head")},
}


@pytest.mark.parametrize("form", FORMS)
def test_peft_loads_ours_and_so_do_we(tmp_path: Path, form: str) -> None:
    base, adapter = write_model(tmp_path / "base"), tmp_path / "adapter"
    model, chosen = prepared(base, **FORMS[form])
    before = logits(model)
    shake(model)
    after = logits(model)
    assert (after - before).abs().max() > 0.01
    save_trained(model, chosen, open_checkpoint(base), adapter)
    torch.testing.assert_close(reference_logits(load_with_peft(base, adapter)), after, atol=1e-5, rtol=1e-5)
    again, chosen = prepared(base, **(FORMS[form] | {"adapter": str(adapter)}))
    assert {name: p.shape for name, p in trainable_parameters(again).items()} == {
        name: p.shape for name, p in trainable_parameters(model).items()
    }
    torch.testing.assert_close(logits(again), after, atol=1e-6, rtol=1e-6)
    save_trained(again, chosen, open_checkpoint(base), tmp_path / "again")
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tied_embedding_and_head_are_saved_both(tmp_path: Path) -> None:
    base, adapter = write_model(tmp_path / "base", "llama"), tmp_path / "adapter"
    model, chosen = prepared(base, modules_to_save=("embed_tokens",))
    shake(model)
    save_trained(model, chosen, open_checkpoint(base), adapter)
    saved = json.loads((adapter / "adapter_config.json").read_text())
    assert saved["modules_to_save"] == ["lm_head", "model.embed_tokens"]
    torch.testing.assert_close(reference_logits(load_with_peft(base, adapter)), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 9}},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"], "use_rslora": True},
        {"target_modules": ["q_proj", "k_proj"], "bias": "lora_only", "use_dora": True},
        {"target_modules": ["o_proj"], "bias": "all"},
    ],
    ids=["patterns", "dora", "modules", "biases", "every bias"],
)
def test_we_load_what_peft_saves(tmp_path: Path, settings: dict[str, Any]) -> None:
    base, adapter = write_model(tmp_path / "base"), tmp_path / "adapter"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        reference = peft.get_peft_model(reference, peft.LoraConfig(**({"r": 4, "lora_alpha": 8} | settings)))
        shake(reference)
        reference.save_pretrained(adapter)
    expected = reference_logits(reference)
    model, _ = prepared(base, adapter=str(adapter))
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in trainable_parameters(model).values()) == sum(
        p.numel() for p in reference.parameters() if p.requires_grad
    )


def test_full_training_saves_a_model_that_loads(tmp_path: Path) -> None:
    for model_type in ("qwen2", "llama", "qwen3_moe"):
        base, output = write_model(tmp_path / model_type, model_type), tmp_path / f"{model_type}-trained"
        output.mkdir()
        (output / "trainer_log.jsonl").write_text("{}\n")
        (output / "model-00001-of-00009.safetensors").write_text("an older model")
        model, chosen = prepared(base, method="full", export_size="50KB")
        assert len(trainable_parameters(model)) == len(list(model.parameters()))
        shake(model)
        save_trained(model, chosen, open_checkpoint(base), output)
        assert (output / "trainer_log.jsonl").exists()
        assert not (output / "model-00001-of-00009.safetensors").exists()
        torch.testing.assert_close(logits(load_model(output)), logits(model))
        reference = transformers.AutoModelForCausalLM.from_pretrained(output)
        torch.testing.assert_close(reference_logits(reference), logits(model), atol=1e-5, rtol=1e-5)
        assert (output / "tokenizer.json").exists()


def test_freeze(tmp_path: Path) -> None:
    base = write_model(tmp_path)
    for settings, wanted in (
        ({"freeze_trainable_layers": 1}, lambda name: ".layers.2." in name),
        ({"freeze_trainable_layers": -2}, lambda name: ".layers.0." in name or ".layers.1." in name),
        ({"freeze_trainable": ("mlp", "model.norm")}, lambda name: ".mlp." in name or name == "model.norm.weight"),
        ({"freeze_trainable": ("model.layers.?.*bias",)}, lambda name: name.endswith("bias")),
    ):
        model, _ = prepared(base, method="freeze", **settings)
        assert set(trainable_parameters(model)) == {name for name, _ in model.named_parameters() if wanted(name)}


def test_targets_of_qwen1_and_of_experts(tmp_path: Path) -> None:
    model = load_model(write_model(tmp_path, "qwen2_moe"))
    chosen = choose_linears(model, ["all"])
    assert "lm_head" not in chosen
    assert not any(name.endswith(("gate", "shared_expert_gate")) for name in chosen)
    assert any(".experts.3.up_proj" in name for name in chosen)
    object.__setattr__(model.config, "model_type", "qwen")
    assert {name.split(".")[-1] for name in choose_linears(model, ["c_attn", "w1"])} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "up_proj",
    }


def test_qlora_keeps_its_base_in_four_bits(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", **SIZES)
    model, chosen = prepared(base, method="qlora")
    bases = [module.base for module in model.modules() if isinstance(module, LoRALinear)]
    assert len(bases) == 7 * 3
    assert all(isinstance(base, NF4Linear) for base in bases)
    loss = model.logits(model(*pack([PROMPT], model.config))).square().mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) is ("lora_" in name), name
    shake(model)
    save_trained(model, chosen, open_checkpoint(base), tmp_path / "adapter")
    again, _ = prepared(base, method="qlora", adapter=str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(again), logits(model))
    load_with_peft(base, tmp_path / "adapter")


def test_lora_over_gptq_keeps_it_packed(tmp_path: Path) -> None:
    base = tmp_path / "base"
    quantized_folder(base, "gptq")
    write_tokenizer(base)
    dequantized = logits(load_model(base, dtype=torch.float32))
    for method in ("lora", "qlora"):
        model, chosen = prepared(base, method=method)
        bases = [module.base for module in model.modules() if isinstance(module, LoRALinear)]
        assert len(bases) == 7 * 3
        assert all(isinstance(base, PackedBase) for base in bases)
        torch.testing.assert_close(logits(model), dequantized, atol=1e-4, rtol=1e-4)
        model.logits(model(*pack([PROMPT], model.config))).square().mean().backward()
        assert all(parameter.grad is not None for parameter in trainable_parameters(model).values())
    save_trained(model, chosen, open_checkpoint(base), tmp_path / "adapter")
    with pytest.raises(
        ValueError, match="quantized by GPTQ or AWQ, whose matrices cannot be trained; allowed are lora"
    ):
        prepared(base, method="full")


def test_qlora_over_a_gguf_keeps_its_own_four_bits(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, random_model(tiny_config("llama")), kind="Q4_1")
    dequantized = logits(load_model(path, dtype=torch.float32))
    model, _ = prepared(path, method="qlora")
    bases = [module.base for module in model.modules() if isinstance(module, LoRALinear)]
    assert bases
    assert all(isinstance(base, PackedBase) and base.packed.bits == 4 for base in bases)
    torch.testing.assert_close(logits(model), dequantized, atol=1e-4, rtol=1e-4)
    model, _ = prepared(path, method="lora")
    assert not any(isinstance(module, PackedBase) for module in model.modules())


def test_a_reward_model_is_one_of_transformers(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    ids = torch.tensor([PROMPT])
    for method in ("full", "lora"):
        output = tmp_path / method
        model, chosen = prepared(base, stage="rm", method=method)
        assert "lm_head.weight" not in trainable_parameters(model)
        shake(model)
        with torch.no_grad():
            score = model.score(model.eval()(*pack([PROMPT], model.config)))[-1]  # type: ignore[operator]
        save_trained(model, chosen, open_checkpoint(base), output)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            source = output if method == "full" else base
            reference = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
            reference = reference if method == "full" else peft.PeftModel.from_pretrained(reference, output)
            torch.testing.assert_close(reference.eval()(ids).logits[0], score, atol=1e-5, rtol=1e-5)
        again, _ = (
            prepared(output if method == "full" else base, stage="rm", method=method)
            if method == "full"
            else (prepared(base, stage="rm", method="lora", adapter=str(output)))
        )
        with torch.no_grad():
            torch.testing.assert_close(again.score(again.eval()(*pack([PROMPT], again.config)))[-1], score)  # type: ignore[operator]


def test_the_seed_decides_the_adapter(tmp_path: Path) -> None:
    base = write_model(tmp_path)
    torch.manual_seed(7)
    first, second, other = (prepared(base, seed=seed)[0] for seed in (1, 1, 2))
    name = next(name for name in trainable_parameters(first) if "lora_A" in name)
    assert torch.equal(first.get_parameter(name), second.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


def test_ranks_that_do_not_write_gather_all_the_same(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    for method in ("full", "lora"):
        model, chosen = prepared(base, method=method)
        save_trained(model, chosen, open_checkpoint(base), tmp_path / "nothing", writes=False)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"lora_target": ("query_key_value",)},
            "lora_target has 'query_key_value', which meets nothing in this model; its names are made",
        ),
        ({"lora_target": ("embed_tokens",)}, "embed_tokens, which is no Linear; train it whole by modules_to_save"),
        ({"lora_rank": 64}, "lora_rank is 64, allowed are 1 to 32 for model.layers.0.self_attn.q_proj"),
        ({"modules_to_save": ("q_proj",)}, "meets model.layers.0.self_attn.q_proj"),
        ({"method": "freeze", "freeze_trainable_layers": 9}, "freeze_trainable_layers is 9, allowed are 1 to 3, or -1"),
        ({"method": "freeze", "freeze_trainable": ("nothing",)}, "freeze_trainable has 'nothing', which meets nothing"),
        ({"method": "full", "adapter": "x"}, "adapter is 'x', but method is 'full'; allowed are lora and qlora"),
    ],
)
def test_what_does_not_fit_the_model(tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        prepared(write_model(tmp_path), **settings)
    assert "\n" not in str(caught.value)


def test_an_adapter_that_unties_a_tied_model(tmp_path: Path) -> None:
    base, adapter = write_model(tmp_path / "base", "llama"), tmp_path / "adapter"
    model, chosen = prepared(base, modules_to_save=("embed_tokens",))
    save_trained(model, chosen, open_checkpoint(base), adapter)
    change_tensor(adapter, "base_model.model.lm_head.weight", lambda tensor: tensor + 1)
    with pytest.raises(ValueError, match="has an embedding and a head that differ, but this model ties them"):
        prepared(base, adapter=str(adapter))


def change_tensor(adapter: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    from safetensors.torch import save_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(tensors | {name: change(tensors[name])}, adapter / "adapter_model.safetensors")


def test_names_of_all_linears(tmp_path: Path) -> None:
    model, _ = prepared(write_model(tmp_path))
    assert all(isinstance(linear, LoRALinear) for name, linear in linears(model).items() if name != "lm_head")
