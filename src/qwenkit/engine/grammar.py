"""Grammar: what an answer must look like, and its compilation by llguidance for one vocabulary.

In: a JSON schema, a pattern, choices or a lark grammar as text. Out: a checked `Grammar`, and from it llguidance's matcher with
limits on the work of each step. llguidance (extra `serve`) is imported when a grammar is first compiled; neither torch nor numpy
is imported here, for the process that compiles on trial (grammar_worker.py) starts with this file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from qwenkit.engine.grammar_fault import words_of_a_client
from qwenkit.installation import install_extra
from qwenkit.text.json_schema import WHITESPACE, normalized

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Kind = Literal["json_schema", "json_object", "regex", "choice", "lark"]
KINDS: tuple[str, ...] = get_args(Kind)
MAX_DEPTH = 64  # levels of a schema
MAX_OPTIONAL = 400  # properties of one object that are not required
MAX_ENTRIES = 20_000  # keys and items of a schema in all

# Work of one step; the engine waits for it, so the limits are below llguidance's own. In its measure about 10 ms each.
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 150_000,
    "step_max_items": 30_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 250_000,
    "verbose_errors": False,
}


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like.

    `source` is the schema as JSON text, the pattern (Rust's syntax, the whole answer matches), the choices as a JSON list of
    texts, or the lark grammar in llguidance's dialect; it is empty for json_object. Raises ValueError, one sentence, for what
    can be told without compiling.
    """

    kind: Kind
    source: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"grammar has the kind {self.kind!r}, allowed are {', '.join(KINDS)}")
        if not isinstance(self.source, str):
            raise ValueError(f"grammar has a source of type {type(self.source).__name__}, allowed is a text")
        try:
            self.source.encode()
        except UnicodeEncodeError:
            raise ValueError("grammar has half a surrogate pair in its source, which is no character") from None
        if self.kind == "json_object":
            if self.source:
                raise ValueError("grammar of kind json_object has a source, allowed is none; a schema is a json_schema")
        elif self.kind == "json_schema":
            _check_schema(_decode(self.kind, self.source))
        elif self.kind == "choice":
            _choices(self.source)
        elif self.kind == "lark" and not self.source.strip():
            raise ValueError("grammar of kind lark has an empty source, allowed is a grammar with a rule start")

    @classmethod
    def from_json(cls, value: object) -> Grammar:
        """A grammar from a decoded JSON object with "kind" and "source", which may be the schema or the choices themselves."""
        if not isinstance(value, dict) or not set(value) <= {"kind", "source"} or "kind" not in value:
            raise ValueError(
                'grammar is an object such as {"kind": "regex", "source": "[a-z]+"}, given was another value'
            )
        source = value.get("source", "")
        if value["kind"] in ("json_schema", "choice") and not isinstance(source, str):
            source = json.dumps(source)
        return cls(value["kind"], source)


def build_vocabulary(
    tokens: Sequence[bytes], special_ids: Sequence[int], encode: Callable[[bytes], list[int]]
) -> LLTokenizer:
    """llguidance's view of a vocabulary: the bytes of every id, and how forced text is written in tokens.

    One id after the last of `tokens` is added as the end of an answer: which tokens really end it is the engine's business.
    `special_ids` are control tokens: no text matches them, a lark grammar names them. `encode` may give tokens that spell
    something else (where the vocabulary normalises), then the longest tokens that fit are taken.
    """
    llguidance = require_llguidance()

    class Source:
        eos_token_id = len(tokens)
        bos_token_id = None

        def __init__(self) -> None:
            self.tokens = [*tokens, b"<|end of answer|>"]
            self.special_token_ids = [*special_ids, len(tokens)]
            self.vocabulary: LLTokenizer | None = None

        def __call__(self, text: bytes | str) -> list[int]:
            data = text.encode() if isinstance(text, str) else text
            ids = encode(data)
            if b"".join(self.tokens[id] for id in ids) == data or self.vocabulary is None:
                return ids
            greedy: list[int] = self.vocabulary.greedy_tokenize(data.decode())
            return greedy

    source = Source()
    wrapper = llguidance.TokenizerWrapper(source)
    source.vocabulary = llguidance.LLTokenizer(wrapper, n_vocab=len(source.tokens), eos_token=len(tokens))
    return source.vocabulary


