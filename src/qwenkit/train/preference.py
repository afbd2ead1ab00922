"""Losses of preferences, over batches whose pairs are packed as documents. In: a model and a TrainBatch. Out: the sum of the
pairs' losses, to be divided by the pairs of the whole step, and sums of what is worth seeing.

Papers: DPO 2305.18290 (label smoothing: its conservative form), IPO 2310.12036, hinge as in SLiC 2305.10425, SimPO 2405.14734,
KTO 2402.01306, ORPO 2403.07691, reward models 2203.02155 (section 3.5). The reference of dpo and kto is the model with its
adapters off, or a frozen copy of how it began.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from qwenkit.linear.lora import adapters_off
from qwenkit.model.qwen import Qwen
from qwenkit.train.batch import IGNORE, PairIndex, TrainBatch
from qwenkit.train.config import TrainConfig
from qwenkit.train.loss import hidden_states, token_losses
from qwenkit.train.methods import ADAPTERS, can_outline, outline_model, prepare_model, trainable_parameters
from qwenkit.train.parallel import World, fill_slices, reshard, wrap
from qwenkit.weights.checkpoint import Checkpoint

Metrics = dict[str, float]
STAGES = ("dpo", "kto", "orpo", "rm")


def needs_reference(config: TrainConfig) -> bool:
    return config.stage == "kto" or (config.stage == "dpo" and config.pref_loss != "simpo")


class Objective:
    """A preference stage as a loss. Call it with a model and a batch; `weight` says by how much that batch counts in a step."""

    def __init__(self, config: TrainConfig, reference: Qwen | None = None) -> None:
        """`reference` None: the model itself with its adapters off. ValueError where the stage cannot run as configured."""
        if config.stage not in STAGES:
            raise ValueError(f"stage is {config.stage!r}, allowed are {', '.join(STAGES)} for preferences")
        if needs_reference(config) and reference is None and config.method not in ADAPTERS:
            raise ValueError(
                f"{config.stage} with method {config.method} needs a frozen copy of the model to measure against"
            )
        if config.stage == "kto" and config.batch_size < 2:
            raise ValueError(
                f"per_device_train_batch_size is {config.batch_size}, allowed is 2 or more for kto: "
                "its baseline comes from answers to other prompts of the same micro-batch"
            )
        self.config = config
        self.reference = reference

    def weight(self, batch: TrainBatch) -> int:
        """Number of pairs: the step's loss is the sum over all its batches divided by the sum of their weights."""
        return len(_pairs(batch))

    def __call__(self, model: Qwen, batch: TrainBatch) -> tuple[torch.Tensor, Metrics]:
        """The sum of the pairs' losses, fp32 (), differentiable; and sums over pairs of rewards and the like.

        A batch without pairs, a rank's share where the data does not divide, runs the same forward passes as any other (processes
        that share a model wait for each other in each), and gives zeros under the same names.
        """
        config, pairs = self.config, _pairs(batch)
        if config.stage == "rm":
            return _reward_loss(model, batch, pairs)
        if config.stage == "kto":
            return self._kto(model, batch, pairs)
        sums, counts = log_probabilities(model, batch, chunk=config.loss_chunk)
        chosen, rejected = _sides(pairs, batch)
        per_token = sums / counts.clamp_min(1)
        if config.stage == "orpo":
            losses, rewards = orpo_losses(per_token[chosen], per_token[rejected], config.pref_beta)
            return losses.sum(), _metrics(*rewards)
        if config.pref_loss == "simpo":
            losses, rewards = simpo_losses(per_token[chosen], per_token[rejected], config.pref_beta, config.simpo_gamma)
        else:
            with torch.no_grad(), self._as_it_began(model) as reference:
                of_reference, _ = log_probabilities(reference, batch, chunk=config.loss_chunk)
            ratio = sums - of_reference
            if config.pref_loss == "ipo":
                ratio = ratio / counts.clamp_min(
                    1
                )  # so that the margin it aims at does not depend on how long answers are
            losses, rewards = dpo_losses(
                ratio[chosen], ratio[rejected], config.pref_beta, config.pref_loss, config.pref_label_smoothing
            )
        if config.pref_ftx:
            losses = losses - config.pref_ftx * per_token[chosen]
        return losses.sum(), _metrics(*rewards)

    def _kto(self, model: Qwen, batch: TrainBatch, pairs: list[PairIndex]) -> tuple[torch.Tensor, Metrics]:
        config, shifted = self.config, mismatched(batch, pairs)
        documents = [pair.chosen for pair in pairs]
        # Without another prompt's answer the batch itself is computed in its place: every rank runs the same forward passes.
        other = batch if shifted is None else shifted
        with torch.no_grad():
            with self._as_it_began(model) as reference:
                of_reference, _ = log_probabilities(reference, batch, chunk=config.loss_chunk)
                of_other, _ = log_probabilities(reference, other, chunk=config.loss_chunk)
            ours, _ = log_probabilities(model, other, chunk=config.loss_chunk)
        baseline = of_reference.new_zeros(()) if shifted is None else (ours - of_other).mean().clamp_min(0)
        sums, _ = log_probabilities(model, batch, chunk=config.loss_chunk)
        ratio = (sums - of_reference)[documents]
        liked = torch.tensor([pair.liked for pair in pairs], dtype=torch.bool, device=ratio.device)
        losses = kto_losses(
            ratio, liked, baseline, config.pref_beta, config.kto_chosen_weight, config.kto_rejected_weight
        )
        rewards = (config.pref_beta * ratio).detach()
        return losses.sum(), {
            "liked": float(liked.sum()),
            "reward_liked": float(rewards[liked].sum()),
            "reward_disliked": float(rewards[~liked].sum()),
            "baseline": float(baseline) * len(pairs),
        }

    @contextmanager
    def _as_it_began(self, model: Qwen) -> Iterator[Qwen]:
        """Without its adapters nothing in a model depends on whether it is training."""
        with adapters_off(model) if self.reference is None else nullcontext():
            yield model if self.reference is None else self.reference
        if self.reference is not None:
            reshard(self.reference)


