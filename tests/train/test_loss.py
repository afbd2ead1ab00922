"""The loss: equal to transformers', to plain cross-entropy, and the same however a step is cut into batches."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qwenkit.linear.lora import LoRALinear
from qwenkit.model.qwen import Qwen
from qwenkit.train import loss
from qwenkit.train.batch import IGNORE, Pair, Sample, TrainBatch
from qwenkit.train.loss import token_loss_sum, token_losses
from tests.tiny_models import VOCAB_SIZE, tiny_pair

LENGTHS = (7, 12, 1, 5)


def samples(lengths: tuple[int, ...] = LENGTHS, seed: int = 0, learned: float = 0.5) -> list[Sample]:
    """Documents with unequal masks; the first token is labelled too, which no loss may count."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i, length in enumerate(lengths):
        ids = torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()
        kept = (torch.rand(length, generator=generator) < learned).tolist()
        made.append(Sample(ids, [t if k else IGNORE for t, k in zip(ids, kept, strict=True)], f"f:{i}"))
    return made


def gradients(model: Qwen, batches: list[TrainBatch], **options: Any) -> dict[str, torch.Tensor]:
    """Of the mean over all targets, accumulated over batches."""
    model.zero_grad()
    total = sum(batch.num_targets for batch in batches)
    for batch in batches:
        (token_loss_sum(model, batch, **options)[0] / total).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_loss_and_gradients_equal_transformers(model_type: str) -> None:
    reference, model = tiny_pair(model_type)
    (sample,) = samples((20,))
    batch = TrainBatch.of([sample])
    total, count = token_loss_sum(model, batch, chunk=3)
    expected = reference(torch.tensor([sample.ids]), labels=torch.tensor([sample.labels])).loss
    torch.testing.assert_close(total / count, expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    (total / count).backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if name in theirs and parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("frozen", ["nothing", "head", "hidden"])
@pytest.mark.parametrize("summed", [True, False])
def test_chunked_gradient_equals_the_plain_one(chunk: int, frozen: str, summed: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(11, 6, dtype=torch.float64).requires_grad_(frozen != "hidden")
    weight = torch.randn(17, 6, dtype=torch.float64).requires_grad_(frozen != "head")
    targets = torch.randint(0, 17, (11,))
    weights = torch.ones(11) if summed else torch.randn(11)
    wanted = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
    ours = loss._ChunkedCrossEntropy.apply(hidden, weight, targets, chunk, summed, True)
    plain = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad((ours * weights).sum() * 3, wanted),
        torch.autograd.grad((plain * weights).sum() * 3, wanted),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_gradient_check() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 7, (5,))
    assert torch.autograd.gradcheck(
        lambda h, w: loss._ChunkedCrossEntropy.apply(h, w, targets, 2, False, True), (hidden, weight)
    )


def test_large_logits_stay_finite() -> None:
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]])
    losses = loss._ChunkedCrossEntropy.apply(hidden, weight, torch.tensor([0, 0]), 2, True, True)
    assert losses.tolist() == [0, 2e4]
    losses.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = tiny_pair("qwen2")
    shapes = []
    cross_entropy = loss.ops.cross_entropy_

    def recording(logits: torch.Tensor, targets: torch.Tensor, *, gradient: bool) -> torch.Tensor:
        shapes.append(tuple(logits.shape))
        return cross_entropy(logits, targets, gradient=gradient)

    monkeypatch.setattr(loss.ops, "cross_entropy_", recording)
    batch = TrainBatch.of(samples((40,)))
    token_loss_sum(model, batch, chunk=3)[0].backward()
    assert {shape[1] for shape in shapes} == {VOCAB_SIZE}
    rows = [shape[0] for shape in shapes]
    assert sum(rows) == batch.num_targets  # rows without a target never meet the vocabulary, and none meets it twice
    assert max(rows) == 3


