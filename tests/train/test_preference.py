"""Preference losses: each against a plain reading of its formula in float64, one pair at a time, on unpacked documents."""

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenkit.linear.lora import LoRALinear
from qwenkit.model.context import pack
from qwenkit.model.qwen import Qwen
from qwenkit.train.batch import IGNORE, Pair, Sample, TrainBatch
from qwenkit.train.config import TrainConfig
from qwenkit.train.methods import prepare_model, trainable_parameters
from qwenkit.train.parallel import World
from qwenkit.train.preference import (
    Objective,
    dpo_losses,
    kto_losses,
    log_probabilities,
    make_reference,
    mismatched,
    needs_reference,
    objective,
    orpo_losses,
    scores,
    simpo_losses,
)
from qwenkit.weights.checkpoint import open_checkpoint
from tests.tiny_models import write_model

BETA = 0.3


def document(rng: random.Random, prompt: list[int], origin: str = "") -> Sample:
    answer = [rng.randrange(250) for _ in range(rng.randrange(2, 9))]
    return Sample(prompt + answer, [IGNORE] * len(prompt) + answer, origin)


def pairs(count: int, seed: int = 0) -> list[Pair]:
    rng = random.Random(seed)
    found = []
    for number in range(count):
        prompt = [rng.randrange(250) for _ in range(rng.randrange(1, 6))]
        found.append(Pair(document(rng, prompt, f"file:{number}"), document(rng, prompt, f"file:{number}")))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def settings(folder: Path, **changes: Any) -> TrainConfig:
    chosen: dict[str, Any] = {"model": str(folder), "stage": "dpo", "pref_beta": BETA, "dtype": "float32"}
    return TrainConfig(**(chosen | {"lora_rank": 4, "per_device_train_batch_size": 4} | changes))


def trained(config: TrainConfig, folder: Path) -> Qwen:
    model = prepare_model(config, open_checkpoint(folder), "cpu")
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@torch.no_grad()
def plainly(model: Qwen, sample: Sample) -> tuple[float, int]:
    """Sum of log p of a document's targets and their number, token by token in float64."""
    logits = model.logits(model(*pack([sample.ids], model.config))).double()
    total, count = 0.0, 0
    for place in range(1, len(sample.ids)):
        if sample.labels[place] != IGNORE:
            row = logits[place - 1]
            total += float(row[sample.labels[place]] - torch.logsumexp(row, 0))
            count += 1
    return total, count


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_log_probabilities_of_packed_documents(folder: Path) -> None:
    config = settings(folder)
    model = trained(config, folder)
    batch = TrainBatch.of_pairs(pairs(3))
    samples = [sample for pair in pairs(3) for sample in (pair.chosen, pair.rejected) if sample is not None]
    with torch.no_grad():
        sums, counts = log_probabilities(model, batch, chunk=5)
    for place, sample in enumerate(samples):
        total, count = plainly(model, sample)
        assert counts[place] == count
        assert float(sums[place]) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("kind", ["sigmoid", "smoothed", "hinge", "ipo", "simpo", "ftx", "orpo"])
