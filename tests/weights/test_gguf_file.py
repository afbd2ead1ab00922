"""The GGUF container: values of the gguf package, and one ValueError for every damaged or hostile file."""

import contextlib
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenkit.weights.gguf_file import read_gguf

QUANTIZABLE = ("BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def write(path: Path, tensors: dict[str, tuple[np.ndarray, str]], **metadata: Any) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_array(key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def small(path: Path) -> Path:
    rng = np.random.default_rng(0)
    tensors = {
        "a.weight": (rng.standard_normal((3, 8), dtype=np.float32), "F32"),
        "b.weight": (quantize(rng.standard_normal((2, 64), dtype=np.float32), GGMLQuantizationType.Q4_1), "Q4_1"),
    }
    return write(path, tensors, number=7, real=0.5, flag=True, word="héllo", words=["a", "", "bc"], ids=[1, 2, 3])


def test_metadata_and_shapes(tmp_path: Path) -> None:
    file = read_gguf(small(tmp_path / "x.gguf"))
    assert file.metadata == {
        "general.architecture": "llama",
        "number": 7,
        "real": 0.5,
        "flag": True,
        "word": "héllo",
        "words": ["a", "", "bc"],
        "ids": [1, 2, 3],
    }
    assert [(e.name, e.shape, e.type) for e in file.entries] == [
        ("a.weight", (3, 8), "F32"),
        ("b.weight", (2, 64), "Q4_1"),
    ]


def test_every_scalar_type(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    values = {"uint8": 255, "int8": -128, "uint16": 65535, "int16": -32768, "uint32": 2**32 - 1, "int32": -(2**31)}
    values |= {"uint64": 2**64 - 1, "int64": -(2**63)}
    for name, value in values.items():
        getattr(writer, f"add_{name}")(name, value)
    writer.add_float64("f64", 0.1)
    writer.add_array("nested", [[1, 2], [3]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = read_gguf(tmp_path / "x.gguf").metadata
    assert metadata == {"general.architecture": "llama", **values, "f64": 0.1, "nested": [[1, 2], [3]]}


def assert_reads(path: Path, name: str, expected: np.ndarray) -> None:
    """Whole, in runs of rows, and raw."""
    (stored,) = (tensor for tensor in read_gguf(path).tensors() if tensor.name == name)
    assert stored.shape == expected.shape
    assert torch.equal(stored.load().float(), torch.from_numpy(expected))
    rows = [stored.read(i, min(i + 2, len(expected))) for i in range(0, len(expected), 2)]
    assert torch.equal(torch.cat(rows).float(), torch.from_numpy(expected))


@pytest.mark.parametrize("kind", QUANTIZABLE)
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 32), (64,)])
def test_dequantized_values_equal_the_gguf_package(tmp_path: Path, kind: str, shape: tuple[int, ...]) -> None:
    number = GGMLQuantizationType[kind]
    values = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    blocks = quantize(values, number)
    path = write(tmp_path / "x.gguf", {"w": (blocks, kind)})
    assert_reads(path, "w", dequantize(blocks, number))
    (stored,) = read_gguf(path).tensors()
    raw = stored.raw()
    if kind == "BF16" or len(shape) == 1:
        assert raw is None
    else:
        assert raw is not None
        np.testing.assert_array_equal(raw, blocks)


@pytest.mark.parametrize("kind", K_QUANTS)
def test_k_quants_equal_the_gguf_package(tmp_path: Path, kind: str) -> None:
    number = GGMLQuantizationType[kind]
    block, block_bytes = GGML_QUANT_SIZES[number]
    rng = np.random.default_rng(2)
    blocks = rng.integers(0, 256, (3, 2, block_bytes), dtype=np.uint8)
    half = (
        rng.standard_normal((3, 2, 2)).astype(np.float16).view(np.uint8)
    )  # the scales: random bytes could be infinite
    blocks[..., -2:] = half[..., :2]
    blocks[..., :4] = half if kind in ("Q4_K", "Q5_K") else blocks[..., :4]
    if kind == "Q2_K":
        blocks[..., -4:] = half
    blocks = blocks.reshape(3, 2 * block_bytes)
    expected = dequantize(blocks, number)
    assert np.isfinite(expected).all()
    assert expected.shape == (3, 2 * block)
    assert_reads(write(tmp_path / "x.gguf", {"w": (blocks, kind)}), "w", expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_plain_types_keep_theirs(tmp_path: Path, dtype: type) -> None:
    values = np.random.default_rng(3).standard_normal((3, 7)).astype(dtype)
    path = write(tmp_path / "x.gguf", {"w": (values, "F32" if dtype is np.float32 else "F16")})
    (stored,) = read_gguf(path).tensors()
    assert torch.equal(stored.load(), torch.from_numpy(values))


def test_damaged_scales_warn_nobody(tmp_path: Path) -> None:
    """Warnings are errors in this suite, so reading is the assertion."""
    blocks = np.full((2, 20), 0xFF, dtype=np.uint8)
    (stored,) = read_gguf(write(tmp_path / "x.gguf", {"w": (blocks, "Q4_1")})).tensors()
    assert stored.load().isnan().all()


def test_another_type_is_named(tmp_path: Path) -> None:
    blocks = np.zeros((2, 66), dtype=np.uint8)
    path = write(tmp_path / "x.gguf", {"blk.0.ffn_up.weight": (blocks, "TQ2_0")})
    with pytest.raises(
        ValueError, match=r"blk\.0\.ffn_up\.weight has type TQ2_0; known types are F32, F16, BF16, Q4_0"
    ):
        read_gguf(path)


def test_version_2_is_read_and_others_refused(tmp_path: Path) -> None:
    path = small(tmp_path / "x.gguf")
    data = bytearray(path.read_bytes())
    for version, words in ((2, None), (1, "version is 1"), (4, "version is 4"), (3 << 24, "big-endian")):
        data[4:8] = struct.pack("<I", version)
        path.write_bytes(data)
        if words is None:
            assert len(read_gguf(path).entries) == 2
        else:
            with pytest.raises(ValueError, match=words):
                read_gguf(path)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def entry(name: bytes, dimensions: list[int], kind: int = 0, offset: int = 0) -> bytes:
    numbers = struct.pack(f"<{len(dimensions)}Q", *dimensions)
    return string(name) + struct.pack("<I", len(dimensions)) + numbers + struct.pack("<IQ", kind, offset)


def assemble(pairs: list[bytes], entries: list[bytes], data: int = 64, counts: tuple[int, int] | None = None) -> bytes:
    tensors, keys = counts or (len(entries), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + b"".join(pairs) + b"".join(entries)
    return head + b"\0" * (-len(head) % 32 + data)


HUGE = 2**63
HOSTILE = {
    "nothing": b"",
    "a header alone": b"GGUF" + struct.pack("<IQ", 3, 0),
    "other letters": b"GGML" + bytes(100),
    "absurdly many tensors": assemble([], [], counts=(HUGE, 0)),
    "absurdly many keys": assemble([], [], counts=(0, HUGE)),
    "more tensors than there are": assemble([], [entry(b"a", [4])], counts=(2, 0)),
    "a key longer than the file": assemble([struct.pack("<Q", HUGE)], []),
    "a string longer than the file": assemble([pair(b"k", 8, struct.pack("<Q", HUGE))], []),
    "a string that is not UTF-8": assemble([pair(b"k", 8, string(b"\xff\xfe"))], []),
    "a key that is not UTF-8": assemble([pair(b"\xff", 4, bytes(4))], []),
    "a key twice": assemble([pair(b"k", 4, bytes(4))] * 2, []),
    "a key of 2 KB": assemble([pair(b"k" * 2000, 4, bytes(4))], []),
    "an unknown value type": assemble([pair(b"k", 13, bytes(8))], []),
    "an unknown item type": assemble([pair(b"k", 9, struct.pack("<IQ", 99, 1) + bytes(8))], []),
    "an array longer than the file": assemble([pair(b"k", 9, struct.pack("<IQ", 0, HUGE))], []),
    "an array of strings longer than the file": assemble([pair(b"k", 9, struct.pack("<IQ", 8, HUGE))], []),
    "arrays in arrays": assemble([pair(b"k", 9, struct.pack("<IQ", 9, 1) * 3000)], []),
    "no dimensions": assemble([], [entry(b"a", [])]),
    "five dimensions": assemble([], [entry(b"a", [1] * 5)]),
    "four billion dimensions": assemble([], [string(b"a") + struct.pack("<I", 2**32 - 1) + bytes(40)]),
    "a dimension of zero": assemble([], [entry(b"a", [0])]),
    "a tensor larger than the file": assemble([], [entry(b"a", [17])]),
    "a product that overflows": assemble([], [entry(b"a", [2**32, 2**32, 2**32])]),
    "an offset beyond the file": assemble([], [entry(b"a", [4], offset=2**62)]),
    "an offset that is not aligned": assemble([], [entry(b"a", [4], offset=4)]),
    "tensors that overlap": assemble([], [entry(b"a", [16]), entry(b"b", [4], offset=32)]),
    "a name twice": assemble([], [entry(b"a", [4]), entry(b"a", [4], offset=32)]),
    "a name of 2 KB": assemble([], [entry(b"a" * 2000, [4])]),
    "an unknown tensor type": assemble([], [entry(b"a", [4], kind=12345)]),
    "a row of half a block": assemble([], [entry(b"a", [48], kind=2)]),
    "no alignment": assemble([pair(b"general.alignment", 4, struct.pack("<I", 0))], []),
    "an alignment of 24": assemble([pair(b"general.alignment", 4, struct.pack("<I", 24))], []),
    "an alignment in words": assemble([pair(b"general.alignment", 8, string(b"32"))], []),
    "an alignment beyond the file": assemble(
        [pair(b"general.alignment", 10, struct.pack("<Q", HUGE))], [entry(b"a", [4])]
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_end_in_one_sentence(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(HOSTILE[what])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"x\.gguf is no (readable )?GGUF file: ") as caught:
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


def test_the_assembled_file_without_fault_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(assemble([pair(b"k", 4, bytes(4))], [entry(b"a", [8]), entry(b"b", [4], offset=32)]))
    assert [tensor.load().shape for tensor in read_gguf(path).tensors()] == [(8,), (4,)]


def test_more_items_than_any_vocabulary_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte of the file becomes a Python object of dozens: the number of items is limited, not only their bytes."""
    monkeypatch.setattr("qwenkit.weights.gguf_file._MAX_ITEMS", 1000)
    path = tmp_path / "x.gguf"
    array = struct.pack("<IQ", 0, 600) + bytes(600)
    path.write_bytes(assemble([pair(b"a", 9, array)], []))
    assert read_gguf(path).metadata == {"a": [0] * 600}
    path.write_bytes(assemble([pair(b"a", 9, array), pair(b"b", 9, array)], []))
    with pytest.raises(ValueError, match="brings the arrays to 1200 items"):
        read_gguf(path)


damage = st.one_of(
    st.tuples(st.just("byte"), st.integers(0, 10**6), st.integers(0, 255)),
    st.tuples(st.just("cut"), st.integers(0, 10**6), st.just(0)),
    st.tuples(
        st.just("splice"), st.integers(0, 10**6), st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1])
    ),
    st.tuples(st.just("insert"), st.integers(0, 10**6), st.integers(0, 2**64 - 1)),
    st.tuples(st.just("delete"), st.integers(0, 10**6), st.integers(1, 64)),
)


def damaged(data: bytes, faults: list[tuple[str, int, int]]) -> bytes:
    found = bytearray(data)
    for what, place, value in faults:
        at = place % max(len(found), 1)
        if what == "byte":
            found[at : at + 1] = bytes([value])
        elif what == "cut":
            del found[at:]
        elif what == "splice":
            found[at : at + 8] = struct.pack("<Q", value)
        elif what == "insert":
            found[at:at] = struct.pack("<Q", value)
        else:
            del found[at : at + value]
    return bytes(found)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(faults=st.lists(damage, min_size=1, max_size=4))
def test_fuzz_ends_in_value_error_or_success(tmp_path: Path, faults: list[tuple[str, int, int]]) -> None:
    sound = tmp_path / "sound.gguf"
    if not sound.exists():
        small(sound)
    path = tmp_path / "x.gguf"
    path.write_bytes(damaged(sound.read_bytes(), faults))
    with contextlib.suppress(ValueError):
        for stored in read_gguf(path).tensors():
            assert stored.load().shape == stored.shape
