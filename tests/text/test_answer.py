"""Answers of each model generation, as they should be understood."""

from pathlib import Path

import pytest

from qwenkit.text.answer import AnswerEvent, AnswerFormat
from qwenkit.text.chat import JinjaChat
from qwenkit.text.chat_qwen1 import Qwen1Chat
from qwenkit.text.tokenizer import Tokenizer
from tests.text.conftest import byte_alphabet

TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
ASK = [{"role": "user", "content": "<think> is a tag, <tool_call> too"}]
# How Qwen3's template ends a prompt.
QWEN3 = """{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}{#- <tool_call> -#}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- if begin_thinking is defined %}{{- '<think>\\n' }}{%- endif %}"""


@pytest.fixture(scope="module")
def hermes(tokenizer: Tokenizer, data_folder: Path) -> AnswerFormat:
    return AnswerFormat.of(tokenizer, JinjaChat(tokenizer, (data_folder / "templates" / "qwen2.5.jinja").read_text()))


@pytest.fixture(scope="module")
def react(qwen1: Tokenizer) -> AnswerFormat:
    return AnswerFormat.of(qwen1, Qwen1Chat(qwen1, max_window_size=6144))


def read(
    format: AnswerFormat, answer: str | list[int], prompt: list[int] | tuple[()] = (), *, tools: bool = True
) -> list[tuple[str, str, int]]:
    """The events of an answer that arrives token by token, neighbouring pieces put together."""
    ids = format.tokenizer.encode(answer) if isinstance(answer, str) else answer
    parser = format.parser(prompt, tools=tools)
    events: list[AnswerEvent] = []
    for id in ids:
        events += parser.push([id], format.tokenizer.decode([id]))
    events += parser.finish()
    whole: list[tuple[str, str, int]] = []
    for event in events:
        text = event.text
        if whole and whole[-1][::2] == (event.kind, event.tool_index):
            text = whole.pop()[1] + text
        whole.append((event.kind, text, event.tool_index))
    return whole


def test_thinking_content_and_parallel_calls(hermes: AnswerFormat) -> None:
    answer = (
        "<think>\nTwo sums. I will write <tool_call> twice.\n</think>\n\nLet me  add.\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 1,  "b": "x\\n"}}\n</tool_call>\n'
        '<tool_call>\n{"arguments": {"a": {}}, "name": "add"}\n</tool_call>'
    )
    assert read(hermes, answer) == [
        ("reasoning", "Two sums. I will write <tool_call> twice.", 0),
        ("content", "Let me  add.", 0),
        ("tool_call", "add", 0),
        ("arguments", '{"a": 1,  "b": "x\\n"}', 0),
        ("tool_call", "add", 1),
        ("arguments", '{"a": {}}', 1),
    ]
    assert read(hermes, answer, tools=False)[1][1].endswith("</tool_call>")


def test_content_goes_on_after_a_call_on_a_new_line(hermes: AnswerFormat) -> None:
    answer = 'First\n\n<tool_call>{"name": "f", "arguments": {}}</tool_call>\n\n  indented\n'
    assert read(hermes, answer) == [
        ("content", "First", 0),
        ("tool_call", "f", 0),
        ("arguments", "{}", 0),
        ("content", "\n  indented\n", 0),
    ]


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', '{"a": 1}'),
        ('{"name": "f", "arguments": null}', "{}"),
        ('{"name": "f"}', "{}"),
        ('{"id": 7, "name": "f", "arguments": {"a": "</tool_call><tool_call>"}}', '{"a": "</tool_call><tool_call>"}'),
        ('{"name": "f", "arguments": {"a": "one\ntwo\t"}}', '{"a": "one\\ntwo\\t"}'),
        ('{"name": "f", "arguments":\n{\n"a": 1\n}\n}', '{\n"a": 1\n}'),
    ],
)
def test_arguments_in_all_their_shapes(hermes: AnswerFormat, body: str, arguments: str) -> None:
    calls = [("tool_call", "f", 0), ("arguments", arguments, 0)]
    assert read(hermes, f"<tool_call>\n{body}\n</tool_call>") == calls
    assert read(hermes, f"<tool_call>\n{body}") == calls  # the end tag may be missing where the answer ends
    assert read(hermes, f"<tool_call>\n{body}\n<tool_call>\n{body}") == [
        *calls,
        *((kind, text, 1) for kind, text, _ in calls),
    ]


@pytest.mark.parametrize(
    "answer",
    [
        '<tool_call>\n{"name": "f", "arguments": {"a": 1',
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}, 2}\n</tool_call>',
        '<tool_call>\n{"name": "", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": "a"}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"a": Infinity}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "name": "g", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": ' + "[" * 100_000,
        '<tool_call>\n{"name": "f", "arguments": {"a": ' + "[" * 2_000 + "]" * 2_000 + "}}} </tool_call>",
        "see \n<tool_call>\n</tool_call> there",
        "the tag <tool_call> starts a call, </tool_call> ends it",
        "of </think> and <think>",
    ],
)
def test_what_is_no_call_is_text(hermes: AnswerFormat, answer: str) -> None:
    closed = hermes.tokenizer.encode("<|im_start|>assistant\n<think>\n\n</think>\n\n", allow_special=True)
    assert read(hermes, answer, closed) == [("content", answer, 0)]


def test_a_good_call_after_a_bad_one(hermes: AnswerFormat) -> None:
    bad = '<tool_call>\n{"name": "f, "arguments": {}}\n</tool_call>'
    assert read(hermes, bad + '\n<tool_call>\n{"name": "f"}\n</tool_call>') == [
        ("content", bad, 0),
        ("tool_call", "f", 0),
        ("arguments", "{}", 0),
    ]


