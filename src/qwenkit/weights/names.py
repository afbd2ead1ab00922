"""Foreign names: the only place that knows how others than Hugging Face call and lay out the tensors of a Qwen.

In: a tensor's name in a file. Out: which Hugging Face tensors lie in it, as `Part`s; none for what is no parameter.
Names that are not known pass through unchanged, so that the loader can name them as surplus. Pure functions of names;
`apply` turns a Part and the stored tensor it lies in into the stored tensor it stands for.
Sources: modeling_qwen.py of the original Qwen-1; llama.cpp's conversion script and tensor names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from qwenkit.weights.stored import Bytes, StoredTensor


@dataclass(frozen=True)
class Part:
    """A Hugging Face tensor inside a foreign one: block `index` of `count` equal blocks of rows.

    `interleaved` is the head size where the rows of each head lie as llama.cpp wants them for its rotary embedding, the two
    halves of the head taking turns; 0 where they lie in order. `as_row`: a vector that is a matrix of one row.
    """

    name: str
    index: int = 0
    count: int = 1
    interleaved: int = 0
    as_row: bool = False


# Buffers that old checkpoints carry beside their parameters: all of them follow from the configuration.
_BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|rotary_emb\.(cos|sin)_cached|attn\.(masked_bias|bias))")


# What torch.compile, DDP and peft's merges leave before a name, and the names of a model saved without its head around it.
_WRAPPERS = re.compile(
    r"(?:(?:module|_orig_mod|base_model\.model)\.)+(?=model\.|lm_head\.|layers\.|embed_tokens\.|norm\.)"
)
_BARE = re.compile(r"(layers\.\d+\.|embed_tokens\.|norm\.).+")


def from_hugging_face(name: str) -> tuple[Part, ...]:
    """Names as they are; `layers.0…` of the bare model class and names behind a wrapper are those of the whole model."""
    name = _WRAPPERS.sub("", name, count=1) if _WRAPPERS.match(name) else name
    if _BARE.fullmatch(name):
        name = f"model.{name}"
    return () if _BUFFERS.fullmatch(name) else (Part(name),)


_QWEN1 = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
# The MLP is c_proj(w1(x) * silu(w2(x))): w2 is the gate.
_QWEN1_LAYER = {
    "ln_1": ("input_layernorm",),
    "ln_2": ("post_attention_layernorm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "mlp.w1": ("mlp.up_proj",),
    "mlp.w2": ("mlp.gate_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
}


def from_qwen1(name: str) -> tuple[Part, ...]:
    """Names of the original Qwen-1 (`transformer.h.0.attn.c_attn.weight` holds q, k and v, a third of the rows each)."""
    if _BUFFERS.fullmatch(name):
        return ()
    if name in _QWEN1:
        return (Part(_QWEN1[name]),)
    match = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None or match[2] not in _QWEN1_LAYER:
        return (Part(name),)
    targets = _QWEN1_LAYER[match[2]]
    return tuple(
        Part(f"model.layers.{match[1]}.{target}.{match[3]}", index, len(targets))
        for index, target in enumerate(targets)
    )


_TO_QWEN1 = {ours: theirs for theirs, ours in _QWEN1.items()}
_TO_QWEN1_LAYER = {
    target: (theirs, index, len(targets))
    for theirs, targets in _QWEN1_LAYER.items()
    for index, target in enumerate(targets)
}


def to_qwen1(name: str) -> Part:
    """The way back: the tensor of the original Qwen-1 in which `name` lies, and which of its equal blocks of rows it is."""
    if name in _TO_QWEN1:
        return Part(_TO_QWEN1[name])
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None or match[2] not in _TO_QWEN1_LAYER:
        return Part(name)
    theirs, index, count = _TO_QWEN1_LAYER[match[2]]
    return Part(f"transformer.h.{match[1]}.{theirs}.{match[3]}", index, count)


_GGUF = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_GGUF_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}


def from_gguf(name: str, *, architecture: str, head_dim: int, num_experts: int) -> tuple[Part, ...]:
    """llama.cpp's names. Experts lie stacked in one tensor; the llama architecture has the rows of q and k interleaved."""
    if name == "rope_freqs.weight":
        return ()
    if name in _GGUF:
        return (Part(_GGUF[name]),)
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None:
        return (Part(name),)
    layer, tensor, kind = f"model.layers.{match[1]}", match[2], match[3]
    if tensor == "attn_qkv":
        return tuple(Part(f"{layer}.self_attn.{x}_proj.{kind}", i, 3) for i, x in enumerate("qkv"))
    if tensor in _GGUF_EXPERTS and num_experts:
        projection = _GGUF_EXPERTS[tensor]
        return tuple(Part(f"{layer}.mlp.experts.{i}.{projection}.{kind}", i, num_experts) for i in range(num_experts))
    if tensor not in _GGUF_LAYER:
        return (Part(name),)
    interleaved = head_dim if architecture == "llama" and tensor in ("attn_q", "attn_k") else 0
    as_row = tensor == "ffn_gate_inp_shexp"
    return (Part(f"{layer}.{_GGUF_LAYER[tensor]}.{kind}", interleaved=interleaved, as_row=as_row),)


