"""A clone needs nothing beside it: no tracked file names a place outside of the checkout, and golden data travels in tests/data.

Two searches. In any text: relative paths that lead from the file's folder to nothing in the checkout, and paths of one person's
machine. In Python: path expressions that begin at `__file__`, at the working directory, or at a constant made of them, in this
module or in one it imports, are evaluated and must stay in the checkout.
"""

import ast
import functools
import os
import posixpath
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from tests.conftest import DATA, ROOT

MAX_DATA_BYTES = 6_000_000
RELATIVE = re.compile(r"(?<![\w.\\-])(?:[\w.-]+/)*\.\.(?:/[\w.-]+)*(?![\w.])")
MACHINE = re.compile(r"(?<![\w.])/(?:work|home|Users|mnt|media|scratch)/\w[\w./-]*")
UPWARDS = re.compile(r"parent|dirname|(?<!\.)\.\.(?!\.)")  # without one of these no path leads out
# The first name of a path that leads nowhere on purpose: tests and benchmarks send it to see it refused.
HOSTILE = {
    "a",
    "b",
    "c",
    "x",
    "y",
    "etc",
    "foo",
    "org",
    "bad",
    "evil",
    "secret",
    "escape",
    "elsewhere",
    "outside",
    "model",
}

Location = tuple[str, ...]  # names from the root of the checkout down
OUTSIDE: Location = ("..",)  # any place that is not below the root


