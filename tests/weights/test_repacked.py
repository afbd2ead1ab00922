"""Packed weights on disk: the same model the second time, and nothing but a load from the source when a file is no use."""

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenkit import LLM, SamplingParams
from qwenkit.linear.packed import PackedLinear, packed_matrices
from qwenkit.model.config import ModelConfig
from qwenkit.model.context import pack
from qwenkit.model.qwen import Qwen
from qwenkit.weights import repacked
from qwenkit.weights.checkpoint import open_checkpoint
from qwenkit.weights.load import load_model
from qwenkit.weights.pack import packing
from qwenkit.weights.repacked import load_packed
from tests.tiny_models import tiny_reference, write_model
from tests.weights.test_gguf_model import random_model, tiny_config, write

SIZES = {"intermediate_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
HEADER = 48  # bytes before it


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QWENKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packed"


@pytest.fixture(params=[0.0, repacked.LARGEST_SHARE], ids=["mapped", "read"])
def mapped_or_read(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repacked, "LARGEST_SHARE", request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "model", "qwen3")


def save(folder: Path, model_type: str, **changes: Any) -> Path:
    sizes = {name: size for name, size in SIZES.items() if name == "intermediate_size" or "moe" in model_type}
    tiny_reference(model_type, **(sizes | changes)).save_pretrained(folder)
    return folder


def load(source: Path, cache: Path, weights: str = "int4") -> Qwen:
    return load_packed(open_checkpoint(source), weights, cache, smallest=0)


def loaded_again(source: Path, cache: Path, weights: str = "int4") -> Qwen:
    """A second load, which must not look at the source's tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repacked, "load_model", lambda *_, **__: pytest.fail("it was packed again"))
        return load(source, cache, weights)


def tensors(model: Qwen) -> dict[str, Any]:
    """Everything that the model computes with, by name; a PackedWeight's whole numbers too."""
    found: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    for name, matrix in packed_matrices(model).items():
        found |= {f"{name}.{part}": value for part, value in vars(matrix.weight).items()}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            found[f"{name}.bias"] = module.bias
    return found


def assert_equal(model: Qwen, expected: Qwen) -> None:
    assert model.config == expected.config
    left, right = tensors(model), tensors(expected)
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == right[name].dtype, name
            assert value.is_contiguous(), name
            assert value.requires_grad == right[name].requires_grad, name
            assert torch.equal(value, right[name]), name
        else:
            assert value == right[name], name


def only_file(cache: Path) -> Path:
    (path,) = cache.iterdir()
    assert path.suffix == ".packed"
    return path


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe"])
def test_the_second_load_equals_the_first(tmp_path: Path, cache: Path, model_type: str, weights: str) -> None:
    source = save(tmp_path / "model", model_type)
    config = ModelConfig.from_dict(open_checkpoint(source).config)
    expected = load_model(source, dtype=torch.float32, swaps=[packing(config, weights)])
    assert_equal(load(source, cache, weights), expected)
    again = loaded_again(source, cache, weights)
    assert_equal(again, expected)
    assert only_file(cache)
    head, embedding = again.get_submodule("lm_head"), again.get_submodule("model.embed_tokens")
    assert (head.matrix is embedding.matrix) == config.tie_word_embeddings
    with torch.inference_mode():
        states = [model.logits(model(*pack([[1, 2, 3]], config))) for model in (again, expected)]
    assert torch.equal(*states)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3_moe"])
def test_a_gguf_file(tmp_path: Path, cache: Path, model_type: str) -> None:
    source = tmp_path / "x.gguf"
    write(source, random_model(tiny_config(model_type)), kind="Q4_1")
    expected = load(source, cache)
    assert {matrix.weight.bits for matrix in packed_matrices(expected).values()} == {4}
    assert_equal(loaded_again(source, cache), expected)


def test_a_tied_head_that_cannot_be_packed_stays_shared(tmp_path: Path, cache: Path) -> None:
    """40 inputs do not divide into groups: embedding, head and most of the rest are plain, and one tensor is two."""
    source = save(tmp_path / "model", "qwen3", hidden_size=40)
    expected = load(source, cache)
    again = loaded_again(source, cache)
    assert_equal(again, expected)
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.usefixtures("mapped_or_read")
def test_tensors_lie_aligned_and_apart(folder: Path, cache: Path) -> None:
    load(folder, cache)
    again = loaded_again(folder, cache)
    found = [value for value in tensors(again).values() if isinstance(value, torch.Tensor)]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found)
    starts = {tensor.data_ptr() for tensor in found}
    assert {tensor.untyped_storage().data_ptr() for tensor in found} == starts