def test_gradients_are_equal_for_one_batch_and_four() -> None:
    _, model = tiny_pair("qwen2")
    documents = samples((9, 14, 3, 11))
    together = gradients(model, [TrainBatch.of(documents)])
    apart = gradients(model, [TrainBatch.of([document]) for document in documents])
    assert_same(together, apart)
    counts = {batch.num_targets for batch in (TrainBatch.of([document]) for document in documents)}
    assert len(counts) > 1  # masks are unequal: a mean of means would differ


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 1000))
def test_packed_equals_unpacked(lengths: list[int], seed: int) -> None:
    model = TINY
    documents = samples(tuple(lengths), seed)
    packed, count = token_loss_sum(model, TrainBatch.of(documents))
    apart = [token_loss_sum(model, TrainBatch.of([document])) for document in documents]
    assert count == sum(n for _, n in apart) == sum(document.num_targets for document in documents)
    torch.testing.assert_close(packed, torch.stack([total for total, _ in apart]).sum(), rtol=1e-5, atol=1e-4)


TINY = tiny_pair("qwen2")[1]


def test_losses_of_each_target_know_their_document() -> None:
    documents = samples()
    losses, owners = token_losses(TINY, TrainBatch.of(documents))
    for i, document in enumerate(documents):
        alone, _ = token_loss_sum(TINY, TrainBatch.of([document]))
        torch.testing.assert_close(losses[owners == i].sum(), alone, rtol=1e-5, atol=1e-5)


def test_a_batch_without_targets_has_no_loss_and_zero_gradients() -> None:
    _, model = tiny_pair("qwen2")
    total, count = token_loss_sum(model, TrainBatch.of(samples((5, 3), learned=0)))
    total.backward()
    assert (total.item(), count) == (0, 0)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_frozen_head_gets_no_gradient_and_lora_head_does() -> None:
    _, model = tiny_pair("qwen2")
    batch = TrainBatch.of(samples())
    expected = gradients(model, [batch])
    model.lm_head.requires_grad_(False)
    frozen = gradients(model, [batch])
    assert "lm_head.weight" not in frozen
    assert_same(frozen, {name: grad for name, grad in expected.items() if name != "lm_head.weight"})
    head: nn.Module = LoRALinear(model.lm_head, 2, 4)
    nn.init.normal_(head.lora_B)
    model.lm_head = head  # type: ignore[assignment]
    one, _ = token_loss_sum(model, batch, chunk=2)
    two = F.cross_entropy(model.logits(loss.hidden_states(model, batch))[:-1], batch.labels[1:], reduction="sum")
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(*(torch.autograd.grad(x, [head.lora_A, head.lora_B]) for x in (one, two)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_nothing_is_kept_for_a_backward_that_will_not_come() -> None:
    with torch.no_grad():
        total, _ = token_loss_sum(TINY, TrainBatch.of(samples()))
    assert total.grad_fn is None


def test_batches_are_cut_between_documents() -> None:
    batch = TrainBatch.of(samples((10, 2, 3, 9)))
    first, second = batch.halves()
    assert (first.lengths, second.lengths) == ([10, 2], [3, 9])
    assert first.origins + second.origins == batch.origins
    assert torch.equal(torch.cat([first.ids, second.ids]), batch.ids)
    assert torch.equal(torch.cat([first.labels, second.labels]), batch.labels)
    (one,) = first.halves()[0].halves()
    assert one.lengths == [10]


def test_pairs_stay_together() -> None:
    a, b, c, d, e = samples((4, 6, 2, 8, 3))
    batch = TrainBatch.of_pairs([Pair(a, b), Pair(c, d), Pair(e, liked=False)])
    first, second = batch.halves()
    assert first.pairs is not None
    assert second.pairs is not None
    assert [(p.chosen, p.rejected) for p in first.pairs] == [(0, 1)]
    assert [(p.chosen, p.rejected, p.liked) for p in second.pairs] == [(0, 1, True), (2, None, False)]
    assert second.lengths == [2, 8, 3]


def test_a_sample_has_a_label_for_every_id() -> None:
    with pytest.raises(ValueError, match="f:1: 2 ids, but 1 labels"):
        Sample([1, 2], [1], "f:1")
    with pytest.raises(ValueError, match="no sample may be empty"):
        TrainBatch.of([Sample([], [])])
