"""`qwenkit quantize` from the command line."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from qwenkit.cli.main import cli
from qwenkit.quant import quantize
from qwenkit.weights.load import load_model
from tests.tiny_models import write_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_model(tmp_path / "source", hidden_size=64, intermediate_size=96)


def test_a_model_becomes_a_folder(source: Path, runner: CliRunner) -> None:
    output = source.parent / "out"
    flags = ["--bits", "8", "--samples", "3", "--length", "50", "--device", "cpu"]
    result = runner.invoke(cli, ["quantize", str(source), "--output", str(output), *flags])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{output}\n"
    assert "calibration: 3 samples, 150 tokens" in result.stderr
    assert "block 2: error q 0." in result.stderr
    assert "error of the layers' outputs: 0." in result.stderr
    assert load_model(output).config.num_hidden_layers == 3


def test_rounding_to_nearest_needs_no_text(source: Path, runner: CliRunner) -> None:
    output = source.parent / "out"
    flags = ["--method", "rtn", "--group-size", "-1", "--no-sym"]
    result = runner.invoke(cli, ["quantize", str(source), "--output", str(output), *flags])
    assert result.exit_code == 0, result.output
    assert "calibration" not in result.stderr
    assert load_model(output)


def test_ctrl_c_says_how_to_go_on(source: Path, runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    output = source.parent / "out"
    arguments = ["quantize", str(source), "--output", str(output), "--length", "50", "--samples", "50"]
    whole = quantize._Run._write

    def interrupted(self: quantize._Run, number: int, *rest: object) -> None:
        if number == 1:
            raise KeyboardInterrupt
        whole(self, number, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(quantize._Run, "_write", interrupted)
        result = runner.invoke(cli, arguments)
    assert result.exit_code == 130
    assert f"run the same command again to go on from {output}.part" in result.stderr
    result = runner.invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert "block 0:" not in result.stderr
    assert "block 1:" in result.stderr
    assert not Path(f"{output}.part").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--bits", "5"], "error: bits is 5, allowed are 4, 8\n"),
        (["--group-size", "128"], "error: group_size is 128, but model.layers.0.self_attn.q_proj has 64 inputs"),
        (["--data", "absent.txt"], "error: --data: there is no file 'absent.txt'\n"),
        (["--length", "100000"], "but a sample needs 100000: give a file with more text, or a smaller length\n"),
    ],
)
def test_bad_input_is_one_sentence(flags: list[str], sentence: str, source: Path, runner: CliRunner) -> None:
    before = sorted(source.parent.iterdir())
    result = runner.invoke(cli, ["quantize", str(source), "--output", str(source.parent / "out"), *flags])
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert sorted(source.parent.iterdir()) == before


def test_the_output_must_be_new(source: Path, runner: CliRunner) -> None:
    result = runner.invoke(cli, ["quantize", str(source), "--output", str(source)])
    assert result.exit_code == 2
    assert result.stderr == f"error: --output {source} is not empty: name a new folder, or empty it\n"