@pytest.mark.usefixtures("mapped_or_read")
def test_writing_to_a_model_leaves_the_file_alone(folder: Path, cache: Path) -> None:
    expected = load(folder, cache)
    before = only_file(cache).read_bytes()
    changed = loaded_again(folder, cache)
    with torch.no_grad():
        changed.model.norm.weight.fill_(7)
    assert only_file(cache).read_bytes() == before
    assert_equal(loaded_again(folder, cache), expected)


def test_settings_do_not_share_a_file(folder: Path, cache: Path) -> None:
    models = {weights: load(folder, cache, weights) for weights in ("bf16", "int8", "int4")}
    assert len(list(cache.iterdir())) == 3
    for weights, model in models.items():
        assert_equal(loaded_again(folder, cache, weights), model)


def change_time(folder: Path) -> None:
    path = folder / "model.safetensors"
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))


def change_byte(folder: Path) -> None:
    """Same size, same time."""
    path = folder / "model.safetensors"
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def change_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-3}))


def change_files(folder: Path) -> None:
    shutil.copy2(folder / "model.safetensors", folder / "other.safetensors")


@pytest.mark.parametrize("change", [change_time, change_byte, change_config, change_files])
def test_a_changed_source_is_packed_again(folder: Path, cache: Path, change: Any) -> None:
    load(folder, cache)
    change(folder)
    config = ModelConfig.from_dict(open_checkpoint(folder).config)
    again = load(folder, cache)
    assert len(list(cache.iterdir())) == 2
    assert_equal(again, load_model(folder, dtype=torch.float32, swaps=[packing(config, "int4")]))


