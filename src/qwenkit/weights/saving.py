"""How a model folder is written. In: parameters under Hugging Face's names, each with a way to make it, and the checkpoint that
the rest comes from. Out: config.json, generation_config.json, weights in shards, tokenizer files and chat template.

Such a folder loads by itself here, in transformers and in vLLM. A Qwen-1 keeps its own names and its own *.py files, so that it
loads here and by transformers' remote code. Tensors are made and written one at a time.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qwenkit import storage
from qwenkit.weights import names
from qwenkit.weights.checkpoint import Checkpoint
from qwenkit.weights.gguf_model import GgufCheckpoint
from qwenkit.weights.gguf_tokenizer import write_tokenizer
from qwenkit.weights.stored import DTYPE_NAMES, read_json
from qwenkit.weights.templated import Templated

_STEMS = {False: ("model", "safetensors"), True: ("pytorch_model", "bin")}
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
_CONFIGS = ("config.json", "adapter_config.json")
_COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "qwen.tiktoken", "tokenizer.model", "chat_template.jinja", "LICENSE*", "NOTICE*"),
)
ARCHITECTURES = {
    "qwen": "QWenLMHeadModel",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


@dataclass(frozen=True)
class Outgoing:
    """A tensor that is to be written: made when its turn comes, then cast to `dtype`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def tensor(self) -> torch.Tensor:
        made = self.make().detach()
        assert made.shape == self.shape, self.name
        return made.to("cpu", self.dtype).contiguous()


@dataclass(frozen=True)
class Form:
    """How weights are written: bytes of the largest file (one tensor may be larger), and .bin instead of safetensors."""

    shard_bytes: int = 5 * 10**9
    legacy: bool = False


@contextmanager
def new_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder next to `folder` to write a model into; it becomes `folder` when all of it is on the disk.

    With `overwrite` its files replace all files that are there; subfolders, such as a run's checkpoints, stay. After an error in
    the block nothing of the new folder is left; when it cannot be renamed, both the old and the new one are kept. Raises
    ValueError where `folder` holds something and `overwrite` is not given.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output is {str(folder)!r}, which is a file; allowed is a folder")
    full = folder.is_dir() and any(folder.iterdir())
    if full and not overwrite:
        raise ValueError(f"output is {str(folder)!r}, which is not empty; allowed is a new folder, or --overwrite")
    folder = folder.resolve()  # a symbolic link to a folder stays one
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = storage.temporary_path(folder)
    part.mkdir()
    try:
        yield part
    except BaseException:
        storage.delete(part)
        raise
    with storage.kept_on_error(part):
        if full:
            _install_model(part, folder, lambda name: True)
        else:
            storage.atomic_replace(part, folder)


@contextmanager
def into_folder(folder: Path, *, replaces: Callable[[str], bool] = lambda name: False) -> Iterator[Path]:
    """A temporary folder inside `folder` to write files of a model or adapter into, which then take their places there.

    Files of the same names are replaced, and those that `replaces` names go; other files stay. After an error in the block
    nothing has changed; when a file cannot be renamed, all old ones are put back and the new ones are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part = storage.temporary_path(folder / "saving")
    part.mkdir()
    try:
        yield part
    except BaseException:
        storage.delete(part)
        raise
    with storage.kept_on_error(part):
        _install_model(part, folder, replaces)


def _install_model(new: Path, folder: Path, replaces: Callable[[str], bool]) -> None:
    """Move the files of `new` into `folder`, where older ones that `replaces` names go.

    The configuration goes first and comes last: a folder without it loads nowhere, so that no crash leaves a mixture that does.
    """
    names = sorted((path.name for path in new.iterdir()), key=lambda name: name in _CONFIGS)
    first = [folder / name for name in names if name in _CONFIGS]
    stale = [path for path in folder.iterdir() if path.is_file() and replaces(path.name)]
    storage.install([(new / name, folder / name) for name in names], stale=(*first, *stale))
    new.rmdir()


def is_weights_file(name: str) -> bool:
    """True for the names of a model's weights, in one file or in shards, and of their index; not for an adapter's."""
    return _WEIGHTS.fullmatch(name) is not None


def write_model(
    folder: Path,
    tensors: Sequence[Outgoing],
    checkpoint: Checkpoint,
    changes: Mapping[str, Any],
    form: Form | None = None,
    *,
    progress: bool = False,
) -> None:
    """Write a whole model into an empty folder.

    `changes` go into config.json; a value of None takes the key out.
    """
    config = {**checkpoint.config, **changes}
    config.setdefault("architectures", [ARCHITECTURES[config["model_type"]]])
    config = {
        key: value for key, value in config.items() if value is not None or key in checkpoint.config.keys() - changes
    }
    if config["model_type"] == "qwen":
        tensors = fused_as_qwen1(tensors)
    write_weights(folder, tensors, form or Form(), progress=progress)
    copy_tokenizer(folder, checkpoint)
    generation = generation_config(checkpoint)
    if generation:
        _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "config.json", config)


def generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's own, with every token that ends an answer: a server that knows only the first of two would not stop."""
    generation = dict(checkpoint.generation_config)
    if checkpoint.config["model_type"] == "qwen":  # its own form, chat_format, says it
        return generation
    ids = list(checkpoint.eos_token_ids)
    if ids:
        generation["eos_token_id"] = ids if len(ids) > 1 else ids[0]
    return generation