def compile_grammar(grammar: Grammar, vocabulary: LLTokenizer) -> LLMatcher:
    """A matcher at the start of an answer, its first mask computed. Raises ValueError, one sentence, if it cannot be."""
    llguidance = require_llguidance()
    try:
        text = _as_llguidance(grammar)
    except ValueError as error:
        raise ValueError(_sentence(str(error))) from None
    limits = llguidance.LLParserLimits(**_LIMITS)
    matcher: LLMatcher = llguidance.LLMatcher(vocabulary, text, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(_sentence(matcher.get_error()))
    return matcher


def describe_failure(message: str) -> str:
    """What to tell of a matcher that failed while an answer was written."""
    return _sentence(message)


def _as_llguidance(grammar: Grammar) -> str:
    matcher = require_llguidance().LLMatcher
    kind, source = grammar.kind, grammar.source
    if kind == "json_object":
        kind, source = "json_schema", '{"type": "object"}'
    if kind == "json_schema":
        schema = normalized(json.loads(source))
        source = '{"enum": []}' if schema is False else json.dumps({} if schema is True else schema)
        # A keyword that is not understood is an error, whatever the schema asks for.
        text = matcher.grammar_from_json_schema(
            source, defaults={"whitespace_pattern": WHITESPACE}, overrides={"lenient": False}
        )
    elif kind == "regex":
        # Digits are 0 to 9, as whoever writes a pattern for a program means them.
        text = matcher.grammar_from_regex(require_llguidance().regex_to_lark(source, "d"))
    elif kind == "choice":
        text = matcher.grammar_from_lark("\n".join(choice_rules("start", _choices(source))))
    else:
        text = matcher.grammar_from_lark(source)
    return str(text)


def choice_rules(name: str, choices: Sequence[str]) -> list[str]:
    """Lines of a lark grammar in which the rule `name` is one of the texts `choices`.

    They are one terminal, matched by an automaton: as alternatives of a rule each of them would be an item of the
    parser's row, and a row may have 2,000.
    """
    texts = [json.dumps(choice) for choice in dict.fromkeys(choices) if choice]
    if not texts:
        return [f'{name}: ""']
    return [f"{name}: CHOICE{'?' if '' in choices else ''}", f"CHOICE: {' | '.join(texts)}"]


def require_llguidance() -> Any:
    """The package llguidance; ValueError, one sentence, where it is not installed."""
    try:
        import llguidance
    except ModuleNotFoundError:
        raise ValueError(f"grammar needs the package llguidance: {install_extra('serve')}") from None
    return llguidance


def _decode(kind: str, source: str) -> Any:
    try:
        return json.loads(source, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"grammar of kind {kind} has a source that is no JSON: {error.msg} at character {error.pos}"
        ) from None
    except RecursionError:
        raise ValueError(f"grammar is nested too deeply, allowed are {MAX_DEPTH} levels") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"grammar has {name} in its source, which is no JSON number")


def _check_schema(schema: object) -> None:
    if not isinstance(schema, dict | bool):
        raise ValueError(
            f"grammar of kind json_schema is a {type(schema).__name__}, allowed is an object, true or false"
        )
    entries = 0
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        children: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                children += value.values()
                _check_properties(value)
            elif isinstance(value, list):
                children += value
        entries += len(children)
        if entries > MAX_ENTRIES:
            raise ValueError(f"grammar has more than {MAX_ENTRIES} keys and items in its schema, allowed are so many")
        level = children
        if not level:
            return
    raise ValueError(f"grammar is nested too deeply, allowed are {MAX_DEPTH} levels")


def _check_properties(schema: dict[str, Any]) -> None:
    """Before each property llguidance considers all optional ones that may follow, so many that it would fail in mid-answer."""
    properties, required = schema.get("properties"), schema.get("required")
    if isinstance(properties, dict):
        names = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
        optional = len(properties.keys() - names)
        if optional > MAX_OPTIONAL:
            raise ValueError(
                f"grammar has {optional} optional properties in an object, allowed are at most {MAX_OPTIONAL}"
            )


def _choices(source: str) -> list[str]:
    choices = _decode("choice", source)
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("grammar of kind choice has another source than a JSON list of at least one text")
    try:
        "".join(choices).encode()
    except UnicodeEncodeError:
        raise ValueError("grammar has half a surrogate pair in a choice, which is no character") from None
    return choices


def _sentence(message: str) -> str:
    """llguidance's report, which may be several lines with an excerpt of the grammar, as one sentence."""
    if message.startswith("grammar "):
        return message
    keys = re.search(r"Unimplemented keys: \[(.*?)\]", message)
    if keys is not None:
        names = keys[1].replace('"', "")
        return f"grammar has a schema with the keyword {names}, which is not supported"
    found = re.search(r"^error: (.*)$", message, flags=re.MULTILINE)
    if found is not None:  # the regex parser's reason stands below an excerpt
        return f"grammar has a pattern that is not valid: {found[1].strip()}"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    reason = re.sub(r"^(at )?(\d+)\((\d+)\): ", r"line \2, column \3: ", lines[0]) if lines else "unknown reason"
    reason = reason.removeprefix("Parser Error: ").split("; following")[0].split("; consider")[0]
    return words_of_a_client(f"grammar cannot be used: {reason[:300]}")