def test_another_layout_is_packed_again(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(folder, cache)
    monkeypatch.setattr(repacked, "LAYOUT_VERSION", repacked.LAYOUT_VERSION + 1)
    load(folder, cache)
    assert len(list(cache.iterdir())) == 2


def test_large_files_are_sampled_from_start_to_end(tmp_path: Path) -> None:
    """A change of every matrix, as merging an adapter makes, is seen even where size, time, start and end are the same."""
    path = tmp_path / "x.gguf"
    size = 8 << 20
    keys = set()
    for middle in (0, 1):
        data = bytearray(size)
        data[3 << 20 : 5 << 20] = bytes([middle]) * (2 << 20)
        path.write_bytes(data)
        os.utime(path, ns=(0, 0))
        keys.add(repacked._key(path, "int4"))
    assert len(keys) == 2
    assert all(0 <= start < start + count <= size for start, count in repacked._sampled(size))


def cut(data: bytes) -> bytes:
    return data[:-1]


def cut_in_the_header(data: bytes) -> bytes:
    return data[:100]


def empty(data: bytes) -> bytes:
    return b""


def longer(data: bytes) -> bytes:
    return data + b"\0"


def other_magic(data: bytes) -> bytes:
    return b"X" + data[1:]


def other_length(data: bytes) -> bytes:
    return data[:8] + b"\xff" * 8 + data[16:]


def other_header(data: bytes) -> bytes:
    return data[: HEADER + 20] + b"#" + data[HEADER + 21 :]


def bytes_changed(data: bytes) -> bytes:
    """200 bytes of the data, one bit each, at places that are no padding between tensors for certain."""
    changed = bytearray(data)
    start = data_start(data)
    for index in range(200):
        changed[start + (len(data) - start) * index // 200] ^= 1 << index % 8
    return bytes(changed)


def one_bit_changed(data: bytes) -> bytes:
    changed = bytearray(data)
    changed[data_start(data) + 5] ^= 4
    return bytes(changed)


def second_half_zero(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def data_start(data: bytes) -> int:
    return -(-(HEADER + int.from_bytes(data[8:16], "little")) // 4096) * 4096


@pytest.mark.usefixtures("mapped_or_read")
@pytest.mark.parametrize(
    "damage",
    [
        cut,
        cut_in_the_header,
        empty,
        longer,
        other_magic,
        other_length,
        other_header,
        bytes_changed,
        one_bit_changed,
        second_half_zero,
    ],
    ids=lambda f: f.__name__,
)
def test_a_damaged_file_is_made_again(folder: Path, cache: Path, damage: Any, caplog: pytest.LogCaptureFixture) -> None:
    expected = load(folder, cache)
    path = only_file(cache)
    whole = path.read_bytes()
    other = cache.parent / "damaged"
    other.write_bytes(damage(whole))
    other.replace(path)  # not in place: `expected` may be mapped from the file
    assert_equal(load(folder, cache), expected)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path} cannot be used and is made again: ")
    assert "\n" not in record.getMessage()
    assert only_file(cache).read_bytes() == whole
    assert_equal(loaded_again(folder, cache), expected)


@pytest.mark.parametrize("damage", [0, 1])
def test_any_byte_of_any_tensor_counts(folder: Path, cache: Path, damage: int) -> None:
    """The first and the last byte of each tensor; the warning names it."""
    load(folder, cache)
    path = only_file(cache)
    whole = path.read_bytes()
    length = int.from_bytes(whole[8:16], "little")
    header = json.loads(whole[HEADER : HEADER + length])
    for name, (_, _, offset, count, _) in header["tensors"].items():
        changed = bytearray(whole)
        changed[data_start(whole) + offset + damage * (count - 1)] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=f"it is damaged: tensor {re.escape(name)} has another checksum"):
            repacked._read(path)


def test_a_fifo_in_the_cache_is_replaced(folder: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = load(folder, cache)
    path = only_file(cache)
    path.unlink()
    os.mkfifo(path)
    assert_equal(load(folder, cache), expected)
    assert "is a named pipe (FIFO), but a regular file is needed" in caplog.text
    assert_equal(loaded_again(folder, cache), expected)


def test_a_file_of_another_model_is_made_again(tmp_path: Path, cache: Path, folder: Path) -> None:
    other = save(tmp_path / "other", "qwen3", num_hidden_layers=2)
    load(other, cache)
    of_other = only_file(cache)
    expected = load(folder, tmp_path / "elsewhere")
    of_other.rename(cache / only_file(tmp_path / "elsewhere").name)
    assert_equal(load(folder, cache), expected)
    assert_equal(loaded_again(folder, cache), expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("No space left on device")])
def test_an_interrupted_write_leaves_nothing(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    def fail(_: int) -> None:
        (part,) = cache.iterdir()
        assert part.suffix == ".part"
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    if isinstance(error, OSError):
        assert load(folder, cache).config.num_hidden_layers == 3
        assert "not kept for the next time: No space left" in caplog.text
    else:
        with pytest.raises(KeyboardInterrupt):
            load(folder, cache)
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_a_warning(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    load(folder, tmp_path / "file" / "packed")
    assert [record.levelno for record in caplog.records if "not kept" in record.message] == [logging.WARNING]


def test_a_full_disk_is_a_warning(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    load(folder, cache)
    assert "has 1000 bytes free" in caplog.text
    assert not list(cache.iterdir())


def test_small_models_are_not_kept(folder: Path, cache: Path) -> None:
    load_packed(open_checkpoint(folder), "int4", cache)
    assert not cache.exists()


def test_the_least_recently_used_make_room(
    tmp_path: Path, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load(folder, cache, "int4")
    oldest = only_file(cache)
    os.utime(oldest, (1000, 1000))
    load(folder, cache, "int8")
    (used,) = set(cache.iterdir()) - {oldest}
    os.utime(used, (500, 500))
    loaded_again(folder, cache, "int8")  # which makes it the latest
    other = save(tmp_path / "other", "qwen3", num_hidden_layers=2)
    load(other, tmp_path / "elsewhere")
    needed = only_file(tmp_path / "elsewhere").stat().st_size
    monkeypatch.setattr(repacked, "LARGEST_FOLDER", used.stat().st_size + needed)
    load(other, cache)
    assert {path.name for path in cache.iterdir()} == {used.name, only_file(tmp_path / "elsewhere").name}
    monkeypatch.setattr(repacked, "LARGEST_FOLDER", 100)
    load(folder, cache, "bf16")
    assert "may take 100" in caplog.text
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("weights", ["bf16", "int4"])
def test_generation_is_the_same_cold_and_warm(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    source = write_model(tmp_path / "model", "qwen3", intermediate_size=64)
    monkeypatch.setattr("qwenkit.engine.llm.load_packed", lambda *a, **k: load_packed(*a, smallest=0, **k))
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    answers = []
    for _ in range(2):
        llm = LLM(source, weights=weights, kv_memory="1MiB", device="cpu")
        answers.append([output.completions[0].token_ids for output in llm.generate(["Hi", "One two"], params)])
        assert only_file(cache)
        monkeypatch.setattr(repacked, "load_model", lambda *_, **__: pytest.fail("it was packed again"))
    assert answers[0] == answers[1]
    assert all(len(tokens) == 12 for tokens in answers[0])
