"""What a record says, whatever its format: alpaca, sharegpt, OpenAI messages, Qwen's conversations, text, pairs, token ids.

In: one JSON object, and how its data set is written. Out: an `Example`, in the one shape that text/chat renders. A record that
breaks the rules raises BadRecordError, whose `kind` is what a report counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwenkit.train.data.fields import (
    BadRecordError,
    Message,
    answer,
    as_list,
    integers,
    shown,
    text_or_none,
    without_nulls,
)
from qwenkit.train.data.messages import MessageReader, tags_of
from qwenkit.train.data.preprocess import clean_wikitext
from qwenkit.train.data.registry import DataSource
from qwenkit.train.data.shapes import recognise

PAIR_STAGES = ("dpo", "orpo", "rm")
_COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output", "history": "history"},
    "sharegpt": {"messages": "conversations"},
    "turns": {"messages": "conversation"},
    "openai": {"messages": "messages"},
}
_OPTIONAL = {"system": "system", "tools": "tools", "chosen": "chosen", "rejected": "rejected", "kto_tag": "label"}


@dataclass(frozen=True)
class Example:
    """A record understood: a conversation (with two answers, or one that was liked or not), a text, or ready token ids.

    messages have role and content, an assistant's may have tool_calls, and weight 0 where it is not to be learned. For pairs
    they end before the answers, which are `chosen` and `rejected`.
    """

    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] | None = None
    chosen: Message | None = None
    rejected: Message | None = None
    liked: bool | None = None
    text: str | None = None
    ids: list[int] | None = None
    labels: list[int] | None = None


class RecordReader:
    """Reads the records of one source as `stage` needs them. `system` is for conversations that have none.

    variables fill {{name}} in every text; a name without one is kept unchanged and noted in `unfilled`. `notes` are (kind, what)
    about the last record.
    """

    def __init__(self, source: DataSource, stage: str, *, system: str | None, variables: Mapping[str, str]) -> None:
        self._source, self._stage, self._system = source, stage, system
        self._variables = dict(variables)
        self.unfilled: set[str] = set()
        """Names of {{variables}} in the last record for which there was no text."""
        self._messages = MessageReader(self._fill)

    @property
    def notes(self) -> list[tuple[str, str]]:
        return self._messages.notes

    def read(self, record: Mapping[str, Any], container: str = "json") -> Example:
        """The Example of a record from a file of a kind (`files.file_kind`): csv has texts only, tables fill up with nulls.

        Raises BadRecordError.
        """
        self.unfilled, self._messages.notes = set(), []
        self._container, self._messages.columnar = container, container in ("parquet", "arrow")
        formatting, recognised = self._source.formatting, dict[str, str]()
        if formatting == "auto":
            formatting, recognised = recognise(record, self._stage)
        if formatting == "tokens":
            return _read_tokens(record)
        for media in ("images", "videos", "audios"):
            if record.get(self._source.columns.get(media, media)):
                raise BadRecordError("unsupported field", f"{media} is given, but only text is trained")
        if self._stage == "pt":
            return Example(text=self._text(record, formatting))
        if formatting in ("text", "wiki"):
            raise BadRecordError(
                "missing field", f"plain text has no answers, which stage {self._stage} needs; stage pt reads it"
            )
        columns = _OPTIONAL | _COLUMNS[formatting] | recognised
        if self._source.columns:
            # As in LLaMA-Factory: where columns are given, those that are not named do not exist.
            kept = {"chosen", "rejected"} if self._source.ranking else set()
            columns = {name: column for name, column in columns.items() if name in kept} | dict(self._source.columns)
        values = {name: record.get(column) for name, column in columns.items()}
        if formatting == "alpaca":
            example = self._alpaca(values, columns)
        else:
            example = self._conversation(values, columns, tags_of(self._source.tags, formatting))
        return self._with_system(example)

    def _with_system(self, example: Example) -> Example:
        messages = example.messages
        if self._system is not None and (not messages or messages[0]["role"] != "system"):
            messages = ({"role": "system", "content": self._system}, *messages)
        return Example(messages, example.tools, example.chosen, example.rejected, example.liked)

    def _fill(self, text: str) -> str:
        """{{name}} replaced by its text."""
        if "{{" not in text:
            return text

        def replaced(match: re.Match[str]) -> str:
            if match[1] in self._variables:
                return self._variables[match[1]]
            self.unfilled.add(match[1])
            return match[0]

        return re.sub(r"\{\{\s*(\w+)\s*\}\}", replaced, text)

    def _text(self, record: Mapping[str, Any], formatting: str) -> str:
        column = self._source.columns.get("prompt") or "text"
        text = record.get(column)
        if not isinstance(text, str):
            raise BadRecordError("missing field", f"{column} is {shown(text)}, stage pt needs a text there")
        if formatting == "wiki":
            text = clean_wikitext(text)
        if not text.strip():
            raise BadRecordError("empty text", f"{column} is empty")
        return self._fill(text)

    def _alpaca(self, values: Mapping[str, Any], columns: Mapping[str, str]) -> Example:
        messages: list[Message] = []
        system = text_or_none(values, columns, "system")
        if system:
            messages.append({"role": "system", "content": self._fill(system)})
        history = as_list(values.get("history") or [])
        if history is None:
            raise BadRecordError(
                "wrong type", f"{columns['history']} is {shown(values['history'])}, allowed is a list of pairs"
            )
        for turn in history:
            if not isinstance(turn, list | tuple) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
                raise BadRecordError(
                    "wrong type", f"{columns['history']} holds {shown(turn)}, allowed is [question, answer]"
                )
            messages.append({"role": "user", "content": self._fill(turn[0])})
            messages.append(answer(self._fill(turn[1]), columns["history"]))
        name = columns.get("prompt", "instruction")
        prompt, query = values.get("prompt"), text_or_none(values, columns, "query")
        if isinstance(prompt, list):  # OpenAI's way, with pairs
            messages += self._messages.read(prompt, name, {})
        elif isinstance(prompt, str):
            text = "\n".join(part for part in (prompt, query) if part)
            if not text:
                raise BadRecordError("empty prompt", f"{name} is empty")
            messages.append({"role": "user", "content": self._fill(text)})
        else:
            raise BadRecordError("missing field", f"{name} is {shown(prompt)}, a text is needed")
        tools = self._tools(values, columns)
        name = columns.get("response", "output")
        response = values.get("response")
        if self._stage in PAIR_STAGES:
            if isinstance(response, list) and len(response) == 2:  # how LLaMA-Factory wrote pairs before version 0.8
                values = {**values, "chosen": response[0], "rejected": response[1]}
            return self._pair(messages, tools, values, columns, {})
        if response is None:
            raise BadRecordError("missing field", f"{name} is missing, the answer is needed")
        if isinstance(response, list):  # OpenAI's way
            messages += self._messages.read(response, name, {})
        elif not isinstance(response, str):
            raise BadRecordError("wrong type", f"{name} is {shown(response)}, allowed is a text")
        else:
            messages.append(answer(self._fill(response), name))
        return Example(tuple(messages), tools, liked=self._liked(values, columns))

    def _conversation(self, values: Mapping[str, Any], columns: Mapping[str, str], tags: Mapping[str, Any]) -> Example:
        name = columns.get("messages", "messages")
        given = as_list(values.get("messages"))
        if values.get("messages") is None and self._stage in PAIR_STAGES and as_list(values.get("chosen")) is not None:
            given = []
        if given is None:
            raise BadRecordError(
                "missing field", f"{name} is {shown(values.get('messages'))}, a list of messages is needed"
            )
        if name == "conversation":
            given = _messages_of_turns(given)
        messages = self._messages.read(given, name, tags)
        system = text_or_none(values, columns, "system")
        if system and (not messages or messages[0]["role"] != "system"):
            messages.insert(0, {"role": "system", "content": self._fill(system)})
        tools = self._tools(values, columns)
        if self._stage in PAIR_STAGES:
            return self._pair(messages, tools, values, columns, tags)
        return Example(tuple(messages), tools, liked=self._liked(values, columns))

    def _pair(
        self,
        messages: list[Message],
        tools: tuple[dict[str, Any], ...] | None,
        values: Mapping[str, Any],
        columns: Mapping[str, str],
        tags: Mapping[str, Any],
    ) -> Example:
        answers, prompts = [], []
        for key in ("chosen", "rejected"):
            name = columns.get(key, key)
            value = values.get(key)
            if key == "chosen" and value is None and messages and messages[-1]["role"] == "assistant":
                answers.append(messages.pop())  # ms-swift: the conversation ends with the chosen answer
                continue
            if self._container == "csv" and isinstance(value, str) and tags:
                value = _message_or_text(value)
            if value is None:
                raise BadRecordError(
                    "missing field", f"{name} is missing, stage {self._stage} needs chosen and rejected answers"
                )
            if isinstance(value, str):
                answers.append({"role": "assistant", "content": self._fill(value)})  # an answer may be to say nothing
                continue
            listed = self._messages.read(value if isinstance(value, list) else [value], name, tags)
            if not listed or listed[-1]["role"] != "assistant":
                raise BadRecordError("bad role", f"{name} does not end with the assistant's answer")
            answers.append(listed[-1])
            if len(listed) > 1:
                prompts.append(listed[:-1])
        if prompts:  # whole conversations: both must say the same up to the answer
            if len(prompts) != 2 or prompts[0] != prompts[1]:
                raise BadRecordError("bad order", "chosen and rejected differ before their last message")
            if messages and messages != prompts[0]:
                raise BadRecordError("bad order", "chosen repeats another conversation than the record's own")
            messages = prompts[0]
        return Example(tuple(messages), tools, answers[0], answers[1])

    def _liked(self, values: Mapping[str, Any], columns: Mapping[str, str]) -> bool | None:
        if self._stage != "kto":
            return None
        name, value = columns.get("kto_tag", "label"), values.get("kto_tag")
        if isinstance(value, str) and value.strip().lower() in ("true", "false", "1", "0"):
            value = value.strip().lower() in ("true", "1")
        if value in (0, 1) and value is not None:
            return bool(value)
        kind = "missing field" if value is None else "wrong type"
        raise BadRecordError(kind, f"{name} is {shown(value)}, stage kto needs true or false")

    def _tools(self, values: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[dict[str, Any], ...] | None:
        tools = values.get("tools")
        if tools is None or tools == [] or (isinstance(tools, str) and not tools.strip()):
            return None
        name = columns["tools"]
        if isinstance(tools, str):
            try:
                tools = json.loads(tools)
            except (ValueError, RecursionError):
                raise BadRecordError("wrong type", f"{name} is no valid JSON") from None
            if tools is None:
                return None
        if isinstance(tools, list):  # each may be JSON too
            tools = [_message_or_text(tool) for tool in tools]
        if self._messages.columnar:
            tools = without_nulls(tools)
        tools = [tools] if isinstance(tools, Mapping) else tools
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            raise BadRecordError("wrong type", f"{name} is {shown(tools)}, allowed is a list of functions")
        functions = tuple(
            dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools
        )
        return functions or None


def _messages_of_turns(turns: list[Any]) -> list[Any]:
    """ms-swift's `conversation`: a list of {"human": …, "assistant": …}."""
    messages: list[Any] = []
    for turn in turns:
        if isinstance(turn, Mapping) and {"human", "assistant"} <= set(turn):
            messages += [{"role": role, "content": turn[role]} for role in ("human", "assistant")]
        else:
            messages.append(turn)
    return messages


