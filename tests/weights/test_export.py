"""Exported folders load by themselves, here and in transformers, and compute what model and adapters computed."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qwenkit.linear.lora import LowRank, linears
from qwenkit.model.context import pack
from qwenkit.model.qwen import Qwen
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.weights import names
from qwenkit.weights.adapter import read_whole_adapter
from qwenkit.weights.adapter_saving import AdapterSettings, save_adapter
from qwenkit.weights.checkpoint import open_checkpoint
from qwenkit.weights.export import export_model
from qwenkit.weights.load import load_model
from qwenkit.weights.saving import Form, new_folder
from qwenkit.weights.templated import Templated
from tests.tiny_models import write_model
from tests.weights.test_gptq_awq import quantized_folder

PROMPT = [5, 9, 200, 31]


@torch.no_grad()
def logits(model: Qwen) -> torch.Tensor:
    return model.eval().logits(model(*pack([PROMPT], model.config)))


@torch.no_grad()
def reference_logits(model: Any) -> torch.Tensor:
    return model.eval()(torch.tensor([PROMPT])).logits[0]


def make_adapter(base: Path, adapter: Path, **settings: Any) -> torch.Tensor:
    """A random adapter, made and saved by peft; returns the logits that peft computes with it."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        reference = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        chosen = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | settings
        reference = peft.get_peft_model(reference, peft.LoraConfig(**chosen))
        torch.manual_seed(1)
        for parameter in reference.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        reference.save_pretrained(adapter)
        return reference_logits(reference)


def from_transformers(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True, "target_modules": "all-linear"},
    "modules": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "bias": {"bias": "all"},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "norm means every norm": {"modules_to_save": ["norm"]},
    "taken away": {"lora_alpha": -8},
    "embedding alone": {"modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])  # a head of its own, and one that is the embedding
@pytest.mark.parametrize("form", ADAPTERS)
def test_merged_equals_peft(tmp_path: Path, form: str, model_type: str) -> None:
    base, adapter, output = write_model(tmp_path / "base", model_type), tmp_path / "adapter", tmp_path / "deep" / "out"
    expected = make_adapter(base, adapter, **ADAPTERS[form])
    export_model(open_checkpoint(base), output, adapters=[adapter])
    torch.testing.assert_close(logits(load_model(output)), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reference_logits(from_transformers(output)), expected, atol=1e-5, rtol=1e-5)
    config = json.loads((output / "config.json").read_text())
    untied = form in ("modules", "head", "embedding alone")
    assert config["tie_word_embeddings"] is (model_type == "llama" and not untied)
    assert ("lm_head.weight" in load_file(output / "model.safetensors")) is (model_type == "qwen2" or untied)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "deep"]
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_tied_stays_tied_where_both_got_the_same(tmp_path: Path) -> None:
    base, adapter, output = write_model(tmp_path / "base", "llama"), tmp_path / "adapter", tmp_path / "out"
    make_adapter(base, adapter, modules_to_save=["embed_tokens", "lm_head"])
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    head, embedding = (f"base_model.model.{name}.weight" for name in ("lm_head", "model.embed_tokens"))
    save_file(tensors | {head: tensors[embedding].clone()}, path)
    export_model(open_checkpoint(base), output, adapters=[adapter])
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(output / "model.safetensors")


