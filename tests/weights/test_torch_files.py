"""Reading pytorch_model.bin: tensors only, never code."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch

from qwenkit.weights.torch_files import read_torch_files

INDEX = "pytorch_model.bin.index.json"


def test_values(tmp_path: Path) -> None:
    state = {"a": torch.randn(3, 4), "b": torch.randn(4, 3, dtype=torch.bfloat16).T, "scalar": torch.tensor(1.5)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    stored = {tensor.name: tensor for tensor in read_torch_files(tmp_path)}
    assert {name: (t.shape, t.dtype) for name, t in stored.items()} == {
        "a": ((3, 4), "F32"),
        "b": ((3, 4), "BF16"),
        "scalar": ((), "F32"),
    }
    for name, expected in state.items():
        assert torch.equal(stored[name].load(), expected)
    assert torch.equal(stored["b"].read(1, 3), state["b"][1:3])


def test_what_is_read_can_be_changed_without_changing_the_file(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    (stored,) = read_torch_files(tmp_path)
    stored.load().zero_()
    assert torch.equal(stored.load(), torch.ones(3))


def test_shards(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "1.bin")
    torch.save({"b": torch.ones(3)}, tmp_path / "2.bin")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "1.bin", "b": "2.bin"}}))
    assert {t.name: t.shape for t in read_torch_files(tmp_path)} == {"a": (2,), "b": (3,)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "1.bin", "c": "2.bin"}}))
    with pytest.raises(ValueError, match=r"2.bin lacks 1 tensors .* the first is c"):
        read_torch_files(tmp_path)
    (tmp_path / "1.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"1.bin is missing"):
        read_torch_files(tmp_path)


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "evil": Payload(tmp_path / "executed")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin holds code or objects other than tensors"):
        read_torch_files(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ([torch.ones(2)], "found a list"),
        ({"a": {"b": torch.ones(2)}}, "'a' is no plain tensor"),
        ({3: torch.ones(2)}, "3 is no plain tensor"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "type torch.complex64; known types are F64"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, state: object, words: str) -> None:
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=words):
        read_torch_files(tmp_path)


def test_sparse_tensors_are_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match="'a' is no plain tensor"):
            read_torch_files(tmp_path)


def test_damage_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(1000)}, path)
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(ValueError, match=r"pytorch_model.bin is truncated"):
        read_torch_files(tmp_path)
    at = data.index(b"torch")
    path.write_bytes(data[: at - 5] + b"\xff" * 10 + data[at + 5 :])
    with pytest.raises(ValueError, match=r"pytorch_model.bin"):
        read_torch_files(tmp_path)
