"""A history reaches the template as it is: null stays null where a template asks for it, a thought is one under any name."""

import functools
from pathlib import Path
from typing import Any

import jinja2
import pytest
import transformers

from qwenkit.text.chat import JinjaChat
from qwenkit.text.tokenizer import Tokenizer
from tests.tiny_models import CHAT_TEMPLATE, write_tokenizer

CALL = {"type": "function", "id": "c", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
ASKS_IS_NONE = (
    "{% for m in messages %}{% if m.role == 'assistant' and m.content is none %}"
    "{% for c in m.tool_calls %}CALL {{ c.function.name }}{% endfor %}<|im_end|>"
    "{% else %}<|im_start|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
ASKS_NOT_NONE = ASKS_IS_NONE.replace("m.content is none", "m['content'] == None")
ASKS_TRUTH = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }}{% endfor %}<|im_end|>\n{% endfor %}"
)
FAILS_ON_NULL = ASKS_TRUTH.replace("{% if m.content %}{{ m.content }}{% endif %}", "{{ m.content.strip() }}")
ADDS = ASKS_TRUTH.replace("{% if m.content %}{{ m.content }}{% endif %}", "{{ 'x' + m.content }}")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_tokenizer(tmp_path)
    return Tokenizer.from_folder(tmp_path)


def history(**said: Any) -> list[dict[str, Any]]:
    assistant = {"role": "assistant", **said}
    return [{"role": "user", "content": "None? now"}, assistant, {"role": "user", "content": "sure?"}]


def rendered(tokenizer: Tokenizer, template: str, messages: list[dict[str, Any]]) -> str:
    return tokenizer.decode(JinjaChat(tokenizer, template).render(messages).ids, skip_special=False)


@pytest.mark.parametrize("template", [ASKS_IS_NONE, ASKS_NOT_NONE, ASKS_TRUTH])
@pytest.mark.parametrize("said", [{"content": None}, {}])
def test_null_beside_calls_is_null_for_the_template(tokenizer: Tokenizer, template: str, said: dict[str, Any]) -> None:
    messages = history(tool_calls=[CALL], **said)
    as_given = [{"content": None} | message for message in messages]
    # transformers 5.24 drops keys that are null, and such templates then fail: plain jinja2 is the reference
    want = jinja2.Template(template, trim_blocks=True, lstrip_blocks=True).render(messages=as_given)
    assert "CALL clock" in want
    assert rendered(tokenizer, template, messages) == want


@pytest.mark.parametrize("template", [FAILS_ON_NULL, ADDS, CHAT_TEMPLATE])
def test_null_is_an_empty_text_where_the_template_has_no_place_for_it(tokenizer: Tokenizer, template: str) -> None:
    null = rendered(tokenizer, template, history(content=None, tool_calls=[CALL]))
    assert null == rendered(tokenizer, template, history(content="", tool_calls=[CALL]))


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_reaches_the_template_by_the_name_it_reads(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}({{ m.reasoning_content }})"
        "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    messages = history(content="4", **{name: "BECAUSE"})
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    apply = functools.partial(theirs.apply_chat_template, chat_template=template, tokenize=False)
    assert rendered(tokenizer, template, messages) == apply(messages)
    assert "(BECAUSE)" in apply(messages)


def test_a_null_thought_gives_way_and_a_named_one_does_not(tokenizer: Tokenizer) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.reasoning_content }}{% endfor %}"
    both = history(content="4", reasoning_content="A", reasoning="B")
    assert "A" in rendered(tokenizer, template, both)
    null = history(content="4", reasoning_content=None, thinking="B")
    assert "B" in rendered(tokenizer, template, null)