def objective(config: TrainConfig, reference: Qwen | None = None) -> Objective:
    """The loss of a preference stage; `reference` comes from `make_reference`."""
    return Objective(config, reference)


def make_reference(
    config: TrainConfig,
    checkpoint: Checkpoint,
    world: World,
    model: Qwen,
    *,
    ref_checkpoint: Checkpoint | None = None,
) -> Qwen | None:
    """What the model is measured against: None where switching its adapters off gives that, else a frozen copy.

    A copy is needed where anything but new adapters is trained, or an adapter is trained on, and where `config.ref_model` names
    another model, which is `ref_checkpoint`. It lies in memory as the base does: in 4 bits for qlora, and shared by the processes
    that share the model, all of which must call this.
    """
    if not needs_reference(config):
        return None
    only_adapters = config.method in ADAPTERS and all(".lora_" in name for name in trainable_parameters(model))
    if only_adapters and config.adapter is None and ref_checkpoint is None:
        return None
    source = checkpoint if ref_checkpoint is None else ref_checkpoint
    if config.ref_model is not None and ref_checkpoint is None:
        raise ValueError(f"ref_model is {config.ref_model!r}, but its checkpoint was not opened")
    settings = config.settings() | {"adapter": None if ref_checkpoint is not None else config.adapter}
    chosen = TrainConfig.from_settings(settings)
    if not world.shares or not can_outline(source, chosen.method):
        return wrap(prepare_model(chosen, source, world.device).requires_grad_(False).eval(), chosen, world)
    reference, stored = outline_model(chosen, source, world.device)
    reference = wrap(reference.requires_grad_(False).eval(), chosen, world)
    fill_slices(reference, stored, world.device, new_adapter=chosen.adapter is None)
    return reference


def log_probabilities(model: Qwen, batch: TrainBatch, *, chunk: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each document: the sum over its targets of log p (D,) fp32, and how many targets it has (D,).

    ValueError naming the origin of a document of a pair without any: an empty answer has no probability.
    """
    losses, documents = token_losses(model, batch, chunk=chunk)
    count = len(batch.lengths)
    counts = torch.bincount(documents, minlength=count)
    if batch.pairs != [] and not bool((counts > 0).all()):
        empty = batch.origins[int((counts == 0).nonzero()[0])]
        raise ValueError(f"{empty or 'a pair'}: nothing of the answer is learned, so it has no probability to compare")
    sums = torch.zeros(count, dtype=losses.dtype, device=losses.device).index_add(0, documents, -losses)
    return sums, counts


Rewards = tuple[torch.Tensor, torch.Tensor]


def dpo_losses(
    chosen: torch.Tensor, rejected: torch.Tensor, beta: float, kind: str = "sigmoid", label_smoothing: float = 0.0
) -> tuple[torch.Tensor, Rewards]:
    """From log ratios of model to reference (P,): losses (P,) and implicit rewards.

    sigmoid: -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h) with h = chosen - rejected and s the smoothing;
    hinge: max(0, 1 - beta h); ipo: (h - 1 / (2 beta))^2.
    """
    margin = chosen - rejected
    if kind == "sigmoid":
        agree, differ = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
        losses = -(1 - label_smoothing) * agree - label_smoothing * differ
    elif kind == "hinge":
        losses = (1 - beta * margin).relu()
    else:
        losses = (margin - 1 / (2 * beta)).square()
    return losses, ((beta * chosen).detach(), (beta * rejected).detach())


def simpo_losses(
    chosen: torch.Tensor, rejected: torch.Tensor, beta: float, gamma: float
) -> tuple[torch.Tensor, Rewards]:
    """From mean log probabilities per token (P,): -log sigmoid(beta (chosen - rejected) - gamma)."""
    losses = -F.logsigmoid(beta * (chosen - rejected) - gamma)
    return losses, ((beta * chosen).detach(), (beta * rejected).detach())


def orpo_losses(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> tuple[torch.Tensor, Rewards]:
    """From mean log probabilities per token (P,): -chosen - beta log sigmoid(log odds(chosen) - log odds(rejected))."""
    odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -chosen - beta * F.logsigmoid(odds), ((beta * chosen).detach(), (beta * rejected).detach())


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - e^x) for x < 0, exact at both ends; a certain token (x = 0) is taken as nearly certain."""
    return torch.log(-torch.expm1(x.clamp_max(-torch.finfo(x.dtype).eps)))


