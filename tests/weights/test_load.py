"""The birth of a model: every parameter filled with what the file says, or one sentence about why not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qwenkit.model.config import ModelConfig
from qwenkit.model.context import pack
from qwenkit.model.qwen import Qwen
from qwenkit.weights.checkpoint import StoredTensor, open_checkpoint
from qwenkit.weights.load import load_model
from tests.tiny_models import FAMILIES, tiny_pair, tiny_reference


def save(folder: Path, model_type: str = "qwen2", **changes: Any) -> Path:
    tiny_reference(model_type, **changes).save_pretrained(folder)
    return folder


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def assert_equal(model: Qwen, expected: Qwen) -> None:
    assert model.config == expected.config
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert parameters.keys() == dict(expected.named_parameters(remove_duplicate=False)).keys()
    for name, parameter in parameters.items():
        assert parameter.device.type == "cpu"
        assert torch.equal(parameter, expected.get_parameter(name)), name


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_folder_that_transformers_saved(tmp_path: Path, model_type: str) -> None:
    _, expected = tiny_pair(model_type)
    model = load_model(save(tmp_path, model_type))
    assert_equal(model, expected)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings


def test_shards_torch_files_and_preference(tmp_path: Path) -> None:
    reference, expected = tiny_pair("qwen2")
    reference.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert_equal(load_model(tmp_path / "shards"), expected)
    (tmp_path / "bin").mkdir()
    reference.config.save_pretrained(tmp_path / "bin")
    torch.save(reference.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    assert_equal(load_model(str(tmp_path / "bin")), expected)
    (tmp_path / "shards" / "pytorch_model.bin").write_bytes(b"never read")
    assert_equal(load_model(open_checkpoint(tmp_path / "shards")), expected)


def test_dtype(tmp_path: Path) -> None:
    tiny_reference("qwen3").to(torch.bfloat16).save_pretrained(tmp_path)
    kept = load_model(tmp_path)
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    cast = load_model(tmp_path, dtype=torch.float32)
    assert all(torch.equal(p, kept.get_parameter(name).float()) for name, p in cast.named_parameters())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "int4"}))
    with pytest.raises(ValueError, match="dtype is 'int4', allowed is 'float32', 'float16', 'bfloat16' or 'auto'"):
        load_model(tmp_path)


def qwen1_folder(folder: Path, data_folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    golden = json.loads((data_folder / "qwen1_tiny_golden.json").read_text())
    config = golden["config"] | {"model_type": "qwen", "no_bias": True, "tie_word_embeddings": False} | changes
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(data_folder / "qwen1_tiny_golden.safetensors")
    weights = {name.removeprefix("w."): tensor for name, tensor in tensors.items() if name.startswith("w.")}
    save_file(weights, folder / "model.safetensors")
    return tensors


def test_qwen1(tmp_path: Path, data_folder: Path) -> None:
    """Every parameter from the original's names, and the original's logits out of them."""
    golden = qwen1_folder(tmp_path, data_folder)
    model = load_model(tmp_path)
    layer = model.model.layers[1]
    fused = golden["w.transformer.h.1.attn.c_attn.weight"]
    assert torch.equal(torch.cat([layer.self_attn.get_submodule(f"{x}_proj").weight for x in "qkv"]), fused)
    assert torch.equal(layer.self_attn.k_proj.bias, golden["w.transformer.h.1.attn.c_attn.bias"].chunk(3)[1])
    assert torch.equal(layer.mlp.gate_proj.weight, golden["w.transformer.h.1.mlp.w2.weight"])
    assert torch.equal(layer.mlp.up_proj.weight, golden["w.transformer.h.1.mlp.w1.weight"])
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for n, t in golden.items() if n[:2] == "w.")
    with torch.no_grad():
        logits = model.logits(model(*pack(golden["ids"].tolist(), model.config)))
    torch.testing.assert_close(logits, golden["logits.len24"][0], atol=1e-5, rtol=0)


def test_what_is_no_parameter_is_ignored(tmp_path: Path) -> None:
    _, expected = tiny_pair("llama")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    model = load_model(edit(save(tmp_path, "llama"), add))
    assert model.config.tie_word_embeddings
    assert_equal(model, expected)


def test_missing_surplus_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    def break_it(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        for i in range(3):
            del tensors[f"model.layers.{i}.self_attn.q_proj.bias"]
        tensors["model.extra.weight"] = torch.ones(2, 3)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(56, 31)
        tensors["model.layers.1.mlp.down_proj.weight"] = torch.ones(32, 56, dtype=torch.int8)

    with pytest.raises(ValueError, match="do not fit") as caught:
        load_model(edit(save(tmp_path), break_it))
    message = str(caught.value)
    assert message == (
        f"{tmp_path}: the tensors do not fit the configuration; 4 missing: model.layers.0.self_attn.q_proj.bias (expected [32]), "
        "model.layers.1.self_attn.q_proj.bias (expected [32]), model.layers.2.self_attn.q_proj.bias (expected [32]), …; "
        "1 surplus: model.extra.weight (found [2, 3]); "
        "1 misshapen: model.layers.1.mlp.up_proj.weight (expected [56, 32], found [56, 31]); "
        "1 of whole numbers where weights are needed: model.layers.1.mlp.down_proj.weight (I8)"
    )


def test_a_wrong_checkpoint_fails_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(save(tmp_path), lambda tensors: tensors.pop("model.norm.weight"))
    monkeypatch.setattr("qwenkit.weights.stored.read_bytes", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match=r"1 missing: model\.norm\.weight"):
        load_model(tmp_path)


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    edit(save(tmp_path), lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"1 missing: lm_head\.weight"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "absurd", [{"num_hidden_layers": 4000}, {"intermediate_size": 2**23}, {"vocab_size": 2**23}, {"head_dim": 2**50}]
)
def test_absurd_sizes_are_refused_before_anything_is_built(tmp_path: Path, absurd: dict[str, int]) -> None:
    config = json.loads((save(tmp_path) / "config.json").read_text())
    config.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(config | absurd))
    with pytest.raises(
        ValueError, match=r"but (there are only|the largest tensor has only)|allowed is a whole number from 1"
    ):
        load_model(tmp_path)


class Adapter(nn.Module):
    """Keeps the Linear and brings tensors of its own, as LoRA does."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.inner = linear
        self.down = nn.Parameter(torch.empty(2, linear.in_features, device="meta"))
        self.up = nn.Parameter(torch.empty(linear.out_features, 2, device="meta"))
        self.register_buffer("scale", torch.empty((), device="meta"))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.down)
        nn.init.zeros_(self.up)
        nn.init.constant_(self.get_buffer("scale"), 4.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.get_buffer("scale") * (x @ self.down.T) @ self.up.T


class Counted(nn.Linear):
    """A Linear of another class with the same parameters."""


class Signs(nn.Module):
    """Makes its own tensors from what is stored."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.shape = tuple(linear.weight.shape)
        self.register_buffer("bits", torch.empty(self.shape, dtype=torch.int8, device="meta"))
        self.kinds: list[str] = []

    def fill(self, kind: str, stored: StoredTensor) -> None:
        self.kinds.append(kind)
        if kind == "weight":
            self.get_buffer("bits").copy_(stored.load().sign())


def test_swaps(tmp_path: Path) -> None:
    _, expected = tiny_pair("qwen2")
    save(tmp_path)

    def adapt(name: str, linear: nn.Linear) -> nn.Module | None:
        assert linear.weight.is_meta
        return Adapter(linear) if name.endswith("q_proj") else None

    def recast(name: str, linear: nn.Linear) -> nn.Module | None:
        if not name.endswith("down_proj"):
            return None
        return Counted(linear.in_features, linear.out_features, bias=False, device="meta", dtype=linear.weight.dtype)

    def signs(name: str, linear: nn.Linear) -> nn.Module | None:
        return Signs(linear) if name.endswith("k_proj") else None

    model = load_model(tmp_path, swaps=[adapt, recast, signs])
    for layer, original in zip(model.model.layers, expected.model.layers, strict=True):
        q = layer.self_attn.q_proj
        assert isinstance(q, Adapter)
        assert torch.equal(q.inner.weight, original.self_attn.q_proj.weight)
        assert torch.equal(q.inner.bias, original.self_attn.q_proj.bias)
        assert not q.up.any()
        assert q.down.any()
        assert q.get_buffer("scale") == 4.0
        assert isinstance(layer.mlp.down_proj, Counted)
        assert torch.equal(layer.mlp.down_proj.weight, original.mlp.down_proj.weight)
        k = layer.self_attn.k_proj
        assert isinstance(k, Signs)
        assert torch.equal(k.get_buffer("bits"), original.self_attn.k_proj.weight.sign().char())
        assert sorted(k.kinds) == ["bias", "weight"]


def test_a_swapped_head_of_a_tied_model_is_filled_too(tmp_path: Path) -> None:
    _, expected = tiny_pair("llama")

    def recast(name: str, linear: nn.Linear) -> nn.Module | None:
        return (
            Counted(linear.in_features, linear.out_features, bias=False, device="meta") if name == "lm_head" else None
        )

    model = load_model(save(tmp_path, "llama"), swaps=[recast])
    head = load_model(
        tmp_path, swaps=[lambda name, linear: Signs(linear) if name == "lm_head" else None]
    ).get_submodule("lm_head")
    assert isinstance(head, Signs)
    assert head.kinds == ["weight"]
    assert isinstance(model.lm_head, Counted)
    assert torch.equal(model.lm_head.weight, expected.model.embed_tokens.weight)
    assert torch.equal(model.model.embed_tokens.weight, expected.model.embed_tokens.weight)


def test_a_loaded_model_trains(tmp_path: Path) -> None:
    model = load_model(save(tmp_path, "llama"))
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    model.logits(model(*pack([[1, 2, 3]], model.config))).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_paths_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_model(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_model(tmp_path)
    (tmp_path / "model.txt").write_text("")
    with pytest.raises(ValueError, match=r"neither a model folder nor a \.gguf file"):
        load_model(tmp_path / "model.txt")
    (tmp_path / "config.json").write_text(json.dumps(tiny_reference("qwen2").config.to_dict()))
    with pytest.raises(FileNotFoundError, match=r"has no weights: neither model\.safetensors nor pytorch_model\.bin"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_model(tmp_path)


def test_progress_is_silent_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path)
    capsys.readouterr()
    load_model(tmp_path, progress=True)
    load_model(tmp_path)
    assert capsys.readouterr() == ("", "")


def test_the_configuration_decides_which_names_are_foreign(tmp_path: Path, data_folder: Path) -> None:
    """Qwen-1's names under another model_type are surplus, not guessed at."""
    qwen1_folder(tmp_path, data_folder)
    config = ModelConfig.from_dict(json.loads((tmp_path / "config.json").read_text()))
    assert config.intermediate_size == 48
    changed = json.loads((tmp_path / "config.json").read_text()) | {
        "model_type": "qwen2",
        "intermediate_size": 48,
        "num_key_value_heads": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"surplus: transformer\.h\.0"):
        load_model(tmp_path)
