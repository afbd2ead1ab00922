"""DeepSpeed's files: each number is taken over, compared or named."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwenkit.compat.deepspeed import read_deepspeed
from qwenkit.compat.translate import translate


def read(value: Any, said: dict[str, Any], processes: int = 1) -> tuple[dict[str, Any], list[str]]:
    return read_deepspeed(value, Path(), said, {"per_device_train_batch_size": 8}, processes)


def deepspeed_file(folder: Path, **changes: Any) -> Path:
    """What the DeepSpeed files of that repository hold."""
    config = {
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}},
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    } | changes
    path = folder / "ds.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("stage", "method", "parallel"),
    [(0, "full", "ddp"), (2, "full", "fsdp"), (3, "full", "fsdp"), (2, "lora", "ddp"), (3, "lora", "fsdp")],
)
def test_deepspeed_stages(tmp_path: Path, stage: int, method: str, parallel: str) -> None:
    path = deepspeed_file(tmp_path, zero_optimization={"stage": stage})
    settings = {"model_name_or_path": "m", "finetuning_type": method, "deepspeed": path.name}
    translation = translate(settings, folder=tmp_path)
    assert translation.settings["parallel"] == parallel
    assert any("WarmupLR has no effect" in note for note in translation.notes)


def test_what_a_deepspeed_file_says_besides(tmp_path: Path) -> None:
    zero = {"stage": 3, "offload_param": {"device": "cpu"}}
    path = deepspeed_file(tmp_path, zero_optimization=zero, gradient_clipping=0.5, fp16={"enabled": True})
    found, notes = read(path, {})
    assert found == {"parallel": "fsdp", "max_grad_norm": 0.5, "dtype": "float16"}
    assert any(note.startswith("deepspeed: offload_param to cpu has no effect") for note in notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_optimization": {"stage": 4}}, "stage is 4, allowed are 0, 1, 2, 3"),
        ({"zero_optimization": []}, "stage is None"),
        ({"gradient_clipping": "much"}, "gradient_clipping is 'much', allowed is a number or auto"),
        (
            {"gradient_accumulation_steps": 3},
            "says gradient_accumulation_steps 3, but gradient_accumulation_steps is 8",
        ),
        ({"optimizer": {"type": "Lion"}}, "optimizer.type is 'Lion', allowed is AdamW"),
    ],
)
def test_deepspeed_files_that_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = deepspeed_file(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        read(path, {"gradient_accumulation_steps": 8})


def test_a_deepspeed_file_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        read(tmp_path / "ds.json", {})
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.json", {})


@pytest.mark.parametrize(
    ("config", "said", "found"),
    [
        ({"optimizer": {"type": "AdamW", "params": {"lr": 3e-5, "betas": [0.8, 0.99], "eps": 1e-6, "weight_decay": 0.1}}}, {},
         {"learning_rate": 3e-5, "adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-6, "weight_decay": 0.1}),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, {"learning_rate": "1e-4"}, {}),
        ({"train_batch_size": 64}, {}, {"gradient_accumulation_steps": 4}),
        ({"train_batch_size": 64}, {"gradient_accumulation_steps": 2}, {"per_device_train_batch_size": 16}),
        ({"train_batch_size": 32}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}, {}),
    ],
)  # fmt: skip
def test_numbers_are_taken_over_where_nothing_is_said(
    config: dict[str, Any], said: dict[str, Any], found: dict[str, Any]
) -> None:
    assert read(config, said, processes=2)[0] == found | {"parallel": "ddp"}


@pytest.mark.parametrize(
    ("config", "said", "message"),
    [
        ({"optimizer": {"params": {"lr": 3e-5}}}, {"learning_rate": 1e-4}, "lr 3e-05, but learning_rate is 0.0001"),
        ({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, {"adam_beta2": 0.999}, "but adam_beta2 is 0.999"),
        ({"optimizer": {"params": {"betas": 0.9}}}, {}, "allowed are two numbers"),
        ({"optimizer": {"params": {"adam_w_mode": False}}}, {}, "adam_w_mode is false"),
        (
            {"train_batch_size": 64},
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1},
            "train_batch_size 64",
        ),
        ({"train_batch_size": 20}, {}, "train_batch_size 20"),
        ({"train_batch_size": "many"}, {}, "allowed is a whole number or auto"),
        ({"fp16": {"enabled": True}}, {"dtype": "bfloat16"}, "enables fp16, but dtype is bfloat16"),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}},
            {"warmup_steps": 7},
            "but warmup_steps is 7",
        ),
        ({"curriculum_learning": {"enabled": True}}, {}, "a curriculum is not supported"),
    ],
)
def test_contradictions_are_refused(config: dict[str, Any], said: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(config, said)


def test_what_has_no_effect_is_named() -> None:
    config = {
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8, "overlap_comm": True},
        "fp16": {"enabled": True, "initial_scale_power": 16},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 7, "warmup_min_lr": "auto"}},
        "optimizer": {"type": "AdamW", "params": {"bias_correction": True}},
    }
    text = "\n".join(read(config, {})[1])
    for name in ("steps_per_print", "reduce_bucket_size", "overlap_comm", "initial_scale_power", "bias_correction"):
        assert name in text
    assert "warmup_num_steps 7" in text
    assert "wall_clock_breakdown" not in text
    assert "auto" not in text
