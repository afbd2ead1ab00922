"""What `qwenkit bench` measures: how fast a model answers, what it reads, and what this machine could do at best.

In: an LLM that nobody else uses, and the sizes of BenchConfig. Out: dataclasses of rates, bytes and limits; MB and GB are powers
of ten. Every run draws new token ids, so that nothing computed before makes it cheaper, and is greedy without penalties and
without an end, so that a model with random weights does the same work as a trained one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from qwenkit import ops
from qwenkit.engine.llm import LLM
from qwenkit.engine.memory import choose_dtype
from qwenkit.engine.sampling import SamplingParams
from qwenkit.linear.packed import PackedEmbedding, PackedLinear
from qwenkit.model.config import ModelConfig
from qwenkit.model.moe import SparseMLP
from qwenkit.model.qwen import Qwen

if TYPE_CHECKING:
    from qwenkit.cli.bench import BenchConfig

Tell = Callable[[str], None]  # called after each piece of work with the name of what was done

SEED = 0
READ_BYTES = 2**29  # far beyond any cache
SIDES = (256, 512, 1024, 2048)  # of the matrices whose product is timed
CURVE_BATCHES = (1, 2, 4, 8, 16, 32)
CURVE_CONTEXT = (128, 8192)  # shortest and longest


@dataclass(frozen=True)
class Run:
    """Requests submitted at once, to the last token: `first_tokens` of `tokens` were there when each request had its first."""

    first_s: float
    total_s: float
    first_tokens: int
    tokens: int

    @property
    def decode_tok_s(self) -> float:
        """Tokens a second after every request had its first."""
        return (self.tokens - self.first_tokens) / (self.total_s - self.first_s)


@dataclass(frozen=True)
class Speed:
    """Medians, in tokens a second: reading one prompt (up to its first answer token), writing after it, writing in a batch."""

    prefill_tok_s: float
    decode_tok_s: float
    batch_out_tok_s: float


@dataclass(frozen=True)
class Size:
    """Bytes of the weights (each once) and of the reserved key/value cache; bytes read to write one token after the prompt of
    --prefill; multiply-adds in the linear layers to read one token of a prompt."""

    weight_bytes: int
    kv_cache_bytes: int
    bytes_per_token: int
    multiplies_per_token: int


@dataclass(frozen=True)
class Limits:
    """What this machine reaches with the same threads: reading memory, and multiplying matrices in the arithmetic (`matrix_kind`)
    that is fastest on it."""

    memory_gb_s: float
    matrix_gop_s: float
    matrix_kind: str


@dataclass(frozen=True)
class Curves:
    """Decode speed, tokens a second of all requests together, by number of requests and by length of one request's context."""

    by_batch: dict[int, float]
    by_context: dict[int, float]


def set_threads(count: int) -> None:
    """Compute with `count` threads, in torch and in the native library."""
    torch.set_num_threads(count)
    native = ops.native()
    if native is not None:
        native.executor.library.use_threads(min(count, os.cpu_count() or 1))


class Prompts:
    """Random prompts of ordinary tokens: those that stand for text and are no control tokens. The same in every process."""

    def __init__(self, llm: LLM) -> None:
        self._rng = np.random.default_rng(SEED)
        known, vocab_size = llm.tokenizer, llm.model.config.vocab_size
        ordinary = [id_ for id_ in range(vocab_size) if known.token_bytes(id_) and not known.is_special(id_)]
        self._ordinary = np.array(ordinary)

    def draw(self, count: int, length: int) -> list[list[int]]:
        """`count` new prompts of `length` token ids."""
        ids: list[list[int]] = self._rng.choice(self._ordinary, (count, length)).tolist()
        return ids


def run(llm: LLM, prompts: list[list[int]], new: int) -> Run:
    """Submit all prompts at once and write `new` tokens to each, timed from before the first is submitted."""
    engine = llm.engine
    params = SamplingParams(
        temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, max_tokens=new, ignore_eos=True
    )
    first_s, first_tokens, tokens = 0.0, 0, 0
    requests: list[int] = []
    start = time.perf_counter()
    try:
        for prompt in prompts:
            requests.append(engine.add(prompt, params))
        silent = set(requests)
        while engine.has_work:
            for delta in engine.step():
                tokens += len(delta.token_ids)
                silent.discard(delta.request_id)
            if not silent and not first_tokens:
                first_s, first_tokens = time.perf_counter() - start, tokens
        total_s = time.perf_counter() - start
    finally:
        for request_id in requests:
            engine.abort(request_id)  # those that an interruption left; finished ones are not known any more
    assert tokens == len(prompts) * new, f"{tokens} tokens came, {len(prompts)} times {new} were asked for"
    return Run(first_s, total_s, first_tokens, tokens)


