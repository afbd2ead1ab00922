"""Windows, data files, and perplexity equal to transformers' loss; quantized caches within their bounds."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from qwenkit import LLM
from qwenkit.eval.compare import check_vocabularies, compare
from qwenkit.eval.perplexity import Window, count_windows, logit_rows, perplexity, read_data, score, windows_of
from qwenkit.eval.report import weight_bytes
from tests.tiny_models import write_model


def text_of(path: Path) -> str:
    (document,) = read_data(path)
    assert document.text is not None
    return document.text


SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "initializer_range": 0.1}
TEXT = "The quick brown fox jumps over the lazy dog. " * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), "qwen2", **SIZES)


def opened(folder: Path, **settings: Any) -> LLM:
    return LLM(folder, **({"dtype": "float32", "weights": "float", "prefix_cache": False} | settings))


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return opened(folder)


@given(
    length=st.integers(2, 90),
    context=st.integers(2, 40),
    stride=st.none() | st.integers(1, 39),
    limit=st.none() | st.integers(1, 9),
)
def test_windows(length: int, context: int, stride: int | None, limit: int | None) -> None:
    """Disjoint windows lie end to end and count all but their first tokens; sliding ones count every token once."""
    if stride is not None and stride >= context:
        with pytest.raises(ValueError, match=f"stride is {stride}, allowed is a whole number from 1 to {context - 1}"):
            windows_of(range(length), context, stride, limit)
        return
    windows = list(windows_of(range(length), context, stride, limit))
    assert len(windows) == count_windows(length, context, stride, limit)
    counted = [token for window in windows for token in window.ids[len(window.ids) - window.scored :]]
    assert all(window.scored < len(window.ids) <= context for window in windows)
    if stride is None:
        assert [window.ids[0] for window in windows] == [i * context for i in range(len(windows))]
        assert all(window.scored == len(window.ids) - 1 for window in windows)
        assert len(windows) == 1 or all(len(window.ids) == context for window in windows)
    else:
        assert counted == list(range(1, len(counted) + 1))
        assert limit is not None or counted[-1] == length - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], 1), "context is 1, allowed is a whole number of at least 2"),
        (([1, 2], 2, None, 0), "limit is 0, allowed is a whole number of at least 1"),
        (([1], 2), "the text is 1 tokens long, at least 2 are needed"),
    ],
)
def test_windows_out_of_range(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        windows_of(*arguments)


def test_data_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n \ntwo\n")
    assert text_of(tmp_path / "a.txt") == "one\n \ntwo\n"
    (tmp_path / "a.raw").write_text(" \n = One = \n \n")
    assert text_of(tmp_path / "a.raw") == "\n\n = One = \n\n\n"
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 1}\n')
    assert text_of(tmp_path / "a.jsonl") == "one\n\ntwo"
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["", " = One = \n", ""]}), tmp_path / "a.parquet")
    assert text_of(tmp_path / "a.parquet") == text_of(tmp_path / "a.raw")
    parquet.write_table(pyarrow.table({"words": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet:1: no known format has these fields: words"):
        text_of(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", b"text", r"a\.pdf has an ending that is no data file's; known are "),
        ("a.csv", b"text", r"a\.csv holds no text"),
        ("a.txt", b"\xff", r"a\.txt is not UTF-8 text: byte 1"),
        ("a.txt", b" \n", r"a\.txt holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{', r"a\.jsonl:2: the line is no valid JSON"),
        ("a.jsonl", b'{"words": "x"}', r"a\.jsonl:1: no known format has these fields: words"),
    ],
)
def test_bad_data_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        text_of(tmp_path / name)


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR0")
    with pytest.raises(ValueError, match="is no Parquet file that can be read"):
        text_of(tmp_path / "a.parquet")


@pytest.mark.parametrize("stride", [None, 20])
@pytest.mark.parametrize("chunk", [7, 2048])
def test_equal_to_the_loss_of_transformers(folder: Path, stride: int | None, chunk: int) -> None:
    """Hugging Face's recipe for perplexity: labels of -100 where a token is only read."""
    llm = opened(folder, max_batch_tokens=chunk, block_size=8)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = llm.tokenizer.encode(TEXT)
    total, count = 0.0, 0
    for window in windows_of(ids, 64, stride, 5):
        labels = torch.tensor(window.ids)
        labels[: len(labels) - window.scored] = -100
        with torch.no_grad():
            loss = reference(torch.tensor([window.ids]), labels=labels[None]).loss
        total += float(loss) * window.scored
        count += window.scored
    told = []
    result = perplexity(llm, windows_of(ids, 64, stride, 5), told.append)
    assert result.tokens == count
    assert result.nll == pytest.approx(total / count, abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert [known.windows for known in told] == [1, 2, 3, 4, 5]
    llm.engine.check()


def test_equal_to_llm_score(llm: LLM) -> None:
    ids = llm.tokenizer.encode(TEXT)[:100]
    expected = [value for value in llm.score([ids])[0].logprobs if value is not None]
    assert score(llm, Window(ids, 99)).tolist() == pytest.approx(expected, abs=1e-5)
    assert score(llm, Window(ids, 3)).tolist() == pytest.approx(expected[-3:], abs=1e-5)


def test_qwen1_stretches_as_the_whole_window_asks(tmp_path: Path) -> None:
    """Dynamic NTK: the stretch comes from the length of what is read, with a float cache and a quantized one."""
    from qwenkit.engine.batch import Paged
    from qwenkit.eval.perplexity import _part
    from tests.engine.test_engine import tiny_qwen1
    from tests.engine.test_quantized_cache import engine_with

    folder = write_model(tmp_path)
    one = opened(folder)
    one.engine = engine_with(tiny_qwen1(), one.tokenizer, torch.int8, 16)
    ids = list(range(30))
    table = one.engine.pool.allocate(8)
    _, _, ctx = _part(one, ids, 8, 30, table)
    one.engine.pool.release(table)
    assert isinstance(ctx, Paged)
    assert ctx.rope_alpha is not None
    assert ctx.rope_alpha.tolist() == [7.0] * 22


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.002), ("int8", 0.003), ("int4", 0.05)])
def test_quantized_caches_stay_near_the_float_one(folder: Path, llm: LLM, dtype: str, bound: float) -> None:
    """The issue's bound for int8 is 0.3 %."""
    other = opened(folder, kv_cache_dtype=dtype)
    ids = llm.tokenizer.encode(TEXT)
    result = compare(llm, other, windows_of(ids, 128, limit=4))
    assert result.reference.nll == pytest.approx(perplexity(llm, windows_of(ids, 128, limit=4)).nll, abs=1e-9)
    assert result.variant.perplexity == pytest.approx(result.reference.perplexity, rel=bound)
    assert result.variant.nll == pytest.approx(perplexity(other, windows_of(ids, 128, limit=4)).nll, abs=1e-9)
    assert 0 < result.kl < bound
    assert result.agreement > 0.8


