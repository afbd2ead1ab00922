"""Where in a schema the part stands that no grammar can be made from, and what a client can do about it.

In: a schema, what compiling it said, and a way to try parts of it. Out: the same sentence with the place, so that whoever sent
many schemas, or a long one, finds the word.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from qwenkit.text.json_schema import place, subschemas

MAX_TRIALS = 200  # parts of a schema that are compiled alone

Compile = Callable[[str], "str | None"]  # the text of a schema -> what is wrong with it


def locate(source: str, message: str, compile: Compile) -> str:
    """`message`, which compiling the schema `source` gave, with the place of the smallest part that gives one too."""
    root = json.loads(source)
    if not isinstance(root, Mapping):
        return message
    shared = {word: root[word] for word in ("$defs", "definitions") if word in root}
    where, schema, trials = "", root, 0
    while True:
        for name, part in subschemas(schema):
            if not isinstance(part, Mapping) or trials >= MAX_TRIALS:
                continue
            trials += 1
            # Definitions are tried as parts of the root, and needed by everything else.
            is_definition = name.startswith(("$defs.", "definitions."))
            wrong = compile(json.dumps(part if is_definition else {**shared, **part}))
            if wrong is not None and not (is_definition and "does not exist" in wrong):
                where, schema, message = f"{where}.{name}" if where else name, part, wrong
                break
        else:
            return f"{message}, at {place(where)} of the schema"


def words_of_a_client(message: str) -> str:
    """A compiler's sentence about a schema without options of the compiler: what the schema can say instead."""
    if "oneOf" in message and "not supported" in message:
        return (
            "grammar has a schema with oneOf whose alternatives may both match: use anyOf, or give each alternative a required "
            "property with a const of its own"
        )
    return message.replace("failed to compile JSON schema: ", "")