def measure_speed(llm: LLM, bench: BenchConfig, tell: Tell) -> Speed:
    """One run that warms up and `bench.repeat` that count, of one request and then of a batch."""
    prompts = Prompts(llm)

    def runs(name: str, count: int, length: int, new: int) -> list[Run]:
        results = []
        for _ in range(bench.repeat + 1):
            results.append(run(llm, prompts.draw(count, length), new))
            tell(name)
        return results[1:]

    single = runs("one request", 1, bench.prefill, bench.decode + 1)
    batch = runs("batch", bench.batch, bench.batch_prompt, bench.batch_decode)
    return Speed(
        prefill_tok_s=median(bench.prefill / one.first_s for one in single),
        decode_tok_s=median(one.decode_tok_s for one in single),
        batch_out_tok_s=median(one.tokens / one.total_s for one in batch),
    )


def measure_size(llm: LLM, bench: BenchConfig) -> Size:
    """Count bytes and multiply-adds of the model as it lies in memory; see `Size`."""
    caches = llm.engine.runner.caches
    kv_read = 0.0
    for cache, window in zip(caches, llm.model.config.sliding_windows, strict=True):
        lengths = (bench.prefill + step for step in range(1, bench.decode + 1))  # with the token's own key
        seen = sum(length if window is None else min(length, window) for length in lengths) / bench.decode
        kv_read += seen * cache.nbytes / (cache.blocks * cache.block_size)
    return Size(
        weight_bytes=_bytes_of(llm.model.modules()),
        kv_cache_bytes=sum(cache.nbytes for cache in caches),
        bytes_per_token=weights_read(llm.model) + round(kv_read),
        multiplies_per_token=multiplies_per_token(llm.model.config),
    )


def weights_read(model: Qwen) -> int:
    """Bytes of weights that writing one token reads: everything but the embedding, of which one row is nothing, and of experts
    those that a token goes through. A matrix that embedding and head share counts, as the head."""
    embedding = set(model.model.embed_tokens.modules())
    always = _bytes_of(module for module in model.modules() if module not in embedding)
    sparse = [module for module in model.modules() if isinstance(module, SparseMLP)]
    for layer in sparse:
        experts = _bytes_of(layer.experts.modules())
        always -= experts - experts * layer.num_experts_per_tok // len(layer.experts)
    return always


