"""Predicted memory against what a real step on the CPU holds at its peak."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from qwenkit import ops
from qwenkit.cli.plan import find_packed, find_sizes
from qwenkit.hub.find import find_model
from qwenkit.linear.frozen import PackedBase
from qwenkit.model.config import ModelConfig
from qwenkit.train.batch import Sample, TrainBatch
from qwenkit.train.config import TrainConfig
from qwenkit.train.loss import token_loss_sum
from qwenkit.train.methods import model_of_shapes, prepare_model, trainable_parameters
from qwenkit.train.optim import Optimizer
from qwenkit.train.plan import CPU_PROCESS, CUDA_CONTEXT, MemoryPlan, largest_batch, plan_memory
from qwenkit.train.recompute import recompute_blocks
from qwenkit.weights.checkpoint import open_checkpoint
from tests.tiny_models import write_model, write_tokenizer
from tests.train.allocations import allocated
from tests.weights.test_gguf_model import random_model, tiny_config
from tests.weights.test_gguf_model import write as write_gguf
from tests.weights.test_gptq_awq import quantized_folder

SMALL = ModelConfig.from_dict(
    {
        "model_type": "qwen2",
        "vocab_size": 3000,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
)
GIB = 2**30


def qwen(size: str) -> ModelConfig:
    hidden, layers, heads, intermediate, vocab = {
        "0.5B": (1024, 24, 16, 2816, 151936),
        "7B": (4096, 32, 32, 11008, 151936),
        "72B": (8192, 80, 64, 24576, 152064),
    }[size]
    return ModelConfig.from_dict(
        {
            "model_type": "qwen2",
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
        }
    )


def real_peak(sizes: ModelConfig, config: TrainConfig) -> int:
    """Weights, states, and the most that the micro-batches of a step hold beside them, as torch's allocator reports it."""
    ops.use()  # as a run does
    model = model_of_shapes(sizes, config).to_empty(device="cpu").train()
    if sizes.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1) if not parameter.is_floating_point() else parameter.normal_(std=0.02)
    if config.gradient_checkpointing:
        recompute_blocks(model)
    parameters = trainable_parameters(model)
    optimizer = Optimizer(parameters, config)
    ids = torch.randint(0, sizes.vocab_size, (config.cutoff_len,)).tolist()
    batch = TrainBatch.of([Sample(ids, ids)] * config.per_device_train_batch_size)
    token_loss_sum(model, TrainBatch.of([Sample(ids[:8], ids[:8])]))[0].backward()  # tables and libraries
    optimizer.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for _ in range(config.gradient_accumulation_steps):
            token_loss_sum(model, batch, chunk=config.loss_chunk)[0].backward()
            optimizer.collect()
    tensors = [*model.parameters(), *optimizer.tensors().values()]
    return allocated(profiled) + sum(tensor.nbytes for tensor in tensors)


BASE = {"cutoff_len": 384, "per_device_train_batch_size": 2, "loss_chunk": 128, "dtype": "float32"}
RUNS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "full_accumulated": {"method": "full", "gradient_accumulation_steps": 3},
    "full_recomputed": {"method": "full", "gradient_checkpointing": True},
    "full_bfloat16": {"method": "full", "dtype": "bfloat16"},
    "full_stochastic": {"method": "full", "dtype": "bfloat16", "master_weights": "stochastic"},
    "full_8bit": {"method": "full", "optim": "adamw_8bit"},
    "last_layers": {"method": "freeze", "freeze_trainable_layers": 2},
    "first_layers": {"method": "freeze", "freeze_trainable_layers": -4},
    "lora": {"method": "lora"},
    "lora_some": {"method": "lora", "lora_target": ("q_proj", "v_proj"), "lora_rank": 4},
    "lora_recomputed": {"method": "lora", "gradient_checkpointing": True},
    "dora": {"method": "lora", "use_dora": True},
    "qlora": {"method": "qlora"},
    "qlora_recomputed": {"method": "qlora", "gradient_checkpointing": True},
}


@pytest.mark.parametrize("run", RUNS)
def test_prediction_is_within_ten_percent(run: str) -> None:
    config = TrainConfig(**(BASE | RUNS[run]))
    predicted, real = tensors_of(plan_memory(SMALL, config, gpus=0)), real_peak(SMALL, config)
    if os.environ.get("QWENKIT_SLOW"):
        print(
            f"\n{run}: predicted {predicted / 2**20:.1f} MiB, real {real / 2**20:.1f} MiB, {predicted / real - 1:+.1%}"
        )
    assert abs(predicted - real) < 0.1 * real


