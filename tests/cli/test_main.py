"""The command line around the verbs: help, unknown names, and how errors and interruptions end."""

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from qwenkit.cli import doctor, main


def test_help_is_complete_and_imports_no_verb(runner: CliRunner) -> None:
    result = runner.invoke(main.cli, ["--help"])
    assert result.exit_code == 0
    for verb in main.VERBS:
        assert f"  {verb} " in result.output
    assert "Example" in result.output.splitlines()[-2]
    code = (
        "import sys, click.testing, qwenkit.cli.main as m; click.testing.CliRunner().invoke(m.cli, ['--help']);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'qwenkit.cli.chat', 'prompt_toolkit', 'httpx')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("verb", list(main.VERBS))
def test_every_verb_exists_and_shows_an_example(runner: CliRunner, verb: str) -> None:
    result = runner.invoke(main.cli, [verb, "--help"])
    assert result.exit_code == 0, result.output
    assert f"qwenkit {verb}" in result.output.split("Usage:")[1].split("\n", 1)[1]


def test_threads_of_openmp_spin_for_a_moment_only() -> None:
    """Set before torch is loaded, and only where the user has not."""
    environment = {"PATH": "/bin"}
    main.limit_openmp_spin(environment)
    assert environment == {"PATH": "/bin", **main.OPENMP_SPIN}
    for own in ({"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}, {"KMP_BLOCKTIME": "0"}):
        environment = dict(own)
        main.limit_openmp_spin(environment)
        assert environment == own


def test_version(runner: CliRunner) -> None:
    assert runner.invoke(main.cli, ["--version"]).output.startswith("qwenkit, version 0.")


def test_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "qwenkit", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("qwenkit, version")


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["chta"], "did you mean chat?"),
        (["zzz"], "known are chat, doctor, generate, pull"),
        (["chat", "--temprature", "1"], "--temperature"),
        (["--bug"], "--debug"),
    ],
)
def test_unknown_names_are_told_the_nearest(runner: CliRunner, args: list[str], hint: str) -> None:
    result = runner.invoke(main.cli, args)
    assert result.exit_code == 2
    assert hint in result.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("top_p is 2, allowed is less"), "error: top_p is 2, allowed is less\n"),
        (FileNotFoundError("no model here"), "error: no model here\n"),
        (FileNotFoundError(2, "No such file or directory", "x.gguf"), "error: no such file or directory: x.gguf\n"),
        (PermissionError(13, "Permission denied", "/x"), "error: permission denied: /x\n"),
    ],
)
def test_user_errors_are_one_sentence(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: (_ for _ in ()).throw(error))
    result = runner.invoke(main.cli, ["doctor"])
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", said)
    assert runner.invoke(main.cli, ["--debug", "doctor"]).exception is error


def test_bugs_keep_their_traceback(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: {}["x"])
    assert isinstance(runner.invoke(main.cli, ["doctor"]).exception, KeyError)


def test_ctrl_c_exits_130_quietly(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    result = runner.invoke(main.cli, ["doctor"])
    assert (result.exit_code, result.stdout, result.stderr.strip()) == (130, "", "")


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    code = (
        "import qwenkit.cli.doctor as d; d.examine = lambda: {'a': {str(k): 'x' * 1000 for k in range(1000)}};"
        "import sys; sys.argv = ['qwenkit', 'doctor']; from qwenkit.cli.main import main; main()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""


def test_verbs_are_commands_of_their_own_modules() -> None:
    with click.Context(main.cli) as context:
        for verb in main.VERBS:
            command = main.cli.get_command(context, verb)
            assert command is not None
            assert command.name == verb
