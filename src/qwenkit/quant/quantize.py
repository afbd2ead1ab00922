"""Quantizing a model, block by block. In: a checkpoint, a QuantConfig, calibration documents, a folder to be. Out: that folder.

Inside a block in true sequence: q, k, v; then o; then gate and up; then down, each with the inputs that those before it give
once they are quantized. A finished block is on disk: a run that was stopped goes on behind the last one, computing the hidden
states anew from what was written, and ends with the same bytes as one that was never stopped.
"""

from __future__ import annotations

import copy
import errno
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from qwenkit.model.config import ModelConfig
from qwenkit.model.qwen import Block
from qwenkit.quant.blocks import BlockRun, Stream
from qwenkit.quant.config import QuantConfig
from qwenkit.quant.files import (
    assemble,
    is_assembled,
    quantization_config,
    write_companions,
    write_tensors,
)
from qwenkit.quant.gptq import Quantized, gptq, round_to_nearest
from qwenkit.quant.layout import gptq_tensors
from qwenkit.quant.moments import Moments
from qwenkit.quant.workplace import HEADER, Workplace, digest, estimate, fingerprint
from qwenkit.storage import atomic_replace, kept_on_error, write_json
from qwenkit.weights import names
from qwenkit.weights.checkpoint import Checkpoint
from qwenkit.weights.gptq_awq import Quantization, with_weights
from qwenkit.weights.load import empty_and_stored
from qwenkit.weights.safetensors_files import read_file
from qwenkit.weights.stored import StoredTensor, read_json

logger = logging.getLogger(__name__)

STAGES = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
FEWEST = 0.005  # of all tokens; an expert that saw fewer is rounded to nearest
REPORT = "quantize_report.json"
_LAYER = "model.layers.{}."


@dataclass(frozen=True)
class LayerError:
    """One Linear: the squared error of its outputs as a share of them (None: not measured), tokens it saw, how it was done."""

    name: str
    error: float | None
    tokens: int
    damp: float
    method: str


@torch.no_grad()
def quantize_model(
    checkpoint: Checkpoint,
    output: Path,
    config: QuantConfig,
    documents: Sequence[Sequence[int]],
    *,
    progress: bool = False,
) -> list[LayerError]:
    """Write the quantized model as the folder `output`, which must not exist or be empty; say what each Linear lost.

    `documents` of token ids are the calibration; rounding to nearest needs none. Raises ValueError for a model that is quantized
    already, for shapes that do not divide, a folder that is not empty, or another run's leftovers; OSError for a full disk.
    """
    check_output(output)
    if Quantization.of(checkpoint.path, checkpoint.config) is not None:
        raise ValueError(f"{checkpoint.path} is quantized already: quantize the model that it was made from")
    model, stored = empty_and_stored(checkpoint, torch.float32)
    shapes = {
        name: tuple(module.weight.shape)
        for name, module in model.model.layers.named_modules()
        if _is_quantized(name, module)
    }
    config = config.fitted({f"model.layers.{name}": shape for name, shape in shapes.items()})
    if config.method == "gptq" and not documents:
        raise ValueError("there is no calibration text: GPTQ needs some, rtn does not")
    part = output.with_name(f"{output.name}.part")
    header = {"config": asdict(config), "model": fingerprint(checkpoint, stored), "calibration": digest(documents)}
    with Workplace(part, header, estimate(stored, shapes, config)):
        try:
            if not is_assembled(part):
                run = _Run(checkpoint, model.config, model.model.layers, stored, config, part)
                found = run.blocks(documents, progress)
                files = [*(run.path(number) for number in range(len(model.model.layers))), run.rest()]
                moe = model.config.moe is not None
                write_companions(part, checkpoint, quantization_config(config, moe=moe), run.dtype)
                write_json(part / REPORT, {"layers": [asdict(each) for each in found]})
                assemble(part, files)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            kept = f"the blocks that are finished are kept in {part}"
            raise OSError(
                error.errno, f"the disk is full; {kept}: free some space and run the same again, or delete that folder"
            ) from error
        for leftover in (*part.glob("*.tensors"), *part.glob("block-*.json"), *part.glob(".*.part")):
            leftover.unlink()
        with kept_on_error(part):
            atomic_replace(part, output)  # an empty folder there gives way
        (output / HEADER).unlink()
    return [LayerError(**each) for each in read_json(output / REPORT)["layers"]]


