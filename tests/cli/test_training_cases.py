"""What people have: configurations, data sets and adapters of other trainers, as data in tests/data/training/cases.

A case has files and steps. The steps run in one empty folder, in this process; {qwen2} and {wide} are tiny random models. A step
holds when any of its outcomes does: `exit` equal, every `has` found (a regular expression) in the output, no `lacks` found, every
`exists` there. A step without outcomes is preparation.
"""

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from qwenkit import ops
from qwenkit.cli.main import cli
from tests.conftest import OPS, ROOT
from tests.tiny_models import write_model

CASES = {
    f"{path.stem}: {name}": case
    for path in sorted((ROOT / "tests" / "data" / "training" / "cases").glob("*.yaml"))
    for name, case in yaml.safe_load(path.read_text(encoding="utf-8")).items()
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    wide = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 2048}
    return {"qwen2": write_model(folder / "qwen2"), "wide": write_model(folder / "wide", **wide)}


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    yield
    ops.use(OPS)


@pytest.mark.parametrize("name", CASES)
def test_case(
    name: str, models: dict[str, Path], tmp_path: Path, runner: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for file, text in case.get("files", {}).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(filled(text, models), encoding="utf-8", newline="")
    for number, step in enumerate(case["steps"], start=1):
        exit_code, output = run(filled(step["run"], models), step.get("env") or {}, runner)
        why = [failure(outcome, exit_code, output, folder) for outcome in step.get("any") or []]
        assert not why or None in why, f"step {number}: {' / '.join(filter(None, why))}\n{output}"


def filled(text: str, models: dict[str, Path]) -> str:
    return re.sub(r"\{(qwen2|wide)\}", lambda match: str(models[match[1]]), text)


def run(command: str, environment: dict[str, str], runner: CliRunner) -> tuple[int, str]:
    words = shlex.split(command)
    if words[0] == "{python}":
        runpy.run_path(words[1])
        return 0, ""
    assert words[0] == "qwenkit"
    result = runner.invoke(cli, words[1:], env=environment)
    raised = result.exception if not isinstance(result.exception, SystemExit) else None
    return result.exit_code, f"{result.output}{raised!r}" if raised else result.output


def failure(outcome: dict[str, Any], exit_code: int, output: str, folder: Path) -> str | None:
    if outcome.get("exit", exit_code) != exit_code:
        return f"exit {exit_code}, not {outcome['exit']}"
    for pattern in outcome.get("has", []):
        if not re.search(pattern, output, re.DOTALL):
            return f"lacks {pattern!r}"
    for pattern in outcome.get("lacks", []):
        if re.search(pattern, output, re.DOTALL):
            return f"has {pattern!r}"
    for pattern in outcome.get("exists", []):
        if not list(folder.glob(pattern)):
            return f"no file {pattern}"
    return None
