"""What a model is run with on this machine: device, dtype, and how much memory its keys and values may take.

The shares of free memory are fixed. No step of the largest size is run first to measure what activations need, as vLLM's profile
run does; on a GPU the rest must hold them, and `kv_memory` is the way to say otherwise.
"""

from __future__ import annotations

import psutil
import torch

from qwenkit import ops
from qwenkit.engine.config import EngineConfig
from qwenkit.engine.runner import kv_bytes_per_token
from qwenkit.model.config import ModelConfig
from qwenkit.settings import parse_size

CPU_SHARE = 0.4  # of the memory that is free, for keys and values when the user names no number
GPU_SHARE = 0.9
SPARE_BLOCKS = 1  # the runner's, see Runner


def choose_device(name: str) -> torch.device:
    """The device of EngineConfig.device; ValueError when it is unknown or not on this machine."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}, allowed are auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}, allowed are auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def choose_dtype(name: str, checkpoint_dtype: str | None, device: torch.device) -> torch.dtype:
    """The dtype of EngineConfig.dtype.

    auto follows the checkpoint, with two exceptions: float16 becomes bfloat16, since Qwen2 and later overflow in float16; and a
    CPU without bfloat16 instructions computes in float32, which is several times faster there.
    """
    if name != "auto":
        return getattr(torch, name)
    if checkpoint_dtype == "float32" or (device.type == "cpu" and not _cpu_has_bfloat16()):
        return torch.float32
    return torch.bfloat16


def choose_weights(engine: EngineConfig, device: torch.device) -> str:
    """The packing of EngineConfig.weights: float (none), bf16, int8 or int4.

    auto packs where the native library runs and no dtype was asked for: plain weights as bf16, so that nothing is lost, and
    quantized ones with their own values. Raises ValueError where packed weights cannot run.
    """
    if engine.weights == "auto":
        return "bf16" if device.type == "cpu" and engine.dtype == "auto" and ops.native() is not None else "float"
    if engine.weights != "float" and (device.type != "cpu" or engine.dtype not in ("auto", "float32")):
        raise ValueError(
            f"weights is {engine.weights!r}, which needs device cpu and dtype auto or float32, but they are "
            f"{device.type} and {engine.dtype}; allowed there are auto and float"
        )
    return engine.weights


def choose_cache_dtype(engine: EngineConfig, weights: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of EngineConfig.kv_cache_dtype. auto is that of the arithmetic, bfloat16 where weights are packed, or int8 where
    they are rounded to 8 or 4 bits at load: fewer bytes to read for each token, and a rounding well below that of the weights.
    """
    if engine.kv_cache_dtype != "auto":
        return getattr(torch, engine.kv_cache_dtype)
    if weights == "float":
        return dtype
    return torch.int8 if weights in ("int8", "int4") else torch.bfloat16


def _cpu_has_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def plan_cache(config: ModelConfig, engine: EngineConfig, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """(number of blocks, longest prompt plus answer) for what the user allows and the machine has.

    Raises ValueError naming both numbers when max_model_len is beyond the model's context, or when kv_memory cannot hold one
    request of max_model_len (with how much would do).
    """
    longest = config.max_position_embeddings
    if engine.max_model_len is not None:
        if engine.max_model_len > longest:
            raise ValueError(f"max_model_len is {engine.max_model_len}, but the model's context is {longest} tokens")
        longest = engine.max_model_len
    block_bytes = kv_bytes_per_token(config, dtype) * engine.block_size
    blocks_for_one = -(-longest // engine.block_size) + SPARE_BLOCKS
    if engine.kv_memory is not None:
        budget = parse_size("kv_memory", engine.kv_memory)
    else:
        budget = min(_free_share(device), engine.max_num_seqs * blocks_for_one * block_bytes)
    num_blocks = budget // block_bytes - SPARE_BLOCKS
    if num_blocks + SPARE_BLOCKS < blocks_for_one and engine.max_model_len is not None:
        raise ValueError(
            f"{_budget_name(engine)} holds {max(num_blocks, 0) * engine.block_size} tokens, but one request of max_model_len "
            f"{longest} needs {blocks_for_one * block_bytes} bytes ({_mib(blocks_for_one * block_bytes)})"
        )
    if num_blocks < 1:
        raise ValueError(
            f"{_budget_name(engine)} does not hold two blocks of {engine.block_size} tokens ({2 * block_bytes} bytes); "
            f"one request of {longest} tokens needs {_mib(blocks_for_one * block_bytes)}"
        )
    return num_blocks, min(longest, num_blocks * engine.block_size)


def _budget_name(engine: EngineConfig) -> str:
    return f"kv_memory {engine.kv_memory}" if engine.kv_memory is not None else "the memory that is free"


def _mib(count: int) -> str:
    return f"{-(-count // 2**20)} MiB"


def _free_share(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * GPU_SHARE)
    return int(psutil.virtual_memory().available * CPU_SHARE)
