"""Reading safetensors: the values of the reference library, and one sentence for every damaged file."""

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qwenkit.weights.safetensors_files import read_file, read_safetensors
from qwenkit.weights.stored import DTYPES


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = {name: (torch.randn(3, 5) * 50).to(dtype) for name, dtype in DTYPES.items()}
    return found | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "cube": torch.randn(2, 3, 4)}


def test_values_equal_the_reference_library(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    reference = load_file(tmp_path / "model.safetensors")
    stored = {tensor.name: tensor for tensor in read_safetensors(tmp_path)}
    assert stored.keys() == reference.keys()
    for name, expected in reference.items():
        assert stored[name].shape == tuple(expected.shape)
        assert torch.equal(stored[name].load(), expected)
        assert stored[name].load().dtype == expected.dtype
        assert stored[name].raw() is None
    assert stored["BF16"].dtype == "BF16"
    assert torch.equal(stored["cube"].read(1, 2), reference["cube"][1:2])


def test_copies_in_pieces_and_casts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwenkit.weights.stored._CHUNK_ELEMENTS", 12)
    weight = torch.randn(31, 5, dtype=torch.bfloat16)
    save_file({"weight": weight, "scalar": torch.tensor(3.0)}, tmp_path / "model.safetensors")
    for stored in read_safetensors(tmp_path):
        out = torch.empty(stored.shape)
        stored.copy_to(out)
        assert torch.equal(out, weight.float() if stored.name == "weight" else torch.tensor(3.0))


def write_shards(folder: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, folder / "model-00001-of-00002.safetensors")
    save_file({"c": torch.ones(4)}, folder / "model-00002-of-00002.safetensors")
    weight_map = {"a": 1, "b": 1, "c": 2}
    names = {name: f"model-0000{shard}-of-00002.safetensors" for name, shard in weight_map.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def test_shards(tmp_path: Path) -> None:
    write_shards(tmp_path)
    assert {t.name: t.shape for t in read_safetensors(tmp_path)} == {"a": (2,), "b": (3,), "c": (4,)}


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002.safetensors is missing"):
        read_safetensors(tmp_path)


def test_a_truncated_shard_is_named_with_both_sizes(tmp_path: Path) -> None:
    write_shards(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-3])
    with pytest.raises(
        ValueError, match=f"model-00002.* is truncated: expected {len(data)} bytes, found {len(data) - 3}"
    ):
        read_safetensors(tmp_path)
    shard.write_bytes(data[:20])
    with pytest.raises(ValueError, match=r"model-00002.* is truncated or no safetensors file"):
        read_safetensors(tmp_path)


def test_a_shard_cut_after_its_header_was_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    (stored,) = read_safetensors(tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated"):
        stored.load()


def test_a_tensor_that_only_the_index_knows_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"00001.* lacks 1 tensors .* the first is b"):
        read_safetensors(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path)
    save_file({"c": torch.ones(4), "a": torch.ones(2)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match="tensor a is also in another shard"):
        read_safetensors(tmp_path)


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "a/b.safetensors", "/etc/passwd", 3, "..", ""])
def test_an_index_cannot_leave_its_folder(tmp_path: Path, shard: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises((ValueError, FileNotFoundError)):
        read_safetensors(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": []}', "{", '{"weight_map": {}}'])
def test_a_malformed_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index.json"):
        read_safetensors(tmp_path)


def write_raw(path: Path, header: Any, data: bytes = b"\0" * 16) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


GOOD = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"{", "header is corrupt"),
        (b"\xff\xff", "header is corrupt"),
        (b"[" * 100_000, "header is corrupt"),
        (b'{"a": {}, "a": {}}', "header is corrupt"),
        ([], "no JSON object"),
        ({"a": 1}, "tensor a is corrupt"),
        ({"a": GOOD | {"shape": [-4]}}, "tensor a is corrupt"),
        ({"a": GOOD | {"shape": [True]}}, "tensor a is corrupt"),
        ({"a": GOOD | {"data_offsets": [16, 0]}}, "tensor a is corrupt"),
        ({"a": GOOD | {"data_offsets": [0]}}, "tensor a is corrupt"),
        ({"a": GOOD | {"dtype": "F8_E4M3"}}, "type F8_E4M3; known types are F64"),
        ({"a": GOOD | {"shape": [5]}}, "needs 20 bytes, the header gives it 16"),
        ({"a": GOOD | {"shape": [2**62, 2**62]}}, "needs"),
        ({"a": GOOD | {"shape": [2**40], "data_offsets": [0, 2**42]}}, "truncated"),
        ({"a": GOOD, "b": GOOD}, "tensor b starts at byte 0 of the data, expected 16"),
        ({"a": GOOD | {"shape": [2], "data_offsets": [8, 16]}}, "starts at byte 8"),
        ({"a": GOOD | {"shape": [2], "data_offsets": [0, 8]}}, "bytes after its last tensor"),
    ],
)
def test_a_corrupt_header_is_one_sentence(tmp_path: Path, header: Any, words: str) -> None:
    write_raw(tmp_path / "model.safetensors", header)
    with pytest.raises(ValueError, match=words) as caught:
        read_safetensors(tmp_path)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\0" * 7, b"\xff" * 8, struct.pack("<Q", 100) + b"{}"])
def test_a_header_beyond_the_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        read_safetensors(tmp_path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6), cut=st.integers(0, 400))
def test_damage_ends_in_value_error(tmp_path: Path, flips: list[tuple[int, int]], cut: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(2, 3, dtype=torch.bfloat16)}, path)
    data = bytearray(path.read_bytes())
    for position, byte in flips:
        data[position % len(data)] = byte
    path.write_bytes(data[: len(data) - cut] if cut < 100 else data)
    with contextlib.suppress(ValueError):
        for stored in read_file(path):
            assert stored.load().shape == stored.shape
