"""`qwenkit bench train`: rows in processes of their own, tables, memory that runs out, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qwenkit.cli import bench_train, bench_train_measure
from qwenkit.cli.bench_train import Rows, as_markdown, as_text, measure
from qwenkit.cli.main import cli
from qwenkit.train.config import TrainConfig
from qwenkit.weights.checkpoint import open_checkpoint
from tests.conftest import ROOT
from tests.tiny_models import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), "qwen2")


def test_one_row(model: Path, runner: CliRunner) -> None:
    arguments = ["bench", "train", str(model), "gradient_accumulation_steps=2", "lora_rank=2", "device=cpu"]
    arguments += ["--lengths", "32", "--methods", "qlora", "--steps", "2"]
    result = runner.invoke(cli, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    (row,) = record["rows"]
    assert (row["method"], row["length"], row["tokens"], row["out_of_memory"]) == ("qlora", 32, 64, False)
    assert row["tok_s"] == pytest.approx(64 / row["step_s"])
    assert row["memory_bytes"] >= 0
    assert 0 < row["trained"] < row["parameters"]
    assert 0 < row["mfu"] < 1
    assert record["settings"]["lora_rank"] == 2
    assert {"versions", "machine", "date", "device"} <= record.keys()
    text = runner.invoke(cli, arguments).stdout
    assert "qlora        32" in text
    assert "tok/s" in text


def test_rows_in_processes_of_their_own(model: Path, runner: CliRunner) -> None:
    arguments = ["bench", "train", str(model), "gradient_accumulation_steps=1", "device=cpu", "--table", "--steps", "1"]
    result = runner.invoke(cli, [*arguments, "--lengths", "16,24", "--methods", "lora_emb"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "| memory / time of a step | 16 | 24 |" in lines
    assert "| tokens a second / MFU | 16 | 24 |" in lines
    assert sum(line.startswith("| lora_emb | ") for line in lines) == 2


def row(method: str, length: int, **changes: Any) -> dict[str, Any]:
    found = {"memory_bytes": 3 * 2**30, "step_s": 0.5, "tok_s": 2 * length, "mfu": 0.25, "predicted_bytes": 2**31}
    return {"method": method, "length": length, "out_of_memory": False} | found | changes


def test_rows_that_memory_does_not_hold(model: Path) -> None:
    """One row says so itself, one was killed by the system; another failure is no row."""
    asked = []

    def child(arguments: list[str]) -> tuple[int, dict[str, Any] | None]:
        asked.append(arguments)
        method, length = arguments[-3], int(arguments[-1])
        if (method, length) == ("full", 16):
            return -9, None
        gone = {"out_of_memory": True} if (method, length) == ("full", 8) else {}
        return 0, {"rows": [row(method, length, **gone)], "device": "cuda"}

    record = measure(str(model), Rows.of("lora,full", "8,16", 2, 1), {"seed": "1"}, is_random=False, child=child)
    assert len(asked) == 4
    assert asked[0] == [str(model), "seed=1", "--steps", "2", "--warmup", "1", "--methods", "lora", "--lengths", "8"]
    assert as_markdown(record).splitlines()[1:] == [
        "",
        "| memory / time of a step | 8 | 16 |",
        "|---|---:|---:|",
        "| lora | 3.0 GiB / 0.5 s | 3.0 GiB / 0.5 s |",
        "| full | out of memory | out of memory |",
        "",
        "| tokens a second / MFU | 8 | 16 |",
        "|---|---:|---:|",
        "| lora | 16 / 25.0 % | 32 / 25.0 % |",
        "| full | out of memory | out of memory |",
    ]
    text = as_text(record)
    assert "full          8  out of memory (plan 2.00 GiB)" in text
    assert "full         16  out of memory" in text
    with pytest.raises(ValueError, match="method lora with 8 tokens could not be measured"):
        measure(str(model), Rows.of("lora", "8,16", 1, 1), {}, is_random=False, child=lambda arguments: (2, None))


def test_memory_that_runs_out(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a step, as torch says it; any other error is one."""
    config = TrainConfig(device="cpu", cutoff_len=8, per_device_train_batch_size=1, save_steps=None)

    def fail(text: str) -> None:
        def backward(*args: object) -> None:
            raise RuntimeError(text)

        monkeypatch.setattr(bench_train_measure.Trainer, "_backward", backward)

    fail("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")
    found = bench_train_measure.measure_row(open_checkpoint(model), config, steps=1, warmup=0)
    assert found["out_of_memory"]
    assert "step_s" not in found
    fail("something else")
    with pytest.raises(RuntimeError, match="something else"):
        bench_train_measure.measure_row(open_checkpoint(model), config, steps=1, warmup=0)


def test_random_weights(tmp_path: Path, model: Path, runner: CliRunner) -> None:
    """Only config.json is there; nothing is loaded."""
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    arguments = [
        "bench",
        "train",
        str(tmp_path / "config.json"),
        "--random",
        "gradient_accumulation_steps=1",
        "device=cpu",
    ]
    for method in bench_train.METHODS:
        result = runner.invoke(cli, [*arguments, "--lengths", "16", "--steps", "1", "--methods", method, "--json"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["rows"][0]["tok_s"] > 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--methods", "lora,dora"], "methods has 'dora', allowed are lora, lora_emb, qlora, full"),
        (["--lengths", "256,long"], "lengths is '256,long', allowed are whole numbers with commas between them"),
        (["--lengths", "1"], "lengths has 1, allowed are whole numbers of at least 2"),
        (["--lengths", ","], "lengths is empty, allowed is at least one"),
        (["--steps", "0"], "steps has 0, allowed are whole numbers of at least 1"),
        (["cutoff_len=8"], "cutoff_len is not a setting here: MODEL, --methods and --lengths say it"),
        (["lora_rnk=8"], "lora_rnk is not a setting of train; did you mean lora_rank?"),
        (["--json", "--table"], "--json and --table do not go together"),
        (["--random"], "is no model folder, config.json or name in sizes.yaml"),
    ],
)
def test_what_is_refused(
    words: list[str], sentence: str, model: Path, runner: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    name = "Qwen/None" if words == ["--random"] else str(model)
    result = runner.invoke(cli, ["bench", "train", name, *words])
    assert result.exit_code == 2
    assert sentence in result.output


def test_no_share_of_the_peak_is_more_than_all_of_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate that is measured too low: what the run reached is more, and is the peak then."""
    monkeypatch.setattr(bench_train_measure, "peak_flops", lambda device, dtype: 1.0)
    config = TrainConfig(device="cpu", cutoff_len=8, per_device_train_batch_size=1, save_steps=None)
    found = bench_train_measure.measure_row(open_checkpoint(model), config, steps=2, warmup=1)
    assert 0 < found["mfu"] <= 1
