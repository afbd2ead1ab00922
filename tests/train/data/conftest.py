"""A byte tokenizer with ChatML, two chat templates (one strips earlier thinking), and a folder to write data into."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwenkit.text.chat import JinjaChat
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.train.config import TrainConfig
from tests.tiny_models import CHAT_TEMPLATE, write_tokenizer

THINKING_TEMPLATE = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{% if loop.index0 > ns.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{% endif %}"
    "{% elif m.role == 'assistant' and loop.index0 > ns.last %}<think>\n\n</think>\n\n{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="session")
def chat(tokenizer: Tokenizer) -> JinjaChat:
    return JinjaChat(tokenizer, CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def thinking_chat(tokenizer: Tokenizer) -> JinjaChat:
    return JinjaChat(tokenizer, THINKING_TEMPLATE)


Write = Callable[[str, Any], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes objects as JSON or JSON Lines, and texts as they are."""

    def write_file(name: str, content: Any) -> Path:
        path = tmp_path / name
        if name.endswith(".jsonl") and not isinstance(content, str):
            content = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in content)
        path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), "utf-8")
        return path

    return write_file


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[..., TrainConfig]:
    """A TrainConfig whose data and cache lie in the test's folder."""

    def config(*dataset: str, **settings: Any) -> TrainConfig:
        given: dict[str, Any] = {"dataset_dir": str(tmp_path), "cache_dir": str(tmp_path / "cache"), "dataset": dataset}
        return TrainConfig(**given | {"per_device_train_batch_size": 1} | settings)

    return config
