"""Grammars that force a call: llguidance takes them, and what they let through is a call to the parser."""

import re
from pathlib import Path
from typing import Any

import pytest

from qwenkit.text.answer import AnswerFormat
from qwenkit.text.tokenizer import Tokenizer

llguidance = pytest.importorskip("llguidance")


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    function = {"name": name} if parameters is None else {"name": name, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [
    tool("add", {"properties": {"a": {"$ref": "#/$defs/n"}}, "required": ["a"], "$defs": {"n": {"type": "integer"}}}),
    tool('n"ow€'),
]
ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "n\\"ow€", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def guide(data_folder: Path) -> Any:
    return llguidance.LLTokenizer((data_folder / "tokenizer" / "tokenizer.json").read_text("utf-8"))


def allowed(guide: Any, grammar: str, ids: list[int]) -> bool:
    matcher = llguidance.LLMatcher(guide, llguidance.LLMatcher.grammar_from_lark(grammar))
    assert matcher.get_error() == ""
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


@pytest.mark.parametrize(
    ("choice", "parallel", "answer", "expected"),
    [
        ("required", True, ADD, True),
        ("required", True, NOW, True),
        ("required", True, f"{ADD}\n{NOW}\n{ADD}", True),
        ("required", False, f"{ADD}\n{NOW}", False),
        ("add", False, ADD, True),
        ("add", True, NOW, False),
        ("required", True, f"\n\n{ADD}", True),
        ("required", True, "hello", False),
        ("required", True, "", False),
        ("required", True, ADD.replace("1", '"x"'), False),
        ("required", True, NOW.replace("{}", '{"a": 1}'), False),
        ("required", True, ADD.replace("add", "sub"), False),
        ("required", True, f"<think>\nhm\n</think>\n\n{ADD}", False),
    ],
)
def test_hermes(guide: Any, tokenizer: Tokenizer, choice: str, parallel: bool, answer: str, expected: bool) -> None:
    format = AnswerFormat(tokenizer, "hermes", thinks=True)
    ids = tokenizer.encode(answer)
    grammar = format.tool_grammar(TOOLS, choice=choice, parallel=parallel)
    assert allowed(guide, grammar, ids) is expected
    if expected:
        parser = format.parser([], tools=True)
        kinds = {event.kind for event in [*parser.push(ids, answer), *parser.finish()]}
        assert kinds == {"tool_call", "arguments"}


def test_thinking_first(guide: Any, tokenizer: Tokenizer) -> None:
    format = AnswerFormat(tokenizer, "hermes", thinks=True)
    grammar = format.tool_grammar(TOOLS, choice="required", parallel=False, may_think=True)
    for answer in (f"<think>\nhm\n</think>\n\n{ADD}", f"<think></think>{ADD}", ADD):
        assert allowed(guide, grammar, tokenizer.encode(answer))


def test_tags_outside_of_the_vocabulary(tiny: Tokenizer) -> None:
    format = AnswerFormat(tiny, "hermes", thinks=False)
    grammar = format.tool_grammar(TOOLS, choice="required", parallel=True)
    assert allowed(llguidance.LLTokenizer("byte"), grammar, list(f"{NOW}\n{ADD}".encode()))


@pytest.mark.parametrize("thought", ["Thought: I add.", " I add.", "思考" * 100])
def test_react(qwen1: Tokenizer, thought: str) -> None:
    format = AnswerFormat(qwen1, "react", thinks=False)
    grammar = format.tool_grammar(TOOLS, choice="required", parallel=False)
    answer = f'{thought}\nAction: add\nAction Input: {{"a": 1}}'
    guide = llguidance.LLTokenizer("byte")
    assert allowed(guide, grammar, list(answer.encode()))
    assert not allowed(guide, grammar, list(answer.replace("1", "x").encode()))
    assert not allowed(guide, grammar, list(f"{thought}\nFinal Answer: 2".encode()))
    parser = format.parser([], tools=True)
    events = [*parser.push(qwen1.encode(answer), answer), *parser.finish()]
    assert [event.text for event in events][-2:] == ["add", '{"a": 1}']


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        (TOOLS, "sub", "tool_choice names 'sub', allowed are the tools 'add'"),
        ([], "required", "tool_choice is 'required', which needs at least one tool"),
        ([], "add", "none, no tools were given"),
        ([tool("f", [1])], "required", r"tools\[0\].parameters is not a JSON schema of the type 'object'"),
        ([TOOLS[0], tool("f", {"type": "array"})], "required", r"tools\[1\].parameters is not"),
        ([tool(" ")], "required", r"tools\[0\] has the name ' '"),
        (["f"], "required", r"tools\[0\] is not an object"),
    ],
)
def test_refused(tokenizer: Tokenizer, tools: Any, choice: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnswerFormat(tokenizer, "hermes", thinks=True).tool_grammar(tools, choice=choice, parallel=True)


def test_a_react_name_is_one_line(qwen1: Tokenizer) -> None:
    with pytest.raises(ValueError, match=re.escape("'a\\nb', allowed is a single line")):
        AnswerFormat(qwen1, "react", thinks=False).tool_grammar([tool("a\nb")], choice="required", parallel=False)
