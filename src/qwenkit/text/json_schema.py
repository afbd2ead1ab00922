"""JSON schemas as grammars take them: what they say in ways that llguidance would pass over, said in ways that it obeys.

In: a schema as JSON. Out: a schema for the same values, except that objects are closed: one with `properties` and without
`additionalProperties` takes no other fields, because models write fields without end otherwise. Older spellings (`nullable`,
boolean `exclusiveMinimum`, `required` inside of a property) become today's. Blanks between the parts of a value are bounded.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

# Between the tokens of JSON: a space, or a line break and indentation, so that a model cannot fill an answer with nothing.
WHITESPACE = r"[ ]{1,2}|\r?\n[ \t]{0,20}"

_ONE = (
    *("items", "additionalProperties", "additionalItems", "contains", "propertyNames", "not", "if", "then", "else"),
    *("unevaluatedProperties", "unevaluatedItems"),
)
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
# Beside one of these an object's fields are not all in its `properties`.
_APPLIED = ("allOf", "anyOf", "oneOf", "$ref", "$dynamicRef", "if", "then", "else", "dependentSchemas")
_REFUSED = ("extends", "disallow", "$recursiveRef")  # words of older drafts that llguidance does not know
# Patterns beside "format": "email" in schemas made by zod, which say the same, in the form of `_plain_pattern`.
_PATTERNS_OF_EMAIL = ("^(?!.)(?!.*..)([a-z0-9_.+-]*)[a-z0-9_+-]@([a-z0-9][a-z0-9-]*.)+[a-z]{2,}$",)


def for_grammar(source: str) -> str:
    """The schema `source` as JSON text that llguidance's lark takes after %json. Raises ValueError as `normalized` does."""
    schema = normalized(json.loads(source))
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    guidance = {"whitespace_pattern": WHITESPACE, "lenient": False}
    return json.dumps({**schema, "x-guidance": guidance}, ensure_ascii=False)


def normalized(schema: Any) -> Any:
    """The schema in the words that llguidance obeys, with closed objects.

    Raises ValueError for a word that it would pass over in silence, naming the word and where it stands.
    """
    return _Normalizer(schema).schema(schema, "", closing=True)


def subschemas(schema: Any) -> Iterator[tuple[str, Any]]:
    """(where, schema) of all schemas that stand right inside of one, in words such as properties.a or anyOf[0]."""
    if not isinstance(schema, Mapping):
        return
    for word in _NAMED:
        if isinstance(schema.get(word), Mapping):
            yield from ((f"{word}.{name}", one) for name, one in schema[word].items())
    for word in _LISTS:
        if isinstance(schema.get(word), list):
            yield from ((f"{word}[{index}]", one) for index, one in enumerate(schema[word]))
    for word in _ONE:
        if isinstance(schema.get(word), Mapping):
            yield word, schema[word]


def place(where: str) -> str:
    """A place in a schema, in words."""
    return where or "the top level"


