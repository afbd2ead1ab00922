"""A server whose engine replays a short answer, after a thought unless the prompt says not to think; one token a byte.

In: nothing. Out: its URL, for as long as the context lasts. For clients that want to see thinking without a model that thinks.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator

from transformers.convert_slow_tokenizer import bytes_to_unicode

from qwenkit.engine.grammar_compiler import GrammarCompiler
from qwenkit.engine.sampling import SamplingParams
from qwenkit.serve.config import ServeConfig
from qwenkit.serve.driver import Driver
from qwenkit.serve.metrics import Metrics
from qwenkit.serve.server import Server
from qwenkit.text.answer import AnswerFormat
from qwenkit.text.chat import JinjaChat
from qwenkit.text.tokenizer import Tokenizer
from tests.serve.api.conftest import CONTROL, TAGS, TEMPLATE
from tests.serve.conftest import running
from tests.serve.scripted import ScriptedEngine

ANSWER = "The sum\nis 4."


@contextlib.contextmanager
def serve() -> Iterator[str]:
    alphabet = [bytes_to_unicode()[byte] for byte in range(256)]
    tokenizer = Tokenizer.from_bpe([*alphabet, *CONTROL, *TAGS], [], [1] * 256 + [3] * 3 + [4] * 4, "qwen2")
    chat_format = JinjaChat(tokenizer, TEMPLATE)

    def answer(prompt: list[int], params: SamplingParams) -> str:
        told_not_to = tokenizer.decode(prompt, skip_special=False).endswith("</think>\n\n")
        return ANSWER if told_not_to else f"<think>\nOne and three.\n</think>\n\n{ANSWER}"

    with tempfile.TemporaryDirectory() as folder, contextlib.closing(GrammarCompiler(tokenizer)) as compiler:
        metrics = Metrics("qwenkit", "tiny")
        driver = Driver(ScriptedEngine(tokenizer, answer), metrics=metrics)
        server = Server(
            ServeConfig(port=0, state_dir=folder), tokenizer, chat_format, driver, ("tiny",), 4096, metrics, compiler,
            AnswerFormat.of(tokenizer, chat_format),
        )  # fmt: skip
        with running(server) as live:
            yield live.url
