"""The loop: normalisation, resume bit for bit (killed processes too), memory that runs out, losses that are not finite."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenkit.model.qwen import Qwen
from qwenkit.train import loop
from qwenkit.train.batch import IGNORE, TrainBatch
from qwenkit.train.checkpoint import STATE, checkpoints, latest_checkpoint
from qwenkit.train.log import LOG, JsonLines, read_log
from qwenkit.train.loop import Trainer
from qwenkit.train.parts import NextTokens
from tests.conftest import ROOT
from tests.train.runs import Documents, Memory, config, parts, tiny_model, weights

KILLS = 20 if os.environ.get("QWENKIT_SLOW") else 3


def assert_equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns() -> None:
    memory = Memory()
    outcome = Trainer(config(max_steps=60), parts(tiny_model(lora=False)), memory).run()
    assert outcome.reason == "done"
    assert outcome.step == len(memory.losses) == 60
    assert memory.losses[0] > 3.5
    assert outcome.loss < 0.6 * memory.losses[0]
    assert memory.finished


@pytest.mark.parametrize(("documents", "accumulation"), [(1, 4), (2, 2)])
def test_steps_are_the_same_however_they_are_cut(documents: int, accumulation: int) -> None:
    """4 x 1 and 1 x 4 micro-batches with unequal masks: the same losses, the same weights."""

    class Regrouped(Documents):
        def batch(self, epoch: int, index: int) -> TrainBatch:
            whole = Documents(documents=4).batch(0, index // accumulation)
            pieces = whole.halves() if accumulation == 2 else [q for h in whole.halves() for q in h.halves()]
            if len(pieces) < accumulation:  # a half of one document and one of three
                pieces = [q for piece in pieces for q in piece.halves()]
            return pieces[index % accumulation]

    whole, cut = Memory(), Memory()
    one = Trainer(config(), parts(tiny_model(dropout=0), train=Documents(documents=4)), whole)
    many = Trainer(
        config(gradient_accumulation_steps=accumulation),
        parts(tiny_model(dropout=0), train=Regrouped(batches=None)),
        cut,
    )
    one.run()
    many.run()
    assert whole.losses == pytest.approx(cut.losses, rel=1e-5)
    for name, value in weights(one).items():
        torch.testing.assert_close(value, weights(many)[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"ema": 0.9}, {"optim": "adamw_8bit"}, {"lr_scheduler_type": "wsd"}])
def test_resume_equals_an_uninterrupted_run_bit_for_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    whole, first, second = Memory(), Memory(), Memory()
    run = config(tmp_path / "whole", max_steps=13, gradient_accumulation_steps=3, warmup_steps=2, **settings)
    uninterrupted = Trainer(run, parts(), whole)
    uninterrupted.run()

    def interrupt(trainer: Trainer, at: int) -> None:
        step = trainer._after_step

        def after() -> str | None:
            trainer.stop = "SIGINT" if trainer.progress.step == at else None
            return step()

        trainer._after_step = after  # type: ignore[method-assign]

    run = replace(run, output_dir=str(tmp_path / "cut"))
    trainer = Trainer(run, parts(), first)
    interrupt(trainer, 5)
    assert trainer.run().reason == "interrupted"
    torch.manual_seed(99)
    resumed = Trainer(run, parts(tiny_model()), second)
    last = latest_checkpoint(tmp_path / "cut")
    assert last is not None
    assert last.name == "checkpoint-5"
    torch.rand(7)
    resumed.load(last)
    assert resumed.run().step == 13
    assert first.losses + second.losses == whole.losses
    assert_equal(weights(resumed), weights(uninterrupted))
    for name, state in uninterrupted.optimizer.tensors().items():
        assert torch.equal(state, resumed.optimizer.tensors()[name]), name


def test_bfloat16_with_fp32_copies_resumes_bit_for_bit(tmp_path: Path) -> None:
    run = config(tmp_path, max_steps=6, save_steps=3, learning_rate=1e-3)
    whole = Trainer(run, parts(tiny_model(lora=False).bfloat16()), Memory())
    whole.run()
    resumed = Trainer(run, parts(tiny_model(lora=False).bfloat16()), Memory())
    resumed.load(tmp_path / "checkpoint-3")
    resumed.run()
    assert_equal(weights(whole), weights(resumed))


def start(folder: Path, steps: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.train.runs", str(folder), str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def test_killed_at_random_steps_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    steps = 40 if KILLS == 3 else 150
    with start(tmp_path / "whole", steps) as process:
        process.communicate()
    assert process.returncode == 0
    chance, kills = random.Random(0), 0
    while True:
        with start(tmp_path / "killed", steps) as process:
            if kills < KILLS:
                assert process.stdout is not None
                for _ in range(chance.randrange(1, 6)):
                    process.stdout.readline()
                time.sleep(chance.uniform(0, 0.03))  # a step or a checkpoint later
                process.kill()
            process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
    assert kills > KILLS // 2
    expected, found = (torch.load(tmp_path / run / "weights.pt", weights_only=True) for run in ("whole", "killed"))
    assert_equal(expected, found)
    losses = [[line["loss"] for line in read_log(tmp_path / run / LOG)] for run in ("whole", "killed")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == steps


def test_ctrl_c_saves_and_leaves(tmp_path: Path) -> None:
    memory = Memory()
    trainer = Trainer(config(tmp_path, max_steps=50), parts(), memory)
    step = trainer._step

    def stepping() -> None:
        step()
        if trainer.progress.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    trainer._step = stepping  # type: ignore[method-assign]
    before = signal.getsignal(signal.SIGINT)
    outcome = trainer.run()
    assert (outcome.reason, outcome.step) == ("interrupted", 4)
    assert list(checkpoints(tmp_path)) == [4]
    assert "SIGINT" in memory.said[0]
    assert signal.getsignal(signal.SIGINT) is before
    assert memory.finished


class Exploding(NextTokens):
    """Not finite whenever a batch holds a document of that origin."""

    def __init__(self, origin: str) -> None:
        super().__init__()
        object.__setattr__(self, "origin", origin)

    def __call__(self, model: Qwen, batch: TrainBatch) -> tuple[torch.Tensor, Mapping[str, float]]:
        loss, others = super().__call__(model, batch)
        return loss * (math.nan if self.origin in batch.origins else 1.0), others  # type: ignore[attr-defined]


def test_a_loss_that_is_not_finite_stops_and_names_the_batch(tmp_path: Path) -> None:
    guarded = parts(objective=Exploding("data.jsonl:0.5.1"))
    trainer = Trainer(config(tmp_path, gradient_accumulation_steps=2, save_steps=1), guarded, Memory())
    with pytest.raises(
        ValueError, match=r"step 3: the loss is nan; its batch holds data.jsonl:0.5.0, data.jsonl:0.5.1"
    ):
        trainer.run()
    assert list(checkpoints(tmp_path)) == [1, 2]
    assert all(p.isfinite().all() for p in guarded.parameters.values())


def test_or_the_step_is_skipped() -> None:
    memory = Memory()
    trainer = Trainer(config(nan_policy="skip"), parts(objective=Exploding("data.jsonl:0.2.0")), memory)
    held: list[dict[str, torch.Tensor]] = []
    step = trainer._step

    def stepping() -> None:
        step()
        held.append(weights(trainer))

    trainer._step = stepping  # type: ignore[method-assign]
    assert trainer.run().reason == "done"
    assert_equal(held[1], held[2])
    assert len(memory.said) == 1
    assert "data.jsonl:0.2.0" in memory.said[0]
    assert math.isnan(memory.losses[2])
    assert math.isfinite(memory.losses[3])


def test_memory_that_runs_out_halves_micro_batches_and_changes_nothing_else() -> None:
    class Small(NextTokens):
        """A device that holds one document."""

        def __call__(self, model: Qwen, batch: TrainBatch) -> tuple[torch.Tensor, Mapping[str, float]]:
            found = super().__call__(model, batch)
            if len(batch.lengths) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return found

    plenty, little = Memory(), Memory()
    documents = Documents(documents=4)
    expected = Trainer(config(), parts(tiny_model(dropout=0), train=documents), plenty)
    expected.run()
    trainer = Trainer(config(), parts(tiny_model(dropout=0), train=Documents(documents=4), objective=Small()), little)
    trainer.run()
    assert trainer.progress.halvings in (2, 3)
    assert len(little.said) == trainer.progress.halvings
    assert "halved" in little.said[0]
    assert little.losses == pytest.approx(plenty.losses, rel=1e-5)


def test_memory_that_runs_out_for_one_sample_is_said() -> None:
    class Full(NextTokens):
        def __call__(self, model: Qwen, batch: TrainBatch) -> tuple[torch.Tensor, Mapping[str, float]]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    trainer = Trainer(config(), parts(objective=Full()), Memory())
    with pytest.raises(ValueError, match="memory ran out, and micro-batches are as small as they can be"):
        trainer.run()
    stopping = Trainer(config(oom_policy="stop"), parts(objective=Full()), Memory())
    with pytest.raises(ValueError, match="oom_policy is stop"):
        stopping.run()


def test_other_errors_are_not_taken_for_memory() -> None:
    class Broken(NextTokens):
        def __call__(self, model: Qwen, batch: TrainBatch) -> tuple[torch.Tensor, Mapping[str, float]]:
            raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        Trainer(config(), parts(objective=Broken()), Memory()).run()


def evaluations(losses: list[float]) -> Any:
    """Evaluations that find these losses, one after the other."""
    left = iter(losses)
    return lambda: {"eval_loss": next(left)}


def test_early_stopping_and_the_best_is_kept(tmp_path: Path) -> None:
    memory = Memory()
    run = config(tmp_path, max_steps=50, eval_steps=2, save_steps=2, save_total_limit=1, early_stopping_patience=3)
    trainer = Trainer(run, parts(evaluation=Documents(2, seed=5)), memory)
    trainer.evaluate = evaluations([3.0, 2.0, 2.5, 2.4, 2.0, 1.0])  # type: ignore[method-assign]
    outcome = trainer.run()
    assert (outcome.reason, outcome.step, outcome.best_step, outcome.eval_loss) == ("early", 10, 4, 2.0)
    assert list(checkpoints(tmp_path)) == [4, 10]
    state = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())
    assert state["progress"]["best"] == 2.0


def test_weights_of_the_best_can_be_brought_back(tmp_path: Path) -> None:
    run = config(tmp_path, max_steps=6, eval_steps=2, save_steps=100)
    trainer = Trainer(run, parts(evaluation=Documents(2)), Memory())
    trainer.evaluate = evaluations([1.0, 2.0, 3.0])  # type: ignore[method-assign]
    held: dict[int, dict[str, torch.Tensor]] = {}
    step = trainer._step

    def stepping() -> None:
        step()
        held[trainer.progress.step] = weights(trainer)

    trainer._step = stepping  # type: ignore[method-assign]
    outcome = trainer.run()
    assert outcome.best_step == 2
    trainer.load_weights(tmp_path / "checkpoint-2")
    assert_equal(weights(trainer), held[2])


def test_evaluation_is_the_mean_over_all_targets_and_changes_nothing() -> None:
    model = tiny_model()
    evaluation = Documents(3, seed=5)
    trainer = Trainer(config(), parts(model, evaluation=evaluation), Memory())
    torch.manual_seed(1)
    found = trainer.evaluate()
    again = trainer.evaluate()
    assert model.training
    batches = [Documents(3, seed=5).batch(0, i) for i in range(3)]
    model.eval()
    with torch.no_grad():
        total = sum(float(NextTokens()(model, batch)[0]) for batch in batches)
    assert found["eval_loss"] == pytest.approx(total / sum(batch.num_targets for batch in batches), rel=1e-6)
    assert found["eval_perplexity"] == pytest.approx(math.exp(found["eval_loss"]))
    assert again.keys() == found.keys()
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(1))


def test_evaluations_leave_training_as_it_is(tmp_path: Path) -> None:
    plain = Trainer(config(), parts(), Memory())
    plain.run()
    memory = Memory()
    answers = [("who?", "me")]
    watched = parts(evaluation=Documents(2, seed=5), answers=lambda: answers)
    evaluated = Trainer(config(tmp_path, eval_steps=2), watched, memory)
    evaluated.run()
    assert_equal(weights(plain), weights(evaluated))
    assert [step for step, record in memory.records if "eval_loss" in record] == [2, 4, 6]
    assert memory.answers == [(2, answers), (4, answers), (6, answers)]


def test_epochs_say_how_many_steps_there_are() -> None:
    memory = Memory()
    trainer = Trainer(config(max_steps=None, num_train_epochs=1.5, gradient_accumulation_steps=5), parts(), memory)
    trainer.run()
    # 12 of the 8 micro-batches an epoch has: two steps of five, and the rest
    assert trainer.total_steps == len(memory.losses) == 3
    assert trainer.parts.train.state_dict() == {"epoch": 1, "cursor": 4}
    assert [record["epoch"] for _, record in memory.records] == [0.625, 1.25, 1.5]


def test_a_run_without_length_or_data_is_refused() -> None:
    with pytest.raises(ValueError, match="max_steps is missing"):
        Trainer(config(max_steps=None), parts(train=Documents(None)), Memory())
    with pytest.raises(ValueError, match="gives no batch"):
        Trainer(config(), parts(train=Documents(0)), Memory())


def test_batches_without_targets_do_no_harm() -> None:
    class Unlabelled(Documents):
        def batch(self, epoch: int, index: int) -> TrainBatch:
            whole = super().batch(epoch, index)
            return replace(whole, labels=torch.full_like(whole.labels, IGNORE)) if index == 1 else whole

    memory = Memory()
    Trainer(config(), parts(train=Unlabelled()), memory).run()
    assert memory.losses[1] == 0
    assert all(math.isfinite(loss) for loss in memory.losses)


def test_clipping_bounds_the_step() -> None:
    memory = Memory()
    Trainer(config(max_grad_norm=1e-3), parts(), memory).run()
    free = Memory()
    Trainer(config(max_grad_norm=0), parts(), free).run()
    assert memory.records[0][1]["grad_norm"] == free.records[0][1]["grad_norm"] > 1e-3


def test_float16_scales_its_loss() -> None:
    """Gradients that overflow on the way back lower the scale and skip the step; the loss itself is fine."""

    class Overflowing(NextTokens):
        def __call__(self, model: Qwen, batch: TrainBatch) -> tuple[torch.Tensor, Mapping[str, float]]:
            loss, others = super().__call__(model, batch)
            loss.register_hook(lambda grad: torch.where(grad.abs() > 40, math.inf, grad))
            return loss, others

    memory = Memory()
    trainer = Trainer(config(dtype="float16", max_steps=20), parts(objective=Overflowing()), memory)
    trainer.run()
    assert 1 < trainer.progress.loss_scale < 2**16
    assert not memory.said
    assert memory.losses[-1] < memory.losses[0]


def test_the_loss_scale_grows_again_from_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_GOOD_STEPS", 2)
    trainer = Trainer(config(dtype="float16", max_steps=6), parts(), Memory())
    trainer.progress.loss_scale = 1.0
    trainer.run()
    assert trainer.progress.loss_scale == 8
    trainer = Trainer(config(max_steps=6), parts(), Memory())
    trainer.run()
    assert trainer.progress.loss_scale == 1


@pytest.mark.parametrize("missing", ["loss_scale", "tokens", "halvings", "progress"])
def test_a_checkpoint_of_an_older_version(tmp_path: Path, missing: str) -> None:
    """What it did not save keeps the value of a new run; what a newer one saves besides is left out."""
    settings = {"max_steps": 4, "save_steps": 2, "dtype": "float16"}
    Trainer(config(tmp_path, **settings), parts(), Memory()).run()
    folder = tmp_path / "checkpoint-2"
    state, own = (json.loads((folder / name).read_text()) for name in (STATE, "rank-00000.json"))
    for key in ("files", "checksum", "sequences_per_step"):
        del state[key]
    if missing == "progress":
        del state["progress"]
    else:
        del state["progress"][missing]
        state["progress"]["of_a_newer_version"] = 1
    own.pop("tokens")
    (folder / STATE).write_text(json.dumps(state))
    (folder / "rank-00000.json").write_text(json.dumps(own))
    trainer = Trainer(config(tmp_path, **settings), parts(), Memory())
    trainer.load(folder)
    progress = trainer.progress
    assert (progress.step, progress.tokens, progress.halvings, progress.loss_scale) == (2, 0, 0, 2.0**16)
    assert trainer.run().step == 4


def test_lines_of_steps_that_are_done_again_go(tmp_path: Path) -> None:
    log = JsonLines(tmp_path)
    log.start(config(), 0, 10)
    for step in (1, 2, 3):
        log.log(step, {"loss": float(step)})
    log.path.write_text(log.path.read_text() + '{"current_steps": 4, "lo')
    log.start(config(), 2, 10)
    log.log(3, {"loss": 0.5})
    assert [(line["current_steps"], line["loss"]) for line in read_log(log.path)] == [(1, 1.0), (2, 2.0), (3, 0.5)]
