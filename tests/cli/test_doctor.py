"""`qwenkit doctor`: it tells all sections, changes nothing, and its text and JSON say the same."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from qwenkit import ops
from qwenkit.cli import doctor
from qwenkit.cli.main import cli


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("QWENKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_json(runner: CliRunner, cache: Path) -> None:
    result = runner.invoke(cli, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert list(report) == ["versions", "machine", "memory", "gpus", "ops", "folders"]
    assert report["ops"] == ops.implementations()
    assert report["versions"]["torch"]
    assert 0 < report["memory"]["free"] <= report["memory"]["total"]
    assert report["machine"]["cores"] >= report["machine"]["usable cores"] >= 1
    assert report["folders"]["qwenkit"] == {
        "path": str(cache),
        "size": 0,
        "disk free": report["folders"]["qwenkit"]["disk free"],
    }
    assert report["folders"]["default model"].startswith("not here yet")
    assert not cache.exists()


def test_text_shows_every_name(runner: CliRunner) -> None:
    text = runner.invoke(cli, ["doctor"]).stdout
    for section, values in doctor.examine().items():
        assert f"\n{section}\n" in f"\n{text}"
        assert all(f"\n  {name} " in text for name in values)


def test_values_are_readable() -> None:
    report = {"a": {"total": 3 * 2**30, "sets": ["x", "y"], "gpu": {"name": "G", "free": 2**29}, "no": None}, "b": {}}
    assert doctor.as_text(report).splitlines() == [
        "a",
        "  total  3.00 GiB",
        "  sets   x y",
        "  gpu    name G, free 0.50 GiB",
        "  no     -",
        "b",
        "  none",
    ]


def test_folder_size_counts_files_once(cache: Path) -> None:
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs" / "b").write_bytes(b"x" * 5000)
    (cache / "link").symlink_to(cache / "blobs" / "b")
    assert 5000 <= doctor._size(cache) < 5500


def test_cpuinfo(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(
        "model name\t: Some CPU @ 2GHz\nflags\t\t: fpu avx2 amx_tile sse\n\nmodel name\t: Some CPU @ 2GHz\n"
    )
    assert doctor._cpuinfo(path) == ("Some CPU @ 2GHz", ["avx2", "amx_tile"])
    path.write_text("Features\t: fp asimd asimddp sve\n")
    assert doctor._cpuinfo(path) == (None, ["asimd", "asimddp", "sve"])
    assert doctor._cpuinfo(tmp_path / "absent") == (None, [])


def test_container_limit(tmp_path: Path) -> None:
    path = tmp_path / "memory.max"
    assert doctor._container_limit(path) is None
    path.write_text("max\n")
    assert doctor._container_limit(path) is None
    path.write_text(f"{2**31}\n")
    assert doctor._container_limit(path) == "2.00 GiB"
