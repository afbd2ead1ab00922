"""Tool calls as Qwen2.5 and Qwen3 write them (Hermes): <tool_call>, a JSON object with name and arguments, </tool_call>.

In: the text between the tags, while it arrives; tool definitions in the OpenAI shape. Out: checked `ToolCall`s, whose
arguments are the very JSON text the model wrote, or a verdict that this is no call; and the grammar that forces one.
A call holds everything that the model wrote for it, or it is none. What every format of calls needs, ReAct's and XML's
too, is here as well: reading definitions, and checking arguments.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qwenkit.text.answer_tags import Tag
from qwenkit.text.call_repair import repaired
from qwenkit.text.json_schema import for_grammar

CALL, CALL_END = "<tool_call>", "</tool_call>"
_BLANK = " \t\r\n"
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x1f]")
FENCE = "```"
ARGUMENTS = ("arguments", "parameters", "args", "input")  # what models call the member that holds them
_LABELS = ("id", "type")  # of the call itself, told by who gives the call out


@dataclass(frozen=True)
class ToolCall:
    """arguments: text of a JSON object."""

    name: str
    arguments: str


class CallText(Protocol):
    """The text of a call, while it arrives."""

    def add(self, text: str) -> bool:
        """Take the next piece; False if no call can come of it any more."""
        ...

    def holds(self, tag: Tag) -> bool:
        """Whether `tag`, coming next, would be part of the call's text and not its end."""
        ...

    def calls(self, *, closed: bool) -> list[ToolCall] | None:
        """What the text says, all of it; None if it is no well-formed call. `closed`: the end tag was written."""
        ...


class HermesCall:
    """The text between <tool_call> and its end: usually one JSON object, now and then several.

    names: of the tools that may be called; what only a lenient reader understands has to name one of them.
    """

    def __init__(self, names: Collection[str] = ()) -> None:
        self._names = names
        self._start = ""
        self._pieces: list[str] = []
        self._opened = False
        self._in_string = False
        self._escaped = False

    def add(self, text: str) -> bool:
        self._pieces.append(text)
        if not self._opened:
            self._start = (self._start + text).lstrip(_BLANK)
            if FENCE.startswith(self._start):
                return True
            if not self._start.startswith(("{", "[", FENCE)):
                return False
            self._opened, text = True, self._start
        for character in text:
            if self._escaped:
                self._escaped = False
            elif character == '"':
                self._in_string = not self._in_string
            elif character == "\\":
                # No JSON. To go on would let answers be made on which reading takes quadratic time.
                if not self._in_string:
                    return False
                self._escaped = True
        return True

    def holds(self, tag: Tag) -> bool:
        return self._in_string

    def calls(self, *, closed: bool) -> list[ToolCall] | None:
        body = "".join(self._pieces).strip(_BLANK)
        # Without the end tag it is not certain that the model had said all.
        return json_calls(body) or (repaired(body, json_calls, self._names) if closed else None)


def json_calls(body: str) -> list[ToolCall] | None:
    """The calls that JSON objects one after the other describe; None if there is none, or one of them is no call."""
    calls = []
    try:
        while body := body.lstrip(_BLANK):
            members, end = _members(body)
            call = _call(members)
            if call is None:
                return None
            calls.append(call)
            body = body[end:]
    except (ValueError, RecursionError):
        return None
    return calls or None


def checked_arguments(text: str) -> str | None:
    """`text`, if it is a JSON object; None otherwise. Line breaks and tabs bare inside its strings become escapes."""
    return checked_json(text, dict)


def checked_json(text: str, kind: type) -> str | None:
    """The same of a value that Python reads as `kind`."""
    text = text.strip(_BLANK)
    try:
        text.encode()  # half a surrogate pair, from an escape, could not be sent on
        if not isinstance(_DECODER.decode(text), kind):
            return None
    except (ValueError, RecursionError):
        return None
    if _CONTROL.search(text):
        text = _STRING.sub(
            lambda string: _CONTROL.sub(lambda match: json.dumps(match.group())[1:-1], string.group()), text
        )
    return text


def function_of(tool: Any, index: int) -> Mapping[str, Any]:
    """The function that a definition {"type": "function", "function": {...}}, or the inner object alone, describes.

    Raises ValueError naming tools[index] and what is wrong with it.
    """
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping):
        raise ValueError(f"tools[{index}] is not an object describing a function")
    name = function.get("name", function.get("name_for_model"))
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"tools[{index}] has the name {name!r}, allowed is text that is not empty")
    return function


def known_schemas(tools: Sequence[Any]) -> dict[str, Any]:
    """Tool name -> the schema of its arguments as it was given, of all tools that can be read."""
    found: dict[str, Any] = {}
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if isinstance(function, Mapping):
            name = function.get("name", function.get("name_for_model"))
            found[str(name)] = function.get("parameters")
    return found


