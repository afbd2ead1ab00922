"""Several processes train as one does, under every layout, and read what any other layout has saved."""

import contextlib
import json
import multiprocessing
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader

from qwenkit.linear.lora import LoRALinear, put
from qwenkit.train.config import TrainConfig
from qwenkit.train.parallel import ShardedFolder, World, load_sharded, save_sharded, tensor, wrap
from tests.conftest import ROOT
from tests.train import ranks

LAYOUTS = [(size, layout) for size, layouts in ranks.LAYOUTS.items() for layout in layouts]


def free_port() -> int:
    """A port that nobody listens at, below those that the system gives out by itself until the first rank takes it."""
    while True:
        port = random.SystemRandom().randrange(15_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def run_ranks(size: int, folder: Path, main: Callable[[int, int, int, Path], None] = ranks.main) -> None:
    port = free_port()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"tests.train.{name}_ranks" for name in ("slice", "reference", "uneven")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # the server of forks reads nothing else
        processes = [context.Process(target=main, args=(rank, size, port, folder)) for rank in range(size)]
        for process in processes:
            process.start()
    try:
        for process in processes:
            process.join(timeout=300)
    finally:
        for process in processes:
            process.kill()
    assert [process.exitcode for process in processes] == [0] * size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two and then four processes have found and saved."""
    path = tmp_path_factory.mktemp("ranks")
    for size in (2, 4):
        run_ranks(size, path)
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, dict[str, Any]]:
    return {size: json.loads((folder / f"found-{size}.json").read_text()) for size in (2, 4)}


@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
def test_several_processes_train_as_one(found: dict[int, Any], size: int, layout: str) -> None:
    """Losses, gradient norms and weights of two steps of two micro-batches, with unequal numbers of targets everywhere."""
    result = found[size][layout]
    assert result["moved"] > 0.1
    assert result["losses"] < 1e-5
    assert result["norms"] < 1e-6
    assert result["weights"] < 1e-6


@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
def test_what_others_saved_is_gone_on_with(found: dict[int, Any], size: int, layout: str) -> None:
    """Weights and optimizer states, saved by two or four processes of another layout; one step more equals one process."""
    differences = {name: value for name, value in found[size][layout].items() if name.startswith("from ")}
    kind = ranks.LAYOUTS[size][layout][0]
    others = sum(its_kind == kind for its_kind, _ in ranks.LAYOUTS[2].values()) if size == 4 else 0
    assert len(differences) == 1 + others
    assert max(differences.values()) < 1e-6


@pytest.mark.parametrize(("size", "layout"), LAYOUTS)
def test_one_process_reads_what_several_saved(folder: Path, size: int, layout: str) -> None:
    kind = ranks.LAYOUTS[size][layout][0]
    trained, again = ranks.new_model(kind), ranks.new_model(kind)
    ranks.train(trained, ranks.optimizer_of(trained), World(), range(ranks.STEPS))
    saved = folder / f"{layout}-{size}"
    load_sharded(saved, ranks.state(again, ranks.optimizer_of(again)))
    stored = ShardedFolder.open(saved)
    for (name, a), b in zip(trained.named_parameters(), again.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
        assert torch.equal(stored.tensor(name), b)


def test_no_process_writes_what_another_has(found: dict[int, Any]) -> None:
    """The files of sharded layouts are about equal: nothing was gathered on one process."""
    for size, layout in ((2, "fsdp"), (2, "tensor"), (4, "fsdp_tensor"), (4, "fsdp_uneven"), (2, "ddp_experts")):
        files = found[size][layout]["files"]
        assert len(files) == size
        assert max(files) < 1.3 * min(files)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_the_files(folder: Path) -> None:
    saved = folder / "fsdp_tensor-4"
    reader = HuggingFaceStorageReader(str(saved))
    stored = ShardedFolder.open(saved)
    tensors = {name: torch.zeros(shape) for name, shape in stored.shapes.items()}
    torch.distributed.checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    assert all(torch.equal(tensor, stored.tensor(name)) for name, tensor in tensors.items())


def saved_by_one(folder: Path) -> Path:
    save_sharded(folder, {"a": torch.arange(6.0).view(2, 3), "step": torch.tensor(7)}, World())
    return folder


def test_one_process_saves_and_loads(tmp_path: Path) -> None:
    saved_by_one(tmp_path)
    tensors = {"a": torch.zeros(2, 3), "step": torch.tensor(0)}
    load_sharded(tmp_path, tensors)
    assert tensors["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensors["step"] == 7
    assert ShardedFolder.open(tmp_path).tensor("step").dtype == torch.int64


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": (2, 3)}, "has, but nobody wants, 1 tensors, the first is step"),
        ({"a": (2, 3), "step": (), "b": (1,)}, "lacks 1 tensors, the first is b"),
        ({"a": (3, 2), "step": ()}, r"a has shape \[2, 3\], but \[3, 2\] is needed"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, tensors: dict[str, tuple[int, ...]], message: str) -> None:
    saved_by_one(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_sharded(tmp_path, {name: torch.zeros(shape) for name, shape in tensors.items()})


def test_a_checkpoint_that_was_not_finished(tmp_path: Path) -> None:
    saved_by_one(tmp_path)
    (tmp_path / "index.json").rename(tmp_path / "index.json.part")
    with pytest.raises(FileNotFoundError, match=r"has no index\.json, so the checkpoint was never finished"):
        ShardedFolder.open(tmp_path)
    (tmp_path / "index.json.part").rename(tmp_path / "index.json")
    shard = next(tmp_path.glob("*.safetensors"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(ValueError, match="is no checkpoint that can be read"):
        ShardedFolder.open(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        ShardedFolder.open(tmp_path)


@pytest.mark.parametrize(
    ("settings", "environment", "message"),
    [
        ({"context_parallel": 2}, {}, "context_parallel is 2, allowed is 1"),
        ({"tensor_parallel": 2}, {}, "tensor_parallel is 2, but 1 processes are not a multiple of it"),
        ({}, {"RANK": "one"}, "RANK is 'one', but torchrun sets it to a whole number"),
        ({}, {"RANK": "3", "WORLD_SIZE": "2"}, "do not fit together"),
        ({"dp_shard": 3}, {"WORLD_SIZE": "4"}, "is 3, but 4 processes run"),
        ({"parallel": "ddp", "dp_shard": 2}, {"WORLD_SIZE": "2"}, "dp_shard is 2, but parallel is ddp"),
        ({"optim": "adamw_8bit", "parallel": "fsdp"}, {"WORLD_SIZE": "2"}, "allowed is adamw, or parallel=ddp"),
        ({"optim": "adamw_8bit", "tensor_parallel": 2}, {"WORLD_SIZE": "2"}, "2 processes share each parameter"),
        (
            {"tensor_parallel": 4},
            {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
            "tensor_parallel is 4, but a node runs 2 processes",
        ),
    ],
)
def test_sizes_that_do_not_fit(settings: dict[str, Any], environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        World.current(TrainConfig(**settings), environment)


def test_a_single_process_is_a_world() -> None:
    config = TrainConfig(device="cpu")
    world = World.current(config, {})
    assert world.layout == "1 process"
    assert world.sum(3) == 3
    assert world.any(True)
    assert world.broadcast("text") == "text"
    model = ranks.new_model("qwen2")
    assert wrap(model, config, world) is model


class FourProcesses:
    def size(self) -> int:
        return 4


def test_models_that_cannot_be_cut() -> None:
    model = ranks.new_model("qwen2")
    with pytest.raises(ValueError, match=r"tensor_parallel is 4, but the model's intermediate_size is 50"):
        tensor.cut(model, FourProcesses())  # type: ignore[arg-type]
    adapted = ranks.new_model("qwen3_moe")
    adapted.config.__dict__.update(vocab_size=64, intermediate_size=48)
    name = "model.layers.0.self_attn.q_proj"
    put(adapted, name, LoRALinear(adapted.get_submodule(name), 2, 4))
    with pytest.raises(ValueError, match="q_proj is a LoRALinear; allowed are the methods full and freeze"):
        tensor.cut(adapted, FourProcesses())  # type: ignore[arg-type]
