"""When an answer ends, with which text, and what is reported about its tokens."""

import pytest
import torch

from qwenkit.engine.sampling import SamplingParams
from qwenkit.model.context import pack
from qwenkit.model.qwen import Qwen
from qwenkit.text.tokenizer import Tokenizer
from tests.engine.conftest import MakeEngine, naive_greedy, run, tokens_of
from tests.tiny_models import EOS, tiny_pair

PROMPT = [72, 101, 108, 108, 111]


@pytest.fixture(scope="module")
def model() -> Qwen:
    return tiny_pair("qwen2")[1]


@pytest.fixture(scope="module")
def free_run(model: Qwen) -> list[int]:
    """What the model writes greedily when nothing stops it."""
    return naive_greedy(model, PROMPT, 24, stop=())


def answer(make_engine: MakeEngine, model: Qwen, **fields: object):
    engine = make_engine(model, num_blocks=32)
    request_id = engine.add(PROMPT, SamplingParams(**fields))  # type: ignore[arg-type]
    return run(engine)[request_id, 0]


def test_length(make_engine: MakeEngine, model: Qwen, free_run: list[int]) -> None:
    deltas = answer(make_engine, model, max_tokens=6, ignore_eos=True)
    assert tokens_of(deltas) == free_run[:6]
    assert [delta.finish_reason for delta in deltas] == [None] * 5 + ["length"]


def test_without_max_tokens_the_context_is_the_limit(make_engine: MakeEngine, model: Qwen) -> None:
    engine = make_engine(model, num_blocks=8, max_model_len=30)
    request_id = engine.add(PROMPT, SamplingParams(ignore_eos=True))
    deltas = run(engine)[request_id, 0]
    assert len(tokens_of(deltas)) == 30 - len(PROMPT)
    assert deltas[-1].finish_reason == "length"


def test_stop_token_ends_the_answer_and_is_not_text(
    make_engine: MakeEngine, model: Qwen, free_run: list[int], tokenizer: Tokenizer
) -> None:
    stop = free_run[4]
    place = free_run.index(stop)
    deltas = answer(make_engine, model, max_tokens=20, ignore_eos=True, stop_token_ids=(stop,))
    assert tokens_of(deltas) == free_run[: place + 1]
    assert "".join(delta.text for delta in deltas) == tokenizer.decode(free_run[:place])
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", stop)


def test_eos_ends_the_answer_unless_ignored(make_engine: MakeEngine, model: Qwen) -> None:
    bias = {EOS: 100.0}
    deltas = answer(make_engine, model, max_tokens=5, logit_bias=bias)
    assert tokens_of(deltas) == [EOS]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason, deltas[-1].text) == ("stop", None, "")
    assert tokens_of(answer(make_engine, model, max_tokens=5, logit_bias=bias, ignore_eos=True)) == [EOS] * 5


def test_min_tokens_bars_the_end(make_engine: MakeEngine, model: Qwen) -> None:
    deltas = answer(make_engine, model, max_tokens=9, min_tokens=4, logit_bias={EOS: 100.0})
    assert tokens_of(deltas)[4:] == [EOS]
    assert EOS not in tokens_of(deltas)[:4]


def test_stop_text_is_cut_and_never_streamed(make_engine: MakeEngine, model: Qwen, tokenizer: Tokenizer) -> None:
    spell = dict.fromkeys(tokenizer.encode("a"), 100.0)
    deltas = answer(make_engine, model, max_tokens=9, logit_bias=spell, stop=("aaa",))
    assert "".join(delta.text for delta in deltas) == ""
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "aaa")
    assert len(tokens_of(deltas)) == 3
    held = answer(make_engine, model, max_tokens=2, logit_bias=spell, stop=("aaa",))
    assert [delta.text for delta in held] == ["", "aa"], "what was held back comes out at the end"


def test_logprobs_are_the_models_own(make_engine: MakeEngine, model: Qwen, free_run: list[int]) -> None:
    """Not touched by temperature or bias, for the answer and for the prompt."""
    deltas = answer(make_engine, model, max_tokens=3, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    with torch.no_grad():
        tokens = PROMPT + free_run[:3]
        expected = model.logits(model(*pack([tokens], model.config))).log_softmax(-1)
    for step, delta in enumerate(deltas):
        assert delta.logprobs is not None
        (logprob,) = delta.logprobs
        row = expected[len(PROMPT) - 1 + step]
        assert logprob.logprob == pytest.approx(row[free_run[step]].item(), abs=1e-5)
        assert [token for token, _ in logprob.top] == row.topk(2).indices.tolist()
    assert deltas[0].prompt_logprobs is not None
    assert deltas[1].prompt_logprobs is None
    first, *rest = deltas[0].prompt_logprobs
    assert first is None
    for place, logprob in enumerate(rest):
        assert logprob is not None
        assert logprob.token_id == PROMPT[place + 1]
        assert logprob.logprob == pytest.approx(expected[place][PROMPT[place + 1]].item(), abs=1e-5)


def test_prompt_logprobs_do_not_depend_on_chunks_cache_or_preemption(make_engine: MakeEngine, model: Qwen) -> None:
    prompt = list(range(33))
    params = SamplingParams(max_tokens=6, prompt_logprobs=0, ignore_eos=True)
    results = []
    for settings in ({"max_batch_tokens": 100}, {"max_batch_tokens": 7}, {"max_batch_tokens": 7, "num_blocks": 20}):
        engine = make_engine(model, **({"num_blocks": 40} | settings))
        for _ in range(2):
            ids = [engine.add(prompt, params) for _ in range(2)]
            deltas = run(engine)
            results += [deltas[request_id, 0][0].prompt_logprobs for request_id in ids]
    values = [[logprob.logprob for logprob in result[1:]] for result in results]
    for other in values[1:]:
        assert other == pytest.approx(values[0], abs=1e-5)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "prompt is empty"),
        ([1] * 40, {}, r"prompt is 40 tokens long, but the context .* is 32 tokens"),
        ([264], {}, r"prompt has token id 264, allowed are 0 to 263"),
        ([1], {"logit_bias": {999: 1.0}}, r"logit_bias has token id 999"),
        ([1], {"stop_token_ids": (999,)}, r"stop_token_ids has token id 999"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_queued(
    make_engine: MakeEngine, model: Qwen, prompt: list[int], params: dict[str, object], message: str
) -> None:
    engine = make_engine(model, num_blocks=8)
    with pytest.raises(ValueError, match=message):
        engine.add(prompt, SamplingParams(**params))  # type: ignore[arg-type]
    assert not engine.has_work
    engine.check()