def test_prediction_of_other_networks() -> None:
    """Grouped queries, tied embeddings, norms of queries; experts."""
    tied = ModelConfig.from_dict(
        {
            "model_type": "qwen3",
            "vocab_size": 3000,
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 5,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "tie_word_embeddings": True,
        }
    )
    for settings in ({"method": "full"}, {"method": "lora"}):
        config = TrainConfig(**(BASE | settings))
        real = real_peak(tied, config)
        assert abs(tensors_of(plan_memory(tied, config, gpus=0)) - real) < 0.1 * real


def tensors_of(plan: MemoryPlan) -> int:
    return plan.total - plan.runtime


RESIDENT = """
import sys
from pathlib import Path
from qwenkit.cli.main import cli
cli(sys.argv[1:], standalone_mode=False)
line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(line.split()[1]) * 1024)
"""


def resident_peak(folder: Path, model: str, settings: dict[str, Any], steps: int) -> int:
    """The most that a whole run's process held, where every sample is longer than cutoff_len."""
    text = "To be, or not to be, that is the question. " * 100
    (folder / "long.json").write_text(json.dumps([{"instruction": str(i), "output": text} for i in range(16)]))
    (folder / "dataset_info.json").write_text(json.dumps({"long": {"file_name": "long.json"}}))
    words = [f"model={model}", "dataset=long", f"dataset_dir={folder}", f"output_dir={folder / 'out'}"]
    words += [f"cache_dir={folder / 'cache'}", "overlong=truncate", "save_steps=none", f"max_steps={steps}"]
    words += [f"{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-c", RESIDENT, "train", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()[-1])


on_a_cpu = pytest.mark.skipif(
    sys.platform != "linux" or torch.version.cuda is not None,
    reason="reads the peak of a process from /proc, and what is planned is torch without CUDA",
)


@on_a_cpu
def test_the_process_itself_is_planned(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "qwen2")
    settings: dict[str, Any] = {"method": "full", "cutoff_len": 64, "per_device_train_batch_size": 1}
    plan = plan_memory(find_sizes(str(model)), TrainConfig(**settings), gpus=0)
    assert plan.runtime > 0.9 * plan.total
    assert plan.total == pytest.approx(resident_peak(tmp_path, str(model), settings, 2), rel=0.3)


@on_a_cpu
@pytest.mark.skipif(not os.environ.get("QWENKIT_SLOW"), reason="trains the default model; QWENKIT_SLOW=1 runs it")
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "lora", "cutoff_len": 256, "per_device_train_batch_size": 1},
        {"method": "lora", "cutoff_len": 256},
        {"method": "lora", "cutoff_len": 512, "packing": True},
        {"method": "qlora", "cutoff_len": 256, "per_device_train_batch_size": 1},
        {"method": "full", "cutoff_len": 256, "per_device_train_batch_size": 1},
        {"method": "full", "cutoff_len": 256, "per_device_train_batch_size": 1, "dtype": "bfloat16"},
    ],
)
def test_resident_memory_of_the_default_model(tmp_path: Path, settings: dict[str, Any]) -> None:
    path = str(find_model("smollm2"))
    packed = find_packed(path, settings["method"])
    predicted = plan_memory(find_sizes(path), TrainConfig(**settings), packed=packed, gpus=0).total
    real = resident_peak(tmp_path, path, settings, 3)
    print(f"\n{settings}: predicted {predicted / GIB:.2f} GiB, real {real / GIB:.2f} GiB, {predicted / real - 1:+.1%}")
    assert predicted == pytest.approx(real, rel=0.1)


def packed_models(folder: Path) -> dict[str, Path]:
    """Matrices that stay in the file's own bits: with offsets and without, of all layers and of some."""
    write_gguf(folder / "q4_0.gguf", random_model(tiny_config("llama")), kind="Q4_0")
    write_gguf(folder / "q4_1.gguf", random_model(tiny_config("qwen2")), kind="Q4_1")
    for name, bits, symmetric in (("gptq", 4, True), ("gptq_offsets", 4, False), ("gptq_int8", 8, True)):
        quantized_folder(folder / name, "gptq", bits, sym=symmetric)
        write_tokenizer(folder / name)
    return {path.stem: path for path in (*folder.glob("*.gguf"), *folder.glob("gptq*"))}


