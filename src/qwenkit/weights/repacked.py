"""Packed weights kept on disk, so that a checkpoint is packed once. In: a checkpoint, a packing and a folder. Out: a `Qwen`.

A file holds one packed model: a JSON header with sizes and checksums, then every tensor as it lies in memory. The next load
reads it into huge pages, from which decoding is 6 to 12 % faster than from a mapped file. A model that would take most of the
memory is mapped, copy on write: its pages are shared by all processes that run it, and given back by the system when memory is
short. Either way every tensor's XXH3 is compared first: about 20 ms for 0.4 GB that are in memory. The file is named by what it
was made from (see `_key`); one that is damaged is made again, and a warning says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import mmap
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import psutil
import torch
import xxhash
from torch import nn
from tqdm import tqdm

from qwenkit.files import open_file
from qwenkit.linear.packed import PackedLinear, packed_matrices
from qwenkit.linear.swap import swap_linears
from qwenkit.model.config import ModelConfig
from qwenkit.model.qwen import Qwen
from qwenkit.ops.packed import PackedWeight
from qwenkit.weights.checkpoint import Checkpoint
from qwenkit.weights.gguf_file import gguf_parts
from qwenkit.weights.load import empty_model, load_model
from qwenkit.weights.pack import packing
from qwenkit.weights.stored import DTYPE_NAMES, DTYPES

logger = logging.getLogger(__name__)

LAYOUT_VERSION = (
    4  # raise it with every change of the packed layout, of how values are packed, or of this file's format
)
SMALLEST = 32 << 20  # bytes; packing fewer takes no time worth a file
LARGEST_FOLDER = 64 << 30  # bytes of all packed models together
SPACE_NEEDED = 1.1  # of the file's size, free on the disk
LARGEST_SHARE = 0.5  # of the free memory: a larger file is mapped

_MAGIC = b"QWENPACK"
_DIGEST = 32
_PREFIX = len(_MAGIC) + 8 + _DIGEST  # before the header: the magic, the header's length, its hash
_CHUNK = 64 << 20  # bytes read at a time
_PAGE = 4096  # the data starts at a multiple of it
_ALIGNMENT = 64  # and every tensor at a multiple of this: a cache line, and a vector of AVX-512

_HEAD, _TAIL, _SAMPLE, _SAMPLES = 1 << 20, 64 << 10, 4 << 10, 64  # of each weight file, for its fingerprint

_TENSORS = ("q", "scale", "offset", "row_scale")  # of a PackedWeight

# What lies in a file: every tensor by name, and bits, rows, cols and group of every packed matrix.
Contents = tuple[dict[str, torch.Tensor], dict[str, list[int]]]


def load_packed(
    checkpoint: Checkpoint, weights: str, cache: Path, *, smallest: int = SMALLEST, progress: bool = False
) -> Qwen:
    """The checkpoint's model with its weights packed as `weights` (bf16, int8 or int4) says: see `packing`.

    Read from the folder `cache` where it was packed before; else packed, and kept there if it takes `smallest` bytes or
    more. That it cannot be kept is a warning in the log. Raises what `load_model` raises.
    """
    config = ModelConfig.from_dict(checkpoint.config)
    path = cache / f"{_key(checkpoint.path, weights)}.packed"
    try:
        return _map(path, config, weights)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be used and is made again: %s", path, error)
    model = load_model(checkpoint, dtype=torch.float32, swaps=[packing(config, weights)], progress=progress)
    tensors, matrices = _contents(model)
    if sum(tensor.nbytes for tensor in tensors.values()) < smallest:
        return model
    try:
        _write(path, tensors, matrices, progress)
    except OSError as error:
        logger.warning("the packed weights are not kept for the next time: %s", error)
        return model
    del model, tensors
    return _map(path, config, weights)  # as every later load has it


def _key(source: Path, weights: str) -> str:
    """A name for what is made of `source`: a hash of the packing, the layout's version and the files of the checkpoint.

    Of each file count name, size, time of change, its first megabyte (with a safetensors header), its end and 64 pages
    between: hashing all of it would take longer than packing. So a file changed in place is noticed by its time, and another
    one that has the same times, as files out of an archive may, by its bytes.
    """
    digest = hashlib.blake2b(json.dumps([LAYOUT_VERSION, weights]).encode(), digest_size=20)
    for path in _source_files(source):
        stat = path.stat()
        digest.update(json.dumps([path.name, stat.st_size, stat.st_mtime_ns]).encode())
        with path.open("rb", buffering=0) as file:
            for start, count in _sampled(stat.st_size):
                file.seek(start)
                digest.update(file.read(count))
    return digest.hexdigest()


def _source_files(source: Path) -> list[Path]:
    """The files that decide what the weights are: the configuration, weight files of any kind and their indices."""
    if source.is_file():
        return [part for part in gguf_parts(source) if part.is_file()]
    named = (
        path
        for path in source.iterdir()
        if path.name in ("config.json", "quantize_config.json")
        or path.name.endswith((".safetensors", ".bin", ".index.json"))
    )
    return sorted(path for path in named if path.is_file())


def _sampled(size: int) -> Iterator[tuple[int, int]]:
    """(start, count) of what is read of a file of `size` bytes."""
    yield 0, _HEAD
    if size > _HEAD:
        for place in range(_SAMPLES):
            yield _HEAD + (size - _HEAD) * place // _SAMPLES, _SAMPLE
        yield size - _TAIL, _TAIL


def _contents(model: Qwen) -> Contents:
    """All that must be kept of a packed model; what is shared (a tied head's matrix) once."""
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    matrices: dict[str, list[int]] = {}
    for name, matrix in packed_matrices(model).items():
        weight = matrix.weight
        matrices[name] = [weight.bits, weight.rows, weight.cols, weight.group]
        found = {f"{name}.{part}": getattr(weight, part) for part in _TENSORS}
        tensors |= {part: tensor for part, tensor in found.items() if tensor is not None}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) and module.bias is not None:
            tensors[f"{name}.bias"] = module.bias
    return tensors, matrices


