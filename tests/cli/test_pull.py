"""`qwenkit pull`: which flags mean what, and what is printed where."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qwenkit.cli.pull import pull
from tests.hub.hub_server import COMMIT, WANTED, HubServer, hub_server, tiny_model, use_hub

SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with hub_server({"org/tiny": tiny_model()}) as server:
        use_hub(monkeypatch, tmp_path, server.url)
        yield server


def run(*arguments: object) -> Result:
    return CliRunner().invoke(pull, [str(argument) for argument in arguments])


def test_the_path_is_all_that_goes_to_stdout(hub: HubServer, tmp_path: Path) -> None:
    result = run("org/tiny")
    snapshot = tmp_path / "huggingface" / "models--org--tiny" / "snapshots" / COMMIT
    assert (result.exit_code, result.stdout) == (0, f"{snapshot}\n")
    assert "org/tiny" in result.stderr  # the progress bar


def test_into_and_verify(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    assert run("ms:org/tiny", "--into", folder, "--revision", "master").stdout == f"{folder}\n"
    good = f"{len(WANTED) + 1} files, 0.00 GB: all good ({len(WANTED)} checksums compared"
    assert run("--verify", folder).stdout == f"{good})\n"
    assert run("--verify", folder, "org/tiny").stdout == f"{good} with org/tiny)\n"
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-1])
    for arguments in (("--verify", folder), ("--verify", folder, "org/tiny")):
        result = run(*arguments)
        assert isinstance(result.exception, ValueError)
        assert str(result.exception).startswith(f"{SHARD}: ")
        assert result.stdout == ""


def test_flags_that_do_not_go_together(tmp_path: Path) -> None:
    assert str(run().exception) == "pull needs the MODEL to get, or --verify FOLDER"
    assert "give one of them" in str(run("--verify", tmp_path, "--into", tmp_path).exception)
    assert isinstance(run("--verify", tmp_path / "none").exception, FileNotFoundError)


def test_the_help_has_an_example() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "qwenkit pull Qwen/Qwen2.5-0.5B-Instruct\n" in result.stdout
    assert "pull --verify models/qwen " in result.stdout