def test_several_adapters_one_after_the_other(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    for name in ("first", "second"):
        make_adapter(base, tmp_path / name, use_dora=name == "second")
    export_model(open_checkpoint(base), tmp_path / "one", adapters=[tmp_path / "first"])
    export_model(open_checkpoint(tmp_path / "one"), tmp_path / "two", adapters=[tmp_path / "second"])
    export_model(open_checkpoint(base), tmp_path / "both", adapters=[tmp_path / "first", tmp_path / "second"])
    both, two = (load_file(tmp_path / name / "model.safetensors") for name in ("both", "two"))
    assert all(torch.equal(both[name], two[name]) for name in two)


@pytest.mark.parametrize("legacy", [False, True])
def test_shards(tmp_path: Path, legacy: bool) -> None:
    base, output = write_model(tmp_path / "base", "qwen2_moe"), tmp_path / "out"
    export_model(open_checkpoint(base), output, form=Form(40_000, legacy))
    stem, suffix = ("pytorch_model", "bin") if legacy else ("model", "safetensors")
    files = sorted(output.glob(f"{stem}-*.{suffix}"))
    assert len(files) > 3
    assert files[0].name == f"{stem}-00001-of-{len(files):05}.{suffix}"
    assert all(path.stat().st_size < 45_000 + 4000 for path in files)
    index = json.loads((output / f"{stem}.{suffix}.index.json").read_text())
    before = load_file(base / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in logits_state(base).values())
    assert set(index["weight_map"]) == set(logits_state(base))
    torch.testing.assert_close(logits(load_model(output)), logits(load_model(base)))
    torch.testing.assert_close(
        reference_logits(from_transformers(output)), logits(load_model(base)), atol=1e-5, rtol=1e-5
    )
    assert before


def logits_state(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder).state_dict()


def test_dtype_and_the_rest_of_the_folder(tmp_path: Path) -> None:
    base, output = write_model(tmp_path / "base"), tmp_path / "out"
    export_model(Templated(open_checkpoint(base), "{{ messages[0].content }}"), output, dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(output / "model.safetensors").values()} == {torch.bfloat16}
    assert from_transformers(output).dtype == torch.bfloat16
    generation = json.loads((output / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [256, 258]
    assert generation["do_sample"] is False
    chat = open_checkpoint(output).chat()
    assert chat is not None
    assert Tokenizer.from_folder(output).decode(chat.render([{"role": "user", "content": "hi"}]).ids) == "hi"
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_gptq_is_not_merged_into(tmp_path: Path) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    quantized_folder(base, "gptq")
    model = load_model(base, dtype=torch.float32)
    a, b = torch.randn(4, 64) * 0.1, torch.randn(64, 4) * 0.1
    name = "model.layers.0.self_attn.q_proj"
    save_adapter(adapter, {name: LowRank(a, b, 2.0)}, {}, linears(model), AdapterSettings(str(base)))
    with pytest.raises(
        ValueError, match=r"merge it into the 16-bit model that this one was made from, then quantize"
    ) as e:
        export_model(open_checkpoint(base), output, adapters=[adapter])
    assert "\n" not in str(e.value)
    assert not output.exists()
    with pytest.raises(ValueError, match="its matrices would be written as floats"):
        export_model(open_checkpoint(base), output)
    export_model(open_checkpoint(base), output, adapters=[adapter], dequantize=True, dtype="float32")
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    weight = load_file(output / "model.safetensors")[f"{name}.weight"]
    torch.testing.assert_close(weight, model.get_parameter(f"{name}.weight").detach() + 2 * b @ a)


QWEN1 = {
    "model_type": "qwen",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "seq_length": 128,
    "layer_norm_epsilon": 1e-6,
    "bf16": True,
    "fp32": False,
    "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
}


def qwen1_folder(folder: Path) -> Path:
    folder.mkdir()
    torch.manual_seed(0)
    shapes = {"attn.c_attn.weight": (96, 32), "attn.c_attn.bias": (96,), "attn.c_proj.weight": (32, 32)}
    shapes |= {"mlp.w1.weight": (48, 32), "mlp.w2.weight": (48, 32), "mlp.c_proj.weight": (32, 48)}
    shapes |= {"ln_1.weight": (32,), "ln_2.weight": (32,)}
    tensors = {f"transformer.h.{i}.{name}": torch.randn(shape) * 0.3 for i in (0, 1) for name, shape in shapes.items()}
    for name, shape in (("transformer.wte", (64, 32)), ("transformer.ln_f", (32,)), ("lm_head", (64, 32))):
        tensors[f"{name}.weight"] = torch.randn(shape)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(QWEN1))
    (folder / "modeling_qwen.py").write_text("raise SystemExit  # data: never run\n")
    return folder


def test_the_first_qwen_keeps_its_names_and_files(tmp_path: Path) -> None:
    base, output = qwen1_folder(tmp_path / "base"), tmp_path / "out"
    export_model(open_checkpoint(base), output, dtype="float32")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, output))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (output / "modeling_qwen.py").read_bytes() == (base / "modeling_qwen.py").read_bytes()
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["QWenLMHeadModel"]
    assert (config["bf16"], config["fp32"]) == (False, True)