def test_packed_matrices_are_counted_as_training_holds_them(tmp_path: Path) -> None:
    models = packed_models(tmp_path)
    assert len(models) == 5
    config = TrainConfig(method="qlora", cutoff_len=64, lora_rank=4, dtype="float32")
    for name, path in models.items():
        checkpoint = open_checkpoint(path)
        model = prepare_model(config, checkpoint, "cpu")
        assert any(isinstance(module, PackedBase) for module in model.modules()), name
        packed = find_packed(str(path), "qlora")
        plan = plan_memory(find_sizes(str(path)), config, packed=packed, gpus=0)
        assert plan.weights == sum(parameter.nbytes for parameter in model.parameters()), name
        plain = plan_memory(find_sizes(str(path)), replace(config, method="lora"), gpus=0)
        assert (plan.parameters, plan.trained) == (plain.parameters, plain.trained)
        # Of the last block only some matrices: the layers of a file need not be alike.
        some = {kind: packed[kind] for kind in packed if "layers.2." not in kind or "down_proj" in kind}
        fewer = plan_memory(find_sizes(str(path)), config, packed=some, gpus=0)
        assert len(some) < len(packed)
        assert plan.weights < fewer.weights < plain.weights
    with pytest.raises(ValueError, match=r"method is 'full', but .* whose matrices cannot be trained"):
        find_packed(str(models["gptq"]), "full")
    assert find_packed(str(models["q4_0"]), "lora") == find_packed(str(models["gptq"] / "config.json"), "qlora") == {}


def test_counts_of_parameters() -> None:
    plan = plan_memory(qwen("7B"), TrainConfig(method="full", gradient_checkpointing=True), gpus=8)
    assert plan.parameters == plan.trained == 7_721_324_544
    quantized = plan_memory(qwen("7B"), TrainConfig(method="qlora"))
    assert quantized.parameters - quantized.trained == 7_721_324_544
    assert quantized.weights < 0.4 * plan_memory(qwen("7B"), TrainConfig(method="lora")).weights


def bytes_of(config: TrainConfig, **layout: Any) -> MemoryPlan:
    return plan_memory(qwen("72B"), config, **layout)


def test_sharding_divides_what_lasts() -> None:
    config = TrainConfig(method="full", parallel="fsdp", gradient_checkpointing=True, cutoff_len=2048)
    eight, sixteen = bytes_of(config, gpus=8), bytes_of(config, gpus=16)
    assert sixteen.weights == pytest.approx(eight.weights / 2)
    assert sixteen.optimizer == pytest.approx(eight.optimizer / 2)
    assert sixteen.activations == eight.activations
    assert sixteen.gathered == eight.gathered
    assert (sixteen.replicate, sixteen.shard) == (1, 16)
    hybrid = bytes_of(replace(config, dp_replicate=2), gpus=16)
    assert hybrid.weights == eight.weights
    copies = bytes_of(replace(config, parallel="ddp"), gpus=16)
    assert (copies.replicate, copies.gathered) == (16, 0)
    assert copies.weights == pytest.approx(16 * sixteen.weights, rel=1e-6)
    cut = bytes_of(replace(config, tensor_parallel=8), gpus=16)
    assert cut.weights == pytest.approx(sixteen.weights, rel=1e-3)
    assert cut.gathered < sixteen.gathered / 7
    assert cut.parameters == pytest.approx(eight.parameters, rel=1e-3)


def test_the_reference_of_dpo_is_shared_too() -> None:
    config = TrainConfig(method="full", parallel="fsdp", gradient_checkpointing=True, cutoff_len=2048)
    plain, dpo = bytes_of(config, gpus=8), bytes_of(replace(config, stage="dpo"), gpus=8)
    assert dpo.weights == 2 * plain.weights
    assert bytes_of(replace(config, stage="dpo"), gpus=16).weights == pytest.approx(plain.weights)


def test_a_gpu_has_a_runtime_and_bfloat16() -> None:
    cpu, gpu = (plan_memory(SMALL, TrainConfig(method="full"), gpus=gpus) for gpus in (0, 1))
    assert cpu.runtime > CPU_PROCESS
    assert gpu.runtime == CUDA_CONTEXT
    assert gpu.weights == cpu.weights / 2
    assert gpu.optimizer == pytest.approx(cpu.optimizer * 1.5, rel=1e-4)  # fp32 copies of the weights


def test_largest_batch() -> None:
    config = TrainConfig(method="lora", gradient_checkpointing=True, cutoff_len=1024, loss_chunk=4096)
    model, memory = qwen("0.5B"), 5 * GIB
    batch = largest_batch(model, config, memory)
    assert batch is not None
    assert plan_memory(model, replace(config, per_device_train_batch_size=batch)).total <= memory
    assert plan_memory(model, replace(config, per_device_train_batch_size=batch + 1)).total > memory
    assert largest_batch(model, config, GIB) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze_trainable": ("layers.3",), "method": "freeze"}, "freeze_trainable is not planned for"),
        ({"tensor_parallel": 3}, "tensor_parallel is 3, but 8 processes are not a multiple"),
        ({"dp_shard": 5}, "is 5, but 8 processes run"),
    ],
)
def test_what_cannot_be_planned(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_memory(SMALL, TrainConfig(**settings), gpus=8)


def test_a_tensor_group_stays_in_a_node() -> None:
    with pytest.raises(ValueError, match="tensor_parallel is 16, but a node has 8 GPUs"):
        plan_memory(qwen("7B"), TrainConfig(method="full", tensor_parallel=16), gpus=16)
