"""The engine against decoding by full forward passes, over everything that may change how a request is computed."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qwenkit.engine.sampling import SamplingParams
from qwenkit.model.config import ModelConfig
from qwenkit.model.qwen import Qwen
from tests.engine.conftest import MakeEngine, naive_greedy, run, tokens_of
from tests.model.test_qwen import qwen1_names
from tests.tiny_models import FAMILIES, tiny_pair

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in FAMILIES},
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen2-yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "rope_theta": 1e4,
            }
        },
    ),
}


@functools.cache
def model_of(variant: str) -> Qwen:
    if variant == "qwen1":
        return tiny_qwen1()
    model_type, changes = VARIANTS[variant]
    return tiny_pair(model_type, **changes)[1]


def tiny_qwen1() -> Qwen:
    """A random Qwen-1 with trained length 8, so that NTK and LogN are at work in every test."""
    torch.manual_seed(0)
    config = {
        "model_type": "qwen",
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "kv_channels": 16,
        "seq_length": 8,
        "max_position_embeddings": 256,
    }
    model = Qwen(ModelConfig.from_dict(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


prompts = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=30), min_size=1, max_size=6)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    variant=st.sampled_from([*VARIANTS, "qwen1"]),
    prompts=prompts,
    shared_prefix=st.lists(st.integers(0, 255), max_size=20),
    chunk=st.integers(1, 40),
    block_size=st.sampled_from([1, 2, 4, 8, 16]),
    prefix_cache=st.booleans(),
    spare_blocks=st.integers(0, 12),
    max_num_seqs=st.integers(1, 6),
    max_tokens=st.integers(1, 12),
    repeat=st.booleans(),
    principals=st.text("abc", min_size=6, max_size=6),
)
def test_greedy_tokens_equal_naive_decoding(
    make_engine: MakeEngine,
    variant: str,
    prompts: list[list[int]],
    shared_prefix: list[int],
    chunk: int,
    block_size: int,
    prefix_cache: bool,
    spare_blocks: int,
    max_num_seqs: int,
    max_tokens: int,
    repeat: bool,
    principals: str,
) -> None:
    """Chunk size x block size x prefix cache x preemption (the pool is barely larger than the longest request) x batch x
    principals.
    """
    model = model_of(variant)
    prompts = [shared_prefix + prompt for prompt in prompts]
    longest = max(map(len, prompts)) + max_tokens
    engine = make_engine(
        model,
        num_blocks=-(-longest // block_size) + spare_blocks,
        block_size=block_size,
        max_batch_tokens=chunk,
        prefix_cache=prefix_cache,
        max_num_seqs=max_num_seqs,
    )
    expected = [naive_greedy(model, prompt, max_tokens) for prompt in prompts]
    for _ in range(1 + repeat):  # the second time the prefix cache holds what the first left
        ids = [
            engine.add(prompt, SamplingParams(max_tokens=max_tokens), principal=principal)
            for prompt, principal in zip(prompts, principals, strict=False)
        ]
        deltas = run(engine)
        assert [tokens_of(deltas[request_id, 0]) for request_id in ids] == expected


@pytest.mark.parametrize("principals", ["aaaaaa", "aaaaab", "abcabc"])
def test_preemption_is_exercised_and_changes_nothing(make_engine: MakeEngine, principals: str) -> None:
    model = model_of("qwen3")
    prompts = [[i, 2 * i, 3 * i] for i in range(1, 7)]
    engine = make_engine(model, num_blocks=10)
    ids = [
        engine.add(prompt, SamplingParams(max_tokens=20, ignore_eos=True), principal=principal)
        for prompt, principal in zip(prompts, principals, strict=True)
    ]
    deltas = run(engine)
    assert engine.scheduler.num_preemptions > 0
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert tokens_of(deltas[request_id, 0]) == naive_greedy(model, prompt, 20, stop=())


def test_prefix_cache_is_hit_and_says_so(make_engine: MakeEngine) -> None:
    engine = make_engine(model_of("qwen2"), num_blocks=40)
    prompt = list(range(30))
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    first = engine.add(prompt, params)
    second_prompt = [*prompt[:20], 99, 98]
    (cold,) = run(engine).values()
    assert cold[0].num_cached_tokens == 0
    second = engine.add(second_prompt, params)
    warm = run(engine)[second, 0]
    assert warm[0].num_cached_tokens == 20
    assert first != second


def test_requests_of_different_ntk_stretch_share_no_blocks(make_engine: MakeEngine) -> None:
    """Qwen-1's keys depend on the length of the prompt they were computed for."""
    model = model_of("qwen1")
    engine = make_engine(model, num_blocks=40)
    short, long = list(range(12)), list(range(20))  # alpha 3 and 7 at trained length 8
    for prompt in (short, long, short):
        request_id = engine.add(prompt, SamplingParams(max_tokens=4))
        deltas = run(engine)[request_id, 0]
        assert tokens_of(deltas) == naive_greedy(model, prompt, 4)
    assert deltas[0].num_cached_tokens == 8


