"""Tools as Qwen-1 knows them: ReAct, lines that begin with Thought:, Action:, Action Input:, Observation:, Final Answer:.

In: tool definitions and calls in the OpenAI shape. Out: the instruction and the lines the model was trained on (those of
the original openai_api.py), the grammar that forces a call, and a reader of the text that follows "Action:". One answer
calls one tool, because the model waits for the observation; its input must be a JSON object to count as a call.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qwenkit.text.answer_tags import Tag
from qwenkit.text.tool_calls import ToolCall, arguments_rule, checked_arguments, function_of

THOUGHT, ACTION, ACTION_INPUT = "Thought:", "Action:", "Action Input:"
OBSERVATION, FINAL_ANSWER = "Observation:", "Final Answer:"

_INSTRUCTION = """Answer the following questions as best you can. You have access to the following APIs:

{descriptions}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!"""


def instruction(tools: Sequence[Any]) -> str:
    """What stands before "Question: ..." in the user's turn. A tool may also carry Qwen-1's plugin fields
    (name_for_model, name_for_human, description_for_model). Raises ValueError naming a malformed tool.
    """
    names, descriptions = [], []
    for index, tool in enumerate(tools):
        function = function_of(tool, index)
        name = function.get("name", "")
        for_model = str(function.get("name_for_model", name))
        if "\n" in for_model:
            raise ValueError(f"tools[{index}] has the name {for_model!r}, allowed is a single line")
        about = function.get("description_for_model", function.get("description")) or ""
        parameters = json.dumps(function.get("parameters") or {}, ensure_ascii=False)
        api = function.get("name_for_human", name or for_model)
        names.append(for_model)
        descriptions.append(
            f"{for_model}: Call this tool to interact with the {api} API. What is the {api} API useful for? "
            f"{about} Parameters: {parameters}"
        )
    return _INSTRUCTION.format(descriptions="\n\n".join(descriptions), names=", ".join(names))


Parts = list[tuple[str, bool]]  # the text of one turn in pieces, each with whether the assistant wrote it


def turns(messages: Sequence[Mapping[str, Any]], offset: int, tools: Sequence[Any]) -> list[tuple[str, Parts]]:
    """User's and assistant's turns in turn: calls, their results and the answer after them become one assistant turn.

    messages: as the caller wrote them but with contents as text, without the system message; the first is
    messages[offset] in errors. The instruction goes where the original puts it, into the last user turn that has been
    answered, else into the last one. Raises ValueError naming a message that comes at the wrong place.
    """
    done: list[tuple[str, Parts]] = []
    calls: list[
        tuple[str, Any]
    ] = []  # of several calls made at once those without a result yet; the first has been told
    previous = ""
    for index, message in enumerate(_in_order_of_calls(messages)):
        field, role, content = f"messages[{offset + index}]", message["role"], _trimmed(message["content"])
        after = {"user": ("", "assistant", "tool"), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}.get(
            role, ()
        )
        if previous not in after:
            raise ValueError(
                f"{field}.role is {role!r}, which cannot come here: Qwen-1 takes one system message first, then user and "
                "assistant in turn, and tool results after the assistant's call"
            )
        if calls and role != "tool":
            break
        if role == "user":
            done.append((role, [(content, False)]))
        elif role == "tool":
            done[-1][1].append((f"\n{OBSERVATION} {content}", False))
            if calls[1:]:
                done[-1][1].append((f"\n{_call_lines('', *calls[1])}", True))
            calls = calls[1:]
        else:
            lines, calls = _assistant_lines(message, content, field, answering=bool(tools))
            if previous == "user":
                done.append((role, [(lines, True)]))
            else:
                done[-1][1].append((f"\n{lines}", True))
        previous = role
    if calls:
        raise ValueError(
            f"{calls[0][0]}: its result is missing; Qwen-1 makes one call at a time and goes on after the result"
        )
    if tools and done:
        last = max(index for index, (role, _) in enumerate(done) if role == "user")
        answered = last - 2 if last == len(done) - 1 and last >= 2 else last
        done[answered] = asked(done[answered], tools)
    return done


def asked(turn: tuple[str, Parts], tools: Sequence[Any]) -> tuple[str, Parts]:
    """A user's turn with the instruction before its question."""
    role, parts = turn
    return role, [(f"{instruction(tools)}\n\nQuestion: ", False), *parts]


