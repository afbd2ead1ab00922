"""Tool calls as Qwen3-Coder writes them: <tool_call>, <function=NAME>, a <parameter=KEY> for each argument, all closed again.

In: the text between the tags, while it arrives, and the schemas of the tools. Out: checked `ToolCall`s whose values have the
types that the schema gives them (the model writes them bare), or a verdict that this is no call; and the grammar that forces one.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from qwenkit.text.answer_tags import Tag
from qwenkit.text.json_schema import for_grammar
from qwenkit.text.tool_calls import ToolCall, checked_json, grammar_start

FUNCTION, FUNCTION_END = "<function=", "</function>"
_BLANK = " \t\r\n"
_HEAD = re.compile(r"\s*<function=([^<>\n]+)>")
_END = re.compile(r"\s*</function>\s*")
# A value may hold the end tag of a parameter: it ends where the next thing of the call follows.
_PARAMETER = re.compile(
    r"\s*<parameter=([^<>\n]+)>(.*?)</parameter>(?=\s*(?:<parameter=[^<>\n]+>|</function>))", re.DOTALL
)
_MAX_TAGS = 16  # in the values of one call; bounds how often a text that turns out to be no call is read again
_INTEGER = re.compile(r"-?(?:0|[1-9]\d*)")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?")
_TYPES = ("null", "boolean", "integer", "number", "array", "object", "string")  # the order in which a value is tried

Schemas = Mapping[str, Any]  # tool name -> the JSON schema of its arguments


class XmlCall:
    """The text between <tool_call> and its end: usually one <function=...>, now and then several."""

    def __init__(self, schemas: Schemas | None = None) -> None:
        self._schemas = schemas or {}
        self._pieces: list[str] = []
        self._start = ""
        self._opened = False
        self._in_value = False
        self._tail = ""  # the end of the text, in which half a tag may stand
        self._num_tags = 0

    def add(self, text: str) -> bool:
        self._pieces.append(text)
        if not self._opened:
            self._start = (self._start + text).lstrip(_BLANK)
            if not self._start.startswith(FUNCTION):
                return FUNCTION.startswith(self._start)
            self._opened, text = True, self._start
        tail = self._tail + text
        opened, closed = tail.rfind("<parameter="), tail.rfind("</parameter>")
        if opened != closed:
            self._in_value = opened > closed
        self._tail = tail[-len("</parameter>") :]
        return True

    def holds(self, tag: Tag) -> bool:
        self._num_tags += self._in_value
        return self._in_value and self._num_tags <= _MAX_TAGS

    def calls(self, *, closed: bool) -> list[ToolCall] | None:
        return xml_calls("".join(self._pieces), self._schemas)


def xml_calls(body: str, schemas: Schemas) -> list[ToolCall] | None:
    """The calls in `body`; None if there is none, or if a call would leave out some of what is written."""
    calls: list[ToolCall] = []
    position = 0
    while body[position:].strip(_BLANK):
        head = _HEAD.match(body, position)
        if head is None:
            return None
        name, position = head[1].strip(), head.end()
        arguments: dict[str, str] = {}
        schema = schemas.get(name)
        while (found := _PARAMETER.match(body, position)) is not None:
            key, position = found[1].strip(), found.end()
            if not key or key in arguments:
                return None
            arguments[key] = _as_json(_bare(found[2]), _property(schema, key), schema)
        end = _END.match(body, position)
        if end is None or not name:
            return None
        position = end.end()
        members = ", ".join(f"{json.dumps(key, ensure_ascii=False)}: {text}" for key, text in arguments.items())
        calls.append(ToolCall(name, f"{{{members}}}"))
    return calls or None


def _bare(value: str) -> str:
    """A value without the line breaks that belong to its tags."""
    return re.sub(r"\A\r?\n|\r?\n\Z", "", value)


def _property(schema: Any, key: str) -> Any:
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return properties.get(key) if isinstance(properties, Mapping) else None


def _as_json(value: str, schema: Any, root: Any) -> str:
    """`value` as JSON text of the first type of the schema that it can be; else, and without a schema, as a string."""
    for kind in _TYPES:
        if kind in _types(schema, root, 0) and (text := _typed(value, kind)) is not None:
            return text
    return json.dumps(value, ensure_ascii=False)


def _typed(value: str, kind: str) -> str | None:
    text = value.strip(_BLANK)
    if kind == "string":
        return json.dumps(value, ensure_ascii=False)
    if kind == "null":
        return "null" if text in ("null", "None") else None
    if kind == "boolean":
        return text.lower() if text.lower() in ("true", "false") else None
    if kind in ("integer", "number"):
        is_number = (_INTEGER if kind == "integer" else _NUMBER).fullmatch(text) is not None
        return text if is_number and (kind == "integer" or math.isfinite(float(text))) else None
    return checked_json(text, list if kind == "array" else dict)


def _types(schema: Any, root: Any, depth: int) -> set[str]:
    """The types that a value may have; a schema that does not say means text, as the model's own template does."""
    if not isinstance(schema, Mapping) or depth > 8:
        return set()
    found: set[str] = {"null"} if schema.get("nullable") is True else set()
    named = schema.get("type")
    if named is not None:
        return found | {str(kind) for kind in (named if isinstance(named, list) else [named])}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        target = root
        for step in reference[1:].strip("/").split("/") if reference != "#" else ():
            target = target.get(step) if isinstance(target, Mapping) else None
        found |= _types(target, root, depth + 1)
    for word in ("anyOf", "oneOf", "allOf"):
        for one in schema.get(word) or () if isinstance(schema.get(word), list) else ():
            found |= _types(one, root, depth + 1)
    values = schema.get("enum") if isinstance(schema.get("enum"), list) else None
    if values is None and "const" in schema:
        values = [schema["const"]]
    for one in values or ():
        found.add(_type_of(one))
    if "properties" in schema:
        found.add("object")
    if "items" in schema:
        found.add("array")
    return found