def test_cached_decode_equals_the_original_qwen1(make_engine: MakeEngine, data_folder: Path) -> None:
    """Prefill of 7 tokens, then one at a time to 20: the stretch stays that of the prompt while LogN sets in."""
    tensors = load_file(data_folder / "qwen1_tiny_golden.safetensors")
    config = json.loads((data_folder / "qwen1_tiny_golden.json").read_text())["config"]
    model = Qwen(ModelConfig.from_dict({"model_type": "qwen", **config}))
    model.load_state_dict(qwen1_names({k[2:]: v for k, v in tensors.items() if k.startswith("w.")}))
    ids = tensors["ids"].flatten()[:20].tolist()
    expected = tensors["decode.prefill7_to20.lastlogits"].reshape(-1, config["vocab_size"])
    engine = make_engine(model, num_blocks=8, max_model_len=32)
    engine.add(ids[:7], SamplingParams(max_tokens=13, ignore_eos=True))
    rows = []
    for place in range(7, 21):
        scheduled = engine.scheduler.schedule()
        rows.append(engine.runner.run(scheduled).logits[0].clone())
        engine.scheduler.computed(scheduled[0])
        if place < 20:
            scheduled[0].sequence.tokens.append(ids[place])
    computed = torch.stack(rows)[-len(expected) :]
    torch.testing.assert_close(computed, expected, atol=1e-5, rtol=0)


def test_a_request_alone_and_in_a_batch_gives_the_same_tokens(make_engine: MakeEngine) -> None:
    model = model_of("qwen2")
    params = SamplingParams(max_tokens=12, temperature=0.9, top_p=0.95, seed=7, ignore_eos=True)
    prompt = [10, 20, 30, 40, 50]
    engine = make_engine(model, num_blocks=64)
    alone_id = engine.add(prompt, params)
    alone = tokens_of(run(engine)[alone_id, 0])
    for others in range(1, 6):
        for other in range(others):
            engine.add([other] * (3 * other + 1), SamplingParams(max_tokens=15, temperature=1.3, ignore_eos=True))
        together_id = engine.add(prompt, params)
        assert tokens_of(run(engine)[together_id, 0]) == alone


def test_answers_of_one_request_share_the_prompt(make_engine: MakeEngine) -> None:
    engine = make_engine(model_of("qwen2"), num_blocks=64)
    params = SamplingParams(max_tokens=8, temperature=1.5, n=4, seed=3, ignore_eos=True)
    request_id = engine.add(list(range(40)), params)
    deltas = run(engine)
    answers = [tokens_of(deltas[request_id, index]) for index in range(4)]
    assert len({tuple(answer) for answer in answers}) == 4, "answers of one request are drawn independently"
    assert deltas[request_id, 3][0].num_cached_tokens == 36


def test_sixty_four_requests_of_mixed_length_return_every_block(make_engine: MakeEngine) -> None:
    engine = make_engine(model_of("qwen2"), num_blocks=100, block_size=16, max_num_seqs=64, max_model_len=256)
    ids = [
        engine.add([i % 256] * (1 + i * 3), SamplingParams(max_tokens=1 + i % 9, ignore_eos=True)) for i in range(64)
    ]
    deltas = run(engine)
    assert [len(tokens_of(deltas[request_id, 0])) for request_id in ids] == [1 + i % 9 for i in range(64)]


@pytest.mark.parametrize("after_steps", [0, 1, 3])
def test_abort_returns_blocks_at_once(make_engine: MakeEngine, after_steps: int) -> None:
    engine = make_engine(model_of("qwen2"), num_blocks=64, max_batch_tokens=8)
    kept = engine.add([1, 2, 3], SamplingParams(max_tokens=5, ignore_eos=True))
    doomed = engine.add(list(range(30)), SamplingParams(max_tokens=20, n=3, ignore_eos=True))
    for _ in range(after_steps):
        engine.step()
    engine.abort(doomed)
    engine.abort(doomed)
    engine.check()
    assert sum(len(sequence.block_table) for sequence in engine.scheduler.running) <= 2
    deltas = run(engine)
    assert {request_id for request_id, _ in deltas} <= {kept}