@pytest.mark.parametrize("parts", ["qkv", "qv"])
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_of_the_first_qwen_are_one_of_c_attn(tmp_path: Path, parts: str, dora: bool) -> None:
    """Written, read again and merged: the same matrices, exact though three updates became one."""
    base, adapter = qwen1_folder(tmp_path / "base"), tmp_path / "adapter"
    model = load_model(base, dtype=torch.float32)
    torch.manual_seed(2)

    def update(outputs: int, inputs: int, rank: int) -> LowRank:
        magnitude = torch.rand(outputs) + 0.5 if dora else None
        return LowRank(torch.randn(rank, inputs), torch.randn(outputs, rank), 1.5 + rank, magnitude)

    updates = {f"model.layers.0.self_attn.{part}_proj": update(32, 32, 2 + place) for place, part in enumerate(parts)}
    updates["model.layers.1.mlp.down_proj"] = update(32, 48, 2)
    bias = {f"model.layers.1.self_attn.{part}_proj.bias": torch.randn(32) for part in "qkv"}
    settings = AdapterSettings("base", bias="all")
    if dora and parts == "qv":
        with pytest.raises(ValueError, match=r"DoRA of a part of transformer\.h\.0\.attn\.c_attn cannot be written"):
            save_adapter(adapter, updates, bias, linears(model), settings, qwen1=True)
        return
    save_adapter(adapter, updates, bias, linears(model), settings, qwen1=True)
    assert "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight" in load_file(
        adapter / "adapter_model.safetensors"
    )
    shapes = {name: (module.in_features, module.out_features) for name, module in linears(model).items()}
    sizes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = read_whole_adapter(adapter, shapes, sizes, qwen1=True)
    for name, wanted in updates.items():
        weight = model.get_parameter(f"{name}.weight").detach()
        torch.testing.assert_close(found.updates[name].merged(weight), wanted.merged(weight))
    assert all(torch.equal(found.parameters[name], tensor) for name, tensor in bias.items())
    export_model(open_checkpoint(base), tmp_path / "out", adapters=[adapter], dtype="float32")
    merged = load_model(tmp_path / "out")
    torch.testing.assert_close(
        merged.get_parameter("model.layers.1.mlp.down_proj.weight").detach(),
        updates["model.layers.1.mlp.down_proj"].merged(
            model.get_parameter("model.layers.1.mlp.down_proj.weight").detach()
        ),
    )


def test_names_there_and_back() -> None:
    for name in ("transformer.wte.weight", "transformer.h.7.attn.c_attn.bias", "transformer.h.0.mlp.w2.weight"):
        for part in names.from_qwen1(name):
            back = names.to_qwen1(part.name)
            assert (back.name, back.index, back.count) == (name, part.index, part.count)


def test_where_it_may_be_written(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    checkpoint, output = open_checkpoint(base), tmp_path / "out"
    output.mkdir()
    export_model(checkpoint, output)
    with pytest.raises(ValueError, match="which is not empty; allowed is a new folder, or --overwrite"):
        export_model(checkpoint, output)
    (output / "stale").write_text("")
    export_model(checkpoint, output, overwrite=True)
    assert not (output / "stale").exists()
    with pytest.raises(ValueError, match="which is where the model lies"):
        export_model(checkpoint, base, overwrite=True)
    with pytest.raises(ValueError, match="which is a file; allowed is a folder"):
        export_model(checkpoint, base / "config.json")
    with pytest.raises(ValueError, match="dtype is 'int4', allowed are float32, bfloat16, float16"):
        export_model(checkpoint, tmp_path / "other", dtype="int4")


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("")
    with pytest.raises(OSError, match="disk"), new_folder(tmp_path / "out", overwrite=True) as beside:
        fail(beside)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "kept"]


def fail(beside: Path) -> None:
    (beside / "config.json").write_text("{}")
    raise OSError("the disk is full")


@pytest.fixture(scope="module")
def smollm2(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The default model as a GGUF and as an exported folder."""
    folder = tmp_path_factory.mktemp("export") / "smollm2"
    export_model(open_checkpoint(default_model), folder)
    return default_model, folder


TEXTS = (
    "The capital of France is Paris.",
    "  two  spaces\tand\ttabs\n\n\nlines 1234567 3.14",
    "def f(x):\n    return x**2  # 平方\n",
    "naïve café — “quotes” … 你好，世界 🙂🙃 Ünïcödé",
    "<|im_start|>user\nhello<|im_end|>\n<|endoftext|>",
    "don't we'll I'd it's THEY'RE",
    "",
)


def test_the_default_models_tokenizer_is_transformers(smollm2: tuple[Path, Path]) -> None:
    gguf, folder = smollm2
    ours, exported = open_checkpoint(gguf).tokenizer(), open_checkpoint(folder).tokenizer()
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = ours.encode(text, allow_special=True)
        assert exported.encode(text, allow_special=True) == ids
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids, skip_special=False)
    messages = [{"role": "user", "content": "Who are you?"}]
    chat = open_checkpoint(gguf).chat()
    assert chat is not None
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert rendered == chat.render(messages).ids
    assert theirs.eos_token_id == open_checkpoint(folder).eos_token_ids[0]


@pytest.mark.skipif(not os.environ.get("QWENKIT_SLOW"), reason="seconds and gigabytes; set QWENKIT_SLOW=1")
def test_the_default_model_computes_the_same_in_transformers(smollm2: tuple[Path, Path]) -> None:
    gguf, folder = smollm2
    model = load_model(open_checkpoint(gguf))
    ids = open_checkpoint(gguf).tokenizer().encode(TEXTS[0])
    with torch.no_grad():
        ours = model.logits(model(*pack([ids], model.config)))
        theirs = from_transformers(folder)(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=1e-4)