def argument_schemas(tools: Sequence[Any], choice: str) -> dict[str, str]:
    """Tool name -> the JSON schema of its arguments as text, of all tools (choice "required") or of the one named.

    Without parameters a function takes none. Raises ValueError for a name that no tool has and for malformed tools.
    """
    schemas: dict[str, str] = {}
    for index, tool in enumerate(tools):
        function = function_of(tool, index)
        parameters = function.get("parameters")
        if parameters is None:
            parameters = {"properties": {}, "additionalProperties": False}
        if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
            raise ValueError(f"tools[{index}].parameters is not a JSON schema of the type 'object'")
        name = function.get("name", function.get("name_for_model"))
        schemas[str(name)] = json.dumps({**parameters, "type": "object"}, ensure_ascii=False)
    if choice != "required":
        if choice not in schemas:
            known = ", ".join(map(repr, schemas)) or "none, no tools were given"
            raise ValueError(f"tool_choice names {choice!r}, allowed are the tools {known}")
        return {choice: schemas[choice]}
    if not schemas:
        raise ValueError("tool_choice is 'required', which needs at least one tool in tools")
    return schemas


def hermes_grammar(schemas: Mapping[str, str], *, parallel: bool, tags: tuple[str, str]) -> str:
    """llguidance's lark text of one call, or with `parallel` of one or more, to these functions.

    tags: the start and end tag, each as the grammar's own name for a token or as a quoted string.
    """
    rules = grammar_start(len(schemas), parallel=parallel, tags=tags)
    for index, (name, schema) in enumerate(schemas.items()):
        opening = json.dumps(f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": ')
        rules.append(f'call_{index}: {opening} arguments_{index} "}}"')
        rules.append(f"arguments_{index}: {arguments_rule(name, schema)}")
    return "\n".join(rules) + "\n"


def arguments_rule(name: str, schema: str) -> str:
    """The right side of a rule of lark for the arguments of a tool. Raises ValueError naming the tool."""
    try:
        return f"%json {for_grammar(schema)}"
    except ValueError as error:
        raise ValueError(f"the parameters of the tool {name!r}: {error}") from None


def grammar_start(num_calls: int, *, parallel: bool, tags: tuple[str, str]) -> list[str]:
    """Lines of lark for an answer of calls in tags, each one of the rules call_0, call_1, ..."""
    return [
        # The breaks are what a model writes between a thought and what follows.
        'start: /\\n{0,2}/ call ("\\n" call)*' if parallel else "start: /\\n{0,2}/ call",
        f'call: {tags[0]} "\\n" ({" | ".join(f"call_{index}" for index in range(num_calls))}) "\\n" {tags[1]}',
    ]


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# Not strict: models write bare line breaks in strings. NaN and Infinity are Python's, not JSON's.
_DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse_constant)


def _members(text: str) -> tuple[dict[str, str], int]:
    """The members of the object that `text` begins with, each value as it is written, and where the object ends.

    Raises ValueError if `text` does not begin with an object, or names a member twice.
    """
    members: dict[str, str] = {}
    position = _after(text, 0, "{")
    if text[position : position + 1] == "}":
        return members, position + 1
    while True:
        if text[position : position + 1] != '"':
            raise ValueError("not JSON: a member's name is missing")
        key, position = _DECODER.raw_decode(text, position)
        position = _after(text, position, ":")
        _, end = _DECODER.raw_decode(text, position)
        if key in members:
            raise ValueError(f"the member {key} comes twice")
        members[key] = text[position:end]
        position = _skip(text, end)
        if text[position : position + 1] == "}":
            return members, position + 1
        position = _after(text, position, ",")


def _after(text: str, position: int, character: str) -> int:
    position = _skip(text, position)
    if text[position : position + 1] != character:
        raise ValueError(f"not JSON: {character} is missing")
    return _skip(text, position + 1)


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in _BLANK:
        position += 1
    return position


def _call(members: Mapping[str, str]) -> ToolCall | None:
    name = _DECODER.decode(members.get("name", "null"))
    if not isinstance(name, str) or not name.strip():
        return None
    name.encode()
    if any(key not in ("name", *ARGUMENTS) for key in members.keys() - _LABELS) or not _are_labels(members):
        return None
    written = [text for key in ARGUMENTS if (text := _object_text(members.get(key, "null"))) != "{}"]
    if len(written) > 1 or None in written:
        return None
    return ToolCall(name, (written[0] if written else None) or "{}")


def _are_labels(members: Mapping[str, str]) -> bool:
    """Whether what beside name and arguments stands in a call are values that cannot be arguments."""
    return all(not members.get(key, "null").startswith(("{", "[")) for key in _LABELS)


def _object_text(written: str) -> str | None:
    """The text of a JSON object; null is an empty one. None if it is none."""
    if written == "null":
        return "{}"
    if written.startswith('"'):  # arguments as the text of an object: models write this too
        written = _DECODER.decode(written)
    checked = checked_arguments(written)
    return "{}" if checked is not None and checked[1:-1].strip(_BLANK) == "" else checked
