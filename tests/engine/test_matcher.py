"""Grammars without a model: what is refused, what is kept, which tokens of a vocabulary are allowed."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from qwenkit.engine.grammar import Grammar
from qwenkit.engine.matcher import Grammars
from qwenkit.engine.sampling import SamplingParams
from qwenkit.text.tokenizer import Tokenizer
from tests.tiny_models import EOS, IM_END, IM_START, VOCAB_SIZE


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("xml", "", "kind 'xml', allowed are json_schema, json_object, regex, choice, lark"),
        ("regex", 3, "type int, allowed is a text"),
        ("regex", "\ud800", "surrogate"),
        ("json_object", "{}", "kind json_object has a source"),
        ("json_schema", "{", "no JSON: .* at character 1"),
        ("json_schema", '{"maximum": NaN}', "NaN in its source"),
        ("json_schema", "[]", "is a list, allowed is an object, true or false"),
        ("json_schema", '{"items":' * 100 + "{}" + "}" * 100, "nested too deeply, allowed are 64 levels"),
        ("json_schema", "[" * 100_000, "nested too deeply"),
        ("json_schema", json.dumps({"enum": list(range(20_001))}), "more than 20000 keys and items"),
        (
            "json_schema",
            json.dumps({"properties": {f"p{i}": {} for i in range(402)}, "required": ["p0"]}),
            "401 optional properties in an object, allowed are at most 400",
        ),
        ("choice", "[]", "a JSON list of at least one text"),
        ("choice", '["a", 1]', "a JSON list of at least one text"),
        ("choice", '["\\ud800"]', "surrogate"),
        ("lark", " ", "empty source"),
    ],
)
def test_what_is_told_without_compiling(kind: Any, source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Grammar(kind, source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("json_schema", '{"type": "array", "uniqueItems": true}', "keyword uniqueItems, which is not supported"),
        ("json_schema", '{"not": {}, "x-guidance": {"lenient": true}}', "keyword not, which is not supported"),
        ("json_schema", '{"type": "text"}', "Invalid type: text"),
        ("json_schema", '{"$ref": "https://example.com/schema"}', "does not fetch"),
        ("json_schema", '{"type": "integer", "minimum": 2, "maximum": 1}', "Unsatisfiable"),
        ("json_schema", '{"type": "string", "pattern": "("}', "pattern that is not valid: unclosed group"),
        ("json_schema", "false", "Unsatisfiable"),
        ("regex", "a(", "pattern that is not valid: unclosed group"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("lark", "start: nothing", 'line 1, column 8: unknown name: "nothing"'),
        ("lark", 'start: "a', "lexer error"),
        ("lark", "start: <nosuch>", 'unknown special token: "<nosuch>"$'),
        ("lark", 'start: %json {"not": {}}', "keyword not"),
    ],
)
def test_what_is_told_when_compiling(tokenizer: Tokenizer, kind: Any, source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Grammars(tokenizer, VOCAB_SIZE).compile(Grammar(kind, source))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("grammar ")


def test_params_take_a_grammar_and_a_token_id() -> None:
    with pytest.raises(ValueError, match="grammar is 'json', allowed is a Grammar"):
        SamplingParams(grammar="json")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="grammar_after is -1, allowed is a token id"):
        SamplingParams(grammar_after=-1)


def test_a_grammar_from_a_json_line() -> None:
    assert Grammar.from_json({"kind": "json_schema", "source": {"type": "null"}}).source == '{"type": "null"}'
    assert Grammar.from_json({"kind": "choice", "source": ["a"]}) == Grammar("choice", '["a"]')
    assert Grammar.from_json({"kind": "json_object"}) == Grammar("json_object")
    for wrong in ("a", {}, {"kind": "regex", "pattern": "a"}):
        with pytest.raises(ValueError, match="grammar is an object such as"):
            Grammar.from_json(wrong)


def test_compiled_grammars_are_kept_up_to_their_bytes(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, VOCAB_SIZE, max_bytes=4 << 20)
    first = grammars.compile(Grammar("regex", "a"), 1 << 20)
    assert grammars.compile(Grammar("regex", "a")) is first
    for letter in "bcd":
        grammars.compile(Grammar("regex", letter), 1 << 20)
    assert grammars.compile(Grammar("regex", "a")) is first  # now the last one used
    grammars.compile(Grammar("regex", "e"), 3 << 20)
    assert grammars.compile(Grammar("regex", "a")) is first
    grammars.compile(Grammar("regex", "f"), 5 << 20)  # too large to be kept at the cost of others
    assert grammars.compile(Grammar("regex", "a")) is first
    grammars.compile(Grammar("regex", "g"), 4 << 20)
    assert grammars.compile(Grammar("regex", "a")) is not first


def test_the_largest_objects_are_written(tokenizer: Tokenizer) -> None:
    schema = {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(400)}}
    matcher = Grammars(tokenizer, VOCAB_SIZE, [EOS]).matcher(
        Grammar("json_schema", json.dumps(schema)), stop_ids=frozenset({EOS})
    )
    for token in tokenizer.encode('{"p3": null, "p399": null}'):
        assert matcher.allowed()[token]
        assert not matcher.advance(token)
    assert matcher.error is None
    assert matcher.finished


def test_control_tokens_are_no_text_and_padding_is_nothing(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, VOCAB_SIZE, [EOS, IM_END])
    anything = grammars.matcher(Grammar("regex", r"(.|\n)*"), stop_ids=frozenset({IM_END}))
    allowed = anything.allowed()
    assert allowed.shape == (VOCAB_SIZE,)
    assert [id for id in range(256, VOCAB_SIZE) if allowed[id]] == [IM_END]
    named = grammars.matcher(Grammar("lark", "start: <|im_start|>"), stop_ids=frozenset({IM_END}))
    assert [id for id in range(VOCAB_SIZE) if named.allowed()[id]] == [IM_START]
    padding = grammars.matcher(Grammar("lark", f"start: <[{VOCAB_SIZE - 1}]>"), stop_ids=frozenset({IM_END}))
    assert not padding.allowed().any()
    assert padding.error is not None


def test_a_vocabulary_of_full_size(data_folder: Path) -> None:
    """Real merges: text is cut as the model would, tags are tokens of their own, and Qwen-1's ids go the same way."""
    tokenizer = Tokenizer.from_folder(data_folder / "tokenizer")
    end = tokenizer.special_tokens["<|im_end|>"]
    grammars = Grammars(tokenizer, 151_936, [end])
    call = Grammar("lark", 'start: <tool_call> "\\n" %json {"const": {"name": "weather"}} "\\n" </tool_call>')
    matcher = grammars.matcher(call, stop_ids=frozenset({end}))
    for token in tokenizer.encode('<tool_call>\n{"name": "weather"}\n</tool_call>'):
        assert matcher.allowed()[token]
        assert not matcher.advance(token)
    assert matcher.finished
    anything = grammars.matcher(Grammar("json_object"), stop_ids=frozenset({end}))
    for token in tokenizer.encode('{"'):
        anything.advance(token)
    inside = anything.allowed()
    assert inside.sum() > 100_000
    assert not inside[sorted(tokenizer.added_tokens.values())].any()
    assert not inside[tokenizer.num_ids :].any()
    # Text that the vocabulary's normalisation would change is still written as it stands.
    decomposed = "cafe\u0301 cre\u0300me"
    forced = grammars.matcher(Grammar("choice", json.dumps([decomposed])), stop_ids=frozenset({end}))
    written = []
    while not forced.finished:
        written.append(int(forced.allowed().argmax()))
        forced.advance(written[-1])
    assert tokenizer.decode(written) == decomposed


def test_the_vocabulary_of_qwen1(data_folder: Path, tmp_path: Path) -> None:
    ranks = Tokenizer.from_folder(data_folder / "tokenizer")
    lines = (base64.b64encode(ranks.token_bytes(rank)) + b" %d\n" % rank for rank in range(151_643))
    (tmp_path / "qwen.tiktoken").write_bytes(b"".join(lines))
    tokenizer = Tokenizer.from_folder(tmp_path)
    end = tokenizer.special_tokens["<|im_end|>"]
    grammars = Grammars(tokenizer, 151_936, [end])
    properties = {"name": {"type": "string"}, "tags": {"type": "array", "items": {"enum": ["red", "blue"]}}}
    matcher = grammars.matcher(
        Grammar("json_schema", json.dumps({"properties": properties})), stop_ids=frozenset({end})
    )
    text = '{"name": "J\u00f6", "tags": ["red"]}'
    for token in tokenizer.encode(text):
        allowed = matcher.allowed()
        assert allowed[token]
        assert not allowed[end]
        matcher.advance(token)
    assert matcher.finished
