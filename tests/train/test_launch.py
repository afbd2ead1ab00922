"""torchrun, run for the user."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qwenkit.train.launch import Launch, check_environment, run, started_by_torchrun

WORKER = """
import os, pathlib, sys
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
folder = pathlib.Path(sys.argv[1])
(folder / os.environ["RANK"]).write_text(" ".join([*(os.environ[name] for name in names), *sys.argv[2:]]))
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "some_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return "some_worker"


def test_two_processes_get_the_arguments(worker: str, tmp_path: Path) -> None:
    assert run(Launch(nproc=2), worker, [str(tmp_path), "0", "a b", "--c=d"]) == 0
    for rank in ("0", "1"):
        words = (tmp_path / rank).read_text().split(" ", 5)
        assert words[:4] == [rank, "2", rank, "2"]
        assert int(words[4]) >= 1
        assert words[5] == "0 a b --c=d"


def test_commands() -> None:
    alone = Launch(nproc=8).command("qwenkit", ["train", "x.yaml"])
    assert alone[1:] == [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=8",
        "-m",
        "qwenkit",
        "train",
        "x.yaml",
    ]
    many = Launch(8, 2, 1, "10.0.0.1", 6001).command("qwenkit", [])
    assert many[3:7] == ["--nnodes=2", "--node-rank=1", "--master-addr=10.0.0.1", "--master-port=6001"]


def test_when_it_is_needed() -> None:
    assert not Launch().needed
    assert Launch(nproc=2).needed
    assert Launch(nnodes=2, master="10.0.0.1").needed
    assert started_by_torchrun({"RANK": "0", "WORLD_SIZE": "1"})
    assert not started_by_torchrun({})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nproc": 0}, "nproc is 0, allowed is a whole number from 1 to 1024"),
        ({"nnodes": 2, "master": "a", "node_rank": 2}, "node_rank is 2, allowed is a whole number from 0 to 1"),
        ({"nnodes": 2}, "master is '127.0.0.1', but there are 2 nodes"),
        ({"port": 70000}, "port is 70000"),
    ],
)
def test_launches_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Launch(**settings)


def test_ctrl_c_waits_for_processes_that_save(tmp_path: Path) -> None:
    """The launcher outlives the signal, and what it started ends in its own time."""
    child = "import signal, sys, time; signal.signal(signal.SIGINT, lambda *_: (time.sleep(0.5), sys.exit(7))); "
    child += "open('ready', 'w').close(); time.sleep(60)"
    code = (
        "import sys; from qwenkit.train import launch\n"
        f"launch.Launch.command = lambda *_: [sys.executable, '-c', {child!r}]\n"
        "sys.exit(launch.run(launch.Launch(2), '', []))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)

    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 7


@pytest.mark.parametrize(
    ("environment", "notes"),
    [
        ({}, []),
        ({"NNODES": "1", "MASTER_ADDR": "10.0.0.9", "NPROC_PER_NODE": "1"}, []),
        ({"NPROC_PER_NODE": "4"}, ["NPROC_PER_NODE=4 in the environment is not read; --nproc 4 says it"]),
    ],
)
def test_launch_variables_of_others_are_named(environment: dict[str, str], notes: list[str]) -> None:
    assert check_environment(Launch(), environment) == notes


@pytest.mark.parametrize("prefix", ["", "PET_"])
def test_a_node_of_several_does_not_train_alone(prefix: str) -> None:
    environment = {f"{prefix}NNODES": "2", f"{prefix}NODE_RANK": "1", f"{prefix}MASTER_ADDR": "10.0.0.9"}
    with pytest.raises(ValueError, match=r"--nnodes 2 --node-rank 1 --master 10\.0\.0\.9 joins them"):
        check_environment(Launch(), environment)
    assert check_environment(Launch(nnodes=2, node_rank=1, master="10.0.0.9"), environment) == []
