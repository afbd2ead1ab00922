"""The loop: micro-batches become steps, steps become a trained model, whatever happens on the way.

In: a model, an objective, a stream of batches, an optimizer, a place among processes. Out: the model's parameters changed in
place, checkpoints, records for the callbacks, and an Outcome that says why it ended. A step's loss is the sum over all its
micro-batches and processes, divided by the number of what was summed, which is known before the first backward pass.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from qwenkit.train.batch import TrainBatch, halved
from qwenkit.train.checkpoint import (
    Saved,
    load_checkpoint,
    random_state,
    remove_old,
    save_checkpoint,
    set_random_state,
)
from qwenkit.train.config import TrainConfig
from qwenkit.train.failures import describe_not_finite, is_out_of_memory
from qwenkit.train.log import Callback
from qwenkit.train.optim import MovingAverage, Optimizer, clip
from qwenkit.train.parallel import gradient_norm, gradient_sync, reduce_gradients, reshard
from qwenkit.train.parts import Outcome, Parts, Progress
from qwenkit.train.resume import check_end, restore_progress, resumed_step, step_size
from qwenkit.train.schedule import learning_rate, steps_of

_MOST_SKIPPED = 20  # steps in a row
_MOST_HALVED = 10
_GOOD_STEPS = 2000  # in a row before the loss scale of float16 is doubled
_Backward = tuple[list[torch.Tensor], dict[str, float]]


class Trainer:
    """A run of training. Raises ValueError where data or settings make one impossible."""

    def __init__(self, config: TrainConfig, parts: Parts, callback: Callback) -> None:
        self.config, self.parts, self.callback, self.world = config, parts, callback, parts.world
        self.output_dir = Path(config.output_dir)
        self.optimizer = Optimizer(parts.parameters, config)
        self.average = MovingAverage(parts.parameters, config.ema) if config.ema is not None else None
        self.progress = Progress()
        self.scales_loss = next(iter(parts.parameters.values())).dtype == torch.float16 or config.dtype == "float16"
        if self.scales_loss:
            self.progress.loss_scale = 2.0**16
        per_epoch = parts.train.batches_per_epoch
        if per_epoch == 0:
            raise ValueError("the training data gives no batch: every sample was dropped, or there is none")
        self.batches: int | None = None  # micro-batches of the whole run, where steps do not say it
        if config.max_steps is None:
            if per_epoch is None:
                raise ValueError("max_steps is missing: the length of the data is not known")
            self.batches = max(1, math.ceil(per_epoch * config.num_train_epochs))
        self.total_steps = config.max_steps or math.ceil((self.batches or 1) / config.gradient_accumulation_steps)
        self.sequences_per_step = step_size(config, self.world.world_size)
        self.stop: str | None = None
        self._stream = self._endless()
        self._metrics: dict[str, float] = {}
        self._counted = 0.0
        self._last_loss = math.nan
        self._last_eval: float | None = None
        self._ended_epoch = False  # by the last step

    def run(self) -> Outcome:
        """Train to the end, or until it is stopped. The model is left in training mode."""
        first, config = self.progress.step, self.config
        reason = "done"
        if self.world.is_first:
            self.callback.start(config, first, self.total_steps)
        try:
            with self._signals():
                while self.progress.step < self.total_steps:
                    self._step()
                    if ended := self._after_step():
                        reason = ended
                        break
        finally:
            if self.world.is_first:
                self.callback.finish()
        return Outcome(reason, self.progress.step, self._last_loss, self._last_eval, self.progress.best_step)

    # One step

    def _endless(self) -> Iterator[TrainBatch]:
        empty = 0  # epochs in a row; what is left of one after a resume may be nothing
        while True:
            empty += 1
            for batch in self.parts.train:
                empty = 0
                yield batch
            if empty > 1:
                raise ValueError("the training data gives no batch: every sample was dropped, or there is none")

    def _step(self) -> None:
        begun = time.perf_counter()
        progress, wanted = self.progress, self.config.gradient_accumulation_steps
        if self.batches is not None:
            wanted = min(wanted, self.batches - progress.step * wanted)
        epoch = self.parts.train.epoch
        batches = [next(self._stream) for _ in range(wanted)]
        self._ended_epoch = self.parts.train.epoch > epoch
        count = self.world.sum(float(sum(self.parts.objective.weight(batch) for batch in batches)))
        rate = learning_rate(progress.step, self.total_steps, self.config)
        losses, sums = self._backward_with_less_memory(batches, max(count, 1.0))
        stepped = list(self.optimizer.stepped.values())
        reduce_gradients(nn.ParameterList(stepped), self.world)
        total = float(self.world.sum_tensor(torch.stack(losses).double().sum())) / max(count, 1.0)
        gradients = self.optimizer.gradients()
        if progress.loss_scale != 1:
            self.optimizer.scale_gradients(1 / progress.loss_scale)
        if self.world.world_size > 1:
            norm = gradient_norm(stepped, self.world)
        else:
            norm = float(torch.nn.utils.get_total_norm(gradients))
        if math.isfinite(total) and math.isfinite(norm):
            clip(gradients, norm, self.config.max_grad_norm)
            self.optimizer.step(rate)
            if self.average is not None:
                self.average.update()
            progress.skipped = 0
            self._grow_loss_scale()
        else:
            self._not_finite(batches, losses, total, norm)
        progress.step += 1
        progress.tokens += sum(batch.num_tokens for batch in batches)
        self._last_loss = total
        self._counted += count
        others = {name: self.world.sum(value) for name, value in sums.items()}
        for name, value in (others | {"loss": total * count, "grad_norm": norm * count}).items():
            self._metrics[name] = self._metrics.get(name, 0.0) + value
        if self.parts.meter is not None:
            self.parts.meter.add(batches, time.perf_counter() - begun)
        if self.world.is_first:
            now = {"loss": total, "learning_rate": rate}
            self.callback.step(progress.step, now | (self.parts.meter.read(reset=False) if self.parts.meter else {}))

    def _backward_with_less_memory(self, batches: list[TrainBatch], count: float) -> _Backward:
        """`_backward`; where memory runs out, again with micro-batches of half the size and twice as many."""
        random = random_state(self.world.device)
        while True:
            pieces = halved(batches, self.progress.halvings)
            try:
                found, short = self._backward(pieces, count), False
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._check_halving(batches, error)
                found, short = ([], {}), True
            # In a ddp run no process waits for another inside a backward pass, so all come here.
            if not self.world.any(short):
                return found
            self.progress.halvings += 1
            self.optimizer.zero_grad()
            if self.world.device.type == "cuda":
                torch.cuda.empty_cache()
            set_random_state(random, self.world.device)
            pieces = halved(batches, self.progress.halvings)
            self._say(
                f"step {self.progress.step + 1}: memory ran out; micro-batches are halved, accumulation is doubled "
                f"({len(pieces)} micro-batches of at most {max(piece.num_tokens for piece in pieces)} tokens), "
                "the step is done again and its gradient is the same"
            )

    def _check_halving(self, batches: list[TrainBatch], error: BaseException) -> None:
        """ValueError where smaller micro-batches are not wanted, or cannot help."""
        longest = max(max(batch.lengths) for batch in batches)
        before, after = (len(halved(batches, self.progress.halvings + more)) for more in (0, 1))
        if self.config.oom_policy == "stop":
            why = "oom_policy is stop"
        elif self.world.shard > 1 or self.world.tensor > 1:
            why = "processes that share a model cannot do a step again on their own"
        elif self.progress.halvings >= _MOST_HALVED or (after == before and self.world.world_size == 1):
            why = f"micro-batches are as small as they can be (the longest sample has {longest} tokens)"
        else:
            return
        raise ValueError(
            f"step {self.progress.step + 1}: memory ran out, and {why}; a smaller per_device_train_batch_size or cutoff_len, "
            "gradient_checkpointing=true, method=qlora or more devices need less"
        ) from error

    def _backward(self, pieces: list[TrainBatch], count: float) -> _Backward:
        """Gradients of the loss of all pieces; returns the pieces' sums of losses and of other numbers, of this process."""
        losses, sums = [], dict[str, float]()
        for i, piece in enumerate(pieces):
            gradient_sync(self.parts.model, self.world, last=i == len(pieces) - 1)
            loss, others = self.parts.objective(self.parts.model, piece.to(self.world.device))
            (loss * (self.progress.loss_scale / count)).backward()
            self.optimizer.collect()
            losses.append(loss.detach())
            for name, value in others.items():
                sums[name] = sums.get(name, 0.0) + value
        return losses, sums

    def _not_finite(
        self, batches: Sequence[TrainBatch], losses: Sequence[torch.Tensor], total: float, norm: float
    ) -> None:
        """A loss or gradient that is not finite: try a smaller loss scale, skip, or stop, and say which batch it was."""
        self.optimizer.zero_grad()
        progress = self.progress
        # Where only the gradient is not finite, float16 overflowed on the way back; that is what scales are for.
        if progress.loss_scale > 1 and math.isfinite(total):
            progress.loss_scale, progress.good_steps = progress.loss_scale / 2, 0
            return
        pieces = halved(batches, progress.halvings)
        text = describe_not_finite(progress.step + 1, pieces, losses, total, norm)
        if self.config.dtype == "float16":
            text += "; float16 overflows in Qwen2-like models, bfloat16 and float32 do not"
        progress.skipped += 1
        if self.config.nan_policy == "stop" or progress.skipped > _MOST_SKIPPED:
            raise ValueError(f"{text}; the last checkpoint is untouched (nan_policy=skip goes on without such steps)")
        self._say(f"{text}; the step is skipped")

    def _grow_loss_scale(self) -> None:
        """Double it after many good steps in a row, also from 1, to which it may have fallen."""
        if self.scales_loss:
            self.progress.good_steps += 1
            if self.progress.good_steps >= _GOOD_STEPS:
                self.progress.loss_scale, self.progress.good_steps = min(self.progress.loss_scale * 2, 2.0**24), 0

    # Between steps

    def _after_step(self) -> str | None:
        """Log, evaluate, save. Returns why the run ends here, if it does."""
        config, step = self.config, self.progress.step
        last = step == self.total_steps
        interrupted = self.world.any(self.stop is not None)
        if self._is_due("steps", config.logging_steps) or last or interrupted:
            self._log()
        better = False
        evaluates = last or self._is_due(config.eval_strategy, config.eval_steps or config.save_steps)
        if self.parts.evaluation is not None and evaluates and not interrupted:
            better = self._evaluate()
        patience = config.early_stopping_patience
        early = patience is not None and self.progress.waited >= patience
        strategy = "no" if config.save_strategy == "steps" and config.save_steps is None else config.save_strategy
        saves = strategy in ("steps", "epoch") and (self._is_due(strategy, config.save_steps) or last or early)
        if saves or interrupted or (better and (strategy != "no" or config.load_best_model_at_end)):
            self.save()
        if interrupted:
            return "interrupted"
        return "early" if early and not last else None

    def _is_due(self, strategy: str, steps: float | None) -> bool:
        """True where a step is the last of an epoch, or one that `steps` (a share of all, below 1) names."""
        if strategy == "epoch":
            return self._ended_epoch
        return strategy == "steps" and steps is not None and self.progress.step % steps_of(steps, self.total_steps) == 0

    def _log(self) -> None:
        config, step = self.config, self.progress.step
        record = {name: value / max(self._counted, 1.0) for name, value in self._metrics.items()}
        record["learning_rate"] = learning_rate(step - 1, self.total_steps, config)
        per_epoch = self.parts.train.batches_per_epoch
        if per_epoch:
            done = step * config.gradient_accumulation_steps
            record["epoch"] = round(min(done, self.batches or done) / per_epoch, 4)
        if self.parts.meter is not None:
            record |= self.parts.meter.read(reset=True)
        record["total_tokens"] = self.world.sum(self.progress.tokens)
        self._metrics, self._counted = {}, 0.0
        if self.world.is_first:
            self.callback.log(step, record)

    def _evaluate(self) -> bool:
        """Measure and log eval_loss; whether it is the best so far."""
        progress = self.progress
        found = self.evaluate()
        self._last_eval = loss = found["eval_loss"]
        progress.evaluated = progress.step
        better = math.isfinite(loss) and (progress.best is None or loss < progress.best)
        if better:
            progress.best, progress.best_step, progress.waited = loss, progress.step, 0
        else:
            progress.waited += 1
        answers = self.parts.answers() if self.parts.answers is not None else []
        if self.world.is_first:
            self.callback.log(progress.step, found)
            if answers:
                self.callback.samples(progress.step, answers)
        return better

    def evaluate(self) -> dict[str, float]:
        """eval_loss over the evaluation set, and eval_perplexity or the objective's other numbers. Changes nothing."""
        stream, model = self.parts.evaluation, self.parts.model
        assert stream is not None
        sums = {"loss": 0.0}
        count = 0.0
        with torch.no_grad(), _evaluating(model), self.averaged():
            for batch in stream:
                for piece in halved([batch], self.progress.halvings):
                    loss, others = self.parts.objective(model, piece.to(self.world.device))
                    for name, value in {**others, "loss": loss.item()}.items():
                        sums[name] = sums.get(name, 0.0) + value
                    count += self.parts.objective.weight(piece)
        reshard(model)
        count = max(self.world.sum(count), 1.0)
        found = {f"eval_{name}": self.world.sum(value) / count for name, value in sums.items()}
        if len(found) == 1 and found["eval_loss"] < 80:
            found["eval_perplexity"] = math.exp(found["eval_loss"])
        return found

    def averaged(self) -> AbstractContextManager[None]:
        """Inside it the model holds the moving average, where there is one."""
        return self.average.in_place() if self.average is not None else nullcontext()

    # Saving and going on

    def save(self) -> Path:
        """A checkpoint of this step; older ones go as save_total_limit says."""
        saved = Saved(
            {
                "progress": asdict(self.progress),
                "total_steps": self.total_steps,
                "sequences_per_step": self.sequences_per_step,
                "config": self.config.settings(),
            },
            {"data": self.parts.train.state_dict(), "tokens": self.progress.tokens},
        )
        path = save_checkpoint(
            self.output_dir, self.progress.step, self._tensors(), saved, self.world, beside=self.parts.beside
        )
        if self.world.is_first:
            remove_old(self.output_dir, self.config.save_total_limit, self.progress.best_step, self.progress.step)
        return path

    def load(self, folder: Path) -> None:
        """Resume from a checkpoint, as if nothing had happened. ValueError for a damaged one, or one of other settings."""
        saved = load_checkpoint(folder, self._tensors(), self.world)
        self.progress = restore_progress(saved, self.progress)
        step, changed = resumed_step(saved.state, self.config, self.world.world_size)
        if changed is not None:
            self._say(changed)
        self.progress.step = check_end(folder, saved, step, self.total_steps)
        self.parts.train.load_state_dict(saved.own["data"])
        self._stream = self._endless()

    def load_weights(self, folder: Path) -> None:
        """Only what was trained, from a checkpoint; the run goes on as it is."""
        tensors = self._tensors()
        kept = asdict(self.progress)
        load_checkpoint(folder, tensors, self.world)
        self.progress = Progress(**kept)

    def _tensors(self) -> dict[str, Mapping[str, torch.Tensor]]:
        found: dict[str, Mapping[str, torch.Tensor]] = {
            "weights": self.parts.parameters,
            "optimizer": self.optimizer.tensors(),
        }
        if self.average is not None:
            found["average"] = self.average.tensors()
        return found

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first Ctrl-C (or SIGTERM) ends the run after this step, with a checkpoint; the second at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: object) -> None:
            if self.stop is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop = signal.Signals(number).name
            self._say(f"{self.stop}: the run saves after this step and ends; once more ends it at once")

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _say(self, text: str) -> None:
        if self.world.is_first:
            self.callback.say(text)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    model.eval()
    try:
        yield
    finally:
        model.train()
