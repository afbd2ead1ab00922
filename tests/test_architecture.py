"""What holds the house up: floors, file sizes, names, exports, and documents that a machine can check."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import qwenkit
from qwenkit.cli.main import cli
from tests.conftest import ROOT

PACKAGE = ROOT / "src" / "qwenkit"
FLOORS = {
    "errors": -1,
    "files": 0,
    "installation": 0,
    "settings": 0,
    "storage": 0,
    "text": 1,
    "ops": 1,
    "model": 2,
    "linear": 3,
    "weights": 4,
    "hub": 4,
    "engine": 5,
    "train": 5,
    "quant": 6,  # calibration reads what training reads
    "serve": 7,
    "eval": 7,
    "compat": 7,
    "cli": 8,
}
READMES = ("README.md", "README_zh.md")
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, at the top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def folder_of(path: Path) -> str | None:
    """The folder at the root of the package, or the module there, that a file belongs to; None for the package's own entry."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else None if path.stem in {"__init__", "__main__"} else path.stem


def test_imports_only_go_down() -> None:
    wrong = []
    for path in SOURCES:
        here = folder_of(path)
        if here is None:
            continue  # the package's own __init__ and __main__ stand above all floors
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "qwenkit" or len(parts) == 1 or parts[1] == here:
                continue
            if FLOORS.get(parts[1], 99) >= FLOORS[here]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong, wrong


def test_every_folder_has_a_floor() -> None:
    assert {folder_of(path) for path in SOURCES} - {None} <= set(FLOORS)
    assert all(len(path.relative_to(PACKAGE).parts) <= 3 for path in SOURCES), "folders are at most two deep"


def test_text_knows_no_torch_and_references_stay_in_tests() -> None:
    for path in SOURCES:
        roots = {name.split(".")[0] for name in imports(path) if name != "pickle.UnpicklingError"}
        assert not roots & {"transformers", "peft", "trl", "vllm", "pickle"}, path
        if folder_of(path) == "text":
            assert "torch" not in roots, path


def test_files_are_short_and_say_what_they_are() -> None:
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, path
        assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
        assert path.stem not in {"utils", "common", "helpers", "base", "manager", "misc"}, path


def test_public_names_are_exported_and_exports_exist() -> None:
    for name in qwenkit.__all__:
        assert getattr(qwenkit, name) is not None
    assert len(set(qwenkit.__all__)) == len(qwenkit.__all__)
    assert set(qwenkit.__all__) <= set(dir(qwenkit))
    with pytest.raises(AttributeError, match="no attribute 'NoSuchName'"):
        _ = qwenkit.NoSuchName


def test_import_does_no_work() -> None:
    """Importing the package reads no model code: torch is loaded when a name that needs it is first used."""
    code = "import sys, qwenkit, qwenkit.cli.main; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", READMES)
def test_readme_is_short_and_its_make_targets_exist(name: str) -> None:
    readme = (ROOT / name).read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    targets = set(re.findall(r"^make (\w+)", readme, flags=re.MULTILINE))
    assert {"demo", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def readme_commands() -> list[str]:
    """Every `qwenkit …` line of the READMEs' shell blocks, continuation lines joined."""
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in READMES]
    blocks = re.findall(r"```bash\n(.*?)```", "".join(texts), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return sorted({line for line in lines if re.match(r"(.* \| )?(\.venv/bin/)?qwenkit ", line)})


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands_are_understood(command: str) -> None:
    """Each verb and flag that the README shows is one that the program has (its parser takes them, nothing is run)."""
    words = shlex.split(command.split(" | ")[-1].split(" # ")[0].split(" < ")[0].split(" > ")[0])[1:]
    with click.Context(cli) as ctx:
        verb = cli.get_command(ctx, words[0])
        assert verb is not None, f"no verb {words[0]}"
        verb.make_context(words[0], words[1:])


def test_links_in_the_documents_lead_somewhere() -> None:
    for document in (*(ROOT / name for name in READMES), ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