def test_a_model_compared_with_itself(llm: LLM) -> None:
    ids = llm.tokenizer.encode(TEXT)
    result = compare(llm, llm, windows_of(ids, 64, 10, 3))
    assert (result.kl, result.agreement) == (0.0, 1.0)
    assert result.reference.nll == result.variant.nll == pytest.approx(perplexity(llm, windows_of(ids, 64, 10, 3)).nll)
    llm.engine.check()


def test_kl_and_agreement_written_out(folder: Path, llm: LLM) -> None:
    other = opened(folder, kv_cache_dtype="int4")
    ids = llm.tokenizer.encode(TEXT)[:40]
    first, second = (torch.cat(list(logit_rows(one, ids[:-1]))).double().log_softmax(-1) for one in (llm, other))
    result = compare(llm, other, iter([Window(ids, 10)]))
    first, second = first[-10:], second[-10:]
    expected = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(first, second, strict=True)) / 10
    assert result.kl == pytest.approx(expected, rel=1e-4)
    assert result.agreement == sum(int(p.argmax() == q.argmax()) for p, q in zip(first, second, strict=True)) / 10


def test_what_cannot_be_compared_or_read(folder: Path, llm: LLM, tmp_path: Path) -> None:
    other = opened(write_model(tmp_path, **SIZES, vocab_size=300))
    with pytest.raises(ValueError, match="report compares models with one vocabulary"):
        check_vocabularies(llm, other, TEXT)
    small = opened(folder, max_model_len=32)
    with pytest.raises(ValueError, match="a window is 40 tokens long, but there is room for 32 tokens"):
        next(logit_rows(small, list(range(40))))
    small.engine.check()


def test_weight_bytes(llm: LLM) -> None:
    assert weight_bytes(llm.model) == sum(parameter.nbytes for parameter in llm.model.parameters())


def test_wikitext_is_the_published_text(data_folder: Path) -> None:
    """Its 4,358 rows as datasets gives them are 299,078 tokens to Qwen2."""
    from qwenkit.text.tokenizer import Tokenizer

    text = text_of(data_folder / "wikitext2" / "wiki.test.raw")
    assert len(Tokenizer.from_folder(data_folder / "tokenizer").encode(text)) == 299_078
    assert text.startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is an English film")
