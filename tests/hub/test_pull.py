"""Downloads from a hub on this machine: what is taken, resuming, checksums, offline use, refusals."""

import hashlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from qwenkit.hub import fetch
from qwenkit.hub.find import find_model, pull_model
from qwenkit.hub.verify import KnownFile, is_complete, verify_folder
from tests.hub.hub_server import COMMIT, WANTED, HubServer, hub_server, tiny_model, use_hub

SHARD = "model-00001-of-00002.safetensors"
NAMES = pytest.mark.parametrize("name", ["org/tiny", "ms:org/tiny"])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with hub_server({"org/tiny": tiny_model()}) as server:
        use_hub(monkeypatch, tmp_path, server.url)
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@NAMES
def test_pull_takes_the_model_and_nothing_else(hub: HubServer, name: str) -> None:
    folder = pull_model(name, progress=False)
    assert contents(folder) == {file: hub.repos["org/tiny"][file] for file in WANTED}
    assert [path.name for path in folder.rglob("*.part*")] == []
    assert find_model(name, download=False) == folder


def test_the_hub_may_be_named(hub: HubServer) -> None:
    assert pull_model("hf:org/tiny", progress=False) == find_model("org/tiny", download=False)


@NAMES
def test_into_a_folder_puts_plain_files_and_their_sums(hub: HubServer, name: str, tmp_path: Path) -> None:
    folder = pull_model(name, into=tmp_path / "deep" / "tiny", progress=False)
    files = {file: hub.repos["org/tiny"][file] for file in WANTED}
    sums = "".join(f"{sha256(files[file])}  {file}\n" for file in sorted(files))
    assert contents(folder) == files | {"SHA256SUMS": sums.encode()}
    assert not any(path.is_symlink() for path in folder.iterdir())
    report = verify_folder(folder, progress=False)
    assert (report.problems, report.hashed) == ([], len(WANTED))


def test_the_cache_is_the_one_of_huggingface_hub(hub: HubServer, tmp_path: Path) -> None:
    from huggingface_hub import try_to_load_from_cache

    folder = pull_model("org/tiny", progress=False)
    assert folder == tmp_path / "huggingface" / "models--org--tiny" / "snapshots" / COMMIT
    cached = try_to_load_from_cache("org/tiny", SHARD, cache_dir=tmp_path / "huggingface")
    assert cached == str(folder / SHARD)


@NAMES
def test_a_model_in_the_cache_needs_no_network(hub: HubServer, name: str) -> None:
    folder = pull_model(name, progress=False)
    hub.asked.clear()
    assert find_model(name) == folder
    assert hub.asked == []


@NAMES
def test_a_cut_connection_is_resumed_within_a_run(hub: HubServer, name: str) -> None:
    hub.cuts[SHARD] = [100_000, 50_000]
    folder = pull_model(name, progress=False)
    assert (folder / SHARD).read_bytes() == hub.repos["org/tiny"][SHARD]
    assert hub.ranges(SHARD) == [None, "bytes=100000-", "bytes=150000-"]


