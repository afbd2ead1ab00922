"""`qwenkit bench` on a tiny model: flags, the table, the JSON line, the plot, the markdown table, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from qwenkit import ops
from qwenkit.cli import bench as command
from qwenkit.cli import bench_measure as measuring
from qwenkit.cli.bench_measure import Limits
from qwenkit.cli.main import cli
from qwenkit.engine.config import WEIGHTS
from qwenkit.installation import install_extra
from tests.tiny_models import SIZES, write_model

FLAGS = ["--prefill=20", "--decode=4", "--batch=3", "--batch-prompt=6", "--batch-decode=5", "--repeat=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def known_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the tests the half gigabyte that the real measurement reads."""
    monkeypatch.setattr(measuring, "measure_limits", lambda: Limits(50.0, 800.0, "int8"))


def _interrupt() -> Any:
    raise KeyboardInterrupt


def invoke(runner: CliRunner, *arguments: str) -> Any:
    return runner.invoke(cli, ["bench", *arguments])


def test_json(runner: CliRunner, folder: Path, known_limits: None) -> None:
    result = invoke(runner, str(folder), *FLAGS, "--json", "--weights", "float")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    record = json.loads(result.stdout)
    assert record["model"] == str(folder)
    assert (record["weights"], record["device"]) == ("float", "cpu")
    assert record["measured"] == {
        "prefill": 20,
        "decode": 4,
        "batch": 3,
        "batch_prompt": 6,
        "batch_decode": 5,
        "repeat": 2,
        "threads": None,
    }
    assert record["settings"]["prefix_cache"] is False
    assert record["settings"]["max_model_len"] == 25
    assert record["settings"]["max_num_seqs"] == 3
    for name in ("prefill_tok_s", "decode_tok_s", "batch_out_tok_s", "load_s", "peak_rss_mb", "weight_bytes"):
        assert record[name] > 0
    assert record["bandwidth_gb_s"] == pytest.approx(record["bytes_per_token"] * record["decode_tok_s"] / 1e9, rel=0.01)
    assert (record["memory_gb_s"], record["matrix_gop_s"], record["matrix_kind"]) == (50.0, 800.0, "int8")
    assert set(record["versions"]) == {"qwenkit", "torch", "python"}
    assert record["machine"]["cores"] >= 1
    assert record["ops"] == ops.implementations()
    assert record["date"].endswith("+00:00")
    assert "curves" not in record


def test_settings_of_the_user_come_first(runner: CliRunner, folder: Path, known_limits: None) -> None:
    flags = ["--prefix-cache", "--max-model-len", "64", "--max-num-seqs", "2", "--dtype", "float32"]
    settings = json.loads(invoke(runner, str(folder), *FLAGS, "--json", *flags).stdout)["settings"]
    assert settings["prefix_cache"] is True
    assert (settings["max_model_len"], settings["max_num_seqs"], settings["dtype"]) == (64, 2, "float32")


def test_text_has_a_line_for_each_figure(runner: CliRunner, folder: Path, known_limits: None) -> None:
    result = invoke(runner, str(folder), *FLAGS)
    assert result.exit_code == 0, result.output
    head, *lines = result.stdout.splitlines()
    assert head.startswith(f"{folder} on cpu: ")
    assert head.endswith("medians of 2")
    units = {line[:16].strip(): line[26:].split()[0] for line in lines}
    assert units == {
        "prefill": "tok/s",
        "decode": "tok/s",
        "batch": "tok/s",
        "load": "s",
        "peak memory": "MB",
        "weights": "MB",
        "read per token": "MB",
        "memory": "GB/s",
        "matrices": "GOP/s",
    }
    assert all(float(line[16:26]) >= 0 for line in lines)
    assert lines[-1].endswith("% of 800 GOP/s (int8)")


