"""Reading a model that several processes share: each reads what it keeps, after the model was laid over all of them.

In: a model whose base has no memory yet (on the meta device), laid out by `wrap`, and what the checkpoint has for it. Out: the
same model with every parameter filled. A process never holds more than its share and one tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from qwenkit.linear.lora import LoRALinear
from qwenkit.train.parallel.sharded import begin_of
from qwenkit.train.parallel.world import is_cut, local
from qwenkit.weights.load import fill_parts
from qwenkit.weights.stored import StoredTensor


def fill_slices(
    model: nn.Module,
    stored: Mapping[str, StoredTensor],
    device: torch.device,
    *,
    new_adapter: bool,
    progress: bool = False,
) -> None:
    """Give the parts that this process holds memory on `device`, and read them. To be called by all processes.

    `new_adapter`: the lengths of DoRA's rows are not read but computed, from matrices gathered one at a time.
    """
    # As Module.to_empty does; but what has values already, an adapter, keeps them.
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    fill_parts(model, stored, lambda parameter: (local(parameter.detach()), begin_of(parameter)), progress=progress)
    for module in model.modules() if new_adapter else ():
        if isinstance(module, LoRALinear) and module.lora_magnitude_vector is not None:
            _reset_lengths(module)


@torch.no_grad()
def _reset_lengths(module: LoRALinear) -> None:
    assert module.lora_magnitude_vector is not None
    whole = _gathered(module)
    whole.add_module("base", _gathered(module.base))
    assert isinstance(whole, LoRALinear)
    assert whole.lora_magnitude_vector is not None
    whole.reset_lengths()
    part, (first,) = local(module.lora_magnitude_vector.detach()), begin_of(module.lora_magnitude_vector)
    part.copy_(whole.lora_magnitude_vector[first : first + len(part)])


def _gathered(module: nn.Module) -> nn.Module:
    """The same module with its own parameters whole, on every process."""
    whole = copy.copy(module)
    whole._modules = dict(module._modules)
    for name, parameter in module._parameters.items():
        if parameter is not None and is_cut(parameter):
            whole._parameters = whole._parameters | {name: nn.Parameter(parameter.full_tensor(), requires_grad=False)}
    return whole
