"""One meaning, several spellings: forms of a request that other servers and clients use, in the form of OpenAI's chat.

In: parts of a JSON body before they are validated. Out: the same in the form that the models of protocol.py describe; what has no
known form is returned as it is, for the models to refuse by name. `RequestModel.simplify` of each route calls these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwenkit.serve.api import unsupported
from qwenkit.serve.body import LeftOut
from qwenkit.serve.errors import ApiError

_CHOICES = {"auto": "auto", "none": "none", "required": "required", "any": "required"}
_TRUTH = {"true": True, "false": False}
_OF_FUNCTION = ("name", "description", "parameters", "strict")


def truth(value: Any) -> Any:
    """ "true" and "false", in whatever case, as what they say."""
    return _TRUTH.get(value.lower(), value) if isinstance(value, str) else value


def function_tool(tool: Any) -> Any:
    """A tool in OpenAI's shape, also where its function stands flat beside the type or is written in Anthropic's words."""
    if not isinstance(tool, dict):
        return tool
    function = tool.get("function")
    if not isinstance(function, dict):
        if "name" not in tool:
            return tool
        function = {name: tool[name] for name in _OF_FUNCTION if name in tool}
    if "parameters" not in function and isinstance(function.get("input_schema", tool.get("input_schema")), dict):
        function = {**function, "parameters": function.get("input_schema", tool.get("input_schema"))}
    return {"type": "function", "function": function}


def parameters(given: Any) -> Any:
    """The schema of a function's arguments, also from Qwen-Agent's list of {name, type, description, required}."""
    if not isinstance(given, list) or not all(
        isinstance(one, dict) and isinstance(one.get("name"), str) for one in given
    ):
        return given
    return {
        "type": "object",
        "properties": {
            one["name"]: {word: value for word, value in one.items() if word not in ("name", "required")}
            for one in given
        },
        "required": [one["name"] for one in given if one.get("required") is True],
    }


def function_choice(choice: Any) -> Any:
    """A tool_choice as auto, none, required, {"type": "function", "function": {"name": ...}} or OpenAI's allowed_tools."""
    if isinstance(choice, str):
        return _CHOICES.get(choice, {"type": "function", "function": {"name": choice}})
    if not isinstance(choice, dict):
        return choice
    kind = choice.get("type")
    function = choice.get("function")
    if isinstance(kind, str) and kind in _CHOICES and function is None and choice.get("name") is None:
        return _CHOICES[kind]
    if kind == "allowed_tools":
        allowed = choice.get("allowed_tools")
        if not isinstance(allowed, dict):
            allowed = {name: choice[name] for name in ("mode", "tools") if name in choice}
        tools = allowed.get("tools")
        if isinstance(tools, list):
            allowed = {**allowed, "tools": [function_choice(tool) for tool in tools]}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    name = function.get("name") if isinstance(function, dict) else choice.get("name")
    return choice if name is None else {"type": "function", "function": {"name": name}}


def runnable_tools(body: dict[str, Any], left_out: LeftOut) -> dict[str, Any]:
    """`body` without tools that a server would have to run, such as a web search; they are told as left out.

    Raises ApiError 400 where the answer must use one of them.
    """
    tools = body.get("tools")
    if not isinstance(tools, list):
        return body
    kept, dropped = [], []
    for index, tool in enumerate(tools):
        kind = tool.get("type") if isinstance(tool, dict) else None
        own = kind in (None, "function") or (kind == "custom" and "input_schema" in tool)
        if own or not isinstance(kind, str):
            kept.append(tool)
        else:
            dropped.append((kind, tool.get("name", kind)))
            left_out.add(f"tools.{index}")
    if not dropped:
        return body
    choice = function_choice(body.get("tool_choice"))
    named = choice.get("function", {}).get("name") if isinstance(choice, dict) else None
    refused = next((kind for kind, name in dropped if named in (kind, name)), None)
    if refused is None and choice == "required" and not kept:
        refused = dropped[0][0]
    if refused is not None:
        raise ApiError(
            400,
            f"tool_choice asks for a tool of the type {refused[:100]!r}, which this server cannot run, allowed are functions",
            param="tool_choice",
            code="invalid_value",
        )
    body = {**body, "tools": kept}
    if not kept:
        body.pop("tool_choice", None)
    return body


def thinking(body: dict[str, Any]) -> dict[str, Any]:
    """What other servers call `reasoning` and `thinking`, as reasoning_effort and enable_thinking. Raises ApiError 400."""
    body = dict(body)
    reasoning = body.get("reasoning")
    if isinstance(reasoning, dict):
        del body["reasoning"]
        unsupported.BUDGET.check("reasoning.max_tokens", reasoning.get("max_tokens", -1))
        unsupported.THOUGHT_LEFT_OUT.check("reasoning.exclude", reasoning.get("exclude", False))
        if reasoning.get("effort") is not None:
            body.setdefault("reasoning_effort", reasoning["effort"])
        if reasoning.get("enabled") is not None:
            body.setdefault("enable_thinking", reasoning["enabled"])
    given = body.get("thinking")
    if isinstance(given, dict) and given.get("type") in ("enabled", "disabled", "auto", "adaptive"):
        del body["thinking"]
        if given["type"] in ("enabled", "disabled"):
            body.setdefault("enable_thinking", given["type"] == "enabled")
    elif isinstance(given, bool):
        del body["thinking"]
        body.setdefault("enable_thinking", given)
    return body


def renamed(body: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """`body` with the fields `names` under the names of this API; a field that is there under both counts as it is here."""
    if not names.keys() & body.keys():
        return body
    rest = {name: value for name, value in body.items() if name not in names}
    return {names[name]: value for name, value in body.items() if name in names} | rest
