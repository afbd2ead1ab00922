"""Two processes read half a model each, and train as one does that has read all of it."""

import json
from typing import Any

import pytest
import torch

from qwenkit.train.config import TrainConfig
from qwenkit.train.methods import prepare_model, save_trained, trainable_parameters
from qwenkit.weights.checkpoint import open_checkpoint
from tests.tiny_models import write_model
from tests.train import slice_ranks
from tests.train.test_parallel import run_ranks

LARGEST = 4 * 1024 * 256  # bytes of a matrix in float32


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has counted and computed."""
    folder = tmp_path_factory.mktemp("slices")
    for kind in ("qwen2", "qwen3"):
        write_model(folder / kind, kind, **slice_ranks.SIZES)
    base = folder / "qwen2"
    config = TrainConfig(model=str(base), dtype="float32", lora_rank=4, modules_to_save=("embed_tokens", "lm_head"))
    model = prepare_model(config, open_checkpoint(base), "cpu")
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    save_trained(model, config, open_checkpoint(base), folder / "saved")
    run_ranks(2, folder, slice_ranks.main)
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("layout", slice_ranks.LAYOUTS)
def test_what_was_read_in_slices_is_the_model(found: list[dict[str, Any]], layout: str) -> None:
    for rank in found:
        assert rank[layout]["same"]
        assert rank[layout]["names"]


@pytest.mark.parametrize("layout", slice_ranks.LAYOUTS)
def test_losses_are_those_of_one_process(found: list[dict[str, Any]], layout: str) -> None:
    first = found[0][layout]
    assert len(first["losses"]) == slice_ranks.STEPS
    assert first["losses"] == pytest.approx(first["alone"], abs=1e-5)
    assert first["losses"][1] != pytest.approx(first["losses"][0], abs=1e-4)


@pytest.mark.parametrize("layout", slice_ranks.LAYOUTS)
def test_a_process_reads_and_holds_half(found: list[dict[str, Any]], layout: str) -> None:
    for rank in found:
        counted, quantized = rank[layout], layout.startswith("q")
        assert counted["held"] == pytest.approx(0.5, abs=0.02)
        # In 4 bits rows are quantized 256 at a time, so the two matrices of 256 rows in a block are read by both.
        assert counted["read"] == pytest.approx(0.735 if quantized else 0.5, abs=0.02)
        # The adapter is made whole before it is cut, and one matrix at a time is gathered or computed with: up to four of its
        # size at once. DoRA gathers through a collective, whose thread gives each gathered matrix back in its own time, so two
        # or three may linger. All of them at once would be more than ten.
        matrices = 7 if layout == "dora" else 5 if quantized else 0.0625
        assert counted["own"] <= counted["peak"] < counted["own"] + counted["adapter"] + matrices * LARGEST
