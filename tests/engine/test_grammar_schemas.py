"""Any JSON schema, any way through it: what is written is valid."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenkit.engine.grammar import Grammar
from qwenkit.engine.matcher import Grammars
from qwenkit.text.tokenizer import Tokenizer
from tests.tiny_models import EOS, VOCAB_SIZE

SCALARS = st.sampled_from(
    [
        {"type": "integer", "minimum": -50, "maximum": 50},
        {"type": "boolean"},
        {"type": "null"},
        {"type": "string", "maxLength": 3},
        {"enum": ["a", 1, None, True]},
        {"const": "fixed \u00e9"},
    ]
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.text("abc\u00e9\"' \\", min_size=1, max_size=4)
    objects = st.dictionaries(names, inner, max_size=3).map(
        lambda parts: {
            "type": "object",
            "properties": parts,
            "required": sorted(parts),
            "additionalProperties": False,
        }
    )
    arrays = st.tuples(inner, st.integers(0, 2)).map(
        lambda pair: {"type": "array", "items": pair[0], "minItems": pair[1], "maxItems": 2}
    )
    return st.one_of(objects, arrays, st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts}))


def valid(value: Any, schema: dict[str, Any]) -> bool:
    if "anyOf" in schema:
        return any(valid(value, part) for part in schema["anyOf"])
    if "enum" in schema:
        return any(value == one and type(value) is type(one) for one in schema["enum"])
    if "const" in schema:
        return bool(value == schema["const"])
    kind = schema["type"]
    if kind == "object":
        parts = schema["properties"]
        return isinstance(value, dict) and set(value) == set(parts) and all(valid(value[k], parts[k]) for k in parts)
    if kind == "array":
        return (
            isinstance(value, list)
            and schema["minItems"] <= len(value) <= schema["maxItems"]
            and all(valid(item, schema["items"]) for item in value)
        )
    if kind == "string":
        return isinstance(value, str) and len(value) <= 3
    if kind == "integer":
        return type(value) is int and -50 <= value <= 50
    return value is None if kind == "null" else isinstance(value, bool)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, VOCAB_SIZE, [EOS])


@settings(max_examples=100)
@given(schema=st.recursive(SCALARS, containers, max_leaves=6), seed=st.integers(0, 2**31))
def test_any_path_through_a_schema_is_valid(
    grammars: Grammars, tokenizer: Tokenizer, schema: dict[str, Any], seed: int
) -> None:
    """Tokens drawn evenly from what is allowed, the end as soon as it is possible."""
    generator = torch.Generator().manual_seed(seed)
    matcher = grammars.matcher(Grammar("json_schema", json.dumps(schema)), stop_ids=frozenset({EOS}))
    space = torch.tensor([tokenizer.token_bytes(id).isspace() for id in range(VOCAB_SIZE)])
    written: list[int] = []
    while not matcher.finished:
        allowed = torch.from_numpy(matcher.allowed())
        assert matcher.error is None
        assert not allowed[EOS + 1 :].any()
        if allowed[EOS]:
            break
        weights = torch.where(space, 0.01, 1.0) * allowed
        written.append(int(torch.multinomial(weights, 1, generator=generator)))
        assert not matcher.advance(written[-1])
        assert len(written) < 5000
    assert valid(json.loads(tokenizer.decode(written)), schema)