def tracked_files() -> list[PurePosixPath]:
    """Paths of the files that git tracks, or, without git or a repository, of all that .gitignore does not name."""
    try:
        ran = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        names = [name for name in ran.stdout.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        ignored = {line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()} | {".git"}
        names = []
        for folder, folders, found in os.walk(ROOT):
            folders[:] = [name for name in folders if name not in ignored and not name.endswith(".egg-info")]
            names += [os.path.relpath(os.path.join(folder, name), ROOT) for name in found]
    return [PurePosixPath(name) for name in names if (ROOT / name).is_file()]


def go(start: Location | None, path: str) -> Location | None:
    """The place that a path leads to; None if the start is unknown or the path is absolute."""
    if start is None or path.startswith("/"):
        return None
    names = posixpath.normpath(posixpath.join(*start, path)).split("/")
    return OUTSIDE if names[0] == ".." else tuple(name for name in names if name != ".")


def outside_in_text(file: PurePosixPath, text: str) -> Iterator[str]:
    """Paths in a text that name a place outside of the checkout, or one inside it that does not exist."""
    yield from MACHINE.findall(text)
    for found in RELATIVE.findall(text):
        path = posixpath.normpath(found)
        first = next((name for name in path.split("/") if name != ".."), "")
        target = go(file.parent.parts, path)
        exists = target is not None and target != OUTSIDE and ROOT.joinpath(*target).exists()
        if path.startswith("..") and not exists and first.split(".")[0] not in HOSTILE:
            yield found


class PathExpressions(ast.NodeVisitor):
    """Evaluates the path expressions of a module. `outside`: the source of those that leave the checkout."""

    def __init__(self, file: PurePosixPath, text: str) -> None:
        self.names: dict[str, Location | None] = {"__file__": file.parts}
        self.outside: list[str] = []
        self.visit(ast.parse(text))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        path = PurePosixPath(f"{(node.module or '').replace('.', '/')}.py")
        if (ROOT / path).is_file():
            names = module_names(path)
            self.names |= {alias.asname or alias.name: names.get(alias.name) for alias in node.names}

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        before = self.names
        arguments = {argument.arg: None for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
        self.names = before | arguments
        self.generic_visit(node)
        self.names = before

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        self.names |= {target.id: self.place(node.value) for target in node.targets if isinstance(target, ast.Name)}

    def generic_visit(self, node: ast.AST) -> None:
        place = self.place(node) if isinstance(node, ast.expr) else None
        if place == OUTSIDE:
            self.outside.append(ast.unparse(node))
        elif place is None:
            super().generic_visit(node)

    def place(self, node: ast.expr) -> Location | None:
        """Where an expression points, as far as that can be known without running it."""
        match node:
            case ast.Name(name):
                return self.names.get(name)
            case ast.Attribute(path, "parent") | ast.Call(ast.Attribute(_, "dirname"), [path]):
                return go(self.place(path), "..")
            case ast.Subscript(ast.Attribute(path, "parents"), ast.Constant(int(number))):
                return go(self.place(path), "../" * (number + 1))
            case ast.Attribute(path, "parents"):  # a walk up to the root of the disk
                return None if self.place(path) is None else OUTSIDE
            case ast.BinOp(path, ast.Div(), ast.Constant(str(name))):
                return go(self.place(path), name)
            case ast.Call(ast.Attribute(_, "cwd" | "getcwd"), []):
                return ()
            case ast.Call(ast.Name("Path" | "PurePath" | "str"), [path]):
                return self.place(path)
            case ast.Call(ast.Attribute(_, "abspath" | "realpath" | "fspath"), [path]):
                return self.place(path)
            case ast.Call(ast.Attribute(path, "resolve" | "absolute"), []):
                return self.place(path)
            case ast.Call(ast.Attribute(ast.Attribute(_, "path"), "join"), [path, *names]):
                return go(self.place(path), "/".join(str(getattr(name, "value", "")) for name in names))
            case ast.Call(ast.Attribute(path, "joinpath"), names):
                return go(self.place(path), "/".join(str(getattr(name, "value", "")) for name in names))
        return None


def outside(file: PurePosixPath, text: str) -> list[str]:
    found = list(outside_in_text(file, text))
    if file.suffix == ".py" and UPWARDS.search(text):
        found += PathExpressions(file, text).outside
    return found


@functools.cache
def module_names(file: PurePosixPath) -> dict[str, Location | None]:
    """The names of a module that are places in the checkout."""
    return PathExpressions(file, (ROOT / file).read_text("utf-8")).names


def test_no_file_names_a_place_outside_of_the_checkout() -> None:
    found = {}
    for file in tracked_files():
        try:
            text = (ROOT / file).read_text("utf-8")
        except UnicodeDecodeError:
            continue  # golden data
        if file != PurePosixPath("tests/test_self_contained.py") and (places := outside(file, text)):
            found[str(file)] = places
    assert not found, f"outside of the checkout (names made up for a test belong to HOSTILE here): {found}"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("docs/train.md", "data: ../shared/data/sft"),
        ("docs/train.md", "bash ../../peers/run_all.sh"),
        ("README.md", "see [the peers](../peers/README.md)"),
        ("Makefile", "\tpytest --data=../shared"),
        (".ci/run", 'cp -r "$(dirname "$0")/../../golden" .'),
        ("docs/train.md", "measured with /home/someone/bench.py"),
        ("recipes/lora.yaml", "dataset_dir: /scratch/someone/data"),
        ("tests/text/test_x.py", 'DATA = Path("../shared")'),
        ("tests/text/test_x.py", 'open(f"{ROOT}/../golden/x.json")'),
        ("tests/text/test_x.py", "# as ../shared/check.py does"),
        ("tests/text/test_x.py", 'Path(__file__).resolve().parents[3] / "shared" / "tokenizer"'),
        ("tests/text/test_x.py", "Path(__file__).parent.parent.parent.parent"),
        ("tests/text/test_x.py", 'HERE = Path(__file__).parents[2]\ndef f():\n    return HERE.parent / "shared"'),
        ("tests/text/test_x.py", "from tests.conftest import ROOT\ndef f(x):\n    return ROOT.parent / x"),
        ("tests/text/test_x.py", 'from tests.conftest import ROOT as R\nx = R / ".." / "shared"'),
        (
            "tests/text/test_x.py",
            'x = DATA.joinpath("y")\nDATA = Path(__file__).parent\nx = DATA.joinpath("..", "..", "..", "y")',
        ),
        ("tests/text/test_x.py", 'os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "..", "data")'),
        ("tests/text/test_x.py", "next(p for p in Path(__file__).parents if (p / 'shared').is_dir())"),
        ("benchmarks/x.py", 'sys.path.insert(0, str(Path.cwd().parent / "peers"))'),
        ("benchmarks/x.py", 'Path(__file__).resolve().parents[2] / "shared" / "data"'),
    ],
)
def test_references_are_found(file: str, text: str) -> None:
    assert outside(PurePosixPath(file), text)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("docs/train.md", '[data](../src/qwenkit/train/data), 1..5, and so on ... ".."'),
        (".ci/run", 'cd "$(dirname "$0")/.."'),
        ("tests/hub/test_x.py", 'NAMES = ["..", "../../etc/passwd", "a/../b", "/etc/passwd", "../x.json"]'),
        ("tests/text/test_x.py", 'ROOT = Path(__file__).resolve().parents[2] / "tests" / "data"'),
        (
            "tests/text/test_x.py",
            "HERE = Path(__file__).parent\ndef f(HERE):\n    return HERE.parent.parent.parent.parent",
        ),
        ("tests/text/test_x.py", "def f(tmp_path):\n    return tmp_path.parent.parent / '..'"),
    ],
)
def test_places_in_the_checkout_and_hostile_names_are_not(file: str, text: str) -> None:
    assert not outside(PurePosixPath(file), text)


def test_golden_data_is_small_and_its_sources_are_named() -> None:
    files = [path for path in DATA.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_DATA_BYTES
    table = (DATA / "README.md").read_text("utf-8")
    for name in {path.relative_to(DATA).parts[0] for path in files} - {"README.md"}:
        stem = name.split(".")[0]
        assert f"`{name}" in table or f"`{stem}." in table, f"tests/data/README.md does not say where {name} is from"


def test_golden_data_is_decompressed(data_folder: Path) -> None:
    names = {str(path.relative_to(DATA)).removesuffix(".xz") for path in DATA.rglob("*") if path.is_file()}
    assert names == {str(path.relative_to(data_folder)) for path in data_folder.rglob("*") if path.is_file()}
    assert (data_folder / "tokenizer" / "tokenizer.json").stat().st_size == 11_422_654
