"""Replacing Linears and embeddings. In: a finished model and a rule. Out: the same model, some of them now another kind.

The model's own code never learns of it: LoRA, 4-bit weights, row-parallel layers are all put in place by this one walk.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

# Given the dotted name and the module: its replacement, or None to leave it.
Swap = Callable[[str, "nn.Linear | nn.Embedding"], "nn.Module | None"]


def swap_linears(model: nn.Module, make: Swap) -> list[str]:
    """Offer every nn.Linear and nn.Embedding to `make`, replace those for which a module comes back, return their names.

    They are listed before the first is replaced, so that one which its replacement keeps inside is not walked again.
    """
    matrices = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and name
    ]
    replaced = []
    for name, matrix in matrices:
        module = make(name, matrix)
        if module is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
            replaced.append(name)
    return replaced