Rows = TypeVar("Rows", torch.Tensor, Bytes)


def apply(part: Part, stored: StoredTensor) -> StoredTensor:
    """The Hugging Face tensor that `part` says lies in `stored`. ValueError when the foreign shape does not allow it.

    Rows are only chosen and reordered, never changed, so quantized blocks (which lie along rows) stay whole.
    """
    if part == Part(stored.name):
        return stored
    shape = _shape_of(part, stored)
    raw = stored.read_raw
    return StoredTensor(
        name=part.name,
        shape=shape,
        dtype=stored.dtype,
        read=_reader(part, stored, shape, stored.read),
        read_raw=None if raw is None else _reader(part, stored, shape, raw),
    )


def _shape_of(part: Part, stored: StoredTensor) -> tuple[int, ...]:
    shape = stored.shape
    if part.as_row and len(shape) == 1:
        return (1, *shape)
    if part.interleaved and (not shape or shape[0] % part.interleaved or part.interleaved % 2):
        raise ValueError(f"tensor {stored.name}: its {list(shape)} does not divide into heads of {part.interleaved}")
    if part.count == 1 and len(shape) < 3:
        return shape
    if len(shape) == 3 and shape[0] == part.count:
        return shape[1:]
    if len(shape) in (1, 2) and shape[0] % part.count == 0:
        return (shape[0] // part.count, *shape[1:])
    raise ValueError(f"tensor {stored.name}: its shape {list(shape)} does not divide into {part.count} equal parts")


def _reader(
    part: Part, stored: StoredTensor, shape: tuple[int, ...], read: Callable[[int, int], Rows]
) -> Callable[[int, int], Rows]:
    if part.as_row and len(stored.shape) == 1:
        return lambda start, stop: read(0, stored.shape[0]).reshape(1, -1)[start:stop]
    if len(stored.shape) == 3:
        return lambda start, stop: read(part.index, part.index + 1)[0][start:stop]
    if part.interleaved:
        return lambda start, stop: _halves_in_order(part.interleaved, start, stop, read)
    first = part.index * shape[0] if shape else 0
    return lambda start, stop: read(first + start, first + stop)


def _halves_in_order(head_dim: int, start: int, stop: int, read: Callable[[int, int], Rows]) -> Rows:
    """Rows [start, stop) in Hugging Face's order: llama.cpp's row (head, j, half) is Hugging Face's (head, half, j)."""
    low, high = start // head_dim * head_dim, -(-stop // head_dim) * head_dim
    rows = read(low, high)
    heads = rows.reshape((high - low) // head_dim, head_dim // 2, 2, *rows.shape[1:])
    return heads.swapaxes(1, 2).reshape(rows.shape)[start - low : stop - low]
