"""Folders that are whole, and folders with one thing wrong: what is said of them."""

import hashlib
import json
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenkit.hub.find import check_model, pull_model
from qwenkit.hub.verify import (
    KnownFile,
    check_structure,
    is_complete,
    is_plain_path,
    read_safetensors_header,
    verify_folder,
)
from tests.hub.hub_server import WANTED, git_sha1, hub_server, tiny_model, use_hub

SHARD = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
FILES = tiny_model()
SIZE = len(FILES[SHARD])


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plain folder with a whole model and nothing that tells its checksums."""
    place = tmp_path / "tiny"
    place.mkdir()
    for name in WANTED:
        (place / name).write_bytes(FILES[name])
    return place


def problems(folder: Path, against: list[KnownFile] | None = None) -> list[str]:
    return [str(problem) for problem in verify_folder(folder, against=against, progress=False).problems]


def edit_index(folder: Path, change: Callable[[dict], object]) -> None:
    index = json.loads(FILES[INDEX])
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def test_a_whole_folder_is_good(folder: Path) -> None:
    report = verify_folder(folder, progress=False)
    assert (report.problems, report.files, report.hashed) == ([], len(WANTED), 0)
    assert report.size == sum(len(FILES[name]) for name in WANTED)
    assert is_complete(folder)
    assert check_model(folder, progress=False).startswith("7 files, 0.00 GB: all good (by lengths and names only")


def test_a_truncated_shard_is_named_with_both_sizes(folder: Path) -> None:
    (folder / SHARD).write_bytes(FILES[SHARD][:200_000])
    assert problems(folder) == [f"{SHARD}: is truncated: expected {SIZE:,} bytes, found 200,000"]
    assert not is_complete(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (FILES[SHARD] + b"x", f"is too long: expected {SIZE:,} bytes, found {SIZE + 1:,}"),
        (FILES[SHARD][:20], "is truncated: expected more than"),
        (b"", "is no safetensors file: 0 bytes"),
        (b"\xff" * 64, "is no safetensors file: 64 bytes"),
        (b"\x04" + bytes(7) + b"null", "header that cannot be read"),
        (b"\x02" + bytes(7) + b"{]", "header that cannot be read"),
        ((10_000).to_bytes(8, "little") + b"[" * 10_000, "header that cannot be read"),
        (b"\x10" + bytes(7) + b'{"a":{"b":[1,2]}', "header that cannot be read"),
    ],
)
def test_a_damaged_shard_is_named(folder: Path, content: bytes, said: str) -> None:
    (folder / SHARD).write_bytes(content)
    (problem,) = problems(folder)
    assert problem.startswith(f"{SHARD}: ")
    assert said in problem


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / SHARD).unlink()
    assert problems(folder) == [f"{SHARD}: is missing; {INDEX} names it"]


def test_a_tensor_that_is_not_in_its_shard_is_named(folder: Path) -> None:
    shutil.copy(folder / OTHER, folder / SHARD)
    assert problems(folder) == [f"{SHARD}: lacks 2 tensors of {INDEX}, the first is 'layers.0.weight'"]


def test_a_wrong_sum_of_the_index_is_named_where_nothing_better_is_known(folder: Path) -> None:
    edit_index(folder, lambda index: index["metadata"].update(total_size=1_000_000))
    assert problems(folder) == [f"{INDEX}: expected 1,000,000 bytes of tensors in all shards, found 655,360"]
    assert is_complete(folder)
    (folder / "SHA256SUMS").write_text(f"{sha256(FILES[SHARD])}  {SHARD}\n")
    assert problems(folder) == []


@pytest.mark.parametrize("shard", ["../../x.safetensors", "/etc/passwd"])
def test_an_index_may_not_lead_out_of_the_folder(folder: Path, shard: str) -> None:
    edit_index(folder, lambda index: index["weight_map"].update({"layers.0.weight": shard}))
    assert problems(folder) == [f"{INDEX}: names a file outside of the folder: {shard!r}"]


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_map_is_named(folder: Path, content: str) -> None:
    (folder / INDEX).write_text(content)
    assert problems(folder) == [f"{INDEX}: has no weight_map from tensors to files"]


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_no_json_is_named(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    (problem,) = problems(folder)
    assert problem.startswith("tokenizer.json: is not valid JSON: ")


def test_what_a_model_cannot_do_without_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert problems(tmp_path / "empty") == [
        "model.safetensors: is missing, and there are no other weights",
        "config.json: is missing",
    ]
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        verify_folder(tmp_path / "none")


def test_a_truncated_pickle_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.writestr("data", bytes(1000))
    assert problems(tmp_path) == []
    whole = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(whole[:500])
    assert problems(tmp_path) == ["pytorch_model.bin: is truncated: its end is missing, found 500 bytes"]


def test_checksums_of_a_listing(folder: Path) -> None:
    listing = [
        KnownFile(SHARD, SIZE, sha256=sha256(FILES[SHARD])),
        KnownFile("config.json", git_sha1=git_sha1(FILES["config.json"])),
        KnownFile("merges.txt", 9),
        KnownFile("chat_template.jinja", 5),
    ]
    damaged = bytes([FILES[SHARD][-1] ^ 1])
    (folder / SHARD).write_bytes(FILES[SHARD][:-1] + damaged)
    config = b'{"model_type": "qwen3"}'
    (folder / "config.json").write_bytes(config)
    assert problems(folder, listing) == [
        "chat_template.jinja: is missing",
        f"{SHARD}: expected sha256 {sha256(FILES[SHARD])}, found {sha256(FILES[SHARD][:-1] + damaged)}",
        f"config.json: expected git sha1 {git_sha1(FILES['config.json'])}, found {git_sha1(config)}",
        "merges.txt: expected 9 bytes, found 4",
    ]


def test_a_sums_file_is_obeyed(folder: Path) -> None:
    names = sorted(WANTED)
    lines = [f"{sha256(FILES[name])} {' *'[i % 2]}{name}\n" for i, name in enumerate(names)]
    (folder / "sha256sum.txt").write_text("".join(lines))
    report = verify_folder(folder, progress=False)
    assert (report.problems, report.hashed) == ([], len(WANTED))
    (folder / "merges.txt").write_bytes(b"changed")
    (folder / "generation_config.json").unlink()
    assert problems(folder) == [
        "generation_config.json: is missing",
        f"merges.txt: expected sha256 {sha256(FILES['merges.txt'])}, found {sha256(b'changed')}",
    ]


def test_a_sums_file_with_a_strange_line_is_named(folder: Path) -> None:
    (folder / "SHA256SUMS").write_text(f"# made by hand\n\n{'0' * 64}  ../../x\nhello\n")
    assert problems(folder) == [f"SHA256SUMS: line {n} is not a checksum and the name of a file here" for n in (3, 4)]


def test_our_sums_file_is_what_sha256sum_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("needs the program sha256sum")
    with hub_server({"org/tiny": FILES}) as server:
        use_hub(monkeypatch, tmp_path, server.url)
        folder = pull_model("org/tiny", into=tmp_path / "into", progress=False)
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True, capture_output=True)


def test_the_traces_of_huggingface_hub_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both in its cache, and in a folder that `hf download --local-dir` made."""
    from huggingface_hub import snapshot_download

    with hub_server({"org/tiny": FILES}) as server:
        use_hub(monkeypatch, tmp_path, server.url)
        cached = pull_model("org/tiny", progress=False)
        local = Path(snapshot_download("org/tiny", local_dir=tmp_path / "local", endpoint=server.url))
    for folder, count in ((cached, len(WANTED)), (local, len(FILES))):
        report = verify_folder(folder, progress=False)
        assert (report.problems, report.hashed) == ([], count)
        damaged = (folder / SHARD).resolve()
        damaged.chmod(0o644)
        damaged.write_bytes(FILES[SHARD][:-1] + b"\0")
        (folder / "merges.txt").resolve().write_bytes(b"changed")
        assert problems(folder) == [
            f"merges.txt: expected git sha1 {git_sha1(FILES['merges.txt'])}, found {git_sha1(b'changed')}",
            f"{SHARD}: expected sha256 {sha256(FILES[SHARD])}, found {sha256(FILES[SHARD][:-1] + bytes(1))}",
        ]


