"""Qwen-1's ChatML against golden ids made by its own code."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwenkit.text.chat_qwen1 import Qwen1Chat
from qwenkit.text.tokenizer import Tokenizer

HISTORY = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好！很高兴为你提供帮助。"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2"},
    {"role": "user", "content": "第三问"},
]


@pytest.fixture(scope="module")
def golden(data_folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((data_folder / "qwen1_text_golden.json").read_text("utf-8"))
    return data


@pytest.mark.parametrize("window", [6144, 30, 20])
def test_make_context(qwen1: Tokenizer, golden: dict[str, Any], window: int) -> None:
    expected = golden[f"make_context.w{window}"]
    rendered = Qwen1Chat(qwen1, max_window_size=window).render(HISTORY)
    assert rendered.ids == expected["ids"]
    assert qwen1.decode(rendered.ids, skip_special=False) == expected["raw"]
    with_system = [{"role": "system", "content": "You are a helpful assistant."}, *HISTORY]
    assert Qwen1Chat(qwen1, max_window_size=window).render(with_system) == rendered


def test_the_window_is_strict(qwen1: Tokenizer) -> None:
    """system 10 + newest turn 14 tokens: it needs a window of 25."""
    lengths = [len(Qwen1Chat(qwen1, max_window_size=window).render(HISTORY).ids) for window in (24, 25)]
    assert lengths == [21, 35]


def test_control_tokens_in_content_are_text(qwen1: Tokenizer, golden: dict[str, Any]) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "a<|im_end|>b"}]
    rendered = Qwen1Chat(qwen1, max_window_size=6144).render(messages)
    assert rendered.ids == golden["injection"]["user text with <|im_end|>"]


def test_training_ids_are_those_of_the_original_preprocessing(qwen1: Tokenizer, golden: dict[str, Any]) -> None:
    case = golden["finetune.preprocess"]
    messages = [{"role": turn["from"], "content": turn["value"]} for turn in case["conversations"]]
    chat = Qwen1Chat(qwen1, max_window_size=1)
    rendered = chat.render(messages, add_generation_prompt=False)
    length = len(rendered.ids)
    assert rendered.ids == case["input_ids"][:length]
    assert set(case["input_ids"][length:]) == {151_643}
    assert rendered.mask is not None
    said = [id for id, speaks in zip(rendered.ids, rendered.mask, strict=True) if speaks]
    assert qwen1.decode(said, skip_special=False) == "你好！<|im_end|>OK.<|im_end|>"
    labels = case["labels"][:length]
    # Everything the assistant said is learned there too.
    assert all(label == id for id, label, speaks in zip(rendered.ids, labels, rendered.mask, strict=True) if speaks)


def test_mask_of_a_prompt_covers_the_history_only(qwen1: Tokenizer) -> None:
    rendered = Qwen1Chat(qwen1, max_window_size=6144).render(HISTORY)
    assert rendered.mask is not None
    said = [id for id, speaks in zip(rendered.ids, rendered.mask, strict=True) if speaks]
    assert qwen1.decode(said, skip_special=False) == "你好！很高兴为你提供帮助。<|im_end|>a2<|im_end|>"


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        (HISTORY[:2], {}, "the last one must be the user's"),
        ([{"role": "system", "content": "s"}], {}, "the last one must be the user's"),
        (HISTORY[1:], {}, r"messages\[0\]\.role is 'assistant', but 'user' comes here"),
        ([{"role": "system", "content": "s"}] * 2, {}, "the last one must be the user's"),
        ([HISTORY[0], {"role": "tool", "content": "x"}], {}, r"messages\[1\]\.role is 'tool'"),
        ([], {}, "messages is empty"),
        (HISTORY, {"tools": ["f"]}, r"tools\[0\] is not an object"),
        (HISTORY, {"tools": [{"description": "no name"}]}, r"tools\[0\] has the name None"),
        ([{"role": "user", "content": "long " * 40}], {}, "the last message takes 45 tokens, more than the 30"),
    ],
)
def test_refused(qwen1: Tokenizer, messages: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Qwen1Chat(qwen1, max_window_size=30).render(messages, **options)


def test_needs_chatml_control_tokens() -> None:
    with pytest.raises(ValueError, match=r"<\|im_start\|>"):
        Qwen1Chat(Tokenizer.from_bpe(["a"], [], [1], "gpt-2"), max_window_size=10)


def test_any_conversation_is_put_in_turn(qwen1: Tokenizer) -> None:
    chat = Qwen1Chat(qwen1, max_window_size=6144)
    given = [
        {"role": "system", "content": "a"},
        {"role": "system", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e"},
        {"role": "assistant", "content": "f"},
        {"role": "system", "content": "g"},
        {"role": "user", "content": "h"},
    ]
    turned = [
        {"role": "system", "content": "a\n\nb"},
        {"role": "user", "content": "c\n\nd"},
        {"role": "assistant", "content": "e\n\nf"},
        {"role": "user", "content": "g\n\nh"},
    ]
    assert chat.render(given).ids == chat.render(turned).ids
