"""Checkpoints: whole or not there, the newest whole one is found, old ones go and the best one stays."""

from pathlib import Path

import pytest
import torch

from qwenkit.train import checkpoint
from qwenkit.train.checkpoint import (
    Saved,
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    remove_leftovers,
    remove_old,
    save_checkpoint,
    verify_checkpoint,
    write_json,
)
from qwenkit.train.parallel.world import World

WORLD = World()


def tensors(value: float = 0.0) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "weights": {"a.weight": torch.full((3, 4), value), "b": torch.full((5,), value, dtype=torch.bfloat16)},
        "optimizer": {"num_steps": torch.tensor(int(value)), "a.weight.exp_avg": torch.full((3, 4), value / 2)},
    }


def save(folder: Path, step: int, value: float = 1.0) -> Path:
    return save_checkpoint(folder, step, tensors(value), Saved({"epoch": 0.5}, {"data": {"cursor": 7}}), WORLD)


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

    for place in ("save_sharded", "write_json", "sync"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, place, dies)
            with pytest.raises(OSError, match="no space left"):
                save(tmp_path, 20)
        assert list(checkpoints(tmp_path)) == [10]
    assert len(list(tmp_path.iterdir())) == 2
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "no state", "bad state", "no rank"])
def test_the_newest_whole_one_is_found(tmp_path: Path, how: str) -> None:
    for step in (5, 10, 100):
        save(tmp_path, step)
    damaged = tmp_path / "checkpoint-100"
    file = next((damaged / "weights").glob("*.safetensors"))
    data = file.read_bytes()
    if how == "truncated":
        file.write_bytes(data[:-1])
    elif how == "flipped":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "missing":
        file.unlink()
    elif how == "no state":
        (damaged / checkpoint.STATE).unlink()
    elif how == "bad state":
        (damaged / checkpoint.STATE).write_text("[]")
    else:
        (damaged / "rank-00000.json").unlink()
    said: list[str] = []
    assert latest_checkpoint(tmp_path, said.append) == tmp_path / "checkpoint-10"
    assert len(said) == 1
    assert said[0].startswith("checkpoint-100 is passed over")
    with pytest.raises((ValueError, FileNotFoundError)):
        verify_checkpoint(damaged)
    with pytest.raises((ValueError, FileNotFoundError)):
        load_checkpoint(damaged, tensors(), WORLD)


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
    remove_old(tmp_path, None, None)
    assert list(checkpoints(tmp_path)) == [1, 2, 3, 4, 5]
    remove_old(tmp_path, 2, best=2)
    assert list(checkpoints(tmp_path)) == [2, 4, 5]
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
