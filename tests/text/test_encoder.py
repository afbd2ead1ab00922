"""Long text is encoded in chunks with the ids of the whole; what the libraries cannot take is a ValueError."""

import threading
from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenkit.text.encoder import CHUNK, MAX_STRETCH, Cuts, Encoder, guarded
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.text.vocabulary import GGUF_SCHEMES, LLAMA3_PATTERN, QWEN_PATTERN, Scheme
from tests.text.conftest import FRAGMENTS

SCHEMES = {**GGUF_SCHEMES, "qwen2 with digits": Scheme(QWEN_PATTERN, digits=True, nfc=True)}
SCHEMES["llama 3 normalized"] = Scheme(LLAMA3_PATTERN, nfc=True)

RUNS = (
    " ",
    "\t",
    "\n",
    "\r\n",
    "a",
    "Z",
    "7",
    "\u0665",
    "!",
    "'",
    "\u4f60",
    "\u3002",
    "\u3000",
    "\u0301",
    "\u1100",
    "\u1161",
)
RUNS += (
    "\u11a8",
    "\uac00",
    "\u00a0",
    "\u2028",
    "\x85",
    "\x1c",
    "\u180e",
    "\u200b",
    "\u017f",
    "s",
    "\u00bd",
    "\u0345",
    "\u093e",
)
texts = st.lists(
    st.one_of(
        st.sampled_from(FRAGMENTS),
        st.builds(lambda one, count: one * count, st.sampled_from(RUNS), st.integers(1, 12)),
        st.text(max_size=3),
    ),
    max_size=24,
).map("".join)


@pytest.mark.parametrize("name", SCHEMES)
@settings(deadline=None, max_examples=300)
@given(text=texts)
def test_words_of_the_chunks_are_words_of_the_whole(name: str, text: str) -> None:
    """Normalized and cut into words chunk by chunk as at once, wherever the chunks end: so are the ids, for any vocabulary."""
    steps = SCHEMES[name].steps()
    text = text.encode("utf-8", "replace").decode()

    def words(piece: str) -> list[str]:
        normal = piece if steps.normalizer is None else steps.normalizer.normalize_str(piece)
        return [word for word, _ in steps.pre_tokenizer.pre_tokenize_str(normal)]

    assert steps.cuts is not None
    for size in (1, 2, 7, 30):
        chunks = list(steps.cuts.chunks(text, size))
        assert "".join(chunks) == text
        assert list(chain.from_iterable(map(words, chunks))) == words(text)


@settings(deadline=None, max_examples=200)
@given(text=texts)
def test_ids_of_the_chunks_are_ids_of_the_whole(tokenizer: Tokenizer, qwen1: Tokenizer, text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    for one in (tokenizer, qwen1):
        engine = one._encoder._engine
        for size in (1, 9, 40):
            small = Encoder(engine, Cuts(digits=True, lines=True), chunk=size)
            assert list(chain.from_iterable(small.encode(text))) == engine.encode(text)
            assert small.normalize(text) == engine.normalize(text)


def test_common_text_is_cut_into_chunks_of_the_size_asked_for() -> None:
    cuts = {name: scheme.cuts() for name, scheme in SCHEMES.items()}
    for text in ("hello world " * 5000, "你好，世界。" * 9000, '{"a": [1, 2]}\n' * 5000, "line\n" * 9000):
        for name in cuts:
            assert max(map(len, cuts[name].chunks(text, CHUNK))) <= CHUNK
    assert max(map(len, cuts["qwen2"].chunks("1" * 100_000, CHUNK))) <= CHUNK


def test_long_text_has_the_ids_of_the_library(tokenizer: Tokenizer, reference: Any) -> None:
    """Also where nothing can be cut, up to half a million characters."""
    for text in ("The quick brown fox, 1234.\n" * 8000, " " * 60_000 + "x", "a" * 60_000, "\n" * 40_000, "!" * 40_000):
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    "text", [" " * 999_999, " " * 2_000_000 + "x", "a" * 999_999, "\n" * (MAX_STRETCH + 1)], ids=len
)
def test_endless_words_are_refused(tokenizer: Tokenizer, qwen1: Tokenizer, text: str) -> None:
    for one in (tokenizer, qwen1):
        with pytest.raises(ValueError, match=r"^text has \d+ characters in a row .* allowed are at most 500000$"):
            one.encode(text)


def test_endless_digits_are_not_words(tokenizer: Tokenizer, qwen1: Tokenizer) -> None:
    for one in (tokenizer, qwen1):
        assert one.encode("1" * 600_000) == [one.token_id("1")] * 600_000


def test_max_tokens_stops_early(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    engine = tokenizer._encoder._engine
    encode = type(engine).encode
    monkeypatch.setattr(type(engine), "encode", lambda self, text: encoded.append(len(text)) or encode(self, text))
    text = "hello world " * 100_000
    with pytest.raises(ValueError, match="text is more than 5000 tokens long, allowed are at most 5000"):
        tokenizer.encode(text, max_tokens=5000)
    assert sum(encoded) <= 3 * CHUNK
    assert len(tokenizer.encode("hello world", max_tokens=2)) == 2
    with pytest.raises(ValueError, match="more than 1 token"):
        tokenizer.encode("<|im_end|><|im_end|>", max_tokens=1, allow_special=True)


def test_other_threads_run_while_text_is_encoded(tokenizer: Tokenizer) -> None:
    """Also while one word is: the library holds the interpreter's lock in all but one of its calls."""
    turns = 0
    done = threading.Event()

    def count() -> None:
        nonlocal turns
        while not done.wait(0.001):
            turns += 1

    thread = threading.Thread(target=count)
    thread.start()
    try:
        for text in ("hello world " * 50_000, "\u4f60" * 100_000):
            turns = 0
            tokenizer.encode(text)
            assert turns >= 5
    finally:
        done.set()
        thread.join()


def test_panics_are_value_errors_and_interrupts_are_not() -> None:
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})

    def fail(error: BaseException) -> None:
        raise error

    with pytest.raises(ValueError, match=r"^text cannot be tokenized: over$"):
        guarded(lambda: fail(panic("over\nstack")), "text cannot be tokenized")
    with pytest.raises(ValueError, match=r"^x: no such token$"):
        guarded(lambda: fail(Exception("no such token")), "x")
    with pytest.raises(KeyboardInterrupt):
        guarded(lambda: fail(KeyboardInterrupt()), "x")