def _message_or_text(value: Any) -> Any:
    """A text that is the JSON of an object or a list as that, where one of them has a place; any other value unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def check_order(messages: tuple[Message, ...], *, answered: bool) -> None:
    """Who may speak when: system first or never, a question before each answer, a tool's result after a call.

    answered: the assistant must have said something; otherwise the assistant is about to, so another must speak last.
    Raises BadRecordError.
    """
    before = ""
    for index, message in enumerate(messages):
        role = message["role"]
        allowed = {
            "system": before == "",
            "user": before != "user",
            "assistant": before in ("user", "tool"),
            "tool": before in ("assistant", "tool"),
        }[role]
        if not allowed:
            place = f"after {before!r}" if before else "at the beginning"
            raise BadRecordError("bad order", f"message {index} is {role!r}, which cannot stand {place}")
        before = role
    if answered and not any(message["role"] == "assistant" for message in messages):
        raise BadRecordError("missing field", "there is no answer of the assistant")
    if not answered and before not in ("user", "tool"):
        raise BadRecordError("bad order", "the prompt does not end with a question or a tool's result")


def _read_tokens(record: Mapping[str, Any]) -> Example:
    """Ready ids, as MindFormers' tools write them: input_ids, and target_ids or labels (-100: not learned).

    Padding at the end, where nothing is learned, is cut off: nothing before it can see it.
    """
    ids = integers(record, "input_ids")
    name = next((name for name in ("target_ids", "labels") if record.get(name) is not None), None)
    if name is None:
        return Example(ids=ids, labels=list(ids))
    labels = integers(record, name)
    if len(labels) != len(ids):
        raise BadRecordError("wrong type", f"{name} has {len(labels)} entries, input_ids has {len(ids)}")
    if any(label not in (-100, id) for id, label in zip(ids, labels, strict=True)):
        raise BadRecordError("wrong type", f"{name} differs from input_ids other than by -100")
    length = len(labels)
    while length and labels[length - 1] == -100 and ids[length - 1] == ids[-1]:
        length -= 1
    return Example(ids=ids[:length], labels=labels[:length])
