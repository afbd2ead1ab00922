"""`qwenkit export`: flags and LLaMA-Factory's YAML lead to the same folder."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from qwenkit.cli.main import cli
from qwenkit.train.config import TrainConfig
from qwenkit.train.methods import prepare_model, save_trained, trainable_parameters
from qwenkit.weights.checkpoint import open_checkpoint
from qwenkit.weights.load import load_model
from tests.tiny_models import CHAT_TEMPLATE, write_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and an adapter of it."""
    place = tmp_path_factory.mktemp("export")
    return save_adapter_of(write_model(place / "base"), place / "saves" / "qwen")


def save_adapter_of(base: Path, adapter: Path) -> tuple[Path, Path]:
    config = TrainConfig(model=str(base), dtype="float32", lora_rank=2)
    model = prepare_model(config, open_checkpoint(base), "cpu")
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter))
    save_trained(model, config, open_checkpoint(base), adapter)
    return base, adapter


def test_flags(folders: tuple[Path, Path], tmp_path: Path, runner: CliRunner) -> None:
    base, adapter = folders
    output = tmp_path / "out"
    arguments = ["export", "--model", str(base), "--adapter", str(adapter), "--output", str(output)]
    arguments += ["--dtype", "bfloat16", "--shard-size", "20KB", "--format", "bin"]
    result = runner.invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(output)
    assert len(list(output.glob("pytorch_model-*.bin"))) > 1
    assert {tensor.dtype for tensor in (stored.load() for stored in open_checkpoint(output).tensors())} == {
        torch.bfloat16
    }
    again = runner.invoke(cli, arguments)
    assert again.exit_code == 2
    assert "is not empty; allowed is a new folder, or --overwrite" in again.stderr
    assert runner.invoke(cli, [*arguments, "--overwrite"]).exit_code == 0


