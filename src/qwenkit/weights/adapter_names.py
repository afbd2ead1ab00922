"""Names of an adapter's tensors without the words of the wrappers that they were saved through.

In: a name as PEFT, torch.compile, FSDP or a state dict wrote it. Out: the module and what the tensor is of it.
"""

from __future__ import annotations

import re

# What torch.compile, FSDP, activation checkpointing and DDP put between or before names.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_OUTER = re.compile(r"^(module\.)*(base_model\.model\.)*")
_WHOLE = re.compile(r"(?<=\.)(base_layer|modules_to_save)\.")


def plain_name(name: str, adapter: str | None = None) -> str:
    """`name` without wrappers, PEFT's outer names and the adapter's own name: `module.lora_A.weight`, or a parameter's name.

    adapter: the adapter's name, where it is known; else any one word in its place is taken for it.
    """
    plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    plain = _OUTER.sub("", plain)
    word = re.escape(adapter) if adapter else r"[^.]+"
    plain = re.sub(rf"\.(lora_(?:A|B|embedding_A|embedding_B))\.{word}\.weight$", r".\1.weight", plain)
    plain = re.sub(rf"\.lora_magnitude_vector\.(?!weight$){word}(\.weight)?$", r".lora_magnitude_vector\1", plain)
    return re.sub(rf"\.modules_to_save\.{word}\.(?=[^.]+$)", ".modules_to_save.", plain)


def replaced_name(name: str) -> str:
    """The parameter's own name where PEFT keeps a trained copy of it, or the layer that an adapter changes."""
    return _WHOLE.sub("", name)


def is_original(name: str) -> bool:
    """True for the model's own weights, which PEFT keeps next to a trained copy."""
    return ".original_module." in f".{name}"
