"""Data that does not divide by the processes: a rank without a record takes part in every step and evaluation."""

import json
import math
from pathlib import Path

import pytest
import torch

from qwenkit.train.batch import Pair, Sample, TrainBatch
from qwenkit.train.config import TrainConfig
from qwenkit.train.preference import objective
from qwenkit.train.run import train
from tests.tiny_models import tiny_pair, write_model
from tests.train import uneven_ranks
from tests.train.test_parallel import run_ranks


def write_data(folder: Path, name: str, count: int, liked: int) -> None:
    """`count` texts and pairs, `liked` liked or disliked answers, all of different lengths."""
    words = [f"{'ab' * (place + 1)} {place}" for place in range(max(count, liked))]
    files = {
        "text": [{"text": f"it is said: {word}", "instruction": f"say {word}", "output": word * 2} for word in words],
        "pairs": [{"instruction": f"say {word}", "chosen": word * 2, "rejected": "no"} for word in words],
        "liked": [
            {"instruction": f"say {word}", "output": word, "tag": place % 2 == 0} for place, word in enumerate(words)
        ],
    }
    for kind, rows in files.items():
        rows = rows[: liked if kind == "liked" else count]
        (folder / f"{kind}{name}.json").write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that two processes have trained, and one process with the same steps."""
    folder = tmp_path_factory.mktemp("uneven")
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 264}
    write_model(folder / "model", "qwen2", **sizes, initializer_range=0.1)
    write_data(folder, "", 3, 5)
    write_data(folder, "_eval", 1, 3)
    pair_columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    info = {}
    for name in ("", "_eval"):
        info[f"text{name}"] = {"file_name": f"text{name}.json"}
        info[f"pairs{name}"] = {"file_name": f"pairs{name}.json", "ranking": True, "columns": pair_columns}
        columns = {"prompt": "instruction", "response": "output", "kto_tag": "tag"}
        info[f"liked{name}"] = {"file_name": f"liked{name}.json", "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    run_ranks(2, folder, uneven_ranks.main)
    return folder


@pytest.mark.parametrize(("stage", "layout"), uneven_ranks.RUNS)
def test_two_processes_train_as_one(folder: Path, stage: str, layout: str) -> None:
    """The same losses step by step; kto's are not the same, because its baseline is of one process's micro-batch."""
    train(TrainConfig.from_settings(uneven_ranks.settings(stage, layout, folder, 1)))
    one, two = (uneven_ranks.losses(folder / f"{stage}-{layout}-{processes}") for processes in (1, 2))
    assert [list(line) for line in two] == [["loss"], ["eval_loss"]] * 4
    for theirs, ours in zip(one, two, strict=True):
        for name, value in ours.items():
            assert math.isfinite(value)
            assert stage == "kto" or value == pytest.approx(theirs[name], abs=2e-4), (name, one, two)


@pytest.mark.parametrize(
    ("stage", "loss"),
    [("dpo", "sigmoid"), ("dpo", "ipo"), ("dpo", "simpo"), ("kto", "sigmoid"), ("orpo", "sigmoid"), ("rm", "sigmoid")],
)
def test_no_pairs_are_zeros_under_the_same_names(stage: str, loss: str) -> None:
    """A batch without pairs: loss 0, gradients that are 0 and not absent, and as many forward passes as with pairs."""
    config = TrainConfig(stage=stage, pref_loss=loss, method="full", per_device_train_batch_size=2)
    model, reference = tiny_pair("qwen2")[1], tiny_pair("qwen2")[1]
    if stage == "rm":
        model.score = torch.nn.Linear(model.config.hidden_size, 1, bias=False)
    goal = objective(config, reference)
    passes: list[str] = []
    for name, each in (("model", model), ("reference", reference)):
        each.model.register_forward_hook(lambda *_, name=name: passes.append(name))
    pair = Pair(Sample([5, 6, 7], [-100, 6, 7]), None if stage == "kto" else Sample([5, 8], [-100, 8]), liked=True)
    full = TrainBatch.of_pairs([pair, pair])
    empty = TrainBatch(full.ids, torch.full_like(full.labels, -100), full.lengths, full.origins, [])
    one = TrainBatch.of_pairs([pair])
    counted, names = [], []
    for batch in (full, one, empty):
        passes.clear()
        loss_sum, numbers = goal(model, batch)
        counted.append(list(passes))
        names.append(set(numbers))
    assert counted[0] == counted[1] == counted[2]
    assert names[0] == names[1] == names[2]
    assert goal.weight(empty) == 0
    assert set(numbers.values()) == {0.0}
    assert loss_sum.item() == 0
    loss_sum.backward()
    touched = [parameter.grad for parameter in model.model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in touched)


def test_data_of_another_stage_is_no_empty_share() -> None:
    batch = TrainBatch.of([Sample([1, 2], [1, 2], "a.json:1")])
    goal = objective(TrainConfig(stage="orpo"))
    with pytest.raises(ValueError, match=r"a\.json:1 has no preferences, but the stage needs them"):
        goal.weight(batch)
