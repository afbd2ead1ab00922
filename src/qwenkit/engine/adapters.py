"""Adapters: LoRA updates by name beside one model, so that requests of a batch can each use their own.

`load` reads an adapter and puts AdaptedLinears where it has updates; `unload` takes it away, and plain Linears come back where no
adapter is left. `routed` says, for one forward pass, which rows use which. Not thread-safe: the engine's thread calls it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from qwenkit.linear.lora import AdaptedLinear, LowRank, Routing, features, linears, put
from qwenkit.model.qwen import Qwen
from qwenkit.weights.adapter import read_adapter
from qwenkit.weights.stored import StoredTensor

# Linears that do not see the stream row by row: experts get the tokens that chose them. The head gets those that sample, whose
# rows the runner tells.
_NOT_BY_ROW = re.compile(r".*\.experts\..*")


class Adapters:
    """The adapters of `model`. An adapter's key is its name with a number that no other load ever gets, so that nothing
    remembered of one (keys and values of its prompts) is taken for another's that is loaded later under the same name.
    """

    def __init__(self, model: Qwen) -> None:
        self.model = model
        norm = model.model.norm.weight
        self.device, self.dtype = norm.device, norm.dtype
        self.stored: Callable[[], Iterable[StoredTensor]] = tuple
        """The model's own tensors as its files have them, for what peft saves along unchanged."""
        self._keys: dict[str, str] = {}
        self._loads = 0
        self._routing = Routing()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._keys)

    def key(self, name: str) -> str:
        """ValueError for a name that no adapter has."""
        if name not in self._keys:
            raise ValueError(f"adapter is {name!r}, loaded are: {', '.join(self._keys) or 'none'}")
        return self._keys[name]

    def load(self, name: str, path: Path | str) -> None:
        """Read the adapter in the folder `path`. Nothing is changed when it raises.

        Raises ValueError for a name that is empty or taken, and what `read_adapter` raises.
        """
        if not name or not isinstance(name, str):
            raise ValueError(f"adapter is {name!r}, a name is needed")
        if name in self._keys:
            raise ValueError(f"adapter {name!r} is loaded already; unload it before another takes its name")
        places = linears(self.model)
        shapes = {place: features(linear) for place, linear in places.items()}
        updates = read_adapter(Path(path), shapes, qwen1=self.model.config.model_type == "qwen", stored=self.stored)
        wrong = next((place for place in updates if _NOT_BY_ROW.fullmatch(place)), None)
        if wrong is not None:
            raise ValueError(
                f"{path} has an update for {wrong}, which cannot be chosen request by request; merge it into the model"
            )
        self._loads += 1
        key = self._keys[name] = f"{self._loads}:{name}"
        for place, update in updates.items():
            linear = places[place]
            if not isinstance(linear, AdaptedLinear):
                linear = AdaptedLinear(linear, self._routing)
                put(self.model, place, linear)
            linear.updates[key] = LowRank(self._ready(update.a), self._ready(update.b), update.scaling)

    def unload(self, name: str) -> None:
        """Forget an adapter. ValueError for an unknown one; the caller knows that no request uses it."""
        key = self.key(name)
        del self._keys[name]
        for place, linear in linears(self.model).items():
            if isinstance(linear, AdaptedLinear):
                linear.updates.pop(key, None)
                if not linear.updates:
                    put(self.model, place, linear.base)

    @contextmanager
    def routed(self, rows: Iterable[tuple[str | None, int]]) -> Iterator[None]:
        """For one forward pass over rows of (key or None, number of tokens), end to end in the stream."""
        spans: dict[str | None, list[torch.Tensor]] = {}
        start = 0
        for key, count in rows:
            spans.setdefault(key, []).append(torch.arange(start, start + count, device=self.device))
            start += count
        alone = len(spans) == 1
        self._routing.groups = tuple(
            (key, None if alone else torch.cat(places)) for key, places in spans.items() if key is not None
        )
        try:
            yield
        finally:
            self._routing.groups = ()

    def _ready(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, self.dtype).contiguous()
