"""Checkpoints: whole or not there, the newest whole one is found, old ones go and the best one stays."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenkit.storage import write_json
from qwenkit.train import checkpoint
from qwenkit.train.checkpoint import (
    DamagedError,
    Saved,
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    remove_leftovers,
    remove_old,
    save_checkpoint,
    verify_checkpoint,
)
from qwenkit.train.parallel.world import World

WORLD = World()


def tensors(value: float = 0.0) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "weights": {"a.weight": torch.full((3, 4), value), "b": torch.full((5,), value, dtype=torch.bfloat16)},
        "optimizer": {"num_steps": torch.tensor(int(value)), "a.weight.exp_avg": torch.full((3, 4), value / 2)},
    }


def save(folder: Path, step: int, value: float = 1.0) -> Path:
    saved = Saved({"epoch": 0.5, "best": float("nan")}, {"data": {"cursor": 7}})
    return save_checkpoint(
        folder, step, tensors(value), saved, WORLD, beside=lambda path: write_json(path / "adapter_config.json", {})
    )


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(5)
    path = save(tmp_path, 10, 3.0)
    drawn = torch.rand(4)
    found = tensors()
    saved = load_checkpoint(path, found, WORLD)
    for group, expected in tensors(3.0).items():
        for name, tensor in expected.items():
            assert torch.equal(found[group][name], tensor)
            assert found[group][name].dtype == tensor.dtype
    assert (saved.state["step"], saved.state["epoch"], saved.own["data"]) == (10, 0.5, {"cursor": 7})
    assert torch.equal(torch.rand(4), drawn)  # random numbers go on where they were
    assert {p.suffix for p in path.rglob("*") if p.is_file()} <= {".json", ".safetensors"}


def test_a_checkpoint_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10)

    def dies(*_: object) -> None:
        raise OSError("no space left on device")

    for place in ("save_sharded", "write_json", "fsync_tree", "rename_all"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, place, dies)
            with pytest.raises(OSError, match="no space left"):
                save(tmp_path, 20)
        assert list(checkpoints(tmp_path)) == [10]
        assert len(list(tmp_path.iterdir())) == 2
        remove_leftovers(tmp_path)
        # One that was written whole and only lacked its name gets it.
        found = [10, 20] if place in ("fsync_tree", "rename_all") else [10]
        assert list(checkpoints(tmp_path)) == found
        assert len(list(tmp_path.iterdir())) == len(found)
        shutil.rmtree(tmp_path / "checkpoint-20", ignore_errors=True)


def damage(folder: Path, how: str) -> None:
    file = next((folder / "weights").glob("*.safetensors"))
    data = file.read_bytes()
    listing = (folder / checkpoint.STATE).read_text()
    if how == "truncated":
        file.write_bytes(data[:-1])
    elif how == "flipped":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "missing":
        file.unlink()
    elif how == "no state":
        (folder / checkpoint.STATE).unlink()
    elif how == "bad state":
        (folder / checkpoint.STATE).write_text("[]")
    elif how == "other state":
        (folder / checkpoint.STATE).write_text(listing.replace('"step": 100', '"step": 101'))
    elif how == "no rank":
        (folder / "rank-00000.json").unlink()
    elif how == "other rank":
        own = (folder / "rank-00000.json").read_text()
        (folder / "rank-00000.json").write_text(own.replace('"cursor": 7', '"cursor": 8'))
    elif how == "no index":
        (folder / "weights" / "index.json").unlink()
    elif how == "no optimizer":
        shutil.rmtree(folder / "optimizer")
    elif how == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    else:
        (folder / "adapter_config.json").write_text("{")


DAMAGES = (
    *("truncated", "flipped", "missing", "no state", "bad state", "other state", "no rank", "other rank", "no index"),
    *("no optimizer", "empty", "adapter"),
)


@pytest.mark.parametrize("how", DAMAGES)
def test_the_newest_whole_one_is_found(tmp_path: Path, how: str) -> None:
    """Every file of a checkpoint counts. A damaged one is renamed and named, and nothing of it is lost."""
    for step in (5, 10, 100):
        save(tmp_path, step)
    damaged = tmp_path / "checkpoint-100"
    damage(damaged, how)
    held = sorted(path.name for path in damaged.rglob("*"))
    with pytest.raises(DamagedError):
        verify_checkpoint(damaged)
    with pytest.raises(DamagedError):
        load_checkpoint(damaged, tensors(), WORLD)
    said: list[str] = []
    assert latest_checkpoint(tmp_path, said.append) == tmp_path / "checkpoint-10"
    assert len(said) == 1
    assert said[0].startswith("checkpoint-100 is damaged and renamed to checkpoint-100.damaged: ")
    assert sorted(path.name for path in (tmp_path / "checkpoint-100.damaged").rglob("*")) == held
    save(tmp_path, 100)
    damage(tmp_path / "checkpoint-100", how)
    assert latest_checkpoint(tmp_path, said.append) == tmp_path / "checkpoint-10"
    assert (tmp_path / "checkpoint-100.damaged-2").is_dir()


def test_all_damaged(tmp_path: Path) -> None:
    """Nothing is renamed: the same command again must not find an empty folder and begin anew."""
    for step in (5, 10):
        damage(save(tmp_path, step), "flipped")
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"checkpoint-10 is not whole \(.*\), nor is any of the 1 before it; nothing was"
        ):
            latest_checkpoint(tmp_path)
        assert list(checkpoints(tmp_path)) == [5, 10]


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ETIMEDOUT])
@pytest.mark.parametrize("place", ["open", "stat"])
def test_a_share_that_is_away_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, place: str
) -> None:
    """An older whole checkpoint is not chosen for it: that would throw away steps which are on the disk."""
    for step in (5, 10):
        save(tmp_path, step)
    whole = getattr(Path, place)

    def away(path: Path, *args: Any, **kwargs: Any) -> Any:
        if "checkpoint-10" in str(path) and path.suffix == ".safetensors":
            raise OSError(code, os.strerror(code), str(path))
        return whole(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, place, away)
        with pytest.raises(OSError, match=r"checkpoint-10 cannot be read \(.*\), which need not be damage"):
            latest_checkpoint(tmp_path)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_checkpoints_of_earlier_versions(tmp_path: Path) -> None:
    """Those list only the files of each process; their other files are checked by what they must hold."""
    for how in ("no index", "flipped"):
        for step in (1, 2):
            path = save(tmp_path, step)
            state = json.loads((path / checkpoint.STATE).read_text())
            del state["files"], state["checksum"]
            (path / checkpoint.STATE).write_text(json.dumps(state))
            verify_checkpoint(path)
        damage(path, how)
        assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


@pytest.mark.parametrize("when", ["before the old one went", "between", "before the new one came"])
def test_a_kill_while_a_checkpoint_is_replaced(tmp_path: Path, when: str) -> None:
    """What the folder holds at each moment leads to a whole checkpoint of that step."""
    old = save(tmp_path, 3, 1.0)
    kept = tmp_path / "kept"
    shutil.copytree(old, kept)
    new = save(tmp_path, 3, 2.0)
    new.rename(tmp_path / ".unfinished-checkpoint-3")
    if when == "before the old one went":
        kept.rename(old)
    elif when == "between":
        kept.rename(tmp_path / ".replaced-checkpoint-3")
    else:
        shutil.rmtree(kept)
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    found = tensors()
    load_checkpoint(tmp_path / "checkpoint-3", found, WORLD)
    assert found["weights"]["a.weight"].unique().tolist() == [1.0 if when == "before the old one went" else 2.0]
    half = tmp_path / ".unfinished-checkpoint-4"
    shutil.copytree(tmp_path / "checkpoint-3", half)
    (half / checkpoint.STATE).unlink()
    (tmp_path / "checkpoint-3").rename(tmp_path / ".replaced-checkpoint-3")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_rename_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 3, 1.0)
    replace = os.replace

    def refuses(source: Path, target: Path) -> None:
        if Path(source).name.startswith(".unfinished"):
            raise OSError(5, "Input/output error")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuses)
        with pytest.raises(OSError, match="Input/output"):
            save(tmp_path, 3, 2.0)
    found = tensors()
    load_checkpoint(tmp_path / "checkpoint-3", found, WORLD)
    assert found["weights"]["a.weight"].unique().tolist() == [1.0]


def test_other_settings_are_said(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    other = tensors()
    other["weights"]["c"] = torch.zeros(1)
    with pytest.raises(ValueError, match="lacks 1 tensors, the first is c"):
        load_checkpoint(path, other, WORLD)
    with pytest.raises(ValueError, match="has no average"):
        load_checkpoint(path, tensors() | {"average": {"a": torch.zeros(1)}}, WORLD)


def test_old_ones_go_and_the_best_stays(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    (tmp_path / "checkpoint-last").mkdir()
    remove_old(tmp_path, None, None, 5)
    assert list(checkpoints(tmp_path)) == [1, 2, 3, 4, 5]
    remove_old(tmp_path, 2, best=2, step=5)
    assert list(checkpoints(tmp_path)) == [2, 4, 5]
    save(tmp_path, 3)  # of a run that has gone back to step 2
    remove_old(tmp_path, 1, best=None, step=3)
    assert list(checkpoints(tmp_path)) == [3, 4, 5]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_the_same_step_again_replaces(tmp_path: Path) -> None:
    save(tmp_path, 3, 1.0)
    save(tmp_path, 3, 2.0)
    found = tensors()
    load_checkpoint(tmp_path / "checkpoint-3", found, WORLD)
    assert found["weights"]["a.weight"].unique().tolist() == [2.0]


def test_more_can_lie_beside(tmp_path: Path) -> None:
    path = save_checkpoint(
        tmp_path,
        1,
        tensors(),
        Saved({}, {}),
        WORLD,
        beside=lambda folder: write_json(folder / "adapter_config.json", {}),
    )
    assert (path / "adapter_config.json").is_file()
