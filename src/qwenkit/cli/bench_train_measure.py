"""One row of `qwenkit bench train`: a method at a length, over random token ids, by the loop that trains.

In: a checkpoint or the sizes of a model, and a TrainConfig. Out: seconds a step, tokens a second, MFU, memory, and what `qwenkit
plan` predicts. Every document has exactly the length asked for and all of its tokens are learned.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import psutil
import torch

from qwenkit.cli.bench_measure import peak_rss
from qwenkit.model.config import ModelConfig
from qwenkit.model.qwen import Qwen
from qwenkit.train.batch import Sample, TrainBatch
from qwenkit.train.config import TrainConfig
from qwenkit.train.log import Meter, ModelFlops, Silent, count_parameters, peak_flops
from qwenkit.train.loop import Trainer
from qwenkit.train.methods import compute_dtype, model_of_shapes, prepare_model, stays_packed, trainable_parameters
from qwenkit.train.parallel import World
from qwenkit.train.parts import NextTokens, Parts
from qwenkit.train.plan import plan_memory
from qwenkit.train.recompute import recompute_blocks
from qwenkit.weights.checkpoint import Checkpoint

SEED = 0


@dataclass
class RandomDocuments:
    """A stream without end: `batch` documents of `length` random tokens."""

    vocab_size: int
    length: int
    batch: int
    batches_per_epoch: int | None = None
    epoch: int = 0
    _generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(SEED))

    def __iter__(self) -> Iterator[TrainBatch]:
        while True:
            rows = torch.randint(self.vocab_size, (self.batch, self.length), generator=self._generator).tolist()
            yield TrainBatch.of([Sample(ids, ids, "random") for ids in rows])

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Stopwatch(Meter):
    """Keeps the seconds and FLOPs of each step."""

    steps: list[tuple[float, float]] = field(default_factory=list)

    def add(self, batches: Sequence[TrainBatch], seconds: float) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        assert self.flops is not None
        self.steps.append((seconds, sum(self.flops.of_batch(batch) for batch in batches)))


def measure_row(source: Checkpoint | ModelConfig, config: TrainConfig, *, steps: int, warmup: int) -> dict[str, Any]:
    """Train `warmup` steps that do not count and `steps` that do. Memory that runs out is an answer: `out_of_memory`."""
    world = World.current(config, {})
    device = world.device
    dtype = compute_dtype(config, device)
    config = replace(config, dtype=str(dtype).removeprefix("torch."), max_steps=warmup + steps, oom_policy="stop")
    sizes = source if isinstance(source, ModelConfig) else ModelConfig.from_dict(source.config)
    packed = None if isinstance(source, ModelConfig) else stays_packed(source, config.method)
    plan = plan_memory(sizes, config, packed=packed, gpus=int(device.type == "cuda"))
    found: dict[str, Any] = {
        "method": config.method,
        "length": config.cutoff_len,
        "out_of_memory": False,
        # On a CPU what is measured is what this process, which is there already, takes beside.
        "predicted_bytes": plan.total if device.type == "cuda" else plan.total - plan.runtime,
        "tokens": config.cutoff_len * config.batch_size * config.gradient_accumulation_steps,
    }
    peak = peak_flops(device, dtype)
    gc.collect()
    before = psutil.Process().memory_info().rss
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        model = (
            prepare_model(config, source, device)
            if not isinstance(source, ModelConfig)
            else drawn(source, config, device)
        )
        watch = Stopwatch(ModelFlops.of(model), peak, device)
        trained, every = count_parameters(model)
        _train(model, config, world, watch)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError, ValueError) as error:
        if not ran_out(error):
            raise
        return found | {"out_of_memory": True}
    seconds = median(each for each, _ in watch.steps[warmup:])
    # What the run itself reached, the device can do.
    peak = max(peak, *(flops / each for each, flops in watch.steps), watch.steps[-1][1] / seconds)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss() - before
    reserved = {"reserved_bytes": torch.cuda.max_memory_reserved(device)} if device.type == "cuda" else {}
    return (
        found
        | reserved
        | {
            "step_s": seconds,
            "tok_s": found["tokens"] / seconds,
            "mfu": watch.steps[-1][1] / seconds / peak,
            "memory_bytes": memory,
            "trained": trained,
            "parameters": every,
        }
    )


def _train(model: Qwen, config: TrainConfig, world: World, watch: Stopwatch) -> None:
    if config.gradient_checkpointing:
        recompute_blocks(model)
    if config.torch_compile:
        for block in model.model.layers:
            block.compile()
    stream = RandomDocuments(model.config.vocab_size, config.cutoff_len, config.batch_size)
    objective = NextTokens(config.loss_chunk)
    parts = Parts(model, trainable_parameters(model), objective, stream, world=world, meter=watch)
    Trainer(config, parts, Silent()).run()


def drawn(sizes: ModelConfig, config: TrainConfig, device: torch.device) -> Qwen:
    """A model of these sizes with random weights, as the method wants it."""
    model = model_of_shapes(sizes, config).to_empty(device=device).train()
    if sizes.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    generator = torch.Generator(device).manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.normal_(std=0.02, generator=generator)
            else:
                parameter.random_(0, 100, generator=generator)
    return model


def ran_out(error: BaseException | None) -> bool:
    """Whether memory was what was missing, here or where the error came from."""
    if error is None:
        return False
    known = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
    return known or ran_out(error.__cause__)
