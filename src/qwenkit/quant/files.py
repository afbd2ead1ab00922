"""The folder of a quantized model. In: tensors, block by block, and the checkpoint they came from. Out: a folder that loads by
itself: safetensors (in shards with an index where they are large), config.json, quantize_config.json, generation config,
tokenizer, chat template.

Everything is made in a folder beside, DIR.part, which is renamed when it is whole. Each file in it is written beside and renamed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from qwenkit.quant.config import QuantConfig
from qwenkit.storage import write_bytes, write_json
from qwenkit.weights.checkpoint import Checkpoint
from qwenkit.weights.safetensors_files import INDEX, SINGLE, read_file
from qwenkit.weights.saving import ARCHITECTURES, copy_tokenizer, generation_config
from qwenkit.weights.stored import DTYPE_NAMES, DTYPES, StoredTensor

SHARD_BYTES = 4 << 30
_CHUNK = 1 << 24  # bytes of a tensor in memory while it is copied


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A safetensors file of tensors in memory."""

    def read(tensor: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
        return lambda start, stop: tensor[start:stop]

    write_stored(
        path,
        [
            StoredTensor(name, tuple(t.shape), DTYPE_NAMES[t.dtype], read(t.detach().cpu()))
            for name, t in tensors.items()
        ],
    )


def write_stored(path: Path, tensors: Iterable[StoredTensor]) -> None:
    """A safetensors file of tensors that lie elsewhere, each read and written a few megabytes at a time."""
    tensors = sorted(tensors, key=lambda tensor: (-DTYPES[tensor.dtype].itemsize, tensor.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + _bytes(tensor)
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(file: Any) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            rows = max(1, _CHUNK * tensor.shape[0] // max(1, _bytes(tensor)))
            for start in range(0, tensor.shape[0], rows):
                part = tensor.read(start, min(start + rows, tensor.shape[0]))
                file.write(part.contiguous().flatten().view(torch.uint8).numpy().data)

    write_bytes(path, write)


def _bytes(tensor: StoredTensor) -> int:
    count = DTYPES[tensor.dtype].itemsize
    for size in tensor.shape:
        count *= size
    return count


def assemble(folder: Path, parts: list[Path], shard_bytes: int = SHARD_BYTES) -> None:
    """Put the files of all blocks together as model.safetensors, or as shards with an index."""
    shards: list[list[StoredTensor]] = [[]]
    filled = 0
    for tensor in (tensor for part in parts for tensor in read_file(part)):
        if shards[-1] and filled + _bytes(tensor) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += _bytes(tensor)
    if len(shards) == 1:
        write_stored(folder / SINGLE, shards[0])
    else:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        for name, shard in zip(names, shards, strict=True):
            write_stored(folder / name, shard)
        write_json(
            folder / INDEX,
            {
                "metadata": {"total_size": sum(_bytes(tensor) for shard in shards for tensor in shard)},
                "weight_map": {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard},
            },
        )


def is_assembled(folder: Path) -> bool:
    """Whether `assemble` has finished there: what it writes last is there."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def write_companions(folder: Path, checkpoint: Checkpoint, quantization: Mapping[str, Any], dtype: str) -> None:
    """Everything of the folder but the weights."""
    config = dict(checkpoint.config)
    config.setdefault("architectures", [ARCHITECTURES[config["model_type"]]])
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    if config["model_type"] == "qwen":
        config |= {"bf16": dtype == "bfloat16", "fp16": dtype == "float16", "fp32": False}
    write_json(folder / "config.json", config | {"quantization_config": dict(quantization)}, indent=2)
    write_json(folder / "quantize_config.json", quantization, indent=2)
    generation = generation_config(checkpoint)
    if generation:
        write_json(folder / "generation_config.json", generation, indent=2)
    copy_tokenizer(folder, checkpoint)


def quantization_config(config: QuantConfig, *, moe: bool) -> dict[str, Any]:
    """What config.json says of the quantization: AutoGPTQ's keys, and GPTQModel's where they are others."""
    assert config.group_size is not None
    written: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        "sym": config.sym,
        # Whether g_idx is out of order, which is what readers want to know.
        "desc_act": config.method == "gptq" and config.desc_act and not config.static_groups,
        "static_groups": config.static_groups,
        "true_sequential": True,
        "damp_percent": config.damp,
        "lm_head": False,
        "checkpoint_format": config.format,
        "format": config.format,
        "pack_dtype": "int32",
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "meta": {
            "quantizer": ["qwenkit"],
            "method": config.method,
            "act_group_aware": config.group_aware and not config.desc_act,
            "mse": config.mse,
            "gptaq": {"alpha": config.alpha} if config.gptaq else None,
        },
    }
    if moe:  # which Linears of a block are left in 16 bits
        written["dynamic"] = {r"-:.*\.mlp\.gate$": {}, r"-:.*\.shared_expert_gate$": {}}
    return written
