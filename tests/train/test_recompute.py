"""Blocks that are computed again give the same gradients, and keep less."""

import copy

import torch

from qwenkit.train.batch import Sample, TrainBatch
from qwenkit.train.loss import token_loss_sum
from qwenkit.train.recompute import recompute_blocks
from tests.train import ranks


def test_gradients_and_names_stay() -> None:
    plain = ranks.new_model("qwen3").train()
    again = copy.deepcopy(plain)
    recompute_blocks(again)
    copied = copy.deepcopy(again)
    ids = list(range(20))
    batch = TrainBatch.of([Sample(ids, ids), Sample(ids[:5], ids[:5])])
    kept: list[int] = []
    for model in (plain, again):
        saved = [0]

        def count(tensor: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved[0] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss, _ = token_loss_sum(model, batch)
        loss.backward()
        kept.append(saved[0])
    for (name, a), (other, b) in zip(plain.named_parameters(), again.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a.grad, b.grad)
    assert kept[1] < kept[0] / 3
    with torch.no_grad():  # a copy's blocks are its own
        next(copied.model.layers[0].parameters()).zero_()
        assert not torch.equal(token_loss_sum(copied, batch)[0], token_loss_sum(again, batch)[0])