@NAMES
def test_an_interrupted_run_is_resumed_by_the_next(
    hub: HubServer, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.cuts[SHARD] = [100_000]
    monkeypatch.setattr(fetch, "_TRIES", 1)
    with pytest.raises(FileNotFoundError, match=rf"^{SHARD}: the download stopped .* goes on from where it stopped$"):
        pull_model(name, into=tmp_path / "tiny", progress=False)
    assert not (tmp_path / "tiny" / SHARD).exists()
    assert (tmp_path / "tiny" / f"{SHARD}.part").stat().st_size == 100_000
    folder = pull_model(name, into=tmp_path / "tiny", progress=False)
    assert hub.ranges(SHARD) == [None, "bytes=100000-"]
    assert (folder / SHARD).read_bytes() == hub.repos["org/tiny"][SHARD]
    assert {path.name for path in folder.iterdir()} == WANTED | {"SHA256SUMS"}


def test_a_part_of_another_file_is_found_out_and_fetched_anew(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / f"{SHARD}.part").write_bytes(b"?" * 5000)
    folder = pull_model("org/tiny", into=tmp_path / "tiny", progress=False)
    assert hub.ranges(SHARD) == ["bytes=5000-", None]
    assert (folder / SHARD).read_bytes() == hub.repos["org/tiny"][SHARD]


@NAMES
def test_bytes_that_differ_from_the_listing_are_refused(hub: HubServer, name: str, tmp_path: Path) -> None:
    right = hub.repos["org/tiny"][SHARD]
    wrong = right[:-1] + bytes([right[-1] ^ 1])
    hub.served[SHARD] = wrong
    with pytest.raises(ValueError, match=rf"^{SHARD}: expected sha256 {sha256(right)}, found {sha256(wrong)}, twice"):
        pull_model(name, into=tmp_path / "tiny", progress=False)
    assert not (tmp_path / "tiny" / SHARD).exists()


def test_a_small_file_that_differs_is_refused_too(hub: HubServer) -> None:
    hub.served["config.json"] = b'{"model_type": "qwen3"}'
    with pytest.raises(ValueError, match=r"^config\.json: expected git sha1 [0-9a-f]{40}, found [0-9a-f]{40}, twice"):
        pull_model("org/tiny", progress=False)
    with pytest.raises(FileNotFoundError, match="not on this disk"):
        find_model("org/tiny", download=False)


@pytest.mark.parametrize("served", [b"short", tiny_model()[SHARD] + b"longer"])
def test_a_file_of_another_length_than_listed_ends(hub: HubServer, served: bytes, tmp_path: Path) -> None:
    hub.served[SHARD] = served
    with pytest.raises((ValueError, FileNotFoundError), match=rf"^{SHARD}: .*[0-9]"):
        pull_model("org/tiny", into=tmp_path / "tiny", progress=False)
    assert not (tmp_path / "tiny" / SHARD).exists()


@NAMES
def test_pull_mends_what_was_damaged(hub: HubServer, name: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = pull_model(name, progress=False)
    damaged = (folder / SHARD).resolve()
    damaged.chmod(0o644)
    damaged.write_bytes(b"\0" + damaged.read_bytes()[1:])
    hub.asked.clear()
    assert pull_model(name, progress=False) == folder
    assert contents(folder) == {file: hub.repos["org/tiny"][file] for file in WANTED}
    assert "expected sha256" in caplog.text
    assert "fetched again" in caplog.text
    assert [path for method, path, _ in hub.asked if path.startswith("/content/")] == [f"/content/{SHARD}"]


@NAMES
def test_half_a_model_in_the_cache_is_completed(hub: HubServer, name: str) -> None:
    folder = pull_model(name, progress=False)
    (folder / SHARD).unlink()
    assert not is_complete(folder)
    assert find_model(name, progress=False) == folder
    assert is_complete(folder)


@NAMES
def test_without_a_connection_the_cache_serves(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("modelscope_hub._legacy_api.REPO_TREE_PAGE_MAX_ATTEMPTS", 1)
    with hub_server({"org/tiny": tiny_model()}) as server:
        use_hub(monkeypatch, tmp_path, server.url)
        folder = pull_model(name, progress=False)
    assert find_model(name) == folder
    assert pull_model(name, progress=False) == folder
    assert "cannot be reached" in caplog.text
    (folder / SHARD).unlink()
    with pytest.raises(FileNotFoundError, match=rf"org/tiny at {server.url} cannot be reached .*no whole copy"):
        find_model(name)
    with pytest.raises(FileNotFoundError, match=rf"org/tiny at {server.url} cannot be reached"):
        pull_model(name, into=tmp_path / "tiny", progress=False)
    assert not (tmp_path / "tiny").exists()


def test_hub_offline_is_respected(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import close_session

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    close_session()
    with pytest.raises(FileNotFoundError, match="not reached, because HF_HUB_OFFLINE is set"):
        pull_model("org/tiny", progress=False)
    close_session()
    assert hub.asked == []


@pytest.mark.parametrize("name", ["org/none", "ms:org/none"])
def test_an_unknown_id_is_named(hub: HubServer, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"org/none at {hub.url} does not exist"):
        find_model(name)


def test_a_gated_model_says_what_to_do(hub: HubServer) -> None:
    hub.gated.add("org/tiny")
    with pytest.raises(ValueError, match=r"org/tiny at .* on request only: .* set HF_TOKEN"):
        find_model("org/tiny")


def test_a_gated_file_says_what_to_do(hub: HubServer) -> None:
    hub.status[SHARD] = 403
    with pytest.raises(ValueError, match=rf"{SHARD}: the hub refuses it \(403\).*HF_TOKEN"):
        find_model("org/tiny", progress=False)


def test_a_revision_is_taken_and_an_unknown_one_named(hub: HubServer) -> None:
    assert pull_model("org/tiny", revision=COMMIT, progress=False).name == COMMIT
    assert find_model("org/tiny", revision=COMMIT, download=False).name == COMMIT
    with pytest.raises(ValueError, match="has no revision 'v9'"):
        pull_model("org/tiny", revision="v9", progress=False)


@pytest.mark.parametrize("name", ["org/tiny", "ms:org/tiny"])
@pytest.mark.parametrize("hostile", ["../../x.json", "/etc/x.json", "a/../../x.json", "..\\x.json", "C:x.json", ".."])
def test_hostile_names_in_a_listing_get_nowhere(hub: HubServer, name: str, hostile: str, tmp_path: Path) -> None:
    hub.repos["org/tiny"][hostile] = b"{}"
    for into in (None, tmp_path / "tiny"):
        with pytest.raises(ValueError, match="leads out of its folder"):
            pull_model(name, into=into, progress=False)
    assert not any(path.name.endswith("x.json") for path in tmp_path.rglob("*"))
    assert not any(path.startswith("/content") for _, path, _ in hub.asked)


def test_a_hostile_checksum_gets_nowhere(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """huggingface_hub's cache names its blobs by it."""
    monkeypatch.setattr("tests.hub.hub_server.git_sha1", lambda content: "../../../x")
    with pytest.raises(ValueError, match="lists a checksum that is none"):
        pull_model("org/tiny", progress=False)
    assert not any(path.name == "x" for path in tmp_path.rglob("*"))


def test_a_listing_without_a_commit_is_refused(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.hub.hub_server.COMMIT", "../../x")
    with pytest.raises(ValueError, match="listed without a commit"):
        pull_model("org/tiny", progress=False)


def test_a_cache_that_cannot_be_written_is_named(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write the model: .*file"):
        pull_model("org/tiny", into=tmp_path / "file" / "tiny", progress=False)


def test_pickles_are_taken_only_where_there_is_nothing_else() -> None:
    def chosen(*names: str) -> list[str]:
        return [file.path for file in fetch.choose_files([KnownFile(name) for name in names], "org/x")]

    assert chosen("pytorch_model.bin", "model.safetensors", "x.py", "optimizer.bin") == ["model.safetensors"]
    assert chosen("pytorch_model-1.bin", "training_args.bin", "x.pkl", "qwen.tiktoken") == [
        "pytorch_model-1.bin",
        "qwen.tiktoken",
    ]
    with pytest.raises(ValueError, match=r"only GGUF files: name one of them, as org/x:a or org/x:b"):
        chosen("config.json", "a.gguf", "b.gguf")
    with pytest.raises(ValueError, match="and no other weights"):
        chosen("config.json", "original/model.safetensors")


def test_a_full_disk_is_foreseen(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"GB are to be downloaded, but .* has room for 0"):
        pull_model("org/tiny", into=tmp_path / "tiny", progress=False)


def test_two_pulls_at_once_do_not_disturb_each_other(hub: HubServer, tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=pull_model, args=("org/tiny",), kwargs={"into": tmp_path / "tiny", "progress": False})
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verify_folder(tmp_path / "tiny", progress=False).problems == []
    assert {path.name for path in (tmp_path / "tiny").iterdir()} == WANTED | {"SHA256SUMS"}
    assert hub.ranges(SHARD) == [None]


def test_a_token_reaches_the_hub_but_no_other_host(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, str | None]] = []
    real = httpx.HTTPTransport.handle_request

    def spy(transport: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        sent.append((request.url.path, request.headers.get("Authorization")))
        return real(transport, request)

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", spy)
    pull_model("org/tiny", progress=False)
    assert {value for path, value in sent if "/resolve/" in path} == {"Bearer hf_secret"}
    assert {value for path, value in sent if path.startswith("/content/")} == {None}


def test_the_endpoint_is_read_when_it_is_used(hub: HubServer, tmp_path: Path) -> None:
    """In a process of its own, where nothing is patched: HF_ENDPOINT and HF_HOME as a user sets them."""
    code = "from qwenkit.hub.find import pull_model; print(pull_model('org/tiny', progress=False))"
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "NO_PROXY": "127.0.0.1,localhost",
        "PATH": "",
    }
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    folder = Path(ran.stdout.splitlines()[-1])
    assert folder == tmp_path / "home" / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    assert is_complete(folder)


def test_modelscope_needs_its_client(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(ValueError, match=r"pip install .*\[modelscope\]"):
        pull_model("ms:org/tiny", progress=False)


def test_modelscopes_older_cache_is_found(hub: HubServer, tmp_path: Path) -> None:
    folder = pull_model("org/tiny", into=tmp_path / "modelscope/hub/models/org/tiny-0___5B", progress=False)
    assert find_model("ms:org/tiny-0.5B", download=False) == folder