def _assistant_lines(
    message: Mapping[str, Any], content: str, field: str, *, answering: bool
) -> tuple[str, list[tuple[str, Any]]]:
    """What the assistant said, with its first call; and its calls, if they are several."""
    reasoning = message.get("reasoning_content")
    thought = _trimmed(reasoning) if isinstance(reasoning, str) else ""
    calls = [(f"{field}.tool_calls[{number}]", call) for number, call in enumerate(message.get("tool_calls") or ())]
    if calls:
        return _call_lines("\n".join(filter(None, (thought, content))), *calls[0]), calls if calls[1:] else []
    if answering:
        content = f"{THOUGHT} {thought or 'I now know the final answer.'}\n{FINAL_ANSWER} {content}"
    return content, []


def _in_order_of_calls(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages, with the results of several calls made at once in the order of the calls."""
    ordered: list[Mapping[str, Any]] = []
    places: dict[Any, int] = {}
    start = 0  # where the results now being read begin in `ordered`
    for message in messages:
        ordered.append(message)
        if message["role"] == "tool":
            ordered[start:] = sorted(ordered[start:], key=lambda result: places.get(str(result.get("tool_call_id")), 0))
        else:
            places = {str(call.get("id")): place for place, call in enumerate(message.get("tool_calls") or ())}
            start = len(ordered)
    return ordered


def _trimmed(text: str) -> str:
    return text.lstrip("\n").rstrip()


def _call_lines(thought: str, field: str, call: Mapping[str, Any]) -> str:
    function = call.get("function", call)
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise ValueError(f"{field}.function.name is {name!r}, allowed is text that is not empty")
    arguments = function.get("arguments")
    if arguments is None:
        arguments = ""
    elif not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not thought.startswith(THOUGHT):
        thought = f"{THOUGHT} {thought}"
    return f"{thought}\n{ACTION} {name}\n{ACTION_INPUT} {arguments}".rstrip()


def react_grammar(schemas: Mapping[str, str]) -> str:
    """llguidance's lark text of a thought and a call to one of these functions."""
    rules = [
        f'start: THOUGHT "\\n{ACTION} " ({" | ".join(f"call_{index}" for index in range(len(schemas)))})',
        # One line, of bounded length: a call must come. It begins with "Thought:" unless the prompt already does.
        "THOUGHT: /[^\\n]{0,1000}/",
    ]
    for index, (name, schema) in enumerate(schemas.items()):
        if "\n" in name:
            raise ValueError(f"tools: a function is named {name!r}, allowed is a single line")
        rules.append(f"call_{index}: {json.dumps(f'{name}{chr(10)}{ACTION_INPUT} ')} arguments_{index}")
        rules.append(f"arguments_{index}: {arguments_rule(name, schema)}")
    return "\n".join(rules) + "\n"


class ReactCall:
    """The text after "Action:": a name, then on the next line "Action Input:" and a JSON object."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._named = False

    def add(self, text: str) -> bool:
        self._pieces.append(text)
        if self._named:
            return True
        name, newline, rest = "".join(self._pieces).partition("\n")
        rest = rest.lstrip()
        if not newline or not rest:
            return True
        self._named = bool(name.strip()) and rest.startswith(ACTION_INPUT)
        return self._named

    def holds(self, tag: Tag) -> bool:
        return tag.text == ACTION_INPUT

    def calls(self, *, closed: bool) -> list[ToolCall] | None:
        name, marker, arguments = "".join(self._pieces).partition(f"\n{ACTION_INPUT}")
        checked = checked_arguments(arguments)
        if not marker or not name.strip() or checked is None:
            return None
        return [ToolCall(name.strip(), checked)]
