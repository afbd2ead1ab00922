"""How much memory a training run needs on each device, found without weights and before anything is loaded.

In: a ModelConfig, a TrainConfig, the number of GPUs. Out: bytes by what they are for, and the largest batch that fits. The real
code of a step runs on the meta device, where tensors have shapes and no memory, over a model of very few layers; what lives at
the same time is counted, and since every further layer adds the same, the whole model follows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from qwenkit import ops
from qwenkit.linear.frozen import PackedBase
from qwenkit.linear.nf4 import NF4Linear
from qwenkit.model.config import ModelConfig
from qwenkit.train.batch import TrainBatch
from qwenkit.train.config import TrainConfig
from qwenkit.train.loss import LOGITS_AT_ONCE, token_loss_sum
from qwenkit.train.methods import model_of_shapes, trainable_parameters
from qwenkit.train.optim import Optimizer
from qwenkit.train.parallel.world import parallel_sizes
from qwenkit.train.recompute import recompute_blocks

CUDA_CONTEXT = 700 * 2**20  # the driver's context, cuBLAS's workspaces, loaded kernels
# A process on a CPU, measured at the end of runs: the interpreter, torch without CUDA and its libraries, all modules ...
CPU_PROCESS = 270 * 2**20
TOKEN_BYTES = 900  # ... what a tokenizer takes for each of its tokens ...
# ... and of activations and gradients the share that malloc holds between pieces of many sizes. With a lower mmap threshold
# the peak of lora with 8 samples of 256 tokens was 8 % lower, but the system's time three times as long, so it is left as it is.
MALLOC_SHARE = 0.15
NCCL_BUFFERS = 600 * 2**20  # of the communicators
PAIRED = ("dpo", "orpo", "rm")  # stages of which a sample is two documents
LARGEST_BATCH = 4096


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each device at the moment when most is held. `gathered` is what fsdp holds of other devices' parameters,
    `runtime` all that is no tensor: of a GPU its context and communicators, of a CPU the whole process."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int
    runtime: int
    tokens: int  # in one micro-batch
    replicate: int
    shard: int
    tensor: int
    parameters: int
    trained: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.gathered + self.runtime


def plan_memory(
    model: ModelConfig,
    config: TrainConfig,
    *,
    packed: Mapping[str, str] | None = None,
    gpus: int = 1,
    per_node: int = 8,
) -> MemoryPlan:
    """Predict the peak of a step. `gpus` 0 stands for one process on a CPU, whose total is its peak resident memory.

    `packed`: which matrices stay as the checkpoint has them, and their types, as `methods.stays_packed` says.
    Every sample is taken to be cutoff_len long and every token a target. Raises ValueError for a layout that does not fit the
    number of GPUs, and for freeze_trainable, whose patterns belong to layers that the small model does not have.
    """
    if config.freeze_trainable:
        raise ValueError("freeze_trainable is not planned for, allowed is freeze_trainable_layers")
    replicate, shard, tensor = parallel_sizes(config, max(gpus, 1))
    if max(gpus, 1) > per_node and per_node % tensor:
        raise ValueError(f"tensor_parallel is {tensor}, but a node has {per_node} GPUs, no multiple of it")
    if config.dtype == "auto" and gpus:
        config = replace(config, dtype="bfloat16")
    if not gpus:
        ops.use()  # what a run on this machine keeps for its backward depends on it
    local = _slice(model, tensor)
    documents = config.batch_size * (2 if config.stage in PAIRED else 1)
    # Of one process's gradients all are in the sum, so that it can be divided; sharded ones are always there.
    micro_batches = min(config.gradient_accumulation_steps, 2) if shard == 1 else 2
    whole = _extrapolated(local, config, packed, [config.cutoff_len] * documents, micro_batches)
    # What dpo and kto measure against is a second model, shared as the first is.
    references = config.stage in ("dpo", "kto") and config.method not in ("lora", "qlora")
    gathered = 0
    if shard > 1:
        block = _extrapolated(_with_layers(local, 1), config, packed, [1], 1)
        # Two blocks at a time, the next one on its way, and the embedding and the head from start to end.
        per_layer = (whole.weights - block.weights) // max(local.num_hidden_layers - 1, 1)
        gathered = 2 * per_layer + (block.weights - per_layer)
        if config.method in ("full", "freeze"):
            # A block's gradients, and the buffer that they are summed in; or, earlier, the reference's embedding and head.
            gathered += max(2 * per_layer, references * (block.weights - per_layer))
    return replace(
        whole,
        weights=(1 + references) * (whole.weights // shard),
        gradients=whole.gradients // shard,
        optimizer=whole.optimizer // shard,
        activations=whole.activations + _gathered_logits(model, config, tensor),
        gathered=gathered,
        runtime=CUDA_CONTEXT + (NCCL_BUFFERS if gpus > 1 else 0) if gpus else _cpu_runtime(model, whole),
        replicate=replicate,
        shard=shard,
        tensor=tensor,
        parameters=whole.parameters * (tensor if tensor > 1 else 1),
        trained=whole.trained * (tensor if tensor > 1 else 1),
    )


def largest_batch(
    model: ModelConfig,
    config: TrainConfig,
    memory: int,
    *,
    packed: Mapping[str, str] | None = None,
    gpus: int = 1,
    per_node: int = 8,
) -> int | None:
    """The largest per_device_train_batch_size with which the peak stays within `memory` bytes; None where 1 is too much."""

    def total(batch: int) -> int:
        wanted = replace(config, per_device_train_batch_size=batch)
        return plan_memory(model, wanted, packed=packed, gpus=gpus, per_node=per_node).total

    one, two = total(1), total(2)
    if one > memory:
        return None
    # Memory grows by about the same with every sample, so the first guess is at most a few away.
    batch = min(max(1, 1 + (memory - one) // max(two - one, 1)), LARGEST_BATCH)
    while batch > 1 and total(batch) > memory:
        batch = max(1, batch - max(1, batch // 32))
    while batch < LARGEST_BATCH and total(batch + 1) <= memory:
        batch += 1
    return batch


def _cpu_runtime(model: ModelConfig, plan: MemoryPlan) -> int:
    return CPU_PROCESS + TOKEN_BYTES * model.vocab_size + int(MALLOC_SHARE * (plan.activations + plan.gradients))


def _slice(model: ModelConfig, tensor: int) -> ModelConfig:
    """What one process of a tensor group has of a model."""
    if tensor == 1:
        return model
    moe = model.moe
    if moe is not None:
        shared = moe.shared_expert_intermediate_size
        moe = replace(
            moe,
            intermediate_size=moe.intermediate_size // tensor,
            shared_expert_intermediate_size=None if shared is None else shared // tensor,
        )
    return replace(
        model,
        num_attention_heads=model.num_attention_heads // tensor,
        num_key_value_heads=model.num_key_value_heads // tensor,
        intermediate_size=model.intermediate_size // tensor,
        vocab_size=model.vocab_size // tensor,
        moe=moe,
    )


def _gathered_logits(model: ModelConfig, config: TrainConfig, tensor: int) -> int:
    """The logits of a chunk that a cut head gathers: in the dtype of the arithmetic and in fp32, and the same as gradients."""
    rows = config.loss_chunk or max(1, LOGITS_AT_ONCE // model.vocab_size)
    return 0 if tensor == 1 else 12 * rows * model.vocab_size


def _with_layers(model: ModelConfig, layers: int) -> ModelConfig:
    moe = model.moe
    if moe is not None:
        sparse = range(layers) if moe.sparse_layers else ()
        moe = replace(moe, sparse_layers=frozenset(sparse))
    return replace(model, num_hidden_layers=layers, sliding_windows=model.sliding_windows[-1:] * layers, moe=moe)


def _extrapolated(
    model: ModelConfig, config: TrainConfig, packed: Mapping[str, str] | None, lengths: list[int], micro_batches: int
) -> MemoryPlan:
    """The plan of a model of many layers from three of few: (frozen, trained) = (f, t), (f + 1, t), (f, t + 1)."""
    layers = model.num_hidden_layers
    count = config.freeze_trainable_layers
    trained = min(abs(count), layers) if config.method == "freeze" else layers
    frozen = layers - trained
    sign = -1 if count < 0 else 1

    def measured(few_frozen: int, few_trained: int) -> dict[str, int]:
        settings = replace(config, freeze_trainable_layers=sign * few_trained)
        return _measure(_with_layers(model, few_frozen + few_trained), settings, packed, lengths, micro_batches)

    least_frozen, least_trained = min(frozen, 1), min(trained, 2)
    first = measured(least_frozen, least_trained)
    changes = []
    if frozen > least_frozen:
        changes.append((frozen - least_frozen, measured(least_frozen + 1, least_trained)))
    if trained > least_trained:
        changes.append((trained - least_trained, measured(least_frozen, least_trained + 1)))
    sums = {name: value + sum(times * (more[name] - value) for times, more in changes) for name, value in first.items()}
    if packed:  # a quantized file may store each layer in another way
        sums["weights"] = _weights(model_of_shapes(model, config, packed))
    peak = max(sums.pop("early"), sums.pop("late"))
    return MemoryPlan(
        **sums,
        activations=max(peak - sums["gradients"], 0),
        gathered=0,
        runtime=0,
        tokens=sum(lengths),
        replicate=1,
        shard=1,
        tensor=1,
    )


def _measure(
    model_config: ModelConfig,
    config: TrainConfig,
    packed: Mapping[str, str] | None,
    lengths: list[int],
    micro_batches: int,
) -> dict[str, int]:
    """Run micro-batches of one step on the meta device, and see what lives at their peak. From the second on, all gradients
    are there while activations are.

    Two peaks are found: `late`, when a backward pass has reached the first block and nearly all gradients are there, and
    `early`, before. They grow by different amounts with every layer, so the larger of a small model may be the smaller of
    a large one.
    """
    ids = torch.zeros(sum(lengths), dtype=torch.int64, device="meta")
    batch = TrainBatch(ids, ids, lengths, [""] * len(lengths))
    model = model_of_shapes(model_config, config, packed).train()
    if config.gradient_checkpointing:
        recompute_blocks(model)
    parameters = trainable_parameters(model)
    optimizer = Optimizer(parameters, config)
    stepped = [tensor.nbytes for tensor in optimizer.stepped.values()]
    weights = _weights(model)
    states = sum(tensor.nbytes for tensor in optimizer.tensors().values())
    if config.ema is not None:
        states += sum(4 * parameter.numel() for parameter in parameters.values())
    live, stand = _LiveBytes(), _Stand(model_config)
    model.model.layers[0].register_forward_hook(live.late_from)
    for block in model.model.layers:  # modes of the forward pass do not hold while it is computed again
        for name in ("self_attn", "mlp"):
            part = block.get_submodule(name)
            part.__dict__["forward"] = stand.around(part.forward)
    with stand, live:
        for _ in range(micro_batches):
            live.phase = "early"
            loss, _ = token_loss_sum(model, batch, chunk=config.loss_chunk)
            loss.backward()
            optimizer.collect()
    return {
        "weights": weights,
        "gradients": sum(stepped),
        "optimizer": states,
        "parameters": _numbers(model),
        "trained": sum(parameter.numel() for parameter in parameters.values()),
        **live.peaks,
    }


def _weights(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _numbers(model: nn.Module) -> int:
    """Parameters as people count them: a matrix in 4 bits has as many as one in 16."""
    quantized = {
        f"{name}.": module.in_features * module.out_features
        for name, module in model.named_modules()
        if isinstance(module, NF4Linear | PackedBase)
    }
    plain = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not name.startswith(tuple(quantized)) or name.endswith(".bias")
    )
    return plain + sum(quantized.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors among an operator's arguments or results, which are nested lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


class _LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made inside that are still alive, and the most there were in each phase."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.phase = "early"
        self.peaks = {"early": 0, "late": 0}
        self._seen: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(leaf.untyped_storage()) for leaf in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for leaf in _tensors(out):
            if leaf.is_meta:
                storage = leaf.untyped_storage()
                if id(storage) not in before and id(storage) not in self._seen:
                    self._seen[id(storage)] = storage
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._free, storage.nbytes())
        self.peaks[self.phase] = max(self.peaks[self.phase], self.now)
        return out

    def late_from(self, block: nn.Module, args: Any, out: torch.Tensor) -> None:
        """Of a block's output: the late phase begins when its gradient is there."""
        if out.requires_grad:
            out.register_hook(self._is_late)

    def _is_late(self, gradient: torch.Tensor) -> None:
        self.phase = "late"

    def _free(self, size: int) -> None:
        self.now -= size


class _Stand(TorchFunctionMode):
    """Stands in for what has no answer without values: which rows are targets (all), where experts send tokens (evenly), and
    attention, of which kernels keep the queries, keys, values, result and one number a query and head."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.model = model

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any) -> Any:
            with self:
                return forward(*args)

        return inside

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.nonzero:
            return torch.empty(args[0].shape[0], 1, dtype=torch.int64, device="meta")
        if func is torch.Tensor.bincount:
            share, rest = divmod(args[0].numel(), kwargs["minlength"])
            return torch.tensor([share + (i < rest) for i in range(kwargs["minlength"])])
        if func is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            return _Attention.apply(q, k, v)
        return func(*args, **kwargs)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