def test_losses_of_pairs(folder: Path, kind: str) -> None:
    changes: dict[str, dict[str, Any]] = {
        "smoothed": {"pref_label_smoothing": 0.2},
        "hinge": {"pref_loss": "hinge"},
        "ipo": {"pref_loss": "ipo"},
        "simpo": {"pref_loss": "simpo", "simpo_gamma": 0.7},
        "ftx": {"pref_ftx": 0.5},
        "orpo": {"stage": "orpo"},
    }
    config = settings(folder, **changes.get(kind, {}))
    model = trained(config, folder)
    base = prepare_model(config, open_checkpoint(folder), "cpu")  # new adapters: the model as it was
    wanted = 0.0
    for pair in pairs(4):
        assert pair.rejected is not None
        (c, nc), (r, nr) = plainly(model, pair.chosen), plainly(model, pair.rejected)
        (c0, _), (r0, _) = plainly(base, pair.chosen), plainly(base, pair.rejected)
        h = (c - c0) - (r - r0)
        if kind in ("sigmoid", "ftx"):
            wanted += -math.log(sigmoid(BETA * h)) - (0.5 * c / nc if kind == "ftx" else 0)
        elif kind == "smoothed":
            wanted += -0.8 * math.log(sigmoid(BETA * h)) - 0.2 * math.log(sigmoid(-BETA * h))
        elif kind == "hinge":
            wanted += max(0.0, 1 - BETA * h)
        elif kind == "ipo":
            wanted += ((c - c0) / nc - (r - r0) / nr - 1 / (2 * BETA)) ** 2
        elif kind == "simpo":
            wanted += -math.log(sigmoid(BETA * (c / nc - r / nr) - 0.7))
        else:
            odds = [math.exp(mean) / (1 - math.exp(mean)) for mean in (c / nc, r / nr)]
            wanted += -c / nc - BETA * math.log(sigmoid(math.log(odds[0]) - math.log(odds[1])))
    batch = TrainBatch.of_pairs(pairs(4))
    loss, metrics = objective(config)(model, batch)
    assert float(loss.detach()) == pytest.approx(wanted, rel=2e-5)
    assert objective(config).weight(batch) == 4
    assert metrics.keys() == {"reward_chosen", "reward_rejected", "accuracy"}
    loss.backward()
    assert all(parameter.grad is not None for parameter in trainable_parameters(model).values())


def test_kto_with_its_baseline_from_answers_to_other_prompts(folder: Path) -> None:
    config = settings(folder, stage="kto", kto_chosen_weight=1.5, kto_rejected_weight=0.5)
    model = trained(config, folder)
    base = prepare_model(config, open_checkpoint(folder), "cpu")
    given = [replace(pair, rejected=None, liked=number % 2 == 0) for number, pair in enumerate(pairs(4))]
    prompts = [[i for i, label in zip(p.chosen.ids, p.chosen.labels, strict=True) if label == IGNORE] for p in given]
    answers = [p.chosen.ids[len(prompt) :] for p, prompt in zip(given, prompts, strict=True)]
    other = [
        Sample(prompt + answers[(i + 1) % 4], [IGNORE] * len(prompt) + answers[(i + 1) % 4])
        for i, prompt in enumerate(prompts)
    ]
    baseline = max(0.0, sum(plainly(model, s)[0] - plainly(base, s)[0] for s in other) / 4)
    wanted = 0.0
    for pair in given:
        ratio = plainly(model, pair.chosen)[0] - plainly(base, pair.chosen)[0]
        wanted += (
            1.5 * (1 - sigmoid(BETA * (ratio - baseline)))
            if pair.liked
            else 0.5 * (1 - sigmoid(BETA * (baseline - ratio)))
        )
    batch = TrainBatch.of_pairs(given)
    loss, metrics = objective(config)(model, batch)
    assert float(loss.detach()) == pytest.approx(wanted, rel=2e-5)
    assert metrics["liked"] == 2
    shifted = mismatched(batch, batch.pairs or [])
    assert shifted is not None
    assert shifted.ids.tolist() == [token for sample in other for token in sample.ids]
    assert shifted.num_targets == sum(sample.num_targets for sample in other)
    assert mismatched(batch, (batch.pairs or [])[:1]) is None
    with pytest.raises(ValueError, match="per_device_train_batch_size is 1, allowed is 2 or more for kto"):
        objective(settings(folder, stage="kto", per_device_train_batch_size=1))


def test_a_reward_model_compares_scores_at_the_last_token(folder: Path) -> None:
    config = settings(folder, stage="rm", method="full")
    model = trained(config, folder)
    batch = TrainBatch.of_pairs(pairs(3))
    head: Any = model.score
    with torch.no_grad():
        alone = [
            [float(head(model(*pack([sample.ids], model.config))[-1:])) for sample in (p.chosen, p.rejected) if sample]
            for p in pairs(3)
        ]
        torch.testing.assert_close(scores(model, batch), torch.tensor(alone).flatten(), atol=1e-5, rtol=1e-5)
    loss, metrics = objective(config)(model, batch)
    assert float(loss.detach()) == pytest.approx(sum(-math.log(sigmoid(c - r)) for c, r in alone), rel=1e-4)
    assert metrics["accuracy"] == sum(c > r for c, r in alone)
    loss.backward()
    assert head.weight.grad is not None


