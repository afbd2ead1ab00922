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
from tests.tiny_models import CHAT_TEMPLATE, write_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and an adapter of it."""
    place = tmp_path_factory.mktemp("export")
    base, adapter = write_model(place / "base"), place / "saves" / "qwen"
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


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("export_quantization_bit: 4", "export does not do: quantize the exported folder afterwards"),
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
