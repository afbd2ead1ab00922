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
    calls,
    decoded,
    integers,
    joined,
    shown,
    text_or_none,
    without_nulls,
)
from qwenkit.train.data.preprocess import clean_wikitext
from qwenkit.train.data.registry import DataSource

PAIR_STAGES = ("dpo", "orpo", "rm")
_COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output", "history": "history"},
    "sharegpt": {"messages": "conversations"},
    "openai": {"messages": "messages"},
}
_OPTIONAL = {"system": "system", "tools": "tools", "chosen": "chosen", "rejected": "rejected", "kto_tag": "label"}
_CALL = "function_call"
_ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"},
    **{"developer": "system", "observation": "tool", "tool": "tool", "function_call": _CALL},
}
_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": _CALL,
    "system_tag": "system",
}


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

    variables fill {{name}} in every text; a name without one is kept as it is, and its place noted in `unfilled`.
    """

    def __init__(self, source: DataSource, stage: str, *, system: str | None, variables: Mapping[str, str]) -> None:
        self._source, self._stage, self._system = source, stage, system
        self._variables = dict(variables)
        self.unfilled: set[str] = set()
        """Names of {{variables}} in the last record for which there was no text."""

    def read(self, record: Mapping[str, Any]) -> Example:
        """The Example of a record. Raises BadRecordError."""
        self.unfilled = set()
        formatting = self._source.formatting
        if formatting == "auto":
            formatting = _guess(record, self._stage)
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
        columns = _OPTIONAL | _COLUMNS[formatting]
        if self._source.columns:
            # As in LLaMA-Factory: where columns are given, those that are not named do not exist.
            kept = {"chosen", "rejected"} if self._source.ranking else set()
            columns = {name: column for name, column in columns.items() if name in kept} | dict(self._source.columns)
        values = {name: record.get(column) for name, column in columns.items()}
        if formatting == "alpaca":
            example = self._alpaca(values, columns)
        else:
            example = self._conversation(values, columns, _tags_of(self._source, formatting))
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
        history = decoded(values.get("history")) or []
        if not isinstance(history, list):
            raise BadRecordError("wrong type", f"{columns['history']} is {shown(history)}, allowed is a list of pairs")
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
            messages += self._messages(prompt, name, {})
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
        if not isinstance(response, str):
            raise BadRecordError("wrong type", f"{name} is {shown(response)}, allowed is a text")
        messages.append(answer(self._fill(response), name))
        return Example(tuple(messages), tools, liked=self._liked(values, columns))

    def _conversation(self, values: Mapping[str, Any], columns: Mapping[str, str], tags: Mapping[str, Any]) -> Example:
        name = columns.get("messages", "messages")
        given = decoded(values.get("messages"))
        if given is None and self._stage in PAIR_STAGES and isinstance(decoded(values.get("chosen")), list):
            given = []
        if not isinstance(given, list):
            raise BadRecordError("missing field", f"{name} is {shown(given)}, a list of messages is needed")
        messages = self._messages(given, name, tags)
        system = text_or_none(values, columns, "system")
        if system and (not messages or messages[0]["role"] != "system"):
            messages.insert(0, {"role": "system", "content": self._fill(system)})
        tools = self._tools(values, columns)
        if self._stage in PAIR_STAGES:
            return self._pair(messages, tools, values, columns, tags)
        return Example(tuple(messages), tools, liked=self._liked(values, columns))

    def _messages(self, given: list[Any], name: str, tags: Mapping[str, Any]) -> list[Message]:
        return [self._message(message, f"{name}[{index}]", tags) for index, message in enumerate(given)]

    def _message(self, message: Any, name: str, tags: Mapping[str, Any]) -> Message:
        if not isinstance(message, Mapping):
            raise BadRecordError(
                "wrong type", f"{name} is {shown(message)}, allowed is an object with role and content"
            )
        role_tag, content_tag = tags.get("role_tag", "role"), tags.get("content_tag", "content")
        if role_tag not in message and {"role", "from"} & set(message):  # the other of the two common ways
            role_tag, content_tag = ("role", "content") if "role" in message else ("from", "value")
        roles: dict[str, str] = tags.get("roles", _ROLES)
        role = message.get(role_tag)
        if not isinstance(role, str) or role not in roles:
            raise BadRecordError("bad role", f"{name}.{role_tag} is {shown(role)}, allowed are {', '.join(roles)}")
        content = joined(message.get(content_tag), f"{name}.{content_tag}")
        given_calls = message.get("tool_calls") or None
        if roles[role] == _CALL:
            return {"role": "assistant", "content": "", "tool_calls": calls(content, f"{name}.{content_tag}")}
        if content is None and not (roles[role] == "assistant" and given_calls):
            raise BadRecordError("missing field", f"{name}.{content_tag} is missing")
        text = self._fill(content or "")
        if roles[role] != "assistant":
            return {"role": roles[role], "content": text}
        said: Message = {"role": "assistant", "content": text} if given_calls else answer(text, f"{name}.{content_tag}")
        if given_calls:
            said["tool_calls"] = [without_nulls(call) for call in given_calls]
        if isinstance(message.get("reasoning_content"), str) and message["reasoning_content"]:
            said["reasoning_content"] = self._fill(message["reasoning_content"])
        weight = message.get("weight", 1)
        if weight not in (0, 1, None):
            raise BadRecordError("wrong type", f"{name}.weight is {shown(weight)}, allowed are 0 and 1")
        if weight == 0:
            said["weight"] = 0
        return said

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
            value = decoded(values.get(key))
            if value is None:
                raise BadRecordError(
                    "missing field", f"{name} is missing, stage {self._stage} needs chosen and rejected answers"
                )
            if isinstance(value, str):
                answers.append(answer(self._fill(value), name))
                continue
            listed = self._messages(value if isinstance(value, list) else [value], name, tags)
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
        if tools is None or tools == "" or tools == []:
            return None
        name = columns["tools"]
        if isinstance(tools, str):
            try:
                tools = json.loads(tools)
            except (ValueError, RecursionError):
                raise BadRecordError("wrong type", f"{name} is no valid JSON") from None
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            raise BadRecordError("wrong type", f"{name} is {shown(tools)}, allowed is a list of functions")
        functions = tuple(
            dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools
        )
        return functions or None


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


def _guess(record: Mapping[str, Any], stage: str) -> str:
    if "input_ids" in record:
        return "tokens"
    if stage == "pt":
        return "text"
    if "conversations" in record:
        return "sharegpt"
    if "messages" in record:
        return "openai"
    if "chosen" in record and isinstance(decoded(record["chosen"]), list) and "prompt" not in record:
        return "openai"
    if "instruction" in record:
        return "alpaca"
    if "text" in record:
        return "text"
    fields = ", ".join(map(str, record)) or "none"
    raise BadRecordError("missing field", f"no known format has these fields: {fields}; name them in dataset_info.json")


def _tags_of(source: DataSource, formatting: str) -> dict[str, Any]:
    roles = dict(_ROLES)
    for tag, role in _TAGS.items():
        if tag in source.tags:
            roles[source.tags[tag]] = role
    role, content = ("from", "value") if formatting == "sharegpt" else ("role", "content")
    return {
        "role_tag": source.tags.get("role_tag", role),
        "content_tag": source.tags.get("content_tag", content),
        "roles": roles,
    }


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