def test_text_without_limits(runner: CliRunner, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "measure_limits", lambda: None)
    lines = invoke(runner, str(folder), *FLAGS).stdout.splitlines()
    assert lines[-1].startswith("memory ")
    assert lines[-1].endswith("GB/s")


def test_plot(runner: CliRunner, folder: Path, known_limits: None, tmp_path: Path) -> None:
    path = tmp_path / "speed.png"
    result = invoke(runner, str(folder), *FLAGS, "--json", "--repeat", "1", "--plot", str(path))
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout.splitlines()[-1])
    assert [place for place, _ in record["curves"]["by_batch"]] == [1, 2, 4, 8, 16, 32]
    assert [place for place, _ in record["curves"]["by_context"]] == [128, SIZES["max_position_embeddings"] - 5]
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert os.listdir(tmp_path) == ["speed.png"]


def test_plot_without_matplotlib(runner: CliRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = invoke(runner, "absent", "--plot", str(tmp_path / "speed.png"))
    assert (result.exit_code, result.stderr) == (
        2,
        f"error: plot as .png needs matplotlib: {install_extra('plot')}\n",
    )


def test_a_plot_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "speed.png"
    path.write_bytes(b"old")
    curves = {"by_batch": [[1, 2.0], [2, 3.0]], "by_context": [[128, 2.0]]}
    record = {"model": "m", "weights": "int8", "machine": {"processor": "p"}, "curves": curves}
    monkeypatch.setattr(os, "replace", lambda *names: _interrupt())
    with pytest.raises(KeyboardInterrupt):
        command.draw(record, path)
    assert os.listdir(tmp_path) == ["speed.png"]
    assert path.read_bytes() == b"old"


def child_record(weights: str) -> dict[str, Any]:
    bits = {"float": 32, "bf16": 16, "int8": 8, "int4": 4}[weights]
    return {
        "prefill_tok_s": 1234.5,
        "decode_tok_s": 640 / bits,
        "batch_out_tok_s": 99.96,
        "weight_bytes": bits * 10**7,
        "peak_rss_mb": 812.4,
        "measured": {"prefill": 512, "decode": 64, "batch": 16},
        "machine": {"processor": "Some CPU", "torch threads": 2},
        "versions": {"qwenkit": "0.1.0", "torch": "2.13.0"},
        "date": "2026-11-21T09:00:00+00:00",
    }


def test_table_runs_each_setting_and_shows_what_failed(folder: Path) -> None:
    asked = []

    def child(arguments: list[str]) -> dict[str, Any] | None:
        asked.append(arguments)
        return None if arguments[-1] == "int4" else child_record(arguments[-1])

    text = command.weights_table(str(folder), ["--threads", "2"], child)
    settings = [weights for weights in WEIGHTS if weights != "auto"]
    assert asked == [[str(folder), "--threads", "2", "--weights", weights] for weights in settings]
    assert text.splitlines() == [
        "| weights | prefill 512 (tok/s) | decode 64 (tok/s) | batch 16 (tok/s) | weights (MB) | peak memory (MB) |",
        "|---|---:|---:|---:|---:|---:|",
        "| float | 1234 | 20.0 | 100.0 | 320 | 812 |",
        "| bf16 | 1234 | 40.0 | 100.0 | 160 | 812 |",
        "| int8 | 1234 | 80.0 | 100.0 | 80.0 | 812 |",
        "| int4 | – | – | – | – | – |",
        "",
        f"{folder}, Some CPU, 2 threads, qwenkit 0.1.0, torch 2.13.0, 2026-11-21.",
    ]
    with pytest.raises(ValueError, match="could not be measured with any of --weights float, bf16"):
        command.weights_table(str(folder), [], lambda arguments: None)


def test_table_hands_the_flags_on(runner: CliRunner, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(command, "run_child", lambda arguments: asked.append(arguments) or child_record(arguments[-1]))
    result = invoke(
        runner, str(folder), "--table", "--repeat", "1", "--no-graphs", "--prefix-cache", "--kv-memory", "1GB"
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("| weights |")
    flags = ["--repeat", "1", "--kv-memory", "1GB", "--prefix-cache", "--no-graphs"]
    assert asked[0] == [str(folder), *flags, "--weights", "float"]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The processes that were started; in this test each is a fake that succeeds for the model `good`."""
    started: list[list[str]] = []

    def run(arguments: list[str], **settings: Any) -> Any:
        started.append(arguments)
        good = "good" in arguments
        return SimpleNamespace(returncode=0 if good else 2, stdout='a notice\n{"decode_tok_s": 7}\n' if good else "")

    monkeypatch.setattr(subprocess, "run", run)
    return started


def test_a_child_answers_with_its_last_line(commands: list[list[str]]) -> None:
    assert command.run_child(["good", "--weights", "int8"]) == {"decode_tok_s": 7}
    assert command.run_child(["bad"]) is None
    assert commands[0] == [sys.executable, "-m", "qwenkit", "bench", "good", "--weights", "int8", "--json"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--repeat", "0"], "repeat is 0, allowed is a whole number of at least 1"),
        (["--threads", "-1"], "threads is -1, allowed is a whole number of at least 1"),
        (["--batch", "x"], "batch is 'x', allowed is a whole number"),
        (["--weights", "int3"], "weights is 'int3', allowed are "),
        (
            ["--prefill", "200"],
            "prefill 200 and decode 64 need room for 265 tokens, allowed is a context of 256 tokens",
        ),
        (["--prefill", "3", "--batch-prompt", "250"], "batch_prompt 250 and batch_decode 64 need room for 314 tokens"),
        (
            ["--prefill", "9", "--max-model-len", "30"],
            "prefill 9 and decode 64 need room for 74 tokens, allowed is a context of 30",
        ),
        (["--plot", "speed.jpg"], "plot is 'speed.jpg', allowed is the name of a .png file"),
        (["--plot", "nowhere/speed.png"], "there is no folder 'nowhere'"),
        (["--table", "--weights", "int8"], "--weights, --json and --plot do not go with it"),
        (["--table", "--json"], "--weights, --json and --plot do not go with it"),
        (["--table", "--plot", "speed.png"], "--weights, --json and --plot do not go with it"),
    ],
)
def test_bad_values_are_one_sentence(runner: CliRunner, folder: Path, flags: list[str], said: str) -> None:
    result = invoke(runner, str(folder), *flags)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr.splitlines()[-1]


def test_an_absent_model(runner: CliRunner, tmp_path: Path) -> None:
    for flags in ([], ["--table"]):
        result = invoke(runner, str(tmp_path / "absent"), *flags)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: there is no file or folder ")


def test_ctrl_c_leaves_quietly(runner: CliRunner, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "measure_speed", lambda *arguments: _interrupt())
    result = invoke(runner, str(folder), *FLAGS)
    assert (result.exit_code, result.stdout, result.stderr.strip()) == (130, "", "")


@pytest.mark.parametrize(
    ("dtypes", "packing", "label"),
    [
        ({"a": "Q4_1", "b": "Q4_1", "c": "F32"}, "bf16", "Q4_1"),
        ({"a": "BF16", "b": "BF16"}, "bf16", "bf16"),
        ({"a": "CODES4G128", "b": "CODES4G128"}, "bf16", "int4 of the file"),
        ({"a": "Q4_1"}, "int8", "int8"),
        ({"a": "Q4_1"}, "float", "float"),
    ],
)
def test_what_was_measured_is_named(dtypes: dict[str, str], packing: str, label: str) -> None:
    stored = [SimpleNamespace(name=name, shape=(8, 8), dtype=dtype) for name, dtype in dtypes.items()]
    checkpoint: Any = SimpleNamespace(tensors=lambda: stored)
    assert command.weights_label(checkpoint, packing) == label
