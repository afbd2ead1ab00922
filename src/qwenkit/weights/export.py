"""A model and its adapters as one folder. In: a checkpoint, adapters in PEFT's format, and how to write. Out: a model folder.

Each matrix is read, merged in fp32, cast and written before the next one is read, so the peak is a few matrices. A tied embedding
and head stay tied unless merging has made them differ. Nothing is merged into 4-bit matrices: see `export_model`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from qwenkit.linear.lora import features, linears
from qwenkit.weights.adapter import Adapter, read_whole_adapter
from qwenkit.weights.checkpoint import Checkpoint
from qwenkit.weights.load import empty_and_stored
from qwenkit.weights.saving import Form, Outgoing, new_folder, write_model
from qwenkit.weights.stored import StoredTensor

EXPORT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EMBEDDING, HEAD, SCORE = "model.embed_tokens.weight", "lm_head.weight", "score.weight"


def export_model(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    adapters: Sequence[Path] = (),
    dtype: str | None = None,
    form: Form | None = None,
    dequantize: bool = False,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> None:
    """Write the checkpoint with `adapters` merged, in their order, as a model folder.

    `dtype` None keeps the checkpoint's own (float32 for a quantized GGUF, which only float32 holds exactly); `device` is where
    matrices are merged. GPTQ and AWQ matrices are refused unless `dequantize` says that the result may be a float model.
    Raises ValueError, one sentence, for that, for an adapter that does not fit, and for a folder that is not empty.
    """
    if dtype is not None and dtype not in EXPORT_DTYPES:
        raise ValueError(f"dtype is {dtype!r}, allowed are {', '.join(EXPORT_DTYPES)}")
    for path in (checkpoint.path, *adapters):
        if path.resolve() == folder.resolve():
            raise ValueError(
                f"output is {str(folder)!r}, which is where {'the model' if path is checkpoint.path else 'an adapter'} lies"
            )
    model, stored = empty_and_stored(checkpoint)
    packed = [tensor.name for tensor in stored.values() if tensor.dtype.startswith("CODES")]
    if packed and not dequantize:
        raise ValueError(
            f"{checkpoint.path} is quantized by GPTQ or AWQ: "
            + (
                "an update is finer than the steps of its 4 or 8 bits and would be rounded away; merge it into the "
                "16-bit model that this one was made from, then quantize the result"
                if adapters
                else "its matrices would be written as floats"
            )
            + " (--dequantize writes a float model)"
        )
    own = next(model.parameters()).dtype
    chosen = own if dtype is None else EXPORT_DTYPES[dtype]
    shapes = {name: features(linear) for name, linear in linears(model).items()}
    sizes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    sizes[SCORE] = (1, model.config.hidden_size)
    qwen1 = model.config.model_type == "qwen"
    read = [read_whole_adapter(path, shapes, sizes, qwen1=qwen1) for path in adapters]

    def outgoing(name: str) -> Outgoing:
        return Outgoing(name, sizes[name], chosen, lambda: merged(name, stored.get(name), read, device))

    changes: dict[str, Any] = dtype_change(checkpoint, chosen)
    wanted = [name for name in stored if name != HEAD]
    if any(SCORE in adapter.parameters for adapter in read):
        wanted.append(SCORE)
        changes |= reward_changes(checkpoint)
    elif not model.config.tie_word_embeddings:
        wanted.append(HEAD)
    elif _untied(stored, read, device):
        wanted.append(HEAD)
        changes["tie_word_embeddings"] = False
    if packed:
        changes["quantization_config"] = None
    tensors = [outgoing(name) for name in wanted]
    with new_folder(folder, overwrite=overwrite) as beside:
        write_model(beside, tensors, checkpoint, changes, form, progress=progress)


def merged(
    name: str, stored: StoredTensor | None, adapters: Sequence[Adapter], device: torch.device | str
) -> torch.Tensor:
    """A parameter with what the adapters, one after the other, do to it: fp32."""
    weight = None if stored is None else stored.load().to(device).float()
    for adapter in adapters:
        if name in adapter.parameters:
            weight = adapter.parameters[name].to(device)
        update = adapter.updates.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if update is not None:
            assert weight is not None
            weight = update.to(device).merged(weight)
    assert weight is not None, name
    return weight


def _untied(stored: dict[str, StoredTensor], adapters: Sequence[Adapter], device: torch.device | str) -> bool:
    """Whether merging makes a tied head differ from its embedding."""
    touched = {name for a in adapters for name in (*a.parameters, *(f"{module}.weight" for module in a.updates))}
    if not touched & {EMBEDDING, HEAD}:
        return False
    make: Callable[[str], torch.Tensor] = lambda name: merged(name, stored[name], adapters, device)  # noqa: E731
    return not torch.equal(make(EMBEDDING), make(HEAD))


def dtype_change(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Any]:
    """The dtype under the key that config.json has for it; `torch_dtype`, which every version reads, where it has none."""
    name = next(name for name, known in EXPORT_DTYPES.items() if known is dtype)
    found = [key for key in ("dtype", "torch_dtype") if key in checkpoint.config]
    changes: dict[str, Any] = dict.fromkeys(found or ["torch_dtype"], name)
    for key, flag in (("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")):
        if key in checkpoint.config and checkpoint.config["model_type"] == "qwen":
            changes[key] = flag == name
    return changes


def reward_changes(checkpoint: Checkpoint) -> dict[str, Any]:
    """What config.json of a reward model says: one score for a sequence, read at its last token."""
    return {
        "architectures": [f"{_family(checkpoint.config['model_type'])}ForSequenceClassification"],
        "num_labels": 1,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }


def _family(model_type: str) -> str:
    return "".join(part.capitalize() for part in model_type.split("_"))
