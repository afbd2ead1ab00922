"""Worker processes: new interpreters that tokenize as this process does, are few where data is small, and die with a word."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenkit.text.added_tokens import AddedToken
from qwenkit.text.chat import JinjaChat, Rendered
from qwenkit.text.chat_qwen1 import Qwen1Chat
from qwenkit.text.encoder import Cuts, Encoder, TiktokenEngine
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.text.vocabulary import QWEN1_RANKS, QWEN1_SPECIALS, QWEN_PATTERN, Vocabulary
from qwenkit.train.config import TrainConfig
from qwenkit.train.data import workers
from qwenkit.train.data.pipeline import Pipeline
from qwenkit.train.data.registry import find_sources
from qwenkit.train.data.workers import blocks
from tests.tiny_models import CHAT_TEMPLATE, SPECIAL_TOKENS

from .conftest import Write

ConfigOf = Callable[..., TrainConfig]
ROWS = [{"instruction": f"q{place} <|im_end|> \u4f60", "output": "a" * (place % 30 + 1)} for place in range(200)]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The processes that were started."""
    processes: list[Any] = []
    start = subprocess.Popen

    def counted(*args: Any, **kwargs: Any) -> Any:
        processes.append(start(*args, **kwargs))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", counted)
    return processes


@pytest.fixture
def pipeline(write: Write, config_of: ConfigOf, tokenizer: Tokenizer, chat: JinjaChat) -> Pipeline:
    write("a.jsonl", ROWS)
    config = config_of("a.jsonl", variables=("name=Kit",))
    (source,) = find_sources(config.dataset, Path(config.dataset_dir))
    return Pipeline(config, source, tokenizer, chat)


def test_no_process_for_little_data(pipeline: Pipeline, started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    list(blocks(pipeline, 8))
    assert started == []
    size = pipeline.source.files[0].stat().st_size
    monkeypatch.setattr(workers, "BYTES_PER_WORKER", size // 2)
    list(blocks(pipeline, 8))
    assert [process.returncode for process in started] == [0, 0]


def test_nothing_is_forked(pipeline: Pipeline, started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of this process, whose locks a fork would inherit, do not matter; neither does what lies where it stands."""
    monkeypatch.setattr(workers, "BYTES_PER_WORKER", 1)
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a process with threads was forked"))
    (pipeline.source.files[0].parent / "json.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(pipeline.source.files[0].parent)
    lock = threading.Lock()
    with lock:
        expected = [columns.report.to_json() for columns in blocks(pipeline, 1)]
        assert [columns.report.to_json() for columns in blocks(pipeline, 2)] == expected
    assert len(started) == 2
    assert len(expected) == 4


def test_a_worker_that_dies_is_said(pipeline: Pipeline, started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "BYTES_PER_WORKER", 1)
    receive = workers._receive

    def kill_one(worker: Any) -> Any:
        os.kill(started[1].pid, signal.SIGKILL)  # while it still starts
        return receive(worker)

    with monkeypatch.context() as patch:
        patch.setattr(workers, "_receive", kill_one)
        with pytest.raises(ValueError, match=r"a process that tokenizes a\.jsonl died \(exit codes \[0, -9\]\)"):
            list(blocks(pipeline, 2))
    assert all(process.poll() is not None for process in started)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match=r"a process that tokenizes a\.jsonl died \(exit codes \[1, 1\]\)"):
        list(blocks(pipeline, 2))


def test_leaving_early_ends_the_workers(
    pipeline: Pipeline, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "BYTES_PER_WORKER", 1)
    found = blocks(pipeline, 2)
    next(found)
    found.close()
    assert [process.poll() is not None for process in started] == [True, True]


def test_a_chat_format_of_the_callers_own(
    pipeline: Pipeline, started: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Own:
        def render(self, messages: Any, **_: Any) -> Rendered:
            ids = pipeline.tokenizer.encode(messages[-1]["content"])
            return Rendered(ids, [True] * len(ids))

    monkeypatch.setattr(workers, "BYTES_PER_WORKER", 1)
    own = Pipeline(pipeline.config, pipeline.source, pipeline.tokenizer, Own())
    assert len(list(blocks(own, 2))) == 4
    assert started == []
    assert "which tokenizes alone" in caplog.text


def qwen1_tokenizer() -> Tokenizer:
    """Qwen-1's kind of engine, over bytes only."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    added = [AddedToken(text, 256 + place, special=True, normalized=True) for place, text in enumerate(QWEN1_SPECIALS)]
    assert len(ranks) < QWEN1_RANKS
    encoder = Encoder(TiktokenEngine(ranks, QWEN_PATTERN), Cuts(digits=True, lines=True))
    return Tokenizer(Vocabulary({rank: token for token, rank in ranks.items()}, added, encoder))


def gguf_tokenizer(pre: str) -> Tokenizer:
    from tokenizers import pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "hell", "12", "<think>", *SPECIAL_TOKENS]
    kinds = [1] * (len(tokens) - 4) + [4, 3, 3, 3]
    return Tokenizer.from_bpe(tokens, ["h e", "l l", "he ll", "1 2"], kinds, pre)


TOKENIZERS = {"qwen1": qwen1_tokenizer(), **{pre: gguf_tokenizer(pre) for pre in ("qwen2", "smollm", "llama-bpe")}}


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text() | st.sampled_from(["hello 1234 <think><|im_end|>", "e\u0301\ud800", "\u4f60\u597d  \n\n x"]))
def test_a_tokenizer_that_travels_is_the_same(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    if kind not in _TRAVELLED:
        _TRAVELLED[kind] = Tokenizer.from_json(json.loads(json.dumps(tokenizer.to_json())))
    other = _TRAVELLED[kind]
    for special in (False, True):
        ids = tokenizer.encode(text, allow_special=special)
        assert other.encode(text, allow_special=special) == ids
        assert other.decode(ids, skip_special=False) == tokenizer.decode(ids, skip_special=False)
    assert (other.num_ids, other.added_tokens, other.special_tokens) == (
        *(tokenizer.num_ids, tokenizer.added_tokens, tokenizer.special_tokens),
    )


_TRAVELLED: dict[str, Tokenizer] = {}


@pytest.mark.parametrize("kind", ["jinja", "qwen1", None])
def test_a_pipeline_that_travels_prepares_the_same(write: Write, config_of: ConfigOf, kind: str | None) -> None:
    write("a.jsonl", ROWS[:40])
    tokenizer = TOKENIZERS["qwen1"]
    chats = {"jinja": JinjaChat(tokenizer, CHAT_TEMPLATE, variables={"eos_token": "x"}), None: None}
    chat = Qwen1Chat(tokenizer, max_window_size=100) if kind == "qwen1" else chats[kind]
    config = config_of("a.jsonl", stage="sft" if kind else "pt", cutoff_len=60, overlong="drop", bad_samples="drop")
    (source,) = find_sources(config.dataset, Path(config.dataset_dir))
    pipeline = Pipeline(config, source, tokenizer, chat)
    request = workers._request(pipeline)
    other = workers._pipeline(json.loads(json.dumps(request)))
    assert (other.config, other.source) == (config, source)
    assert list(other.records()) == list(pipeline.records())