def test_llama_factorys_file_unchanged(
    folders: tuple[Path, Path], tmp_path: Path, runner: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of the LLaMA-Factory guide, with other paths."""
    base, adapter = folders
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen_merge.yaml").write_text(
        f"### 模型路径\nmodel_name_or_path: {base}\nadapter_name_or_path: {adapter} # 微调参数路径\ntemplate: qwen\n"
        "finetuning_type: lora\n\n## export\nexport_dir: outputs/merged # 模型合并后导出路径\nexport_size: 2\n"
        "export_device: auto\nexport_legacy_format: false\n",
        encoding="utf-8",
    )
    result = runner.invoke(cli, ["export", "qwen_merge.yaml"])
    assert result.exit_code == 0, result.output
    output = tmp_path / "outputs" / "merged"
    before, after = (load_file(folder / "model.safetensors") for folder in (base, output))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("proj.weight")}
    assert json.loads((output / "tokenizer_config.json").read_text())["chat_template"] == CHAT_TEMPLATE


def test_a_base_model_gets_the_template_that_is_named(
    folders: tuple[Path, Path], tmp_path: Path, runner: CliRunner
) -> None:
    base = write_model(tmp_path / "base")
    (base / "tokenizer_config.json").write_text("{}")
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages[0].content }}")
    messages = [{"role": "user", "content": "hi"}]
    for name, text in (
        ("qwen", "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"),
        ("chatml", "<|im_start|>user\nhi<|im_end|>\n"),
        (str(own), "hi"),
    ):
        output = tmp_path / Path(name).stem
        arguments = ["export", "--model", str(base), "--output", str(output), "--template", name]
        result = runner.invoke(cli, arguments)
        assert result.exit_code == 0, result.output
        checkpoint = open_checkpoint(output)
        chat = checkpoint.chat()
        assert chat is not None
        ids = chat.render(messages, add_generation_prompt=False).ids
        assert checkpoint.tokenizer().decode(ids, skip_special=False) == text


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model whose widths packed weights can hold, and an adapter of it."""
    place = tmp_path_factory.mktemp("wide")
    return save_adapter_of(write_model(place / "base", hidden_size=64, intermediate_size=128), place / "saved")


def test_quantize(wide: tuple[Path, Path], tmp_path: Path, runner: CliRunner) -> None:
    """Merged in floats, then rounded: the same as the two commands one after the other, and nothing is left beside it."""
    base, adapter = wide
    data = tmp_path / "chats.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "a" * n}]}
        for n in range(9)
    ]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    place = tmp_path / "place"
    output, merged, packed = place / "out", tmp_path / "merged", tmp_path / "packed"
    flags = ["export", "--model", str(base), "--adapter", str(adapter)]
    calibration = ["--data", str(data), "--samples", "6", "--length", "64"]
    for arguments in (
        [*flags, "--output", str(output), "--quantize", "4", *calibration],
        [*flags, "--output", str(merged)],
        ["quantize", str(merged), "--output", str(packed), "--bits", "4", *calibration],
    ):
        result = runner.invoke(cli, arguments)
        assert result.exit_code == 0, result.output
    assert [path.name for path in place.iterdir()] == ["out"]
    assert {path.name for path in output.iterdir()} == {path.name for path in packed.iterdir()}
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (output, packed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert json.loads((output / "config.json").read_text())["quantization_config"]["bits"] == 4
    model, whole = load_model(output), load_model(merged)
    name = "model.layers.1.mlp.up_proj.weight"
    error = (model.get_parameter(name) - whole.get_parameter(name)).norm() / whole.get_parameter(name).norm()
    assert 0 < error < 0.2


def test_llama_factorys_quantization(
    wide: tuple[Path, Path], tmp_path: Path, runner: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "c4_demo.json").write_text(json.dumps([{"text": "some words of a text " * 40}] * 4))
    (tmp_path / "gptq.yaml").write_text(
        f"model_name_or_path: {wide[0]}\ntemplate: qwen\nexport_dir: gptq\nexport_quantization_bit: 8\n"
        "export_quantization_dataset: data/c4_demo.json\nexport_quantization_nsamples: 4\n"
        "export_quantization_maxlen: 128\nexport_size: 2\nexport_device: cpu\nexport_legacy_format: false\n"
    )
    result = runner.invoke(cli, ["export", "gptq.yaml"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "gptq"
    assert json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]["bits"] == 8
    again = runner.invoke(cli, ["export", "gptq.yaml"])
    assert again.exit_code == 2
    assert "is not empty; allowed is a new folder, or --overwrite" in again.stderr


def test_a_width_that_cannot_be_packed_leaves_nothing(
    folders: tuple[Path, Path], tmp_path: Path, runner: CliRunner
) -> None:
    output = tmp_path / "place" / "out"
    result = runner.invoke(cli, ["export", "--model", str(folders[0]), "--output", str(output), "--quantize", "4"])
    assert result.exit_code == 2
    assert "inputs must be a multiple of 32" in result.stderr
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("export_quantization_bit: 3", "bits is 3, allowed are 4, 8"),
        ("export_quantization_bit: four", "quantize is 'four', allowed is a whole number"),
        ("export_quantization_nsamples: 8", "samples is given, but belongs to quantize, which is not"),
        ("quantize: 4\nexport_quantization_nsamples: 0", "samples is 0, allowed are whole numbers of at least 1"),
        (
            "quantize: 4\nexport_legacy_format: true",
            "format is bin, but what is quantized is written as safetensors only",
        ),
        ("quantize: 4\nexport_quantization_dataset: data/c4_demo.json", "data: there is no file 'data/c4_demo.json'"),
        ("export_hub_model_id: me/model", "nothing is uploaded"),
        ("export_sise: 2", "export_sise is not a setting of export; did you mean export_size?"),
        ("export_size: large", "shard_size is 'large', allowed is a size such as 4GB"),
        ("format: gguf", "format is 'gguf', allowed are safetensors, bin"),
        ("export_legacy_format: maybe", "export_legacy_format is 'maybe', allowed are true and false"),
        ("adapter_name_or_path: 3", "adapter is 3, allowed is a folder or a list of folders"),
        ("adapter_name_or_path: nowhere", "nowhere has no adapter_config.json, so it is no adapter"),
        ("export_device: gpu7", "device is 'gpu7', which is not usable here"),
        ("template: alpaca", None),
    ],
)
def test_files_that_ask_for_something_else(
    folders: tuple[Path, Path], tmp_path: Path, runner: CliRunner, lines: str, sentence: str | None
) -> None:
    file = tmp_path / "export.yaml"
    file.write_text(f"model_name_or_path: {folders[0]}\nexport_dir: {tmp_path / 'out'}\n{lines}\n")
    result = runner.invoke(cli, ["export", str(file)])
    if sentence is None:  # the model has a template of its own, which stays
        assert result.exit_code == 0, result.output
        return
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert not (tmp_path / "out").exists()


def test_what_is_missing(tmp_path: Path, runner: CliRunner) -> None:
    result = runner.invoke(cli, ["export", "--output", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "export needs --model, or model_name_or_path in a YAML file" in result.stderr
    result = runner.invoke(cli, ["export", "--model", "smollm2"])
    assert "export needs --output, or export_dir in a YAML file" in result.stderr