def test_at_the_start_the_reference_is_the_model_itself(folder: Path) -> None:
    """Nothing is preferred yet: the loss of a pair is log 2, whatever the reference is kept as."""
    batch = TrainBatch.of_pairs(pairs(3))
    for changes in ({}, {"use_dora": True}, {"method": "full"}, {"modules_to_save": ("lm_head",)}):
        config = settings(folder, **changes)
        checkpoint = open_checkpoint(folder)
        model = prepare_model(config, checkpoint, "cpu")
        reference = make_reference(config, checkpoint, World(), model)
        assert (reference is None) is (changes in ({}, {"use_dora": True}))
        loss, _ = objective(config, reference)(model, batch)
        assert float(loss.detach()) == pytest.approx(3 * math.log(2), rel=1e-5)
        with torch.no_grad():
            for parameter in trainable_parameters(model).values():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        moved, _ = objective(config, reference)(model, batch)
        assert abs(float(moved.detach()) - 3 * math.log(2)) > 1e-3
        if reference is not None:
            assert not any(parameter.requires_grad for parameter in reference.parameters())
        else:
            assert all(m.enabled for m in model.modules() if isinstance(m, LoRALinear))


def test_micro_batches_add_up_to_the_whole(folder: Path) -> None:
    config = settings(folder)
    model = trained(config, folder)
    whole = TrainBatch.of_pairs(pairs(4))
    step: Objective = objective(config)
    loss, _ = step(model, whole)
    parts = [step(model, half) for half in whole.halves()]
    assert float(loss.detach()) == pytest.approx(sum(float(part.detach()) for part, _ in parts), rel=1e-5)
    assert sum(step.weight(half) for half in whole.halves()) == step.weight(whole)


def test_gradients_of_the_formulas() -> None:
    """Double precision, against differences."""
    torch.manual_seed(0)
    chosen, rejected = (-torch.rand(5, dtype=torch.float64) - 0.1 for _ in range(2))
    inputs = (chosen.requires_grad_(), rejected.requires_grad_())
    liked = torch.tensor([True, False, True, False, True])
    for losses in (
        lambda c, r: dpo_losses(c, r, BETA, "sigmoid", 0.1)[0],
        lambda c, r: dpo_losses(c, r, BETA, "hinge")[0],
        lambda c, r: dpo_losses(c, r, BETA, "ipo")[0],
        lambda c, r: simpo_losses(c, r, BETA, 0.5)[0],
        lambda c, r: orpo_losses(c, r, BETA)[0],
        lambda c, r: kto_losses(c - r, liked, torch.full((), 0.4, dtype=torch.float64), BETA, 1.0, 2.0),
    ):
        torch.autograd.gradcheck(losses, inputs)


def test_certain_and_hopeless_answers_stay_finite() -> None:
    chosen = torch.tensor([0.0, -1e-9, -80.0], requires_grad=True)
    losses, _ = orpo_losses(chosen, torch.tensor([-80.0, 0.0, 0.0]), BETA)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert chosen.grad is not None
    assert chosen.grad.isfinite().all()


def test_what_does_not_fit(folder: Path) -> None:
    config = settings(folder)
    model = prepare_model(config, open_checkpoint(folder), "cpu")
    with pytest.raises(ValueError, match="stage is 'sft', allowed are dpo, kto, orpo, rm for preferences"):
        objective(settings(folder, stage="sft"))
    with pytest.raises(ValueError, match="dpo with method full needs a frozen copy"):
        objective(settings(folder, method="full"))
    with pytest.raises(ValueError, match="file:0 has no rejected answer"):
        objective(config)(model, TrainBatch.of_pairs([replace(pairs(1)[0], rejected=None)]))
    with pytest.raises(ValueError, match="file:0 has no preferences"):
        objective(config)(model, TrainBatch.of([pairs(1)[0].chosen]))
    empty = Sample([1, 2], [IGNORE, IGNORE], "file:7")
    with pytest.raises(ValueError, match="file:7: nothing of the answer is learned"):
        objective(config)(model, TrainBatch.of_pairs([Pair(pairs(1)[0].chosen, empty)]))
    assert not needs_reference(settings(folder, pref_loss="simpo"))
    assert needs_reference(settings(folder, stage="kto"))
