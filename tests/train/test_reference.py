"""Two processes share the frozen model that dpo and kto measure against, and train as one does that has it whole."""

import json
from typing import Any

import pytest

from tests.tiny_models import write_model
from tests.train import reference_ranks
from tests.train.test_parallel import run_ranks

LAYOUTS = reference_ranks.LAYOUTS


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has counted and computed."""
    folder = tmp_path_factory.mktemp("reference")
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 264}
    write_model(folder, "qwen2", **sizes, initializer_range=0.1)
    run_ranks(2, folder, reference_ranks.main)
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_those_of_one_process(found: list[dict[str, Any]], layout: str) -> None:
    for rank in found:
        losses, alone = rank[layout]["losses"], rank[layout]["alone"]
        assert len(losses) == reference_ranks.STEPS
        assert losses == pytest.approx(alone, abs=1e-4)
        assert losses[1] != pytest.approx(losses[0], abs=1e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_process_holds_half_before_and_after_steps(found: list[dict[str, Any]], layout: str) -> None:
    for rank in found:
        assert rank[layout]["before"] == pytest.approx(0.5, abs=0.02)
        assert rank[layout]["after"] == rank[layout]["before"]
