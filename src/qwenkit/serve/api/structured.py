"""What shape an answer must have: the many fields in which clients say it, as one Grammar.

In: response_format, vLLM's guided_* and structured_outputs. Out: a Grammar or None; and, where the model may call tools as well, one
grammar that allows either. Compiling and limits are the engine's (engine/grammar_compiler.py).
"""

from __future__ import annotations

import json
from typing import Any

from qwenkit.engine.grammar import Grammar
from qwenkit.serve.api.protocol import GenerationRequest
from qwenkit.serve.errors import ApiError


def grammar_of(request: GenerationRequest) -> tuple[Grammar, str] | None:
    """The grammar asked for and the field that asks; None for free text.

    Raises ApiError for two of them at once, and for a schema given as text that is no JSON.
    """
    found = _asked(request)
    if len(found) > 1:
        fields = " and ".join(field for _, field in found)
        raise ApiError(400, f"{fields} all say what the answer must look like, give one of them", param=found[1][1])
    return found[0] if found else None


def _asked(request: GenerationRequest) -> list[tuple[Grammar, str]]:
    found: list[tuple[Grammar, str]] = []
    wanted = request.response_format
    if wanted is not None and wanted.type == "json_object":
        found.append((Grammar("json_object", ""), "response_format"))
    elif wanted is not None and wanted.json_schema is not None:
        found.append((_schema(wanted.json_schema.schema_, "response_format"), "response_format"))
    given: list[tuple[str, str, Any]] = [
        ("json", "guided_json", request.guided_json),
        ("regex", "guided_regex", request.guided_regex),
        ("choice", "guided_choice", request.guided_choice),
        ("grammar", "guided_grammar", request.guided_grammar),
    ]
    newer = request.structured_outputs
    if newer is not None:
        given += [
            (kind, f"structured_outputs.{kind}", value)
            for kind, value in (
                ("json", newer.json_),
                ("regex", newer.regex),
                ("choice", newer.choice),
                ("grammar", newer.grammar),
                ("json_object", newer.json_object),
            )
        ]
    found += [(_grammar(kind, value, field), field) for kind, field, value in given if value is not None]
    return found


def _grammar(kind: str, value: Any, field: str) -> Grammar:
    if kind == "json":
        return _schema(value, field)
    if kind == "regex":
        return Grammar("regex", value)
    if kind == "choice":
        return Grammar("choice", json.dumps(value, ensure_ascii=False))
    if kind == "grammar":
        return Grammar("lark", value)
    return Grammar("json_object", "")


def _schema(schema: Any, field: str) -> Grammar:
    """A schema as a JSON value or as text."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            schema = None
        if not isinstance(schema, dict | bool):
            raise ApiError(400, f"{field} is text that is not a JSON schema", param=field)
    try:
        return Grammar("json_schema", json.dumps(schema, ensure_ascii=False))
    except RecursionError:
        raise ApiError(400, f"{field} is nested too deeply", param=field) from None
