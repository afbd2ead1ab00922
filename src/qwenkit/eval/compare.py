"""What quantization changes: a reference and a variant read the same windows, and their distributions are compared row by row.

In: two open LLMs with one vocabulary, and windows. Out: both perplexities, the mean Kullback-Leibler divergence of the variant
from the reference, and how often both put the same token first. A few hundred rows of logits are held at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from qwenkit.engine.llm import LLM
from qwenkit.eval.perplexity import Perplexity, Window, logit_rows


@dataclass(frozen=True)
class Comparison:
    """`kl` in nats a token; `agreement` is the share of tokens where both find the same one likeliest."""

    reference: Perplexity
    variant: Perplexity
    kl: float
    agreement: float


def check_vocabularies(reference: LLM, variant: LLM, text: str) -> None:
    """ValueError where two models would not read a text as the same tokens out of the same vocabulary."""
    sizes = [llm.model.config.vocab_size for llm in (reference, variant)]
    ids = [llm.tokenizer.encode_document(text) for llm in (reference, variant)]
    if sizes[0] != sizes[1] or ids[0] != ids[1]:
        raise ValueError("report compares models with one vocabulary, but the two read the text as different tokens")


@torch.inference_mode()
def compare(
    reference: LLM, variant: LLM, windows: Iterator[Window], tell: Callable[[Comparison], None] | None = None
) -> Comparison:
    """Over all scored tokens of all windows; `tell` hears of what is known after each. The two may be one and the same LLM."""
    chunk = min(llm.config.max_batch_tokens for llm in (reference, variant))
    seconds, losses = [0.0, 0.0], [0.0, 0.0]
    divergence, agreed, tokens = 0.0, 0, 0
    result = None
    for count, window in enumerate(windows, start=1):
        ids = window.ids[:-1]
        following = torch.tensor(window.ids[1:])
        readers = [logit_rows(llm, ids, chunk) for llm in (reference, variant)]
        done = 0
        while done < len(ids):
            both = []
            for place, reader in enumerate(readers):
                started = time.perf_counter()
                both.append(next(reader).to("cpu", torch.float32))
                seconds[place] += time.perf_counter() - started
            counted = slice(max(len(ids) - window.scored - done, 0), None)  # rows before these are another window's
            first, second = (logits[counted].log_softmax(-1) for logits in both)
            targets = following[done : done + both[0].shape[0]][counted, None]
            losses[0] -= float(first.gather(-1, targets).double().sum())
            losses[1] -= float(second.gather(-1, targets).double().sum())
            agreed += int((first.argmax(-1) == second.argmax(-1)).sum())
            divergence += float((first.exp() * (first - second)).sum(-1).double().sum())
            done += both[0].shape[0]
        for reader in readers:
            reader.close()
        tokens += window.scored
        results = [Perplexity(losses[place] / tokens, tokens, count, seconds[place]) for place in (0, 1)]
        result = Comparison(results[0], results[1], divergence / tokens, agreed / tokens)
        if tell is not None:
            tell(result)
    assert result is not None, "there is at least one window"
    return result