def check_output(output: Path) -> None:
    """ValueError for an output folder that cannot be one."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file, a new folder is needed")
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"--output {output} is not empty: name a new folder, or empty it")


def _is_quantized(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not name.endswith("gate")  # routers stay as they are


class _Run:
    def __init__(
        self,
        checkpoint: Checkpoint,
        model: ModelConfig,
        layers: nn.ModuleList,
        stored: dict[str, StoredTensor],
        config: QuantConfig,
        part: Path,
    ) -> None:
        self._model, self._layers, self._stored, self._config, self._part = model, layers, stored, config, part
        self._checkpoint = checkpoint
        self._device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
        )
        embedded = stored["model.embed_tokens.weight"].dtype
        self.dtype = "bfloat16" if embedded == "BF16" else "float16"

    def path(self, number: int) -> Path:
        return self._part / f"block-{number:05d}.tensors"

    def blocks(self, documents: Sequence[Sequence[int]], progress: bool) -> list[LayerError]:
        """Quantize every block that is not on disk yet."""
        self._tokens = sum(len(document) for document in documents)
        calibrated = self._config.method == "gptq"
        found: list[LayerError] = []
        streams: list[Stream] = []
        if all(self.path(number).with_suffix(".json").is_file() for number in range(len(self._layers))):
            calibrated = False  # nothing is left to be calibrated
        if calibrated:
            embedding = self._stored["model.embed_tokens.weight"].load()
            streams.append(Stream(self._model, documents, embedding, self._device))
            if self._config.gptaq:
                streams.append(streams[0].copy())
            del embedding
        bar = tqdm(range(len(self._layers)), desc="quantizing", unit="block", disable=None if progress else True)
        for number in bar:
            path = self.path(number)
            done = path.with_suffix(".json").is_file()
            block = None if done and not calibrated else self._load(number)
            if done:
                errors = [LayerError(**each) for each in read_json(path.with_suffix(".json"))["layers"]]
                if calibrated and block is not None:
                    whole = copy.deepcopy(block) if len(streams) > 1 else None
                    self._put_written(number, block)
                    for stream, version in zip(streams, (block, whole), strict=False):
                        BlockRun(stream, version or block).finish()
            else:
                assert block is not None
                quantized, errors = self._quantize(block, number, streams)
                self._write(number, block, quantized)
                write_json(path.with_suffix(".json"), {"layers": [asdict(each) for each in errors]})
            found += errors
            if progress and not done:
                bar.write(_line(number, errors), file=sys.stderr)  # stdout is for the result
        few = [each for each in found if each.method == "rtn"] if self._config.method == "gptq" else []
        if few:
            logger.warning(
                "%d matrices of experts saw fewer than %.1f%% of the calibration's tokens and were rounded to nearest (the first "
                "is %s, %d tokens): more or other calibration text would help",
                *(len(few), 100 * FEWEST, few[0].name, few[0].tokens),
            )
        return found

    def _load(self, number: int) -> Block:
        block = copy.deepcopy(self._layers[number]).to_empty(device=self._device)
        for name, parameter in block.named_parameters():
            self._stored[_LAYER.format(number) + name].copy_to(parameter)
        assert isinstance(block, Block)
        return block

    def _quantize(
        self, block: Block, number: int, streams: list[Stream]
    ) -> tuple[dict[str, Quantized], list[LayerError]]:
        """Round all Linears of a block, put the rounded weights into it, and move the streams to behind it."""
        linears = {name: module for name, module in block.named_modules() if _is_quantized(name, module)}
        quantized: dict[str, Quantized] = {}
        errors: dict[str, LayerError] = {}
        whole = copy.deepcopy(block) if len(streams) > 1 else block
        runs = [BlockRun(stream, version) for stream, version in zip(streams, (block, whole), strict=False)]
        pristine = dict(whole.named_modules())
        for stage, kinds in enumerate(STAGES):
            groups: dict[str, list[str]] = {}  # Linears that read the same, by the first of them
            for name in linears:
                parent, _, kind = name.rpartition(".")
                if kind in kinds:
                    groups.setdefault(f"{parent}.{kinds[0]}", []).append(name)
            for run in runs:
                if stage == 2:
                    run.keep_attention()
                elif stage == 3:
                    run.keep_inner()
            moments = self._moments(runs, linears, pristine, list(groups)) if runs else {}
            for first, members in groups.items():
                made = self._matrices([linears[name] for name in members], moments.pop(first, None))
                for name, (matrix, tokens, method) in zip(members, made, strict=True):
                    linears[name].weight.copy_(matrix.values)
                    quantized[name] = replace(matrix, values=torch.empty(0))
                    errors[name] = LayerError(_LAYER.format(number) + name, matrix.error, tokens, matrix.damp, method)
        for run in runs:
            run.finish()
        return quantized, [errors[name] for name in linears]

    def _moments(
        self, runs: list[BlockRun], linears: dict[str, Any], pristine: dict[str, Any], firsts: list[str]
    ) -> dict[str, Moments]:
        found: dict[str, Moments] = {}
        taps = [runs[0].inputs({first: linears[first] for first in firsts})]
        if len(runs) > 1:
            taps.append(runs[1].inputs({first: pristine[first] for first in firsts}))
        for chunk in zip(*taps, strict=True):
            for first, x in chunk[0].items():
                # An expert's tokens in the unquantized model are others than here, so there is nothing to compare.
                asymmetric = len(chunk) > 1 and ".experts." not in first
                if first not in found:
                    found[first] = Moments(x.shape[1], asymmetric=asymmetric, device=x.device)
                found[first].add(x, chunk[1][first] if asymmetric else None)
        return found

    def _matrices(self, linears: list[nn.Linear], moments: Moments | None) -> list[tuple[Quantized, int, str]]:
        """Linears that read the same inputs, as one matrix; apart again."""
        weight = torch.cat([linear.weight for linear in linears])
        tokens = 0 if moments is None else moments.tokens
        method = self._config.method
        if moments is None or tokens < FEWEST * self._tokens:
            method = "rtn"
        if method == "rtn" or moments is None:
            whole = round_to_nearest(weight, self._config)
        else:
            whole = gptq(weight, moments, self._config)
        parts, start = [], 0
        for linear in linears:
            parts.append((whole.rows(start, start + linear.out_features), tokens, method))
            start += linear.out_features
        return parts

    def _write(self, number: int, block: Block, quantized: dict[str, Quantized]) -> None:
        prefix = _LAYER.format(number)
        v2 = self._config.format == "gptq_v2"
        tensors = {
            prefix + name: self._in_16_bits(parameter)
            for name, parameter in block.named_parameters()
            if name.removesuffix(".weight") not in quantized
        }
        if self._model.model_type != "qwen":
            for name, matrix in quantized.items():
                parts = gptq_tensors([matrix], self._config.bits, v2=v2)
                tensors |= {f"{prefix}{name}.{part}": tensor for part, tensor in parts.items()}
        else:
            tensors = _joined(tensors)
            for theirs, members in _joined_names(prefix, quantized).items():
                parts = gptq_tensors([quantized[name] for name in members], self._config.bits, v2=v2)
                tensors |= {f"{theirs}.{part}": tensor for part, tensor in parts.items()}
        write_tensors(self.path(number), tensors)

    def _put_written(self, number: int, block: Block) -> None:
        """The weights of a block that an earlier run wrote."""
        config = self._config
        assert config.group_size is not None
        quantization = Quantization("gptq", config.bits, config.group_size, 0 if config.format == "gptq_v2" else 1)
        translate = names.from_qwen1 if self._model.model_type == "qwen" else names.from_hugging_face
        parameters = dict(block.named_parameters())
        for tensor in with_weights(self._part, read_file(self.path(number)), quantization):
            for part in translate(tensor.name):
                name = part.name.removeprefix(_LAYER.format(number))
                module = name.removesuffix(".weight")
                if module != name and _is_quantized(module, block.get_submodule(module)):
                    names.apply(part, tensor).copy_to(parameters[name])

    def rest(self) -> Path:
        """The file of embedding, last norm and head."""
        path = self._part / "rest.tensors"
        tied = self._model.tie_word_embeddings
        wanted = [n for n in self._stored if not n.startswith("model.layers.") and not (tied and n == "lm_head.weight")]
        tensors = {name: self._in_16_bits(self._stored[name].load()) for name in wanted}
        write_tensors(path, _joined(tensors) if self._model.model_type == "qwen" else tensors)
        return path

    def _in_16_bits(self, tensor: torch.Tensor) -> torch.Tensor:
        """In the folder's dtype, or fp32 where that cannot hold the values."""
        narrow = tensor.to(torch.bfloat16 if self.dtype == "bfloat16" else torch.float16)
        return narrow if bool(torch.isfinite(narrow).all()) else tensor.float()


def _joined_names(prefix: str, quantized: dict[str, Quantized]) -> dict[str, list[str]]:
    """Qwen-1's Linears, and which of ours lie in each, in order."""
    found: dict[str, list[str]] = {}
    for name in quantized:
        theirs = names.to_qwen1(f"{prefix}{name}.weight").name.removesuffix(".weight")
        found.setdefault(theirs, []).append(name)
    return found


def _joined(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under Qwen-1's names, q, k and v in one."""
    found: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        part = names.to_qwen1(name)
        found.setdefault(part.name, []).append((part.index, tensor))
    return {
        name: torch.cat([tensor for _, tensor in sorted(parts, key=lambda p: p[0])]) for name, parts in found.items()
    }


def _line(number: int, errors: list[LayerError]) -> str:
    shown = [each for each in errors if ".experts." not in each.name]
    kinds = "  ".join(
        f"{each.name.rpartition('.')[2].removesuffix('_proj')} "
        + ("-" if each.error is None else f"{100 * each.error:.2f}%")
        for each in shown
    )
    experts = [each.error for each in errors if ".experts." in each.name and each.error is not None]
    more = f"  experts {100 * sum(experts) / len(experts):.2f}% (mean)" if experts else ""
    return f"block {number}: error {kinds}{more}"
