"""A model without a template can chat; --chat-template gives one to any model."""

import json
import logging
from pathlib import Path

import pytest

from qwenkit import LLM
from tests.tiny_models import CHAT_TEMPLATE, write_model

MESSAGES = [{"role": "user", "content": "hi"}]
FLOAT = {"weights": "float", "dtype": "float32"}


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder without a template."""
    write_model(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    return tmp_path


def rendered(llm: LLM) -> str:
    return llm.tokenizer.decode(llm.encode(MESSAGES), skip_special=False)


def test_chatml_is_taken_and_said_where_there_is_no_template(bare: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        llm = LLM(bare, **FLOAT)
    assert rendered(llm) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert [record.getMessage() for record in caplog.records] == [
        f"{bare} has no chat template, so ChatML is used; --chat-template gives another"
    ]


def test_without_the_control_tokens_the_refusal_names_the_flag(bare: Path) -> None:
    path = bare / "tokenizer.json"
    data = json.loads(path.read_text())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] == "<|endoftext|>"]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="--chat-template gives one"):
        LLM(bare, **FLOAT).encode(MESSAGES)
    with pytest.raises(ValueError, match=r"the template writes <\|im_start\|>, which is no control token"):
        LLM(bare, **FLOAT, chat_template="chatml")


def test_a_file_or_a_name_replaces_the_models_own(bare: Path, tmp_path: Path) -> None:
    (bare / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    file = tmp_path / "own.txt"
    file.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert rendered(LLM(bare, **FLOAT, chat_template=str(file))) == "[hi]"
    assert rendered(LLM(bare, **FLOAT, chat_template="qwen")).startswith("<|im_start|>system\nYou are")
    with pytest.raises(
        FileNotFoundError, match=r"chat_template is 'chatnl', which is no file; allowed are chatml, qwen"
    ):
        LLM(bare, **FLOAT, chat_template="chatnl")