def _bytes_of(modules: Iterable[nn.Module]) -> int:
    """Bytes of memory that the modules' own tensors cover, however many of them share it."""
    spans = sorted({(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for m in modules for tensor in _tensors(m)})
    total, end = 0, 0
    for start, stop in spans:
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
    if isinstance(module, PackedLinear | PackedEmbedding):
        packed = module.matrix.weight
        values = [getattr(packed, field.name) for field in fields(packed)] + [getattr(module, "bias", None)]
        yield from (value for value in values if isinstance(value, torch.Tensor))


def multiplies_per_token(config: ModelConfig) -> int:
    """Multiply-adds in the linear layers for one token of a prompt. The head is not among them: one row of a prompt meets it."""
    hidden, moe = config.hidden_size, config.moe
    attention = 2 * hidden * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    total = config.num_hidden_layers * attention
    sparse = len(moe.sparse_layers) if moe else 0
    total += (config.num_hidden_layers - sparse) * 3 * hidden * config.intermediate_size
    if moe is not None:
        experts = 3 * hidden * moe.intermediate_size * moe.num_experts_per_tok + hidden * moe.num_experts
        shared = moe.shared_expert_intermediate_size
        total += sparse * (experts + (0 if shared is None else 3 * hidden * shared + hidden))
    return total


def peak_rss() -> int:
    """Most bytes of memory that this process has held at once."""
    status = Path("/proc/self/status")
    if status.is_file():  # what getrusage says there can stem from the process that started this one
        text = status.read_text()
        return int(text.partition("VmHWM:")[2].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, the only other system


def measure_limits(size: int = READ_BYTES) -> Limits:
    """Measure reading over `size` bytes and the matrix rate with torch's threads."""
    kind, rate = max(matrix_rates().items(), key=lambda item: item[1])
    return Limits(read_rate(size) / 1e9, rate / 1e9, kind)


def read_rate(size: int) -> float:
    """Bytes a second of the fastest of three loops that read everything once: the sum, a matrix by a vector, and the product of
    the two halves. No loop wins on every machine, and each stays a few percent below what the memory can do."""
    data = torch.ones(size // 4)
    rows, (left, right) = data.view(-1, 4096), data.chunk(2)
    vector = torch.ones(4096)
    loops = (data.sum, lambda: torch.mv(rows, vector), lambda: torch.dot(left, right))
    return data.nbytes / min(_seconds(loop, repeat=5) for loop in loops)


def matrix_rates(sides: Sequence[int] = SIDES) -> dict[str, float]:
    """Operations a second (a multiply-add is two) of the product of square matrices, the best of all sizes, for fp32, int8
    (torch._int_mm) and, on a CPU that has instructions for it, bf16."""
    kinds: dict[str, tuple[torch.dtype, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = {
        "float32": (torch.float32, torch.mm),
        "int8": (torch.int8, torch._int_mm),
    }
    if choose_dtype("auto", "bfloat16", torch.device("cpu")) == torch.bfloat16:
        kinds["bfloat16"] = (torch.bfloat16, torch.mm)
    rates = dict.fromkeys(kinds, 0.0)
    for kind, (dtype, multiply) in kinds.items():
        for side in sides:
            a, b = torch.ones(side, side, dtype=dtype), torch.ones(side, side, dtype=dtype)
            seconds = _seconds(partial(multiply, a, b), repeat=3)
            rates[kind] = max(rates[kind], 2 * side**3 / seconds)
            if seconds > 0.2:
                break  # slow here: a larger one would only take its time
    return rates


def _seconds(work: Callable[[], Any], *, repeat: int) -> float:
    """The shortest of `repeat` times, after one that warms up."""
    work()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def figures(speed: Speed, size: Size, load_s: float, peak_bytes: int, limits: Limits | None) -> dict[str, Any]:
    """All figures by the names that --json has, with those that follow from others. Without `limits` (measured for a CPU only)
    what needs them is None."""
    bandwidth = size.bytes_per_token * speed.decode_tok_s / 1e9
    operations = 2 * size.multiplies_per_token * speed.prefill_tok_s / 1e9
    return {
        **asdict(speed),
        "load_s": load_s,
        "peak_rss_mb": peak_bytes / 1e6,
        **asdict(size),
        "bandwidth_gb_s": bandwidth,
        "memory_gb_s": limits and limits.memory_gb_s,
        "bandwidth_share": limits and bandwidth / limits.memory_gb_s,
        "matrix_gop_s": limits and limits.matrix_gop_s,
        "matrix_kind": limits and limits.matrix_kind,
        "matrix_share": limits and operations / limits.matrix_gop_s,
    }


def curve_points(llm: LLM, bench: BenchConfig) -> tuple[list[int], list[int]]:
    """(numbers of requests, lengths of context) that the engine has room for."""
    block_size, pool = llm.config.block_size, llm.engine.pool
    blocks = -(-(bench.batch_prompt + bench.decode + 1) // block_size)
    at_once = min(pool.num_blocks // blocks, llm.config.max_num_seqs)
    longest = min(CURVE_CONTEXT[1], llm.max_model_len - bench.decode - 1)
    lengths = {longest}
    length = CURVE_CONTEXT[0]
    while length <= longest:
        lengths.add(length)
        length *= 2
    return [count for count in CURVE_BATCHES if count <= at_once], sorted(lengths)


def measure_curves(llm: LLM, bench: BenchConfig, tell: Tell) -> Curves:
    """Decode speed at each of `curve_points`: requests of --batch-prompt tokens, and one request of each length."""
    prompts = Prompts(llm)

    def decode(count: int, length: int) -> float:
        rates = [run(llm, prompts.draw(count, length), bench.decode + 1).decode_tok_s for _ in range(bench.repeat)]
        tell(f"{count} × {length} tokens")
        return median(rates)

    batches, lengths = curve_points(llm, bench)
    for count in batches:  # an engine may record its step once for each number of requests: that is not their speed
        run(llm, prompts.draw(count, 1), 2)
    return Curves(
        {count: decode(count, bench.batch_prompt) for count in batches},
        {length: decode(1, length) for length in lengths},
    )
