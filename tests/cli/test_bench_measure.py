"""What `qwenkit bench` measures, on tiny models: what is run and counted, and the arithmetic of the figures. No speeds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qwenkit.cli import bench_measure as measuring
from qwenkit.cli.bench import BenchConfig
from qwenkit.cli.bench_measure import Limits, Run, Size, Speed
from qwenkit.engine.llm import LLM
from qwenkit.model.config import ModelConfig
from qwenkit.model.moe import SparseMLP
from qwenkit.model.qwen import Qwen
from qwenkit.ops.packed import ROWS
from tests.tiny_models import EXPERTS, FAMILIES, SIZES, VOCAB_SIZE, tiny_reference, write_model

HIDDEN = SIZES["hidden_size"]
SMALL = BenchConfig(prefill=20, decode=4, batch=3, batch_prompt=6, batch_decode=5, repeat=2)
LIMITS = Limits(memory_gb_s=50.0, matrix_gop_s=800.0, matrix_kind="int8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def llm(folder: Path) -> LLM:
    return LLM(folder, weights="float", dtype="float32", prefix_cache=False, max_num_seqs=3)


def silent(done: str) -> None: ...


def _interrupt() -> Any:
    raise KeyboardInterrupt


def test_a_run_writes_exactly_what_was_asked_for(llm: LLM) -> None:
    single = measuring.run(llm, measuring.Prompts(llm).draw(1, 20), 5)
    assert (single.first_tokens, single.tokens) == (1, 5)
    batch = measuring.run(llm, measuring.Prompts(llm).draw(3, 6), 7)
    assert (batch.first_tokens, batch.tokens) == (3, 21)
    assert 0 < batch.first_s < batch.total_s
    assert not llm.engine.has_work


def test_a_run_counts_tokens_that_come_before_the_last_request_begins(folder: Path) -> None:
    """Three prompts of 6 tokens with 8 tokens a step: the first writes while the others are still read."""
    llm = LLM(folder, max_batch_tokens=8, prefix_cache=False)
    batch = measuring.run(llm, measuring.Prompts(llm).draw(3, 6), 7)
    assert batch.first_tokens > 3
    assert batch.tokens == 21


def test_an_interrupted_run_leaves_the_engine_empty(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter([llm.engine.step, llm.engine.step])
    monkeypatch.setattr(llm.engine, "step", lambda: next(steps, _interrupt)())
    with pytest.raises(KeyboardInterrupt):
        measuring.run(llm, measuring.Prompts(llm).draw(2, 6), 7)
    assert not llm.engine.has_work
    llm.engine.check()


def test_prompts_are_ordinary_tokens_new_each_time_and_the_same_in_every_process(llm: LLM) -> None:
    prompts = measuring.Prompts(llm)
    first, second = prompts.draw(4, 2000), prompts.draw(4, 2000)
    assert first != second
    assert measuring.Prompts(llm).draw(4, 2000) == first
    assert {token for prompt in first + second for token in prompt} == set(range(256))  # no control token, no padding


def test_speeds_are_medians_without_the_run_that_warms_up(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    single = [Run(99, 999, 1, 5), Run(2, 4, 1, 5), Run(1, 3, 1, 5), Run(4, 5, 1, 5)]
    batch = [Run(9, 99, 3, 15), Run(1, 3, 3, 15), Run(1, 15, 3, 15), Run(1, 5, 3, 15)]
    scripted, asked, told = iter(single + batch), [], []

    def run(llm: LLM, prompts: list[list[int]], new: int) -> Run:
        asked.append((len(prompts), len(prompts[0]), new))
        return next(scripted)

    monkeypatch.setattr(measuring, "run", run)
    config = BenchConfig(prefill=20, decode=4, batch=3, batch_prompt=6, batch_decode=5, repeat=3)
    speed = measuring.measure_speed(llm, config, told.append)
    assert asked == [(1, 20, 5)] * 4 + [(3, 6, 5)] * 4
    assert speed == Speed(prefill_tok_s=10.0, decode_tok_s=2.0, batch_out_tok_s=3.0)
    assert told == ["one request"] * 4 + ["batch"] * 4


def test_curves_stay_within_model_and_memory(folder: Path) -> None:
    llm = LLM(folder, max_model_len=160, max_num_seqs=5, prefix_cache=False)
    assert measuring.curve_points(llm, SMALL) == ([1, 2, 4], [128, 155])
    curves = measuring.measure_curves(llm, SMALL, silent)
    assert list(curves.by_batch) == [1, 2, 4]
    assert list(curves.by_context) == [128, 155]
    assert all(speed > 0 for speed in (*curves.by_batch.values(), *curves.by_context.values()))
    tight = LLM(folder, max_model_len=32, kv_memory=str(100 * llm.engine.runner.caches[0].keys[0].nbytes))
    batches, lengths = measuring.curve_points(tight, SMALL)
    assert lengths == [32 - 5]
    assert batches[-1] * 11 <= tight.engine.pool.num_blocks * 16 < 32 * 11


def test_threads(folder: Path) -> None:
    before = torch.get_num_threads()
    try:
        LLM(folder)  # the native library, where there is one, is told as well
        measuring.set_threads(2)
        assert torch.get_num_threads() == 2
    finally:
        measuring.set_threads(before)


@pytest.mark.parametrize(
    ("model_type", "tied"),
    [("qwen2", False), ("llama", True), ("qwen3", True), ("qwen2_moe", False), ("qwen3_moe", False)],
)
def test_weights_in_memory_and_weights_read(tmp_path: Path, model_type: str, tied: bool) -> None:
    llm = LLM(write_model(tmp_path, model_type), weights="float", dtype="float32")
    assert llm.model.config.tie_word_embeddings is tied
    everything = 4 * sum(parameter.numel() for parameter in tiny_reference(model_type).parameters())
    size = measuring.measure_size(llm, SMALL)
    assert size.weight_bytes == everything
    read = everything if tied else everything - 4 * VOCAB_SIZE * HIDDEN
    moe = llm.model.config.moe
    if moe is not None:
        resting = EXPERTS["num_experts"] - EXPERTS["num_experts_per_tok"]
        read -= len(moe.sparse_layers) * resting * 4 * 3 * HIDDEN * EXPERTS["moe_intermediate_size"]
    assert measuring.weights_read(llm.model) == read
    config = llm.model.config
    token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert size.bytes_per_token - read == token * (21 + 24) / 2  # the first of 4 tokens sees 21 keys, the last 24
    blocks = llm.engine.runner.caches[0].blocks
    assert size.kv_cache_bytes == blocks * llm.config.block_size * token


def test_a_window_bounds_the_keys_that_are_read(tmp_path: Path) -> None:
    folder = write_model(tmp_path, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    llm = LLM(folder, weights="float", dtype="float32")
    assert llm.model.config.sliding_windows == (None, 8, 8)
    read = measuring.measure_size(llm, SMALL).bytes_per_token - measuring.weights_read(llm.model)
    layer = 2 * 4 * llm.model.config.num_key_value_heads * llm.model.config.head_dim
    assert read == layer * (22.5 + 8 + 8)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_packed_weights_count_where_they_lie(tmp_path: Path, weights: str) -> None:
    """An MLP as wide as the hidden states, so that every matrix can be packed; scales, norms and biases are in fp32."""
    rows = -(-VOCAB_SIZE // ROWS) * ROWS
    per_weight = {"bf16": 2, "int8": 1}[weights]
    scale = {"bf16": 0, "int8": 4}[weights]
    vocabulary = rows * (HIDDEN * per_weight + scale)
    matrices = [HIDDEN] * 2 + [HIDDEN // 2] * 2 + [HIDDEN] * 3  # rows of q, o, k, v, gate, up, down (padded to 32)
    layers = 3 * sum(-(-one // ROWS) * ROWS * (HIDDEN * per_weight + scale) for one in matrices)
    norms = 4 * HIDDEN * (2 * 3 + 1)
    read = vocabulary + layers + norms
    tied = LLM(write_model(tmp_path / "tied", "llama", intermediate_size=HIDDEN), weights=weights)
    assert measuring.weights_read(tied.model) == read
    assert measuring.measure_size(tied, SMALL).weight_bytes == read
    free = LLM(
        write_model(tmp_path / "free", "llama", intermediate_size=HIDDEN, tie_word_embeddings=False), weights=weights
    )
    assert measuring.weights_read(free.model) == read
    assert measuring.measure_size(free, SMALL).weight_bytes == read + rows * HIDDEN * 2  # an embedding in bf16


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_multiplications_are_those_of_the_linears(model_type: str) -> None:
    config = ModelConfig.from_dict(tiny_reference(model_type).config.to_dict())
    model = Qwen(config)
    expected = sum(linear.weight.numel() for linear in model.model.modules() if isinstance(linear, nn.Linear))
    for layer in model.modules():
        if isinstance(layer, SparseMLP):
            resting = list(layer.experts)[layer.num_experts_per_tok :]
            expected -= sum(linear.weight.numel() for expert in resting for linear in expert.children())
    assert measuring.multiplies_per_token(config) == expected


def test_figures_that_follow_from_others() -> None:
    size = Size(weight_bytes=10, kv_cache_bytes=20, bytes_per_token=2 * 10**8, multiplies_per_token=4 * 10**8)
    values = measuring.figures(Speed(500.0, 100.0, 300.0), size, 1.5, 3 * 10**8, LIMITS)
    assert values["peak_rss_mb"] == 300
    assert values["bandwidth_gb_s"] == pytest.approx(20)
    assert values["bandwidth_share"] == pytest.approx(0.4)
    assert values["matrix_share"] == pytest.approx(2 * 0.4 * 500 / 800)
    elsewhere = measuring.figures(Speed(500.0, 100.0, 300.0), size, 1.5, 3 * 10**8, None)
    assert list(elsewhere) == list(values)
    assert elsewhere["bandwidth_gb_s"] == values["bandwidth_gb_s"]
    unknown = ("memory_gb_s", "bandwidth_share", "matrix_gop_s", "matrix_kind", "matrix_share")
    assert all(elsewhere[name] is None for name in unknown)


def test_limits_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measuring.read_rate(2**20) > 0
    rates = measuring.matrix_rates((32, 64))
    assert {"float32", "int8"} <= set(rates) <= {"float32", "int8", "bfloat16"}
    assert all(rate > 0 for rate in rates.values())
    monkeypatch.setattr(measuring, "matrix_rates", lambda: {"float32": 1e9, "int8": 3e9})
    limits = measuring.measure_limits(2**20)
    assert (limits.matrix_gop_s, limits.matrix_kind) == (3.0, "int8")


def test_peak_memory_stays_when_memory_is_given_back() -> None:
    torch.ones(2**25)  # 128 MiB, gone at once
    assert measuring.peak_rss() > 2**27
    assert measuring.peak_rss() == pytest.approx(measuring.peak_rss(), rel=0.01)  # the system counts in lumps
