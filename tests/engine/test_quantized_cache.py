"""Quantized key/value caches under the engine: the same tokens however a prompt is cut, and key biases that do no harm."""

import functools
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenkit import ops
from qwenkit.engine.batch import Paged
from qwenkit.engine.config import EngineConfig
from qwenkit.engine.engine import Engine
from qwenkit.engine.memory import choose_cache_dtype, plan_cache
from qwenkit.engine.runner import Runner, kv_bytes_per_token
from qwenkit.engine.sampling import SamplingParams
from qwenkit.model.attention import Attention
from qwenkit.model.config import ModelConfig
from qwenkit.model.context import pack
from qwenkit.model.qwen import Qwen
from qwenkit.ops.cache import KVCache
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.weights.checkpoint import open_checkpoint
from qwenkit.weights.load import load_model
from qwenkit.weights.pack import packing
from tests.engine.conftest import GREEDY, run, tokens_of
from tests.engine.test_engine import tiny_qwen1
from tests.tiny_models import EOS, IM_END, tiny_pair, write_model

SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.1,
}


@functools.cache
def biased(name: str) -> Qwen:
    """A model whose key biases are as those of Qwen1 to 2.5: huge in a few channels that turn slowly."""
    model = tiny_qwen1() if name == "qwen1" else tiny_pair("qwen2", **SIZES)[1]
    dim = model.config.head_dim
    with torch.no_grad():
        for block in model.model.layers:
            bias = block.self_attn.k_proj.bias.unflatten(0, (-1, dim))
            bias[:, dim // 2 - 1] += 60.0
            bias[:, dim - 2] -= 40.0
    return model


def engine_with(model: Qwen, tokenizer: Tokenizer, dtype: torch.dtype, num_blocks: int, **settings: object) -> Engine:
    config = EngineConfig(**({"block_size": 4, "seed": 0} | settings))  # type: ignore[arg-type]
    longest = num_blocks * config.block_size
    runner = Runner(
        model,
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_model_len=longest,
        graphs=config.graphs,
        cache_dtype=dtype,
    )
    return Engine(runner, tokenizer, config, max_model_len=longest, eos_ids=[EOS, IM_END], defaults=GREEDY)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    name=st.sampled_from(["qwen1", "qwen2"]),
    dtype=st.sampled_from([torch.int8, torch.int4]),
    prompts=st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=30), min_size=1, max_size=4),
    shared_prefix=st.lists(st.integers(0, 255), max_size=20),
    chunk=st.integers(1, 40),
    block_size=st.sampled_from([1, 4, 16]),
    spare_blocks=st.integers(0, 12),
    graphs=st.booleans(),
)
@pytest.mark.parametrize("native", [False, True])
def test_chunks_prefix_cache_batches_and_recordings_give_the_same_tokens(
    tokenizer: Tokenizer,
    instruction_set: str,
    native: bool,
    name: str,
    dtype: torch.dtype,
    prompts: list[list[int]],
    shared_prefix: list[int],
    chunk: int,
    block_size: int,
    spare_blocks: int,
    graphs: bool,
) -> None:
    """Against each prompt alone, read at once, without a prefix cache."""
    ops.use(instruction_set if native else "reference")
    model = biased(name)
    prompts = [shared_prefix + prompt for prompt in prompts]
    longest = max(map(len, prompts)) + 6
    params = SamplingParams(max_tokens=6)
    expected = []
    for prompt in prompts:
        alone = engine_with(model, tokenizer, dtype, 64, prefix_cache=False, graphs=False)
        request_id = alone.add(prompt, params)
        expected.append(tokens_of(run(alone)[request_id, 0]))
    engine = engine_with(
        model,
        tokenizer,
        dtype,
        -(-longest // block_size) + spare_blocks,
        block_size=block_size,
        max_batch_tokens=chunk,
        graphs=graphs,
    )
    for _ in range(2):  # the second time the prefix cache holds what the first left
        ids = [engine.add(prompt, params) for prompt in prompts]
        deltas = run(engine)
        assert [tokens_of(deltas[request_id, 0]) for request_id in ids] == expected


@torch.no_grad()
def logits_through(model: Qwen, ids: list[int], dtype: torch.dtype, *, split: bool) -> torch.Tensor:
    """(T, vocab) of a prompt read through a paged cache."""
    count = len(ids)
    runner = Runner(
        model,
        num_blocks=-(-count // 16),
        block_size=16,
        max_model_len=count,
        graphs=False,
        cache_dtype=dtype,
        split_key_bias=split,
    )
    positions = torch.arange(count)
    ctx = Paged(
        runner.caches,
        slots=positions,
        query_starts=torch.tensor([0, count]),
        context_lengths=torch.tensor([count]),
        block_tables=torch.arange(-(-count // 16), dtype=torch.int32)[None],
        rope_alpha=pack([ids], model.config)[2].rope_alpha if model.config.rope.dynamic_ntk_length else None,
        places=positions,
    )
    return model.logits(model(torch.tensor(ids), positions, ctx))


@pytest.mark.parametrize("native", [False, True])
def test_key_biases_stay_out_of_the_cache(instruction_set: str, native: bool) -> None:
    """The issue's bound: with large key biases the error of logits is more than 5 times smaller without them in the cache."""
    ops.use(instruction_set if native else "reference")
    model = biased("qwen2")
    ids = torch.randint(0, 256, (120,), generator=torch.Generator().manual_seed(1)).tolist()
    exact = logits_through(model, ids, torch.float32, split=True)
    for dtype in (torch.int8, torch.int4):
        with_bias, without = (
            (logits_through(model, ids, dtype, split=split) - exact).abs().mean() for split in (False, True)
        )
        assert with_bias > 5 * without, (dtype, with_bias, without)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int4])
def test_recorded_steps_know_the_bias(
    tokenizer: Tokenizer, instruction_set: str, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Packed weights, whose decode steps are replayed: the tokens of the model's own code."""
    checkpoint = open_checkpoint(write_model(tmp_path, **SIZES, intermediate_size=96))
    swap = packing(ModelConfig.from_dict(checkpoint.config), "bf16")
    model = load_model(checkpoint, dtype=torch.float32, swaps=[swap]).eval()
    for module in model.modules():
        if isinstance(module, Attention):
            assert isinstance(module.k_proj.bias, torch.Tensor)
            module.k_proj.bias[7::8] += 60.0
    found = []
    for graphs in (False, True):
        engine = engine_with(model, tokenizer, dtype, 64, graphs=graphs)
        assert all(cache.key_bias is not None for cache in engine.runner.caches)
        ids = [engine.add(list(range(start, start + 20)), SamplingParams(max_tokens=12)) for start in (0, 50, 90)]
        deltas = run(engine)
        found.append([tokens_of(deltas[request_id, 0]) for request_id in ids])
        steps = engine.runner.graphs
        assert (steps is not None and bool(steps._steps)) == graphs
    assert found[0] == found[1]


def test_caches_of_floats_are_as_they_were() -> None:
    model = biased("qwen2")
    ids = list(range(40))
    for dtype in (torch.float32, torch.bfloat16):
        assert logits_through(model, ids, dtype, split=True).equal(logits_through(model, ids, dtype, split=False))
        runner = Runner(model, num_blocks=4, block_size=16, max_model_len=64, cache_dtype=dtype)
        assert all(cache.key_bias is None for cache in runner.caches)


def test_models_without_a_key_bias_have_nothing_to_take_out() -> None:
    for model_type in ("qwen3", "llama"):
        model = tiny_pair(model_type, **SIZES)[1]
        runner = Runner(model, num_blocks=4, block_size=16, max_model_len=64, cache_dtype=torch.int4)
        assert all(cache.key_bias is None for cache in runner.caches)


@pytest.mark.parametrize(("name", "times"), [("int8", 1.88), ("int4", 3.5)])
def test_a_quantized_cache_holds_more_requests(name: str, times: float) -> None:
    """Head dim 64, where scales weigh most: bf16 takes 128 bytes a head and token, int8 64 + 4, int4 32 + 4."""
    model = tiny_pair("qwen2", **(SIZES | {"head_dim": 64}))[1]
    config = EngineConfig(kv_memory="8MiB", kv_cache_dtype=name)
    dtype = choose_cache_dtype(config, "float", torch.float32)
    device = torch.device("cpu")
    before, _ = plan_cache(model.config, config, torch.bfloat16, device)
    after, longest = plan_cache(model.config, config, dtype, device)
    assert after >= times * before
    runner = Runner(model, num_blocks=after, block_size=16, max_model_len=longest, cache_dtype=dtype)
    taken = sum(cache.nbytes for cache in runner.caches)
    assert taken == (after + 1) * 16 * kv_bytes_per_token(model.config, dtype) <= 8 * 2**20
    assert all(isinstance(cache, KVCache) and cache.dtype == dtype for cache in runner.caches)