def _map(path: Path, config: ModelConfig, weights: str) -> Qwen:
    """The model out of a file. Raises FileNotFoundError where there is none, ValueError or OSError for one that is no use."""
    tensors, matrices = _read(path)
    model = empty_model(config, torch.float32)
    swap_linears(model, packing(config, weights))
    held = packed_matrices(model)
    if held.keys() != matrices.keys() or not dict(model.named_parameters()).keys() <= tensors.keys():
        raise ValueError("it holds other tensors than the model has")
    for name, matrix in held.items():
        bits, rows, cols, group = matrices[name]
        parts = {part: tensors.get(f"{name}.{part}") for part in _TENSORS[1:]}
        matrix.packed = PackedWeight(bits, rows, cols, group, tensors[f"{name}.q"], **parts)
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            module.bias = tensors.get(f"{name}.bias")
    made: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter not in made:
            made[parameter] = nn.Parameter(tensors[name], requires_grad=parameter.requires_grad)
        prefix, _, kind = name.rpartition(".")
        setattr(model.get_submodule(prefix), kind, made[parameter])
    with contextlib.suppress(OSError):
        os.utime(path)  # the time of its last use, which file systems record only roughly
    return model


def _read(path: Path) -> Contents:
    """Read or map a file, and compare all checksums. ValueError for one that is damaged or was cut."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(_PREFIX)
        length = int.from_bytes(prefix[len(_MAGIC) : -_DIGEST], "little")
        if len(prefix) < _PREFIX or not prefix.startswith(_MAGIC) or length > size:
            raise ValueError("it is no file of packed weights")
        text = file.read(length)
        if hashlib.blake2b(text, digest_size=_DIGEST).digest() != prefix[-_DIGEST:]:
            raise ValueError("its header is damaged")
        header = json.loads(text)
        start = _aligned(_PREFIX + length, _PAGE)
        if size != start + header["data_bytes"]:
            raise ValueError(f"it has {size} bytes, but {start + header['data_bytes']} were written")
        data = np.frombuffer(_memory(file, size), dtype=np.uint8)[start:]
    tensors: dict[str, torch.Tensor] = {}
    for name, (dtype, shape, offset, count, checksum) in header["tensors"].items():
        stored = data[offset : offset + count]
        if xxhash.xxh3_64_hexdigest(stored.data) != checksum:
            raise ValueError(f"it is damaged: tensor {name} has another checksum than was written")
        tensors[name] = torch.from_numpy(stored).view(DTYPES[dtype]).view(shape)
    return tensors, header["matrices"]


def _memory(file: io.BufferedReader, size: int) -> mmap.mmap:
    """A whole file in memory of our own, or mapped where it would take more than LARGEST_SHARE of what is free."""
    if size > LARGEST_SHARE * psutil.virtual_memory().available or not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    file.seek(0)
    view, done = memoryview(memory), 0
    while count := file.readinto(view[done : done + _CHUNK]):
        done += count
    if done != size:
        raise ValueError(f"it ended after {done} of {size} bytes")
    return memory


def _write(path: Path, tensors: Mapping[str, torch.Tensor], matrices: Mapping[str, list[int]], progress: bool) -> None:
    """Write tensor by tensor, beside, then rename. OSError, saying why, when it cannot be done."""
    places: dict[str, tuple[str, list[int], int, int, str]] = {}
    end = 0
    for name, tensor in tensors.items():
        checksum = xxhash.xxh3_64_hexdigest(_bytes(tensor))
        places[name] = DTYPE_NAMES[tensor.dtype], list(tensor.shape), end, tensor.nbytes, checksum
        end = _aligned(end + tensor.nbytes, _ALIGNMENT)
    header = json.dumps({"data_bytes": end, "matrices": matrices, "tensors": places}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    _make_room(path.parent, _aligned(_PREFIX + len(header), _PAGE) + end)
    beside = path.with_name(f"{path.stem}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        with beside.open("wb") as file:
            file.write(_MAGIC + len(header).to_bytes(8, "little"))
            file.write(hashlib.blake2b(header, digest_size=_DIGEST).digest() + header)
            file.write(bytes(-file.tell() % _PAGE))
            silent = None if progress else True
            for tensor in tqdm(tensors.values(), desc="keeping", unit="tensor", disable=silent):
                file.write(_bytes(tensor))
                file.write(bytes(-tensor.nbytes % _ALIGNMENT))
            file.flush()
            os.fsync(file.fileno())  # else a file of the right size without its data may be found after a power failure
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def _make_room(folder: Path, needed: int) -> None:
    """Delete what was not used for longest until `needed` bytes more are within the bound. OSError when they never fit."""
    if needed > LARGEST_FOLDER:
        raise OSError(f"they take {needed} bytes, and all in {folder} may take {LARGEST_FOLDER}")
    kept = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process renamed or deleted it
            stat = path.stat()
            kept.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    total = sum(size for _, size, _ in kept)
    for _, size, path in sorted(kept):
        if total + needed <= LARGEST_FOLDER:
            break
        path.unlink(missing_ok=True)
        total -= size
    free = shutil.disk_usage(folder).free
    if free < SPACE_NEEDED * needed:
        raise OSError(f"{folder} has {free} bytes free, {int(SPACE_NEEDED * needed)} are needed")


def _aligned(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment
