"""Files that are no files, that are larger than they look or than they should be: one sentence, at once, in little memory.

Each is read in a process of its own under limits, see hostile_reader.py. tests/data/security/files.jsonl lists what was once
reported; `MADE` makes each of them and its neighbours.
"""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from tests.tiny_models import write_model

READER = Path(__file__).with_name("hostile_reader.py")
MB = 1 << 20
CPU_SECONDS = 2
MEMORY = 200 * MB
CASES = {
    case["id"]: case for case in map(json.loads, (ROOT / "tests/data/security/files.jsonl").read_text().splitlines())
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hostile") / "model")


@pytest.fixture
def folder(tmp_path: Path, template: Path) -> Path:
    shutil.copytree(template, tmp_path / "model")
    return tmp_path / "model"


def assert_one_sentence(found: dict[str, Any], *words: str) -> None:
    said = found["said"]
    assert said is not None
    assert "\n" not in said
    assert len(said) < 1000, said
    assert all(word in said for word in words), said
    assert found["cpu"] < CPU_SECONDS, found
    assert found["memory"] < MEMORY, found


def safetensors(path: Path, header: bytes, data: int = 0) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(data))


def sparse(path: Path, size: int) -> None:
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


def many_dimensions(folder: Path) -> None:
    ones = ",".join(["1"] * 8_100_001)
    header = f'{{"a":{{"dtype":"F32","shape":[{ones}],"data_offsets":[0,4]}}}}'
    safetensors(folder / "model.safetensors", header.encode(), 4)


def some_dimensions(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1] * 200_000, "data_offsets": [0, 4]}})
    safetensors(folder / "model.safetensors", header.encode(), 4)


def empty_lists(folder: Path) -> None:
    safetensors(folder / "model.safetensors", b"[" + b"[]," * 9_000_000 + b"[]]")


def large_header(folder: Path) -> None:
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 90_000_000))
        file.truncate(200_000_000)


def deep(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")


def rather_deep(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' + "[" * 400 + "]" * 400 + "}")


def sparse_config(folder: Path) -> None:
    sparse(folder / "config.json", 4 << 30)


def sparse_tokenizer(folder: Path) -> None:
    sparse(folder / "tokenizer.json", 4 << 30)


def sparse_template(folder: Path) -> None:
    sparse(folder / "chat_template.jinja", 4 << 30)


def many_values(folder: Path) -> None:
    (folder / "config.json").write_bytes(b'{"a":[' + b"{}," * 1_300_000 + b"{}]}")


def huge_integer(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "qwen2", "hidden_size": 1' + "0" * 100_000 + "}")


def duplicate_key(folder: Path) -> None:
    text = (folder / "config.json").read_text().rstrip().removesuffix("}")
    (folder / "config.json").write_text(text + ', "hidden_size": 64}')


def not_a_number(folder: Path) -> None:
    text = (folder / "config.json").read_text().rstrip().removesuffix("}")
    (folder / "config.json").write_text(text + ', "initializer_range_2": NaN}')


def overflowing_number(folder: Path) -> None:
    text = (folder / "config.json").read_text().rstrip().removesuffix("}")
    (folder / "config.json").write_text(text + ', "initializer_range_2": [1, -1e999]}')


def not_text(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_bytes(b'{"a": "\xff"}')


def many_shards(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    sparse(folder / "model.safetensors.index.json", 1 << 30)


MADE: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "file-dims": (many_dimensions, ("model.safetensors", "too many values")),
    "some-dimensions": (some_dimensions, ("tensor a has 200000 dimensions, allowed are at most 16",)),
    "empty-lists": (empty_lists, ("model.safetensors", "too many values")),
    "large-header": (large_header, ("model.safetensors", "header has 90000000 bytes, allowed are at most")),
    "file-sparse-config": (sparse_config, ("config.json has 4,294,967,296 bytes, allowed are at most",)),
    "sparse-tokenizer": (sparse_tokenizer, ("tokenizer.json has 4,294,967,296 bytes, allowed are at most",)),
    "sparse-template": (sparse_template, ("chat_template.jinja has 4,294,967,296 bytes",)),
    "sparse-index": (many_shards, ("model.safetensors.index.json has 1,073,741,824 bytes",)),
    "deep": (deep, ("config.json is not valid JSON: it is nested more than 64 deep",)),
    "rather-deep": (rather_deep, ("config.json is not valid JSON: it is nested more than 64 deep",)),
    "many-values": (many_values, ("config.json holds too many values",)),
    "huge-integer": (huge_integer, ("config.json is not valid JSON",)),
    "duplicate-key": (
        duplicate_key,
        ("config.json is not valid JSON: the key 'hidden_size' occurs twice, as 32 and 64",),
    ),
    "nan": (not_a_number, ("config.json is not valid JSON: 'initializer_range_2' is nan",)),
    "overflow": (overflowing_number, ("config.json is not valid JSON", "-inf")),
    "not-text": (not_text, ("tokenizer_config.json is not valid JSON: byte 7 is not UTF-8 text",)),
}


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path may have a hundred characters
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def directory(path: Path) -> None:
    path.mkdir()


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


IRREGULAR = {
    "fifo": (fifo, "is a named pipe (FIFO)"),
    "socket": (unix_socket, "is a socket"),
    "directory": (directory, "is a directory"),
    "device": (device, "is a character device"),
}
FILES = [
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"),
    "chat_template.jinja",
]


@pytest.mark.parametrize("kind", sorted(IRREGULAR))
def test_what_is_no_regular_file(folder: Path, kind: str) -> None:
    """In the place of every file of a model's folder, in this process: nothing is ever opened."""
    from qwenkit.hub.verify import check_structure
    from qwenkit.weights.checkpoint import open_checkpoint

    make, words = IRREGULAR[kind]
    for name in FILES:
        path = folder / name
        kept = path.rename(folder.parent / name) if path.exists() else None
        make(path)
        with pytest.raises(ValueError, match="but a regular file is needed") as caught:
            list(open_checkpoint(folder).tensors())
        assert f"{path} {words}, but a regular file is needed" in str(caught.value)
        assert f"{name}: {words}, but a regular file is needed" in map(str, check_structure(folder))
        path.rmdir() if kind == "directory" else path.unlink()
        if kept is not None:
            kept.rename(path)
    assert check_structure(folder) == []


FIFOS = {
    "find": "x.gguf",
    "gguf": "x.gguf",
    "safetensors": "x.safetensors",
    "torch": "pytorch_model.bin",
    "tokenizer": "qwen.tiktoken",
    "adapter": "adapter_config.json",
}
VERIFIED = ["file-dims", "empty-lists", "large-header", "file-sparse-config", "deep"]
TAKES_A_FOLDER = ("torch", "tokenizer", "adapter")


def torch_file(path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, path)


def several_disks(path: Path) -> None:
    torch_file(path)
    whole = path.read_bytes()
    end = whole.rindex(b"PK\x05\x06")
    locator = whole.rfind(b"PK\x06\x07")
    if locator >= 0:  # the number of disks is where an archive of 64 bits has it too
        several = bytearray(whole)
        several[locator + 16 : locator + 20] = struct.pack("<I", 3)
    else:
        several = bytearray(whole[:end] + struct.pack("<4sIQI", b"PK\x06\x07", 0, 0, 3) + whole[end:])
    path.write_bytes(several)


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(300 * MB))


def many_members(path: Path) -> None:
    """A list of members of 3 GiB, as sparse as the rest."""
    torch_file(path)
    whole = path.read_bytes()
    end = bytearray(whole[whole.rindex(b"PK\x05\x06") :])
    end[12:20] = struct.pack("<II", (3 << 30) - 100, 0)
    sparse(path, 3 << 30)
    with path.open("ab") as file:
        file.write(end)


ARCHIVES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "several-disks": (several_disks, ("pytorch_model.bin", "multiple disks")),
    "compressed": (compressed, ("pytorch_model.bin has compressed members",)),
    "many-members": (many_members, ("pytorch_model.bin",)),
}


@pytest.fixture(scope="module")
def found(template: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the reader said of every case, by the case's name."""
    if sys.platform != "linux":
        pytest.skip("the memory of a process is read from /proc")
    jobs: list[tuple[str, str, str]] = []
    for name, (make, _) in MADE.items():
        folder = tmp_path_factory.mktemp("made") / "model"
        shutil.copytree(template, folder)
        make(folder)
        jobs.append((name, "model", str(folder)))
        if name in VERIFIED:
            jobs.append((f"verify-{name}", "verify", str(folder)))
    for reader, name in FIFOS.items():
        folder = tmp_path_factory.mktemp("fifo")
        os.mkfifo(folder / name)
        jobs.append((f"fifo-{reader}", reader, str(folder if reader in TAKES_A_FOLDER else folder / name)))
    for name, (make, _) in ARCHIVES.items():
        folder = tmp_path_factory.mktemp("archive")
        make(folder / "pytorch_model.bin")
        jobs.append((name, "torch", str(folder)))
        jobs.append((f"verify-{name}", "verify", str(folder)))
    lines = "".join(json.dumps(job) + "\n" for job in jobs)
    done = subprocess.run(
        [sys.executable, str(READER)], input=lines, capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    return {result["name"]: result for result in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", sorted(MADE))
def test_a_model_folder(found: dict[str, Any], name: str) -> None:
    assert_one_sentence(found[name], *MADE[name][1])


@pytest.mark.parametrize("name", VERIFIED)
def test_verify(found: dict[str, Any], name: str) -> None:
    wrong = "config.json" if name in ("file-sparse-config", "deep") else "model.safetensors"
    assert_one_sentence(found[f"verify-{name}"], wrong)


@pytest.mark.parametrize("reader", sorted(FIFOS))
def test_a_fifo_never_blocks(found: dict[str, Any], reader: str) -> None:
    words = "holds no tokenizer" if reader == "tokenizer" else "is a named pipe (FIFO)"
    assert_one_sentence(found[f"fifo-{reader}"], words)


@pytest.mark.parametrize("name", sorted(ARCHIVES))
def test_archives_that_torch_does_not_write(found: dict[str, Any], name: str) -> None:
    assert_one_sentence(found[name], *ARCHIVES[name][1])
    assert found[f"verify-{name}"]["memory"] < MEMORY
    if name == "several-disks":
        assert "pytorch_model.bin: is no archive that can be read" in found["verify-several-disks"]["said"]


def test_every_reported_file_is_tried() -> None:
    packed = {"file-packed-bytes", "file-packed-zero"}  # test_repacked.py
    assert set(CASES) == packed | (set(MADE) & set(CASES))
