"""Answers behind the prompts that a server gives for them, and a check that nothing of a record got lost on the way.

In: messages that end with an answer, and tools. Out: ids of prompt and answer, from the model's own chat format, and notes on
parts of the record that the format does not write.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwenkit.text.chat import ChatFormat
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.text.tool_calls import CALL, CALL_END
from qwenkit.train.data.fields import BadRecordError, Message

_THINK = "<think>\n"
_THOUGHT = "</think>"


@dataclass(frozen=True)
class Served:
    """Ids from the beginning up to the end of one answer, and how many of them are its prompt."""

    ids: list[int]
    prompt: int


class ServedAnswers:
    """Renders answers. thinking: what the chat template is told, None: whether the answer has thoughts."""

    def __init__(self, tokenizer: Tokenizer, chat: ChatFormat, thinking: bool | None) -> None:
        self._tokenizer, self._chat, self._thinking = tokenizer, chat, thinking
        self.notes: dict[str, str] = {}
        """Of the answers since it was cleared: a kind of issue, and what was not written."""

    def answer(self, messages: Sequence[Message], tools: Any) -> Served:
        """The last message as an answer to the prompt that a server would give for the others.

        Raises ValueError where the template does not write it, BadRecordError where it does not write its calls.
        """
        plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        reasoning = reasoning_of(plain[-1])
        if self._thinking is False and reasoning is not None:
            plain[-1] = {key: value for key, value in plain[-1].items() if key != "reasoning_content"}
            plain[-1]["content"] = plain[-1]["content"].rpartition(_THOUGHT)[2].lstrip("\n")
            self.notes["thoughts left out"] = "enable_thinking is false, so answers are learned without their thoughts"
            reasoning = None
        served = self._served(plain, tools, reasoning)
        if any(name not in self._text(served.ids) for message in plain for name in _called(message)):
            plain = [_with_calls_as_text(message) for message in plain]
            served = self._served(plain, tools, reasoning)
            self.notes["call written as text"] = (
                "the chat template does not write tool calls; they are learned as Qwen writes them, in <tool_call> tags"
            )
        self._check(plain, tools, served, reasoning)
        return served

    def _variables(self, tools: Any, reasoning: str | None) -> dict[str, Any]:
        # Qwen3 puts an empty thinking block before an answer without thinking; as the server does, it goes into the prompt.
        return {"tools": tools, "enable_thinking": reasoning is not None if self._thinking is None else self._thinking}

    def _served(self, plain: list[Message], tools: Any, reasoning: str | None) -> Served:
        variables = self._variables(tools, reasoning)
        prompt = self._chat.render(plain[:-1], **variables).ids
        whole = self._chat.render(plain, add_generation_prompt=False, **variables)
        ids, mask = whole.ids, whole.mask
        follows = ids[: len(prompt)] == prompt
        if mask is None:
            if not follows:
                return self._behind_thinking(prompt, ids, reasoning)
            ends = (i + 1 for i in range(len(prompt), len(ids)) if self._tokenizer.is_special(ids[i]))
            return Served(ids[: next(ends, len(ids))], len(prompt))
        end = len(mask) - next((i for i, said in enumerate(reversed(mask)) if said), len(mask))
        if follows and end > len(prompt):
            return Served(ids[:end], len(prompt))
        start = end
        while start and mask[start - 1]:
            start -= 1
        if start == end:
            raise ValueError("the chat template does not write the last answer")
        said = ids[start:end]
        if self._text(prompt[-len(_THINK) :]).endswith(_THINK):
            said = self._thought(self._text(said[:-1]), said[-1], reasoning)
        return Served([*prompt, *said], len(prompt))

    def _behind_thinking(self, prompt: list[int], ids: list[int], reasoning: str | None) -> Served:
        """An answer of a template without marks, whose prompt opens the thinking block that past answers have lost."""
        before, whole = self._text(prompt), self._text(ids)
        header = before.removesuffix(_THINK)
        last = next((i for i in reversed(range(len(ids))) if self._tokenizer.is_special(ids[i])), None)
        if header == before or not whole.startswith(header) or last is None:
            raise ValueError("the chat template writes another prompt for an answer than before it")
        text = self._text(ids[:last]).removeprefix(header)
        return Served([*prompt, *self._thought(text, ids[last], reasoning)], len(prompt))

    def _thought(self, text: str, end: int, reasoning: str | None) -> list[int]:
        """An answer behind a prompt that has already opened the thinking block: thoughts, the block's end, the answer."""
        answer = text.rpartition(_THOUGHT)[2].lstrip("\n")
        return [*self._tokenizer.encode(f"{(reasoning or '').strip()}\n{_THOUGHT}\n\n{answer}"), end]

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=False)

    def _check(self, plain: list[Message], tools: Any, served: Served, reasoning: str | None) -> None:
        """Note what the record says that is not in the ids. BadRecordError for a call that would be learned as nothing."""
        before, said = self._text(served.ids[: served.prompt]), self._text(served.ids[served.prompt :])
        for name in _called(plain[-1]):
            if name not in said:
                raise BadRecordError("call not written", f"the chat template does not write tool calls, here of {name}")
        if reasoning is not None and reasoning.strip() not in said:
            without = self._without(plain, len(plain) - 1, tools)
            if self._served(without, tools, None).ids == served.ids:
                self.notes["thoughts not written"] = "the chat template does not write reasoning_content"
        names = [name for tool in tools or () for name in _names(tool)]
        contents = "\n".join(str(message["content"]) for message in plain)
        unsure = [name for name in names if name in contents]
        if any(name not in before for name in names) or (
            unsure and self._prompt(plain, None) == self._prompt(plain, tools)
        ):
            self.notes["tools not written"] = "the chat template does not write the tools that a record has"
        for place, message in enumerate(plain[:-1]):
            self._check_earlier(plain, place, message, tools, before)

    def _check_earlier(self, plain: list[Message], place: int, message: Message, tools: Any, before: str) -> None:
        role, text = message["role"], str(message["content"]).strip()
        if role in ("system", "tool") and text and text not in before:
            changed = [*plain[:place], {**message, "content": ""}, *plain[place + 1 :]]
            if self._prompt(changed, tools) == self._prompt(plain, tools):
                what = "system text" if role == "system" else "tool result"
                self.notes[f"{what} not written"] = f"the chat template does not write a {what}"

    def _without(self, plain: list[Message], place: int, tools: Any) -> list[Message]:
        bare = {key: value for key, value in plain[place].items() if key != "reasoning_content"}
        bare["content"] = bare["content"].rpartition(_THOUGHT)[2].lstrip("\n")
        return [*plain[:place], bare, *plain[place + 1 :]]

    def _prompt(self, plain: list[Message], tools: Any) -> list[int]:
        return self._chat.render(plain[:-1], tools=tools).ids


def _with_calls_as_text(message: Message) -> Message:
    """A message whose calls are part of its text, as Qwen's own templates write them."""
    if not message.get("tool_calls"):
        return message
    texts = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        said = json.dumps({"name": function.get("name"), "arguments": arguments}, ensure_ascii=False)
        texts.append(f"{CALL}\n{said}\n{CALL_END}")
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return kept | {"content": "\n".join([*filter(None, [message["content"]]), *texts])}


def _called(message: Mapping[str, Any]) -> list[str]:
    return [str(call.get("function", call).get("name", "")) for call in message.get("tool_calls") or ()]


def _names(tool: Mapping[str, Any]) -> list[str]:
    name = tool.get("function", tool).get("name") if isinstance(tool.get("function", tool), Mapping) else None
    return [name] if isinstance(name, str) else []


def reasoning_of(message: Message) -> str | None:
    """The thoughts of an answer: its own field, or the block its text begins with. None where there are none."""
    given = message.get("reasoning_content")
    if isinstance(given, str) and given.strip():
        return given
    before, thought, _ = message["content"].partition(_THOUGHT)
    text: str = before.strip().removeprefix("<think>").strip()
    return text if thought and text else None
