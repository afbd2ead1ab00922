"""What shape an answer must have: the many fields in which clients say it, as one Grammar.

In: response_format, vLLM's guided_* and structured_outputs. Out: a Grammar or None; and around it one that lets the model think
first or call a tool instead. Compiling and limits are the engine's (engine/grammar_compiler.py).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from qwenkit.engine.grammar import Grammar, choice_rules
from qwenkit.engine.grammar_compiler import GrammarBusyError, GrammarCompiler
from qwenkit.serve.api.protocol import GenerationRequest
from qwenkit.serve.caller import caller
from qwenkit.serve.errors import ApiError
from qwenkit.text.answer import THINK, THINK_END
from qwenkit.text.json_schema import for_grammar
from qwenkit.text.tokenizer import Tokenizer

RETRY_AFTER = "5"  # seconds
GrammarParts = Callable[[], Sequence[tuple[str, Grammar]]]
"""The schemas that a grammar is made from, each with its name in errors."""


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
        return checked(field, Grammar, "regex", value)
    if kind == "choice":
        return checked(field, Grammar, "choice", json.dumps(value, ensure_ascii=False))
    if kind == "grammar":
        return checked(field, Grammar, "lark", value)
    return Grammar("json_object")


def _schema(schema: Any, field: str) -> Grammar:
    """A schema as a JSON value or as text."""
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
    except RecursionError:
        raise ApiError(400, f"{field} is nested too deeply", param=field, code="invalid_grammar") from None
    return checked(field, Grammar, "json_schema", text)


def checked(field: str, make: Callable[..., Grammar], *args: Any) -> Grammar:
    """What `make` gives; its ValueError as ApiError."""
    try:
        return make(*args)
    except ValueError as error:
        raise bad_grammar(field, error) from None


def bad_grammar(field: str, error: ValueError) -> ApiError:
    """400 that names the request's field, from a sentence of the engine about a grammar."""
    return ApiError(400, f"{field}: {error}", param=field, code="invalid_grammar")


async def check_compiles(compiler: GrammarCompiler, grammar: Grammar, field: str, parts: GrammarParts = tuple) -> None:
    """Compile a grammar on trial, in the turn of the caller of the running task.

    parts: compiled one by one where the whole is refused, to name the one at fault, for no longer than one grammar may take.
    Raises ApiError: 400 for one that cannot be used, 429 where too many grammars of the same caller wait.
    """
    try:
        await _compile(compiler, grammar, field)
    except ValueError as error:
        wrong, deadline = error, time.monotonic() + compiler.timeout
        for name, part in parts():
            if time.monotonic() > deadline:
                break
            try:
                await _compile(compiler, part, field)
            except ValueError as reason:
                wrong = ValueError(f"{name}: {reason}" if name else str(reason))
                break
        raise bad_grammar(field, wrong) from None


async def _compile(compiler: GrammarCompiler, grammar: Grammar, field: str) -> None:
    try:
        await compiler.check_async(grammar, caller.get().namespace)
    except GrammarBusyError as error:
        raise ApiError(
            429, f"{field}: {error}", "rate_limit_error", field, "queue_full", {"Retry-After": RETRY_AFTER}
        ) from None


def among(grammar: Grammar, tokenizer: Tokenizer, *, may_think: bool, calls: str = "") -> Grammar:
    """`grammar` after a thought that the model may begin with, or instead of it the tool calls of the lark text `calls`.

    Both are grammars of the whole answer, so that the engine needs no word about either.
    """
    rules = [f"start: {'thought? ' if may_think else ''}({'calls | ' if calls else ''}answer)"]
    if may_think:
        rules += [
            f"thought: {_tag(tokenizer, THINK)} THOUGHT {_tag(tokenizer, THINK_END)} /\\n{{0,2}}/",
            r"THOUGHT: /(.|\n)*/",
        ]
    if calls:
        rules.append(re.sub(r"^start:", "calls:", calls.strip(), count=1, flags=re.MULTILINE))
    if grammar.kind == "choice":
        rules += choice_rules("answer", json.loads(grammar.source))
    else:
        rules.append(f"answer: {_inline(grammar)}")
    return Grammar("lark", "\n".join(rules) + "\n")


def _tag(tokenizer: Tokenizer, tag: str) -> str:
    token = tokenizer.token_id(tag)
    return f'"{tag}"' if token is None else f"<[{token}]>"


def _inline(grammar: Grammar) -> str:
    """A grammar as the right side of a rule in llguidance's lark."""
    source = grammar.source
    if grammar.kind == "lark":
        return f"%lark {{\n{source}\n}}"
    if grammar.kind == "regex":
        pattern = re.sub(r"\\.|/", lambda match: "\\/" if match[0] == "/" else match[0], source, flags=re.DOTALL)
        return "/" + pattern.replace("\n", "\\n") + "/"
    # as strict as the engine is with a schema that stands alone
    return "%json " + for_grammar('{"type": "object"}' if grammar.kind == "json_object" else source)