def kto_losses(
    ratio: torch.Tensor,
    liked: torch.Tensor,
    baseline: torch.Tensor,
    beta: float,
    liked_weight: float,
    disliked_weight: float,
) -> torch.Tensor:
    """weight (1 - sigmoid(+- beta (ratio - baseline))), + for liked answers; log ratios (P,), `liked` (P,) bool."""
    signed = torch.where(liked, ratio - baseline, baseline - ratio)
    weights = torch.where(liked, liked_weight, disliked_weight).to(ratio.dtype)
    return weights * (1 - torch.sigmoid(beta * signed))


def mismatched(batch: TrainBatch, pairs: list[PairIndex]) -> TrainBatch | None:
    """KTO's baseline batch: each prompt with the next pair's answer; None for a single pair, whose baseline is 0.

    An answer begins at its document's first target.
    """
    if len(pairs) < 2:
        return None
    ids, labels = batch.ids.split(batch.lengths), batch.labels.split(batch.lengths)
    documents = [pair.chosen for pair in pairs]
    starts = [int((labels[d] != IGNORE).nonzero()[0]) if bool((labels[d] != IGNORE).any()) else 0 for d in documents]
    rows: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    for place, document in enumerate(documents):
        other = (place + 1) % len(documents)
        answer = slice(starts[other], None)
        prompt = ids[document][: starts[place]]
        rows.append(torch.cat((prompt, ids[documents[other]][answer])))
        targets.append(torch.cat((torch.full_like(prompt, IGNORE), labels[documents[other]][answer])))
        targets[-1][0] = IGNORE
    return TrainBatch(
        torch.cat(rows), torch.cat(targets), [len(row) for row in rows], [batch.origins[d] for d in documents]
    )


def scores(model: Qwen, batch: TrainBatch) -> torch.Tensor:
    """What a reward model says of each document (D,) fp32: its score at the last token."""
    ends = torch.tensor(batch.lengths, device=batch.ids.device).cumsum(0) - 1
    head: Any = model.score
    values: torch.Tensor = head(hidden_states(model, batch)[ends])
    return values[:, 0].float()


def _reward_loss(model: Qwen, batch: TrainBatch, pairs: list[PairIndex]) -> tuple[torch.Tensor, Metrics]:
    """Bradley and Terry: -log sigmoid(score(chosen) - score(rejected))."""
    values = scores(model, batch)
    chosen, rejected = _sides(pairs, batch)
    losses = -F.logsigmoid(values[chosen] - values[rejected])
    return losses.sum(), _metrics(values[chosen].detach(), values[rejected].detach())


def _pairs(batch: TrainBatch) -> list[PairIndex]:
    """The pairs of a batch, none for a rank without data. ValueError for data of another stage, which has no pairs at all."""
    if batch.pairs is None:
        raise ValueError(f"{batch.origins[0] or 'a batch'} has no preferences, but the stage needs them")
    return batch.pairs


def _sides(pairs: list[PairIndex], batch: TrainBatch) -> tuple[list[int], list[int]]:
    rejected = [pair.rejected for pair in pairs if pair.rejected is not None]
    if len(rejected) < len(pairs):
        alone = next(pair.chosen for pair in pairs if pair.rejected is None)
        raise ValueError(f"{batch.origins[alone] or 'a pair'} has no rejected answer, but the stage compares two")
    return [pair.chosen for pair in pairs], rejected


def _metrics(chosen: torch.Tensor, rejected: torch.Tensor) -> Metrics:
    return {
        "reward_chosen": float(chosen.sum()),
        "reward_rejected": float(rejected.sum()),
        "accuracy": float((chosen > rejected).sum()),
    }
