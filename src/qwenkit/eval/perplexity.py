"""Perplexity: how well a model foresees a text, token by token.

In: a data file and an open LLM. Out: windows of token ids, and their mean negative log-likelihood. The protocol of GPTQ and of
published wikitext-2 figures is one text, tokenized once, cut into disjoint windows of 2,048 tokens, each read on its own; sliding
windows give every token a longer context. Windows are read through the engine's paged cache, so that a quantized one counts.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from qwenkit.engine.batch import Paged
from qwenkit.engine.llm import LLM
from qwenkit.model.rope import ntk_alpha
from qwenkit.text.chat import ChatFormat
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.train.data.documents import Document, is_text, read_documents, whole_text

LOGIT_ROWS = 256  # rows that meet the vocabulary at once: a window's logits are never whole


@dataclass(frozen=True)
class Window:
    """Token ids that a model reads from position 0; only the last `scored` of them count. The first token has no prediction."""

    ids: list[int]
    scored: int


@dataclass(frozen=True)
class Perplexity:
    """`nll` is the mean negative log-likelihood of `tokens` tokens in nats; `seconds` is the time that reading took."""

    nll: float
    tokens: int
    windows: int
    seconds: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll) if self.nll < 700 else math.inf


def read_data(path: Path) -> list[Document]:
    """The documents of a data file, of any kind and shape that training reads.

    Plain text is one document, as it is. Texts of rows (`text`) are one too, joined by two line feeds. The lines of WikiText's
    own files (.raw, .tokens) are such rows, as datasets' wikitext-2-raw-v1 has them: with their line feed, blank ones empty.
    Conversations are documents of their own. Raises ValueError naming the file, and the line of a record that cannot be read.
    """
    if is_text(path):
        text = whole_text(path)
        if path.suffix.lower() in (".raw", ".tokens"):
            lines = io.StringIO(text, newline="\n")
            text = "\n\n".join(line if line.strip() else "" for line in lines)
        documents = [Document(str(path), text=text)]
    else:
        rows = list(read_documents(path))
        if all(row.text is not None for row in rows):
            rows = [Document(str(path), text="\n\n".join(row.text or "" for row in rows))] if rows else []
        documents = rows
    if not any(document.text is None or document.text.strip() for document in documents):
        raise ValueError(f"{path} holds no text")
    return documents


def encode(documents: Sequence[Document], tokenizer: Tokenizer, chat: ChatFormat | None) -> list[int]:
    """Ids of all documents, end to end."""
    return [id for document in documents for id in document.encode(tokenizer, chat)]


def windows_of(
    ids: Sequence[int], context: int, stride: int | None = None, limit: int | None = None
) -> Iterator[Window]:
    """Cut one long text into windows of at most `context` tokens.

    Without a stride: disjoint windows, each counting all tokens but its first; what does not fill a window at the end is left
    out, unless it is all there is. With one: a window begins every `stride` tokens, and counts what no earlier one has.
    Raises ValueError where context, stride or limit are out of range, or the text is shorter than two tokens.
    """
    if context < 2:
        raise ValueError(f"context is {context}, allowed is a whole number of at least 2")
    if stride is not None and not 1 <= stride < context:
        raise ValueError(
            f"stride is {stride}, allowed is a whole number from 1 to {context - 1}, less than the context"
        )
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, allowed is a whole number of at least 1")
    if len(ids) < 2:
        raise ValueError(f"the text is {len(ids)} tokens long, at least 2 are needed")
    return _windows(list(ids), context, stride, limit)


def _windows(ids: list[int], context: int, stride: int | None, limit: int | None) -> Iterator[Window]:
    seen = 1  # tokens that earlier windows have counted; the text's first has no prediction
    for count, start in enumerate(range(0, len(ids), stride or context), start=1):
        window = ids[start : start + context]
        if stride is None and len(window) < context and count > 1:
            return
        stop = start + len(window)
        yield Window(window, len(window) - 1 if stride is None else stop - seen)
        seen = stop
        if count == limit or stop == len(ids):
            return


def count_windows(length: int, context: int, stride: int | None, limit: int | None) -> int:
    """How many windows `windows_of` gives for a text of `length` tokens."""
    count = max(length // context, 1) if stride is None else 1 + max(0, -(-(length - context) // stride))
    return count if limit is None else min(count, limit)


@torch.inference_mode()
def logit_rows(llm: LLM, ids: Sequence[int], chunk: int | None = None) -> Generator[torch.Tensor, None, None]:
    """fp32 logits (N, vocab_size) of successive tokens of one text, a few hundred rows at a time, read through the paged cache in
    chunks of `chunk` tokens (by default the engine's).

    The engine may be at work in between: the blocks are taken from its pool, and given back at the end. Raises ValueError where
    they do not suffice, or the text is longer than the context.
    """
    runner, pool = llm.engine.runner, llm.engine.pool
    needed = -(-len(ids) // runner.block_size)
    if len(ids) > llm.max_model_len or needed > pool.num_free:
        raise ValueError(f"a window is {len(ids)} tokens long, but there is room for {llm.max_model_len} tokens")
    table = pool.allocate(needed)
    try:
        chunk = chunk or llm.config.max_batch_tokens
        for start in range(0, len(ids), chunk):
            stop = min(start + chunk, len(ids))
            hidden = runner.model(*_part(llm, ids, start, stop, table))
            for rows in hidden.split(LOGIT_ROWS):
                yield runner.logits(rows)
    finally:
        pool.release(table)


def _part(
    llm: LLM, ids: Sequence[int], start: int, stop: int, table: list[int]
) -> tuple[torch.Tensor, torch.Tensor, Paged]:
    """Tokens start .. stop of a text, whose earlier ones are in the cache, as the model takes them."""
    runner = llm.engine.runner
    device, size = runner.device, runner.block_size
    trained = runner.model.config.rope.dynamic_ntk_length
    stretch = None if trained is None else float(ntk_alpha(len(ids), trained))
    positions = torch.arange(start, stop, device=device)
    blocks = torch.tensor(table, dtype=torch.int32, device=device)
    key_bias = next((cache.key_bias for cache in runner.caches if cache.key_bias is not None), None)
    ctx = Paged(
        runner.caches,
        slots=blocks.long()[positions // size] * size + positions % size,
        query_starts=torch.tensor([0, stop - start], device=device),
        context_lengths=torch.tensor([stop], device=device),
        block_tables=blocks[None],
        rope_alpha=None if stretch is None else torch.full((stop - start,), stretch, device=device),
        places=None if key_bias is None else positions + key_bias.place(0, stretch or 1.0),
    )
    return torch.tensor(ids[start:stop], device=device), positions, ctx


@torch.inference_mode()
def score(llm: LLM, window: Window) -> torch.Tensor:
    """Natural log-likelihoods (scored,) fp64 of the tokens of a window that count."""
    following = torch.tensor(window.ids[1:], device=llm.engine.runner.device)
    done, parts = 0, []
    for logits in logit_rows(llm, window.ids[:-1]):
        targets = following[done : done + logits.shape[0]]
        parts.append(-F.cross_entropy(logits, targets, reduction="none").double())
        done += logits.shape[0]
    return torch.cat(parts)[-window.scored :]


def perplexity(llm: LLM, windows: Iterator[Window], tell: Callable[[Perplexity], None] | None = None) -> Perplexity:
    """Of all scored tokens of all windows together; `tell` hears of what is known after each window."""
    total, tokens, seconds = 0.0, 0, 0.0
    result = None
    for count, window in enumerate(windows, start=1):
        started = time.perf_counter()
        values = score(llm, window)
        total -= float(values.sum())
        seconds += time.perf_counter() - started
        tokens += window.scored
        result = Perplexity(total / tokens, tokens, count, seconds)
        if tell is not None:
            tell(result)
    assert result is not None, "there is at least one window"
    return result