def test_a_tag_spelled_out_of_other_tokens_is_text(hermes: AnswerFormat) -> None:
    encode = hermes.tokenizer.encode
    spelled = [*encode("<"), *encode("tool"), *encode("_call"), *encode(">")]
    assert read(hermes, [*spelled, *encode('{"name": "f"}')]) == [("content", '<tool_call>{"name": "f"}', 0)]


def test_a_vocabulary_without_the_tags_has_them_in_the_text() -> None:
    tokenizer = Tokenizer.from_bpe([*byte_alphabet(), "<|im_start|>"], [], None, "gpt-2")
    format = AnswerFormat.of(tokenizer, JinjaChat(tokenizer, "<tool_call></think>"))
    assert (format.thinks, format.think_end_id) == (True, None)
    assert read(format, '<think>\nso</think>ok<tool_call>{"name": "f"}</tool_call>') == [
        ("reasoning", "so", 0),
        ("content", "ok", 0),
        ("tool_call", "f", 0),
        ("arguments", "{}", 0),
    ]
    for prompt, state in {"<think>\n": "open", "<think>\n\n</think>\n\n": "closed", "": "none"}.items():
        assert format.prompt_thinking(tokenizer.encode(f"<|im_start|>assistant\n{prompt}", allow_special=True)) == state


def test_the_prompt_decides_where_thinking_stands(tokenizer: Tokenizer) -> None:
    chat = JinjaChat(tokenizer, QWEN3)
    format = AnswerFormat.of(tokenizer, chat)
    assert (format.tool_style, format.think_end_id) == ("hermes", 151_668)
    up_to_the_model = chat.render(ASK).ids
    closed = chat.render(ASK, enable_thinking=False).ids
    open = chat.render(ASK, begin_thinking=True).ids
    assert [format.prompt_thinking(ids) for ids in (up_to_the_model, closed, open)] == ["none", "closed", "open"]
    assert read(format, "Hi", closed) == read(format, "Hi", up_to_the_model) == [("content", "Hi", 0)]
    thought = [("reasoning", "hm", 0), ("content", "Hi", 0)]
    assert read(format, "hm\n</think>\n\nHi", open) == thought
    assert read(format, "\n<think>\nhm\n</think>\n\nHi", up_to_the_model) == thought
    assert read(format, "cut off", open) == [("reasoning", "cut off", 0)]
    # The flag says whether to look for thinking, never where the answer begins.
    parser = format.parser(open, tools=True, thinking=False)
    ids = tokenizer.encode("hm</think>Hi")
    assert [*parser.push(ids, "hm</think>Hi"), *parser.finish()] == [AnswerEvent("content", "hm</think>Hi")]


def test_content_streams_as_it_comes(hermes: AnswerFormat) -> None:
    parser = hermes.parser([], tools=True)
    encode = hermes.tokenizer.encode
    steps = [parser.push(encode(text), text) for text in ("Hello", " ", "world", "\n")]
    assert steps == [[AnswerEvent("content", "Hello")], [], [AnswerEvent("content", " world")], []]
    assert parser.finish() == [AnswerEvent("content", "\n")]


def test_a_call_ended_by_a_stop_token(hermes: AnswerFormat) -> None:
    """The engine reports the id of the token that stopped it, without its text."""
    parser = hermes.parser([], tools=True)
    text = '<tool_call>\n{"name": "f"}\n'
    assert parser.push([*hermes.tokenizer.encode(text), 151_658], text) == []
    assert [event.text for event in parser.finish()] == ["f", "{}"]
    assert parser.num_tool_calls == 1


def test_react_thought_action_and_final_answer(react: AnswerFormat) -> None:
    assert react.stop == ("\nObservation:",)
    assert read(react, 'Thought: I look it up.\nAction: search\nAction Input: {"q": "天气"}\n') == [
        ("reasoning", "I look it up.", 0),
        ("tool_call", "search", 0),
        ("arguments", '{"q": "天气"}', 0),
    ]
    answer = "Thought: I now know the final answer.\nFinal Answer: It is 4.\nAction: none"
    assert read(react, answer) == [
        ("reasoning", "I now know the final answer.", 0),
        ("content", "It is 4.\nAction: none", 0),
    ]
    assert read(react, answer, tools=False) == [("content", answer, 0)]
    assert read(react, "Just an answer.\n") == [("content", "Just an answer.\n", 0)]
    prompt = react.tokenizer.encode("x\nObservation: 4\nThought:")
    assert read(react, " Good.\nFinal Answer: 4", prompt) == [("reasoning", "Good.", 0), ("content", "4", 0)]


@pytest.mark.parametrize(
    "call",
    [
        'Action: f\nAction Input: {"a',
        "Action: f\nAction Input: code()",
        "Action: f",
        "Action: f\ng",
        "Action:\nAction Input: {}",
    ],
)
def test_react_text_that_is_no_call(react: AnswerFormat, call: str) -> None:
    assert read(react, f"Thought: hm\n{call}") == [("reasoning", "hm", 0), ("content", call, 0)]


def test_formats_without_known_tools(tokenizer: Tokenizer, data_folder: Path) -> None:
    plain = AnswerFormat.of(tokenizer, JinjaChat(tokenizer, (data_folder / "templates" / "qwen2.jinja").read_text()))
    coder = AnswerFormat.of(tokenizer, JinjaChat(tokenizer, "<tool_call>\n<function=f>"))
    assert (plain.tool_style, coder.tool_style) == (None, "xml")
    with pytest.raises(ValueError, match="no tool calls"):
        plain.tool_grammar([TOOL], choice="required", parallel=True)
