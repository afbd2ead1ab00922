"""Conversations become ids and labels: what the model will see when it serves, and which of it is learned.

In: an `Example`. Out: Samples or Pairs, and notes for the report. Scheme `chat` takes ids and mask from the model's own chat
format, one answer at a time as it would be served: a template that strips earlier thinking gives several samples. `qwen1` and
`mindformers` are the schemes of Qwen's finetune.py and of MindFormers' qwen1_5, label for label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qwenkit.text.chat import ChatFormat
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.train.batch import IGNORE, Pair, Sample
from qwenkit.train.config import TrainConfig
from qwenkit.train.data.fields import BadRecordError, Message
from qwenkit.train.data.formats import Example, check_order
from qwenkit.train.data.older_schemes import chatml_of, mindformers, qwen1
from qwenkit.train.data.served import Served, ServedAnswers

_DOCUMENT_ENDS = ("<|endoftext|>", "</s>", "<|im_end|>")
Item = Sample | Pair


@dataclass
class Rendering:
    """Items of one record, not yet fitted to a length; notes are (kind, what was done about it)."""

    items: list[Item]
    notes: list[tuple[str, str]] = field(default_factory=list)


class Renderer:
    """Raises ValueError where the model lacks what the stage needs: a chat format, control tokens, an end of documents."""

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, chat: ChatFormat | None) -> None:
        self._tokenizer, self._stage = tokenizer, config.stage
        self._answerer: ServedAnswers | None = None
        self._scheme = config.labels
        self._train_on_prompt, self._mask_history = config.train_on_prompt, config.mask_history
        self._split_special = config.split_special_tokens
        if self._scheme != "chat" and self._stage not in ("pt", "sft"):
            raise ValueError(f"labels is {self._scheme!r}, but stage {self._stage} allows chat only")
        specials = tokenizer.special_tokens
        self._end = next((specials[name] for name in _DOCUMENT_ENDS if name in specials), None)
        if self._stage == "pt":
            if self._end is None:
                raise ValueError("the tokenizer has no token that ends a document, which stage pt needs")
        elif self._scheme == "chat":
            if chat is None:
                raise ValueError(
                    f"the model has no chat template, which stage {self._stage} needs; give one as template"
                )
            self._answerer = ServedAnswers(tokenizer, chat, config.enable_thinking)
        else:
            missing = [name for name in ("<|im_start|>", "<|im_end|>") if name not in specials]
            if missing:
                raise ValueError(
                    f"labels {self._scheme} needs the control token {missing[0]}, which the tokenizer lacks"
                )
        self._chatml = chatml_of(tokenizer) if self._scheme == "mindformers" else None

    def render(self, example: Example, origin: str) -> Rendering:
        """Raises BadRecordError for a conversation that the format has no place for, or in which nothing is learned."""
        if example.ids is not None and example.labels is not None:
            return Rendering([self._ready(example.ids, example.labels, origin)])
        if example.text is not None:
            return self._text(example.text, origin)
        try:
            rendering = self._conversation(example, origin)
        except BadRecordError:
            raise
        except ValueError as error:
            raise BadRecordError("not renderable", str(error)) from None
        return rendering

    def _text(self, text: str, origin: str) -> Rendering:
        assert self._end is not None
        written = [token for token in self._tokenizer.special_tokens if token and token in text]
        notes = []
        if written and self._split_special:
            names = ", ".join(written)
            notes = [
                ("control token as text", f"{names}: plain characters; split_special_tokens=false means the token")
            ]
        ids = [*self._tokenizer.encode_document(text, allow_special=not self._split_special), self._end]
        return Rendering([Sample(ids, list(ids), origin)], notes)

    def _conversation(self, example: Example, origin: str) -> Rendering:
        if self._chatml is not None:
            sample, notes = mindformers(example, origin, self._tokenizer, self._chatml)
            return Rendering([sample], notes)
        if self._answerer is None:
            sample, notes = qwen1(example, origin, self._tokenizer)
            return Rendering([sample], notes)
        check_order(example.messages, answered=example.chosen is None)
        self._answerer.notes = {}
        items = self._items(example, origin)
        return Rendering(items, list(self._answerer.notes.items()))

    def _items(self, example: Example, origin: str) -> list[Item]:
        tools = example.tools
        if example.chosen is not None and example.rejected is not None:
            answers = (example.chosen, example.rejected)
            pair = [self._last([*example.messages, answer], tools, origin) for answer in answers]
            return [Pair(pair[0], pair[1])]
        if self._stage == "kto":
            if example.messages[-1]["role"] != "assistant":
                raise BadRecordError("bad order", "the conversation does not end with the assistant's answer")
            return [Pair(self._last(example.messages, tools, origin), None, bool(example.liked))]
        return list(self._answers(example.messages, tools, origin))

    def _served(self, messages: Sequence[Message], tools: Any) -> Served:
        assert self._answerer is not None
        return self._answerer.answer(messages, tools)

    def _last(self, messages: Sequence[Message], tools: Any, origin: str) -> Sample:
        served = self._served(messages, tools)
        labels = [IGNORE] * served.prompt + served.ids[served.prompt :]
        return Sample(served.ids, labels, origin)

    def _answers(self, messages: Sequence[Message], tools: Any, origin: str) -> list[Sample]:
        """As few samples as hold every answer behind exactly the prompt it is served with."""
        places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self._mask_history:
            places = places[-1:]
        places = [i for i in places if messages[i].get("weight", 1)]
        if not places:
            raise BadRecordError("no target", "every answer has weight 0")
        waiting = [self._served(messages[: i + 1], tools) for i in places]
        samples = []
        while waiting:
            whole = waiting[-1].ids
            inside = [served for served in waiting if whole[: len(served.ids)] == served.ids]
            labels = [IGNORE] * len(whole)
            for served in inside:
                labels[served.prompt : len(served.ids)] = served.ids[served.prompt :]
            samples.append(Sample(whole, list(whole) if self._train_on_prompt else labels, origin))
            waiting = [served for served in waiting if served not in inside]
        return samples[::-1]

    def _ready(self, ids: list[int], labels: list[int], origin: str) -> Sample:
        limit = self._tokenizer.num_ids
        wrong = next((id for id in ids if not 0 <= id < limit), None)
        if wrong is not None:
            raise BadRecordError(
                "wrong type", f"input_ids holds {wrong}, allowed are the tokenizer's ids 0 to {limit - 1}"
            )
        if self._stage not in ("pt", "sft"):
            raise BadRecordError("wrong type", f"ready token ids are given, which stage {self._stage} cannot use")
        if self._scheme == "mindformers":
            # There the loss also leaves out what a padding token would predict.
            pad = self._tokenizer.special_tokens.get("<|endoftext|>")
            labels = [IGNORE if before == pad else label for before, label in zip([None, *ids], labels, strict=False)]
        return Sample(ids, labels, origin)


def fit(item: Item, cutoff_len: int, policy: str) -> list[Item]:
    """What is left of an item that is longer than cutoff_len tokens: itself, its beginning, pieces, or nothing.

    policy: drop, truncate or split. Pieces overlap by one token, whose label only the earlier has, so that each target is
    learned exactly once. Pieces and beginnings without a target are left out; pairs are not split but cut.
    """
    if isinstance(item, Pair):
        both = [item.chosen] if item.rejected is None else [item.chosen, item.rejected]
        if max(len(sample.ids) for sample in both) <= cutoff_len:
            return [item]
        if policy == "drop":
            return []
        cut = [Sample(s.ids[:cutoff_len], s.labels[:cutoff_len], s.origin) for s in both]
        if not all(sample.num_targets for sample in cut):
            return []
        return [Pair(cut[0], cut[1] if len(cut) > 1 else None, item.liked)]
    if len(item.ids) <= cutoff_len:
        return [item]
    if policy == "drop":
        return []
    step = max(1, cutoff_len - 1)
    starts = range(0, max(1, len(item.ids) - 1), step) if policy == "split" else [0]
    pieces = []
    for start in starts:
        ids, labels = item.ids[start : start + cutoff_len], item.labels[start : start + cutoff_len]
        pieces.append(Sample(ids, [IGNORE, *labels[1:]] if start else labels, item.origin))
    return [piece for piece in pieces if piece.num_targets]


def num_targets(item: Item) -> int:
    """Learned tokens of an item, both answers of a pair together."""
    if isinstance(item, Sample):
        return item.num_targets
    return item.chosen.num_targets + (item.rejected.num_targets if item.rejected else 0)


def samples_of(item: Item) -> list[Sample]:
    """The documents of an item in the order in which a batch has them."""
    if isinstance(item, Sample):
        return [item]
    return [item.chosen] if item.rejected is None else [item.chosen, item.rejected]
