"""Starting as many processes as there are devices: torchrun, run for the user.

In: how many processes and nodes, and the arguments of `qwenkit train`. Out: the same command in each process, with torchrun's
environment variables set; they end together. Nothing is done where one process is asked for, or torchrun has already started us.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PORT = 29500


@dataclass(frozen=True)
class Launch:
    """`nproc` processes on each of `nnodes` nodes, of which this is number `node_rank`; they meet at `master`:`port`.

    Raises ValueError naming the field for a value outside its range.
    """

    nproc: int = 1
    nnodes: int = 1
    node_rank: int = 0
    master: str = "127.0.0.1"
    port: int = PORT

    def __post_init__(self) -> None:
        for name, low, high in (
            ("nproc", 1, 1024),
            ("nnodes", 1, 65536),
            ("node_rank", 0, self.nnodes - 1),
            ("port", 1, 65535),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}, allowed is a whole number from {low} to {high}")
        if self.nnodes > 1 and self.master in ("127.0.0.1", "localhost", ""):
            raise ValueError(
                f"master is {self.master!r}, but there are {self.nnodes} nodes; allowed is the address of the first one"
            )

    @property
    def needed(self) -> bool:
        """Whether there is more than one process to start."""
        return self.nproc * self.nnodes > 1

    def command(self, module: str, arguments: Sequence[str]) -> list[str]:
        """The command line of torchrun that runs `python -m module arguments` in every process."""
        meeting = (
            ["--standalone"]
            if self.nnodes == 1
            else [
                f"--nnodes={self.nnodes}",
                f"--node-rank={self.node_rank}",
                f"--master-addr={self.master}",
                f"--master-port={self.port}",
            ]
        )
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        return [*torchrun, *meeting, f"--nproc-per-node={self.nproc}", "-m", module, *arguments]


def started_by_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of torchrun's."""
    return "WORLD_SIZE" in environment and "RANK" in environment


def check_environment(launch: Launch, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Notes on launch variables of other trainers, which are not read: what the flags say is what is started.

    Raises ValueError, naming the flags, where they ask for several nodes and the flags for one: this node would train alone.
    """
    names = {
        "NNODES": "nnodes",
        "NODE_RANK": "node_rank",
        "NPROC_PER_NODE": "nproc",
        "MASTER_ADDR": "master",
        "MASTER_PORT": "port",
    }
    given = {
        name: next((environment[key] for key in (name, f"PET_{name}") if environment.get(key)), "") for name in names
    }
    given = {name: value for name, value in given.items() if value}
    flags = {name: f"--{names[name].replace('_', '-')} {value}" for name, value in given.items()}
    if given.get("NNODES", "1") not in ("0", "1") and launch.nnodes == 1:
        said = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(
            f"the environment says {said}, but this command starts one node; {' '.join(flags.values())} joins them, "
            "and without NNODES in the environment one node trains alone"
        )
    unlike = [name for name, value in given.items() if str(getattr(launch, names[name])) != value]
    if given.get("NPROC_PER_NODE", "1") == "1" and launch.nnodes == 1:
        unlike = []  # one process meets nobody
    return [f"{name}={given[name]} in the environment is not read; {flags[name]} says it" for name in unlike]


def run(launch: Launch, module: str, arguments: Sequence[str]) -> int:
    """Run torchrun and wait for it; its exit code. Ctrl-C reaches all processes, which are waited for while they save."""
    environment = dict(os.environ)
    # As many threads as the processes leave each other; torchrun would set one.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // launch.nproc)))
    process = subprocess.Popen(launch.command(module, arguments), env=environment)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the terminal has sent it to torchrun too
            continue
