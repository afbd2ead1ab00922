"""Messages of a conversation, as the trainers write them: roles, contents, calls, thoughts, and marks of turns without loss.

In: decoded objects, and the tags of their data set. Out: messages in the shape that text/chat renders, and notes on keys that are
not understood. Raises BadRecordError naming the field.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from qwenkit.train.data.fields import BadRecordError, Message, answer, joined, shown, without_nulls

_CALL = "function_call"
ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"},
    **{"developer": "system", "observation": "tool", "tool": "tool", "function_call": _CALL},
    **{"tool_call": _CALL, "tool_response": "tool", "function": "tool"},
}
_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": _CALL,
    "system_tag": "system",
}
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_MARKS = ("weight", "loss", "train", "trainable", "loss_scale")
_KNOWN = {"role", "from", "content", "value", "tool_calls", "function_call", *_THOUGHTS}
_HARMLESS = {"name", "id", "tool_call_id", "timestamp", "type", "index"}  # which call a result answers is its place
_TOOL_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)


def tags_of(tags: Mapping[str, str], formatting: str) -> dict[str, Any]:
    """Names of role and content, and the role that each tag of a data set means."""
    roles = dict(ROLES) | {tags[tag]: role for tag, role in _TAGS.items() if tag in tags}
    role, content = ("from", "value") if formatting == "sharegpt" else ("role", "content")
    return {"role_tag": tags.get("role_tag", role), "content_tag": tags.get("content_tag", content), "roles": roles}


class MessageReader:
    """Reads the messages of one record after another. `fill` replaces {{variables}} in a text; `notes` are the last record's.

    columnar: the record is a row of a table, in which keys that an object lacks are null.
    """

    def __init__(self, fill: Callable[[str], str]) -> None:
        self._fill = fill
        self.columnar = False
        self.notes: list[tuple[str, str]] = []

    def read(self, given: list[Any], name: str, tags: Mapping[str, Any]) -> list[Message]:
        return [self._message(message, f"{name}[{index}]", tags) for index, message in enumerate(given)]

    def _message(self, message: Any, name: str, tags: Mapping[str, Any]) -> Message:
        if not isinstance(message, Mapping):
            raise BadRecordError(
                "wrong type", f"{name} is {shown(message)}, allowed is an object with role and content"
            )
        role_tag, content_tag = tags.get("role_tag", "role"), tags.get("content_tag", "content")
        if role_tag not in message and {"role", "from"} & set(message):  # the other of the two common ways
            role_tag = "role" if "role" in message else "from"
        if content_tag not in message and {"content", "value"} & set(message):
            content_tag = "content" if "content" in message else "value"
        roles: dict[str, str] = tags.get("roles", ROLES)
        role = message.get(role_tag)
        if not isinstance(role, str) or role not in roles:
            raise BadRecordError("bad role", f"{name}.{role_tag} is {shown(role)}, allowed are {', '.join(roles)}")
        self._note_unknown({key: value for key, value in message.items() if key not in (role_tag, content_tag)}, name)
        content = joined(message.get(content_tag), f"{name}.{content_tag}")
        given_calls = self._given_calls(message, name)
        role = roles[role]
        if role == _CALL:
            said = self._call(content, given_calls, f"{name}.{content_tag}")
        elif content is None and not (role == "assistant" and given_calls):
            raise BadRecordError("missing field", f"{name}.{content_tag} is missing")
        elif role != "assistant":
            if _weight(message, name) == 1:
                marks = [key for key in _MARKS if message.get(key)]
                self.notes += [("mark without effect", f"{name}.{key}: only answers are learned") for key in marks]
            return {"role": role, "content": self._fill(content or "")}
        else:
            text = self._fill(content or "")
            said = {"role": "assistant", "content": text} if given_calls else answer(text, f"{name}.{content_tag}")
            if given_calls:
                said["tool_calls"] = given_calls
        for key in _THOUGHTS:
            thoughts = message.get(key)
            if thoughts is not None and not isinstance(thoughts, str):
                raise BadRecordError("wrong type", f"{name}.{key} is {shown(thoughts)}, allowed is a text")
            if thoughts and "reasoning_content" not in said:
                said["reasoning_content"] = self._fill(thoughts)
        if _weight(message, name) == 0:
            said["weight"] = 0
        return said

    def _note_unknown(self, rest: Mapping[str, Any], name: str) -> None:
        for key, value in rest.items():
            if value is not None and key not in _KNOWN and key not in _HARMLESS and key not in _MARKS:
                self.notes.append(("unknown key of a message", f"{name} has {key!r}, which is not read"))

    def _given_calls(self, message: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
        """OpenAI's `tool_calls`, and its older `function_call`, one object."""
        given = message.get("tool_calls") or []
        if message.get("function_call") and isinstance(message["function_call"], Mapping):
            given = [{"type": "function", "function": message["function_call"]}]
        if isinstance(given, str):
            given = _decoded(given, f"{name}.tool_calls")
        if not isinstance(given, list) or not all(isinstance(call, Mapping) for call in given):
            raise BadRecordError("wrong type", f"{name}.tool_calls is {shown(given)}, allowed is a list of calls")
        given = [without_nulls(call) if self.columnar else dict(call) for call in given]
        for call in given:
            function = call.get("function", call)
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise BadRecordError("wrong type", f"{name}.tool_calls has {shown(call)}, a call with a name is needed")
        return [call if "function" in call else _as_call(call) for call in given]

    def _call(self, content: str | None, given: list[dict[str, Any]], name: str) -> Message:
        """sharegpt's function_call: a call as JSON or a list of them, in <tool_call> tags or bare, thoughts before it."""
        text = content or ""
        thoughts = [thought.strip() for thought in _THOUGHT.findall(text)]
        text = _THOUGHT.sub("", text)
        tagged = _TOOL_CALL.findall(text)
        spoken = _TOOL_CALL.sub("", text).strip() if tagged else ""
        found = [call for part in tagged or ([text] if text.strip() or not given else []) for call in calls(part, name)]
        said: Message = {"role": "assistant", "content": self._fill(spoken), "tool_calls": given + found}
        if any(thoughts):
            said["reasoning_content"] = self._fill("\n".join(filter(None, thoughts)))
        return said


def calls(content: str, name: str) -> list[dict[str, Any]]:
    """One call as JSON, or a list of them."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise BadRecordError(
            "wrong type", f"{name} is no valid JSON, a call with name and arguments is needed"
        ) from None
    found = found if isinstance(found, list) else [found]
    for index, call in enumerate(found):
        if isinstance(call, dict) and isinstance(call.get("function"), dict):
            call = found[index] = call["function"]
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise BadRecordError("wrong type", f"{name} is {shown(call)}, a call with name and arguments is needed")
    return [_as_call(call) for call in found]


def _as_call(call: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}


def _weight(message: Mapping[str, Any], name: str) -> int:
    """0 where any of the marks says that a turn is not to be learned."""
    weight = 1
    for key in _MARKS:
        value = message.get(key)
        if value not in (0, 1, None) or isinstance(value, str):
            raise BadRecordError("wrong type", f"{name}.{key} is {shown(value)}, allowed are 0, 1, true and false")
        if value is not None and not value:
            weight = 0
    return weight


def _decoded(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRecordError("wrong type", f"{name} is no valid JSON") from None
