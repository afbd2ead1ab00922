"""`qwenkit eval perplexity` on a tiny model: a line, JSON, the report with its table and picture, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qwenkit.cli.eval import USUAL, parse_variant
from qwenkit.cli.main import cli
from tests.tiny_models import write_model

TEXT = "The quick brown fox jumps over the lazy dog. " * 10
FLAGS = ["--context=64", "--weights=float", "--dtype=float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def invoke(runner: CliRunner, *arguments: object) -> Any:
    return runner.invoke(cli, ["eval", "perplexity", *map(str, arguments)])


def test_json_is_one_line_with_the_whole_protocol(runner: CliRunner, folder: Path, data: Path) -> None:
    result = invoke(runner, folder, "--data", data, *FLAGS, "--limit=3", "--json")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    record = json.loads(result.stdout)
    assert (record["model"], record["data"]) == (str(folder), str(data))
    assert (record["windows"], record["context"], record["stride"]) == (3, 64, None)
    assert (record["tokens"], record["text_tokens"]) == (3 * 63, 450)
    assert 100 < record["perplexity"] < 2000  # of a random model over 264 tokens
    assert record["kv_cache_dtype"] == "float32"
    assert record["settings"]["dtype"] == "float32"
    assert record["versions"]["qwenkit"]
    assert "report" not in record


def test_a_line_for_people_and_a_quantized_cache(runner: CliRunner, folder: Path, data: Path) -> None:
    plain = invoke(runner, folder, "--data", data, *FLAGS, "--json")
    result = invoke(runner, folder, "--data", data, *FLAGS, "--kv-cache-dtype=int8")
    assert result.exit_code == 0, result.output
    assert "7 windows of 64" in result.stdout
    assert "keys and values in int8" in result.stdout
    value = float(result.stdout.split()[1])
    assert value != pytest.approx(json.loads(plain.stdout)["perplexity"], rel=1e-7)
    assert value == pytest.approx(json.loads(plain.stdout)["perplexity"], rel=0.02)


def test_sliding_windows_count_every_token(runner: CliRunner, folder: Path, data: Path) -> None:
    record = json.loads(invoke(runner, folder, "--data", data, *FLAGS, "--stride=32", "--json").stdout)
    assert (record["stride"], record["tokens"]) == (32, 449)


def test_report(runner: CliRunner, folder: Path, data: Path, tmp_path: Path) -> None:
    """The reference first, then each variant; a table for people, the same as JSON, and a picture."""
    picture = tmp_path / "report.png"
    flags = [
        "--data",
        data,
        *FLAGS,
        "--limit=2",
        "--report=kv_cache_dtype=int4",
        f"--report={folder},kv-cache-dtype=float32",
    ]
    result = invoke(runner, folder, *flags, f"--report={picture}")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"{data}: 2 disjoint windows of 64 tokens"
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:]]
    assert [row[0] for row in cells] == [str(folder), "kv_cache_dtype=int4", f"{folder},kv-cache-dtype=float32"]
    assert cells[0][2:5] == ["", "", ""]
    assert float(cells[1][3]) > 0
    assert cells[2][2:5] == ["+0.00 %", "0.00000", "100.00 %"]
    assert int(cells[0][6]) > int(cells[1][6]) > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.part"))
    record = json.loads(invoke(runner, folder, *flags, "--json").stdout)
    assert [entry["name"] for entry in record["report"]] == [row[0] for row in cells]
    assert record["report"][0]["perplexity"] == pytest.approx(record["perplexity"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("weights=int4", (None, {"weights": "int4"})),
        ("kv-cache-dtype=int8, block_size=32", (None, {"kv_cache_dtype": "int8", "block_size": 32})),
        ("org/name", ("org/name", {})),
        ("org/name,weights=int8", ("org/name", {"weights": "int8"})),
        *((usual, (None, dict([usual.split("=")]))) for usual in USUAL),
    ],
)
def test_variants(text: str, expected: object) -> None:
    assert parse_variant(text) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--context=1"], "error: context is 1, allowed is a whole number of at least 2"),
        (["--limit=0"], "error: limit is 0, allowed is a whole number of at least 1"),
        (["--stride=64"], "error: stride is 64, allowed is a whole number from 1 to 63"),
        (["--context=300"], "error: context is 300, but the model's context is 256 tokens"),
        (["--report=weight=int4"], "weight is no setting; did you mean weights?"),
        (["--report=weights=int5"], "weights is 'int5', allowed are"),
        (["--report=a,b"], "allowed is a model, settings such as weights=int4, or both"),
        (["--report=a.png", "--report=b.png"], "plot names 2 .png files, allowed is one"),
        (["--report=no/such/folder/a.png"], "but there is no folder"),
        (["--kv-cache-dtype=int2"], "kv_cache_dtype is 'int2', allowed are auto"),
    ],
)
def test_what_is_refused(runner: CliRunner, folder: Path, data: Path, flags: list[str], message: str) -> None:
    result = invoke(runner, folder, "--data", data, *FLAGS, *flags)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_file_is_named(runner: CliRunner, folder: Path, tmp_path: Path) -> None:
    result = invoke(runner, folder, "--data", tmp_path / "none.txt", *FLAGS)
    assert (result.exit_code, "none.txt" in result.stderr) == (2, True)