@pytest.mark.parametrize("name", ["org/tiny", "ms:org/tiny"])
def test_a_folder_is_compared_with_a_hub(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_server({"org/tiny": FILES}) as server:
        use_hub(monkeypatch, folder.parent, server.url)
        assert check_model(folder, name, progress=False).endswith(f"all good (7 checksums compared with {name})")
        (folder / SHARD).write_bytes(FILES[SHARD][:200_000])
        (folder / "generation_config.json").unlink()
        with pytest.raises(ValueError, match="generation_config") as error:
            check_model(folder, name, progress=False)
    assert str(error.value).splitlines() == [
        "generation_config.json: is missing",
        f"{SHARD}: expected {SIZE:,} bytes, found 200,000",
    ]
    assert not any(path.startswith("/content") for _, path, _ in server.asked)


def test_a_revision_needs_a_hub(folder: Path) -> None:
    with pytest.raises(ValueError, match="--revision names a version on a hub"):
        check_model(folder, revision="main", progress=False)


@given(st.binary(max_size=200) | st.binary(max_size=100).map(lambda rest: len(rest).to_bytes(8, "little") + rest))
def test_any_bytes_as_safetensors_end_in_a_value_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(content)
    try:
        size, _ = read_safetensors_header(path)
    except ValueError:
        return
    assert size >= 0


@settings(max_examples=30)
@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_any_json_as_index_is_survived(tmp_path_factory: pytest.TempPathFactory, content: object) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / SHARD).write_bytes(FILES[SHARD])
    for index in (
        content,
        {"weight_map": content, "metadata": content},
        {"weight_map": {"a": SHARD}, "metadata": content},
    ):
        (folder / INDEX).write_text(json.dumps(index))
        assert all(problem.file for problem in check_structure(folder, totals=True))


@pytest.mark.parametrize("path", ["a", "a/b.json", "..a", "a..b/c"])
def test_plain_paths(path: str) -> None:
    assert is_plain_path(path)


@pytest.mark.parametrize("path", ["", "..", "../a", "a/../b", "/a", "a\\b", "C:a", "a\x00b", "a\nb"])
def test_paths_that_lead_elsewhere(path: str) -> None:
    assert not is_plain_path(path)
