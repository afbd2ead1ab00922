"""AdamW over named parameters, and what surrounds its step: fp32 copies of bfloat16 weights, clipping, averaging.

In: parameters with gradients. Out: the parameters, one step on. Weights in bfloat16 are either stepped as exact fp32 copies that
also gather their gradients, or rounded stochastically after every step; states may be kept in 8 bits. All state is named tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from qwenkit.train.config import TrainConfig
from qwenkit.train.parallel.world import local
from qwenkit.train.states import pack8, unpack8

_LOW = (torch.bfloat16, torch.float16)
_KINDS = _FIRST, _SECOND = "exp_avg", "exp_avg_sq"


class Optimizer:
    """AdamW (arXiv 1711.05101). Weight decay goes to matrices only, not to norms, biases and other vectors.

    `stepped` are the tensors that hold the gradients a step uses: the parameters themselves, or the fp32 copies of those in
    bfloat16. Raises ValueError where nothing is trained.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> None:
        if not parameters:
            raise ValueError("nothing is trained: no parameter of the model wants a gradient")
        self.parameters = dict(parameters)
        self.config = config
        self.num_steps = torch.zeros((), dtype=torch.int64)
        self.stepped: dict[str, nn.Parameter] = {}
        self._states: dict[str, dict[str, torch.Tensor]] = {}
        self._eight_bit = config.optim == "adamw_8bit"
        self._own = []  # names stepped here and not by torch: stochastic rounding, states in 8 bits
        for name, parameter in self.parameters.items():
            low = parameter.dtype in _LOW
            own = self._eight_bit or (low and config.master_weights == "stochastic")
            self.stepped[name] = _copy_in_fp32(parameter) if low and not own else parameter
            self._states[name] = self._zero_states(self.stepped[name])
            if own:
                self._own.append(name)
        # Those that torch's fused kernel steps, by whether they decay.
        exact = {name: tensor for name, tensor in self.stepped.items() if name not in self._own}
        self._groups = [
            ([name for name, tensor in exact.items() if (tensor.ndim >= 2) is decays], config.weight_decay * decays)
            for decays in (True, False)
        ]

    def _zero_states(self, tensor: nn.Parameter) -> dict[str, torch.Tensor]:
        """All states exist from the start, so that a checkpoint's tensors always have a place to go."""
        if self._eight_bit:
            zeros = {
                kind: pack8(torch.zeros_like(local(tensor), dtype=torch.float32), signed=kind == _FIRST)
                for kind in _KINDS
            }
            return {f"{kind}.{part}": value for kind, pair in zeros.items() for part, value in pair.items()}
        states = {kind: torch.zeros_like(tensor, dtype=torch.float32, requires_grad=False) for kind in _KINDS}
        return states | {"step": torch.zeros((), dtype=torch.float32, device=tensor.device)}

    def collect(self) -> None:
        """After each backward pass: hand gradients of bfloat16 weights to their fp32 copies, where micro-batches add up."""
        for name, stepped in self.stepped.items():
            parameter = self.parameters[name]
            if stepped is not parameter and parameter.grad is not None:
                _gather(parameter, stepped)

    def gradients(self) -> list[torch.Tensor]:
        """The gradients that the next step will use."""
        return [tensor.grad for tensor in self.stepped.values() if tensor.grad is not None]

    def scale_gradients(self, factor: float) -> None:
        for grad in self.gradients():
            grad.mul_(factor)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One step of everything that has a gradient; gradients are gone afterwards."""
        self.num_steps += 1
        for names, decay in self._groups:
            self._fused_step([name for name in names if self.stepped[name].grad is not None], learning_rate, decay)
        for name, stepped in self.stepped.items():
            if stepped is not self.parameters[name]:
                self.parameters[name].copy_(stepped)
        for index, name in enumerate(self._own):
            if self.parameters[name].grad is not None:
                self._own_step(self.parameters[name], self._states[name], index, learning_rate)
        self.zero_grad()

    def _fused_step(self, names: list[str], learning_rate: float, decay: float) -> None:
        """One step of parameters in fp32, of this process's parts.

        It is the kernel of torch.optim.AdamW(fused=True), called without that class, which imports torch's compiler:
        40 MiB and a second, for nothing.
        """
        weights, gradients, firsts, seconds, steps = [], [], [], [], []
        for name in names:
            stepped, states = self.stepped[name], self._states[name]
            assert stepped.grad is not None
            states["step"] += 1
            if local(stepped).numel():  # a process may hold none of a small parameter
                weights.append(local(stepped.detach()))
                gradients.append(local(stepped.grad))
                firsts.append(local(states[_FIRST]))
                seconds.append(local(states[_SECOND]))
                steps.append(states["step"])
        if not weights:
            return
        torch._fused_adamw_(
            weights,
            gradients,
            firsts,
            seconds,
            [],
            steps,
            lr=learning_rate,
            beta1=self.config.adam_beta1,
            beta2=self.config.adam_beta2,
            weight_decay=decay,
            eps=self.config.adam_epsilon,
            amsgrad=False,
            maximize=False,
        )

    def _own_step(
        self, parameter: nn.Parameter, states: dict[str, torch.Tensor], index: int, learning_rate: float
    ) -> None:
        """The same arithmetic in fp32, one parameter at a time, of this process's part."""
        config, steps = self.config, int(self.num_steps)
        assert parameter.grad is not None
        weight, grad = local(parameter.detach()), local(parameter.grad).float()
        if self._eight_bit:
            first, second = (
                unpack8(states[f"{kind}.code"], states[f"{kind}.scale"], grad.shape, signed=kind == _FIRST)
                for kind in _KINDS
            )
        else:
            first, second = (local(states[kind]) for kind in _KINDS)
        first.lerp_(grad, 1 - config.adam_beta1)
        second.mul_(config.adam_beta2).addcmul_(grad, grad, value=1 - config.adam_beta2)
        if self._eight_bit:
            for kind, value in zip(_KINDS, (first, second), strict=True):
                for part, packed in pack8(value, signed=kind == _FIRST).items():
                    states[f"{kind}.{part}"].copy_(packed)
        exact = weight.float()
        if parameter.ndim >= 2:
            exact = exact * (1 - learning_rate * config.weight_decay)
        denominator = (second / (1 - config.adam_beta2**steps)).sqrt_().add_(config.adam_epsilon)
        exact = exact.addcdiv(first / (1 - config.adam_beta1**steps), denominator, value=-learning_rate)
        if weight.dtype == torch.bfloat16:
            exact = stochastic_round(exact, seed=hash((config.seed, steps, index)))
        weight.copy_(exact)

    def zero_grad(self) -> None:
        for tensors in (self.parameters, self.stepped):
            for tensor in tensors.values():
                tensor.grad = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every state as a named tensor, to be saved, or filled in place: `num_steps`, `parameter.exp_avg`,
        `parameter.exp_avg_sq` (in 8 bits: `….code`, `….scale`), `parameter.step`, `parameter.master`."""
        found: dict[str, torch.Tensor] = {"num_steps": self.num_steps}
        for name, states in self._states.items():
            found |= {f"{name}.{kind}": state for kind, state in states.items()}
            if self.stepped[name] is not self.parameters[name]:
                found[f"{name}.master"] = self.stepped[name].detach()
        return found


def clip(gradients: list[torch.Tensor], norm: float, max_norm: float) -> None:
    """Scale gradients of this norm down to `max_norm`, if that is more than 0 and less than the norm."""
    if 0 < max_norm < norm:
        for grad in gradients:
            grad.mul_(max_norm / (norm + 1e-6))


def _copy_in_fp32(parameter: nn.Parameter) -> nn.Parameter:
    """An fp32 copy that takes over gradients as they arrive, so that they never all exist in both types."""
    exact = nn.Parameter(parameter.detach().float())
    parameter.register_post_accumulate_grad_hook(lambda low: _gather(low, exact))
    return exact


def _gather(low: torch.Tensor, exact: torch.Tensor) -> None:
    assert low.grad is not None
    if exact.grad is None:
        exact.grad = low.grad.float()
    else:
        exact.grad += low.grad
    low.grad = None


def stochastic_round(exact: torch.Tensor, *, seed: int) -> torch.Tensor:
    """fp32 -> bfloat16, up or down with chances that make the mean exact (arXiv 2010.06192). The seed decides all of it."""
    generator = torch.Generator(exact.device).manual_seed(seed & (2**63 - 1))
    noise = torch.randint(0, 2**16, exact.shape, dtype=torch.int32, device=exact.device, generator=generator)
    bits = (exact.view(torch.int32) + noise) & -(2**16)  # bfloat16 is the upper half of fp32
    rounded = bits.view(torch.float32)
    return torch.where(exact.isfinite(), rounded, exact).to(torch.bfloat16)


class MovingAverage:
    """An exponential moving average of parameters, in fp32."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.parameters = dict(parameters)
        self.averages = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        for name, average in self.averages.items():
            average.lerp_(self.parameters[name].float(), 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside it the parameters hold their averages; afterwards they are as they were."""
        kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._set(self.averages)
        try:
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def tensors(self) -> dict[str, torch.Tensor]:
        """The averages, to be saved, or filled in place."""
        return self.averages
