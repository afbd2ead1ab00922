"""What the key/value cache may take, and the sentences when that is too little."""

import pytest
import torch

from qwenkit.engine.config import EngineConfig
from qwenkit.engine.memory import choose_cache_dtype, choose_device, choose_dtype, plan_cache
from qwenkit.engine.runner import Runner, kv_bytes_per_token
from qwenkit.model.qwen import Qwen
from qwenkit.settings import parse_size
from tests.tiny_models import tiny_pair

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Qwen:
    return tiny_pair("qwen2")[1]


@pytest.mark.parametrize("text", ["", "GiB", "2 GiBs", "-1", "two", "1e3"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"kv_memory is .*, allowed is a size such as"):
        EngineConfig(kv_memory=text)


@pytest.mark.parametrize(
    ("field", "bad"),
    [("dtype", "int3"), ("max_num_seqs", 0), ("max_batch_tokens", -1), ("block_size", 0), ("max_model_len", 0)],
)
def test_settings_out_of_range_are_named(field: str, bad: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field} is .*, allowed "):
        EngineConfig(**{field: bad})  # type: ignore[arg-type]


@pytest.mark.parametrize("kv_memory", ["200KiB", "1MiB", "64MiB"])
def test_memory_is_bounded_by_kv_memory(model: Qwen, kv_memory: str) -> None:
    config = EngineConfig(kv_memory=kv_memory)
    num_blocks, longest = plan_cache(model.config, config, torch.float32, CPU)
    runner = Runner(model, num_blocks=num_blocks, block_size=config.block_size, max_model_len=longest)
    taken = sum(cache.nbytes for cache in runner.caches)
    one_block = config.block_size * kv_bytes_per_token(model.config, torch.float32)
    assert parse_size("kv_memory", kv_memory) - one_block < taken <= parse_size("kv_memory", kv_memory)
    assert longest == min(256, num_blocks * config.block_size)


def test_too_little_for_one_request_says_how_much_would_do(model: Qwen) -> None:
    with pytest.raises(
        ValueError, match=r"kv_memory 50KiB holds 112 tokens, but .* max_model_len 200 needs (\d+) bytes"
    ) as caught:
        plan_cache(model.config, EngineConfig(kv_memory="50KiB", max_model_len=200), torch.float32, CPU)
    enough = str(caught.value).split("needs ")[1].split()[0]
    _, longest = plan_cache(model.config, EngineConfig(kv_memory=enough, max_model_len=200), torch.float32, CPU)
    assert longest == 200


def test_not_even_one_block(model: Qwen) -> None:
    with pytest.raises(ValueError, match=r"kv_memory 10 does not hold two blocks of 16 tokens"):
        plan_cache(model.config, EngineConfig(kv_memory="10"), torch.float32, CPU)


def test_beyond_the_models_context(model: Qwen) -> None:
    with pytest.raises(ValueError, match=r"max_model_len is 300, but the model's context is 256 tokens"):
        plan_cache(model.config, EngineConfig(max_model_len=300), torch.float32, CPU)


def test_devices() -> None:
    assert choose_device("cpu") == CPU
    for name in ("tpu", "meta", "cuda:99"):
        with pytest.raises(ValueError, match=f"device is '{name}'"):
            choose_device(name)


def test_cache_dtypes() -> None:
    """What rounds weights at load rounds keys and values too, unless the user says otherwise."""
    auto = EngineConfig()
    kinds = {weights: choose_cache_dtype(auto, weights, torch.float32) for weights in ("float", "bf16", "int8", "int4")}
    assert kinds == {"float": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.int8}
    assert choose_cache_dtype(EngineConfig(kv_cache_dtype="bfloat16"), "int4", torch.float32) == torch.bfloat16


def test_dtypes() -> None:
    assert choose_dtype("float16", "bfloat16", CPU) == torch.float16
    assert choose_dtype("auto", "float32", CPU) == torch.float32
    assert choose_dtype("auto", "float16", torch.device("cuda")) == torch.bfloat16
    assert choose_dtype("auto", "bfloat16", CPU) in (torch.float32, torch.bfloat16)