def copy_tokenizer(folder: Path, checkpoint: Checkpoint) -> None:
    """The checkpoint's tokenizer, template and licence as files; what a GGUF holds of them is written anew.

    A checkpoint without a tokenizer gives none. *.py files travel along where the checkpoint says that it needs them, as data.
    """
    chat_template = None
    if isinstance(checkpoint, Templated):
        chat_template = checkpoint.template
        checkpoint = checkpoint.inner
    if isinstance(checkpoint, GgufCheckpoint):
        write_tokenizer(folder, checkpoint)
    else:
        patterns = list(_COPIED)
        if "auto_map" in checkpoint.config:
            patterns += ["*.py", "*.cpp", "*.cu"]
        for path in (path for pattern in patterns for path in checkpoint.path.glob(pattern) if path.is_file()):
            shutil.copyfile(path, folder / path.name)
    if chat_template is not None:
        settings = folder / "tokenizer_config.json"
        known = read_json(settings) if settings.is_file() else {}
        _write_json(settings, known | {"chat_template": chat_template})
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def fused_as_qwen1(tensors: Sequence[Outgoing]) -> list[Outgoing]:
    """The same tensors under the original Qwen-1's names: q, k and v are one."""
    parts: dict[str, dict[int, Outgoing]] = {}
    for tensor in tensors:
        part = names.to_qwen1(tensor.name)
        parts.setdefault(part.name, {})[part.index] = tensor
    return [_joined(name, [found[index] for index in sorted(found)]) for name, found in parts.items()]


def _joined(name: str, parts: Sequence[Outgoing]) -> Outgoing:
    first = parts[0]
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return Outgoing(name, shape, first.dtype, lambda: torch.cat([part.make() for part in parts]))


def write_weights(folder: Path, tensors: Sequence[Outgoing], form: Form, *, progress: bool = False) -> None:
    """The tensors in one file, or in shards with an index."""
    stem, suffix = _STEMS[form.legacy]
    shards: list[list[Outgoing]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.num_bytes > room:
            shards.append([])
            room = form.shard_bytes
        shards[-1].append(tensor)
        room -= tensor.num_bytes
    weight_map: dict[str, str] = {}
    with tqdm(total=len(tensors), desc="writing", unit="tensor", disable=None if progress else True) as bar:
        for number, shard in enumerate(shards, 1):
            one_of_many = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
            name = f"{stem}{one_of_many}.{suffix}"
            (_write_bin if form.legacy else _write_safetensors)(folder / name, shard, bar)
            weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        total = sum(tensor.num_bytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / f"{stem}.{suffix}.index.json", index)


def _write_safetensors(path: Path, tensors: Sequence[Outgoing], bar: Any) -> None:
    """One safetensors file, the header first: sizes are known before any tensor is made."""
    tensors = sorted(
        tensors, key=lambda tensor: -tensor.dtype.itemsize
    )  # so that each begins at a multiple of its width
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.num_bytes
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            file.write(tensor.tensor().reshape(-1).view(torch.uint8).numpy().data)
            bar.update()


def _write_bin(path: Path, tensors: Sequence[Outgoing], bar: Any) -> None:
    """A plain dictionary of tensors, as torch.save writes it."""
    state = {}
    for tensor in tensors:
        made = tensor.tensor()
        state[tensor.name] = made.clone() if made.untyped_storage().nbytes() > tensor.num_bytes else made
        bar.update()
    torch.save(state, path)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Inside of a folder that is flushed and renamed as a whole."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
