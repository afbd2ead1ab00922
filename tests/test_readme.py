"""The README's commands, one by one and in order, in an empty folder; and README_zh.md has the same ones.

Each is run as it stands, but for what WITHOUT leaves out and INSTEAD replaces, each with its reason. Models of the hubs come from
a hub on loopback, which has a tiny random model under their names; smollm2 is the real one.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import ROOT
from tests.hub.hub_server import hub_server
from tests.tiny_models import write_model

WITHOUT = {
    "make demo": "downloads and installs; the tests' own set-up does the same",
    "make test": "runs this test",
    "source .venv/bin/activate": "the program is on the path already",
    'pip install -e ".[modelscope]"': "installed for the tests",
    'pip install -e ".[serve]"': "installed for the tests",
}
INSTEAD = {
    "num_train_epochs=5": "max_steps=2",  # minutes
    '"Who are you?" --temperature 0': '"Who are you?" --temperature 0 --max-tokens 8',  # hardly trained, it would never end
    "8000": "{port}",  # may be taken
}
CONVERSATIONS = ("qwenkit chat", "qwenkit chat Qwen/Qwen2.5-0.5B-Instruct")  # need a terminal
SERVER = "qwenkit serve"  # runs until it is told to stop
PATIENCE = 240.0  # seconds; only a command that hangs takes them


def commands(name: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [command for line in lines if (command := re.sub(r"\s{2,}#.*", "", line).strip())]


def test_both_languages_have_the_same_commands() -> None:
    assert commands("README.md") == commands("README_zh.md")
    assert len(commands("README.md")) > 20
    assert WITHOUT.keys() <= set(commands("README.md"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Iterator[dict[str, str]]:
    """A fresh home, a cache with nothing but the default model, and a hub with tiny models."""
    folder = tmp_path_factory.mktemp("readme")
    tiny = write_model(folder / "tiny", hidden_size=128, intermediate_size=256, max_position_embeddings=2048)
    held = {path.name: path.read_bytes() for path in tiny.iterdir()}
    cache = folder / "cache" / "models" / "smollm2"
    cache.mkdir(parents=True)
    for path in default_model.parent.iterdir():
        shutil.copyfile(path, cache / path.name)
    with hub_server({"Qwen/Qwen2.5-0.5B-Instruct": held, "Qwen/Qwen2.5-7B-Instruct": held}) as hub:
        yield {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "MODELSCOPE_"))},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(folder),
            "HF_HOME": str(folder / "hf"),
            "HF_ENDPOINT": hub.url,
            "MODELSCOPE_ENDPOINT": hub.url,
            "MODELSCOPE_CACHE": str(folder / "modelscope"),
            "MODELSCOPE_HOME": str(folder / "modelscope-home"),
            "QWENKIT_CACHE": str(folder / "cache"),
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            "TERM": "xterm",
        }


def test_the_commands_do_what_they_say(environment: dict[str, str], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with contextlib.ExitStack() as stack:
        for command in commands("README.md"):
            if command in WITHOUT:
                continue
            for word, other in INSTEAD.items():
                command = command.replace(word, other.format(port=port))
            if command in CONVERSATIONS:
                text = converse(command, environment, tmp_path)
                assert "/help shows the commands" in text
            elif command.startswith(SERVER):
                stack.enter_context(serving(command, port, environment, tmp_path))
            else:
                done = subprocess.run(
                    ["bash", "-c", command],
                    env=environment,
                    cwd=tmp_path,
                    capture_output=True,
                    text=True,
                    timeout=PATIENCE,
                )
                assert done.returncode == 0, f"{command}: {done.stdout[-1000:]} {done.stderr[-2000:]}"
                made = ("> ", "--output", "output_dir=")  # what such a command has to show is a file
                assert done.stdout.strip() or any(sign in command for sign in made), f"{command} says nothing"
    for made in ("answers.jsonl", "runs/kit/adapter_config.json", "smollm2-kit/config.json", "qwen-int4/config.json"):
        assert (tmp_path / made).is_file(), made


def converse(command: str, environment: dict[str, str], folder: Path) -> str:
    """Run a conversation in a terminal and leave it with Ctrl-D. Returns what the terminal showed."""
    import pty

    master, slave = pty.openpty()
    process = subprocess.Popen(
        ["bash", "-c", command], env=environment, cwd=folder, stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    shown, deadline = b"", time.monotonic() + PATIENCE
    while process.poll() is None:
        assert time.monotonic() < deadline, shown[-2000:]
        readable, _, _ = select.select([master], [], [], 1.0)
        if readable:
            with contextlib.suppress(OSError):  # the other side is closed
                shown += os.read(master, 4096)
        elif b"/help shows the commands" in shown:
            os.write(master, b"\x04")
    os.close(master)
    assert process.wait(PATIENCE) == 0, shown[-2000:]
    return shown.decode("utf-8", "replace")


@contextlib.contextmanager
def serving(command: str, port: int, environment: dict[str, str], folder: Path) -> Iterator[None]:
    """A server until the block ends, from the moment when it is ready."""
    with open(folder / "server.log", "w+") as log:
        words: Any = ["bash", "-c", f"exec {command}"]
        process = subprocess.Popen(words, env=environment, cwd=folder, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + PATIENCE
            while True:
                assert process.poll() is None, (folder / "server.log").read_text()
                assert time.monotonic() < deadline, "the server took too long to start"
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"http://127.0.0.1:{port}/ready", trust_env=False).status_code == 200:
                        break
                time.sleep(0.1)
            yield
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(PATIENCE)


def test_the_python_lines_do_what_they_say(default_model: Path) -> None:
    """Each `>>>` statement; what is shown under one is what it gives."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    for statement, shown in re.findall(r"^>>> (.*(?:\n\.\.\. .*)*)\n?((?:(?!>>> ).+\n)*)", block, re.MULTILINE):
        source = statement.replace("\n... ", "\n").replace('"smollm2"', repr(str(default_model)))
        if shown.strip():
            assert repr(eval(source, names)) == shown.strip()
        else:
            exec(source, names)
    assert len(names["outputs"]) == 2