class _Normalizer:
    def __init__(self, root: Any) -> None:
        self._open: set[str] = set()  # definitions whose fields another schema adds to
        self._find_open(root, root, merged=False, depth=0)

    def _find_open(self, schema: Any, root: Any, *, merged: bool, depth: int) -> None:
        """Note the definitions that stand for a part of an object only."""
        if not isinstance(schema, Mapping) or depth > 64:
            return
        reference = schema.get("$ref")
        if isinstance(reference, str) and (merged or _adds_fields(schema)) and reference not in self._open:
            self._open.add(reference)
            self._find_open(_target(root, reference), root, merged=True, depth=depth + 1)
        for where, one in subschemas(schema):
            inside = where.startswith(("allOf", "anyOf", "oneOf"))
            self._find_open(one, root, merged=inside and (merged or _parts(schema, where)), depth=depth + 1)

    def schema(self, schema: Any, where: str, *, closing: bool, depth: int = 0) -> Any:
        if not isinstance(schema, Mapping) or depth > 64:
            return schema
        done = dict(schema)
        for word in _REFUSED:
            if word in done:
                raise ValueError(f"grammar has a schema with the word {word} at {place(where)}, which is not supported")
        self._required_of_properties(done)
        for word in _NAMED:
            if isinstance(done.get(word), Mapping):
                done[word] = {
                    name: self.schema(
                        one,
                        _join(where, f"{word}.{name}"),
                        closing=f"#/{word}/{name}" not in self._open or word not in ("$defs", "definitions"),
                        depth=depth + 1,
                    )
                    for name, one in done[word].items()
                }
        for word in _LISTS:
            if isinstance(done.get(word), list):
                inside = word in ("allOf", "anyOf", "oneOf")
                done[word] = [
                    self.schema(
                        one,
                        _join(where, f"{word}[{index}]"),
                        closing=not inside or (closing and not _parts(schema, word)),
                        depth=depth + 1,
                    )
                    for index, one in enumerate(done[word])
                ]
        for word in _ONE:
            if isinstance(done.get(word), Mapping) and word not in ("not", "if", "then", "else", "contains"):
                done[word] = self.schema(done[word], _join(where, word), closing=True, depth=depth + 1)
        _older_words(done)
        if closing:
            _close(done)
        nullable = done.pop("nullable", None)
        if nullable is True and where:  # arguments as a whole are an object
            shared = {word: done.pop(word) for word in ("$defs", "definitions") if word in done}
            done = {"anyOf": [done, {"type": "null"}], **shared}
        return done

    @staticmethod
    def _required_of_properties(schema: dict[str, Any]) -> None:
        """Draft 3 says `required: true` inside of a property."""
        properties = schema.get("properties")
        if not isinstance(properties, Mapping):
            return
        flagged = [
            name
            for name, one in properties.items()
            if isinstance(one, Mapping) and isinstance(one.get("required"), bool)
        ]
        if not flagged:
            return
        named: list[Any] = [*schema["required"]] if isinstance(schema.get("required"), list) else []
        more = [name for name in flagged if properties[name]["required"] and name not in named]
        schema["properties"] = {
            name: {word: value for word, value in one.items() if word != "required"} if name in flagged else one
            for name, one in properties.items()
        }
        schema["required"] = [*named, *more]


def _older_words(schema: dict[str, Any]) -> None:
    """Words of older drafts, and patterns that say again what the format says."""
    for exclusive, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(schema.get(exclusive), bool) and schema.pop(exclusive) and bound in schema:
            schema[exclusive] = schema.pop(bound)
    if "divisibleBy" in schema:
        schema.setdefault("multipleOf", schema.pop("divisibleBy"))
    pattern = schema.get("pattern")
    if isinstance(pattern, str) and schema.get("format") == "email" and _plain_pattern(pattern) in _PATTERNS_OF_EMAIL:
        del schema["pattern"]


def _plain_pattern(pattern: str) -> str:
    """A pattern in a form in which spellings of the same one are equal; not to be matched with."""
    plain = pattern.replace("\\", "").replace("A-Za-z", "a-z").replace("'", "")
    return plain.replace("_+-.", "_.+-")


def _close(schema: dict[str, Any]) -> None:
    properties = schema.get("properties")
    if not isinstance(properties, Mapping) or "additionalProperties" in schema or _adds_fields(schema):
        return
    if "unevaluatedProperties" in schema:
        return
    required = schema.get("required")
    if isinstance(required, list):  # what must be there is a field, described or not
        missing = [name for name in required if isinstance(name, str) and name not in properties]
        if not isinstance(schema.get("patternProperties"), Mapping):
            schema["properties"] = {**properties, **{name: {} for name in missing}}
    schema["additionalProperties"] = False


def _adds_fields(schema: Mapping[str, Any]) -> bool:
    """Whether words beside `properties` or a reference describe more fields of the same object."""
    words = [word for word in _APPLIED if word in schema]
    if "properties" in schema:
        return any(_describes_fields(schema[word]) for word in words)
    return len(words) > 1


def _parts(schema: Mapping[str, Any], where: str) -> bool:
    """Whether the members of an allOf, anyOf or oneOf are parts of an object and not whole ones."""
    word = where.partition("[")[0]
    if "properties" in schema or any(other in schema for other in _APPLIED if other != word):
        return True
    return word == "allOf" and len(schema["allOf"]) > 1


def _describes_fields(schema: Any) -> bool:
    if isinstance(schema, str):  # a reference
        return True
    if isinstance(schema, list):
        return any(map(_describes_fields, schema))
    return isinstance(schema, Mapping) and any(
        word in schema for word in ("properties", "patternProperties", *_APPLIED)
    )


def _target(root: Any, reference: str) -> Any:
    found = root
    for step in reference.removeprefix("#").strip("/").split("/"):
        if step:
            found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found


def _join(where: str, more: str) -> str:
    return f"{where}.{more}" if where else more
