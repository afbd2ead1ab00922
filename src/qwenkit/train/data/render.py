"""Conversations become ids and labels: what the model will see when it serves, and which of it is learned.

In: an `Example`. Out: Samples or Pairs, and notes for the report. Scheme `chat` takes ids and mask from the model's own chat
format, one answer at a time as it would be served: a template that strips earlier thinking gives several samples. `qwen1` and
`mindformers` are the schemes of Qwen's finetune.py and of MindFormers' qwen1_5, label for label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qwenkit.text.chat import ChatFormat, JinjaChat
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.train.batch import IGNORE, Pair, Sample
from qwenkit.train.config import TrainConfig
from qwenkit.train.data.fields import BadRecordError, Message
from qwenkit.train.data.formats import Example, check_order
from qwenkit.train.data.preprocess import CHATML

QWEN1_SYSTEM = "You are a helpful assistant."
_DOCUMENT_ENDS = ("<|endoftext|>", "</s>", "<|im_end|>")
_THINK = "<think>\n"
_THOUGHT = "</think>"
Item = Sample | Pair


@dataclass
class Rendering:
    """Items of one record, not yet fitted to a length; notes are (kind, what was done about it)."""

    items: list[Item]
    notes: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class _Served:
    """Ids from the beginning up to the end of one answer, and how many of them are its prompt."""

    ids: list[int]
    prompt: int


class Renderer:
    """Raises ValueError where the model lacks what the stage needs: a chat format, control tokens, an end of documents."""

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, chat: ChatFormat | None) -> None:
        self._tokenizer, self._chat, self._stage = tokenizer, chat, config.stage
        self._scheme = config.labels
        self._train_on_prompt, self._mask_history = config.train_on_prompt, config.mask_history
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
        else:
            missing = [name for name in ("<|im_start|>", "<|im_end|>") if name not in specials]
            if missing:
                raise ValueError(
                    f"labels {self._scheme} needs the control token {missing[0]}, which the tokenizer lacks"
                )
        self._chatml = JinjaChat(tokenizer, CHATML) if self._scheme == "mindformers" else None

    def render(self, example: Example, origin: str) -> Rendering:
        """Raises BadRecordError for a conversation that the format has no place for, or in which nothing is learned."""
        if example.ids is not None and example.labels is not None:
            return Rendering([self._ready(example.ids, example.labels, origin)])
        if example.text is not None:
            assert self._end is not None
            ids = [*self._tokenizer.encode_document(example.text), self._end]
            return Rendering([Sample(ids, list(ids), origin)])
        try:
            rendering = self._conversation(example, origin)
        except BadRecordError:
            raise
        except ValueError as error:
            raise BadRecordError("not renderable", str(error)) from None
        return rendering

    def _conversation(self, example: Example, origin: str) -> Rendering:
        if self._scheme == "qwen1":
            return self._qwen1(example, origin)
        if self._scheme == "mindformers":
            return Rendering([self._mindformers(example, origin)])
        answered = example.chosen is None
        check_order(example.messages, answered=answered)
        tools = example.tools
        if example.chosen is not None and example.rejected is not None:
            answers = (example.chosen, example.rejected)
            pair = [self._last([*example.messages, answer], tools, origin) for answer in answers]
            return Rendering([Pair(pair[0], pair[1])])
        if self._stage == "kto":
            if example.messages[-1]["role"] != "assistant":
                raise BadRecordError("bad order", "the conversation does not end with the assistant's answer")
            return Rendering([Pair(self._last(example.messages, tools, origin), None, bool(example.liked))])
        return Rendering(list(self._answers(example.messages, tools, origin)))

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

    def _served(self, messages: Sequence[Message], tools: Any) -> _Served:
        """The last message as an answer to the prompt that a server would give for the others."""
        assert self._chat is not None
        plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        reasoning = _reasoning(plain[-1])
        # Qwen3 puts an empty thinking block before an answer without thinking; as the server does, it goes into the prompt.
        variables = {"tools": tools, "enable_thinking": reasoning is not None}
        prompt = self._chat.render(plain[:-1], **variables).ids
        whole = self._chat.render(plain, add_generation_prompt=False, **variables)
        ids, mask = whole.ids, whole.mask
        follows = ids[: len(prompt)] == prompt
        if mask is None:
            if not follows:
                raise ValueError("the chat template writes another prompt for an answer than before it")
            ends = (i + 1 for i in range(len(prompt), len(ids)) if self._tokenizer.is_special(ids[i]))
            return _Served(ids[: next(ends, len(ids))], len(prompt))
        end = len(mask) - next((i for i, said in enumerate(reversed(mask)) if said), len(mask))
        if follows and end > len(prompt):
            return _Served(ids[:end], len(prompt))
        start = end
        while start and mask[start - 1]:
            start -= 1
        if start == end:
            raise ValueError("the chat template does not write the last answer")
        said = ids[start:end]
        if self._tokenizer.decode(prompt[-len(_THINK) :], skip_special=False).endswith(_THINK):
            said = self._thought(said, reasoning)
        return _Served([*prompt, *said], len(prompt))

    def _thought(self, said: list[int], reasoning: str | None) -> list[int]:
        """An answer behind a prompt that has already opened the thinking block: thoughts, the block's end, the answer."""
        text = self._tokenizer.decode(said[:-1], skip_special=False)
        answer = text.rpartition(_THOUGHT)[2].lstrip("\n")
        return [*self._tokenizer.encode(f"{(reasoning or '').strip()}\n{_THOUGHT}\n\n{answer}"), said[-1]]

    def _qwen1(self, example: Example, origin: str) -> Rendering:
        """finetune.py: <|im_start|>, <|im_end|> and the newline after it are learned in every turn, and the answers' text.

        The system text is fixed; a first turn that is not the user's is left out; other roles are refused. Unlike there,
        control tokens written in a text stay plain text.
        """
        encode, specials = self._tokenizer.encode, self._tokenizer.special_tokens
        start, end, newline = specials["<|im_start|>"], specials["<|im_end|>"], encode("\n")
        messages, notes = list(example.messages), []
        for message in messages:
            if message["role"] not in ("user", "assistant") or message.get("tool_calls"):
                raise BadRecordError("bad role", f"a turn of {message['role']!r} has no place in labels qwen1")
        if messages and messages[0]["role"] != "user":
            messages = messages[1:]
            notes.append(("first turn left out", "labels qwen1 begins with the user's turn"))
        if not any(message["role"] == "assistant" for message in messages):
            raise BadRecordError("missing field", "there is no answer of the assistant")
        ids: list[int] = []
        labels: list[int] = []
        for message in [{"role": "system", "content": QWEN1_SYSTEM}, *messages]:
            header, text = [*encode(message["role"]), *newline], encode(message["content"])
            ids += [start, *header, *text, end, *newline]
            learned = text if message["role"] == "assistant" else [IGNORE] * len(text)
            labels += [start, *[IGNORE] * len(header), *learned, end, *newline]
        return Rendering([Sample(ids, labels, origin)], notes)

    def _mindformers(self, example: Example, origin: str) -> Sample:
        """qwen1_5_preprocess.py: ChatML as the messages stand, all of it learned, except around padding tokens."""
        assert self._chatml is not None
        ids = self._chatml.render(example.messages, add_generation_prompt=False).ids
        pad = self._tokenizer.special_tokens.get("<|endoftext|>")
        return Sample(
            ids, [IGNORE if pad in (id, before) else id for before, id in zip([None, *ids], ids, strict=False)], origin
        )

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


def _reasoning(message: Message) -> str | None:
    """The thoughts of an answer: its own field, or the block its text begins with. None where there are none."""
    given = message.get("reasoning_content")
    if isinstance(given, str) and given.strip():
        return given
    before, thought, _ = message["content"].partition(_THOUGHT)
    text = before.strip().removeprefix("<think>").strip()
    return text if thought and text else None