def _type_of(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    kinds = {int: "integer", float: "number", str: "string", list: "array"}
    return kinds.get(type(value), "object")


_TEXT = "xml_text"
_ANNOTATIONS = {"title", "description", "default", "examples", "$schema", "$id", "$comment", "strict", "nullable"}
_KNOWN = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"} | _ANNOTATIONS


def xml_grammar(schemas: Mapping[str, str], *, parallel: bool, tags: tuple[str, str]) -> str:
    """llguidance's lark text of one call, or with `parallel` of one or more, to these functions.

    schemas and tags: as in `hermes_grammar`. Parameters come in the order of the schema. Raises ValueError for a schema with
    a word that the form of these calls has no place for, naming the function and the word.
    """
    rules = [
        *grammar_start(len(schemas), parallel=parallel, tags=tags),
        # Text up to the end tag, of which it holds nothing.
        f'{_TEXT}[suffix="\\n</parameter>\\n"]: /(.|\\n)*/',
    ]
    for index, (name, source) in enumerate(schemas.items()):
        schema = json.loads(source)
        for word in schema:
            if word not in _KNOWN and not word.startswith("x-"):
                raise ValueError(
                    f"tools: the parameters of {name!r} have {word}, which calls of this model cannot obey"
                )
        parts = [json.dumps(f"<function={name}>\n")]
        required = schema.get("required") or ()
        for number, (key, value) in enumerate((schema.get("properties") or {}).items()):
            rule = f"parameter_{index}_{number}"
            rules += _parameter_rules(rule, key, value, schema)
            parts.append(rule if key in required else f"{rule}?")
        more = schema.get("additionalProperties", not schema.get("properties"))
        if more is not False:
            rules.append(f'more_{index}: "<parameter=" /[^<>\\n]{{1,64}}/ ">\\n" {_TEXT}')
            parts.append(f"more_{index}*")
        rules.append(f"call_{index}: {' '.join(parts)} {json.dumps(FUNCTION_END)}")
    return "\n".join(rules) + "\n"


def _parameter_rules(rule: str, key: str, schema: Any, root: Mapping[str, Any]) -> Iterator[str]:
    opening, closing = json.dumps(f"<parameter={key}>\n"), json.dumps("\n</parameter>\n")
    kinds = _types(schema, root, 0)
    if not kinds or "string" in kinds:
        values = schema.get("enum", [schema["const"]] if "const" in schema else None) if kinds else None
        if isinstance(values, list) and values:
            texts = (one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in values)
            yield f"{rule}: {opening} ({' | '.join(map(json.dumps, texts))}) {closing}"
            return
        for word in ("not", "if", "allOf"):
            if word in schema:
                raise ValueError(f"tools: the parameter {key!r} has {word}, which calls of this model cannot obey")
        bounds = [*_pattern(schema), *_size(schema)] if kinds == {"string"} else []
        if bounds:
            yield f"{rule}: {opening} {rule.upper()} {closing}"
            yield f"{rule.upper()}: {' & '.join(bounds)}"
            return
        yield f"{rule}: {opening} {_TEXT}"
        return
    shared = {word: root[word] for word in ("$defs", "definitions") if word in root}
    yield f"{rule}: {opening} {rule}_value {closing}"
    yield f"{rule}_value: %json {for_grammar(json.dumps({**schema, **shared}, ensure_ascii=False))}"


def _size(schema: Mapping[str, Any]) -> Iterator[str]:
    """The bounds of a string's length as a pattern of lark."""
    least, most = schema.get("minLength"), schema.get("maxLength")
    if least is not None or most is not None:
        yield f"/(.|\\n){{{least or 0},{'' if most is None else most}}}/"


def _pattern(schema: Mapping[str, Any]) -> Iterator[str]:
    """A schema's pattern, which a value only has to contain, as a pattern of lark, which all of it matches."""
    pattern = schema.get("pattern")
    if isinstance(pattern, str):
        start, inner = ("", pattern[1:]) if pattern.startswith("^") else (r"(.|\n)*", pattern)
        end, inner = ("", inner[:-1]) if inner.endswith("$") and not inner.endswith("\\$") else (r"(.|\n)*", inner)
        inner = re.sub(r"\\.|/", lambda found: "\\/" if found[0] == "/" else found[0], inner, flags=re.DOTALL)
        yield f"/{start}({inner}){end}/"
