"""Launch scripts of finetune.py and files of one LLaMA-Factory tutorial, with their own flags and keys: two records, one step.

Only paths and the length of a sample differ.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qwenkit import ops
from qwenkit.cli.main import cli
from tests.conftest import OPS
from tests.tiny_models import write_model

COMMON = """
 --num_train_epochs 1 --per_device_eval_batch_size 1 --evaluation_strategy no --save_strategy steps --save_steps 1000
 --save_total_limit 10 --weight_decay 0.1 --adam_beta2 0.95 --warmup_ratio 0.01 --lr_scheduler_type cosine --logging_steps 1
 --report_to none --model_max_length 512 --lazy_preprocess True --gradient_checkpointing
"""
SCRIPTS = {
    "finetune_ds.sh": "--bf16 True --per_device_train_batch_size 1 --gradient_accumulation_steps 16 --learning_rate 1e-5"
    " --deepspeed finetune/ds_config_zero3.json",
    "finetune_lora_single_gpu.sh": "--bf16 True --per_device_train_batch_size 2 --gradient_accumulation_steps 8"
    " --learning_rate 3e-4 --use_lora",
    "finetune_lora_ds.sh": "--bf16 True --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --learning_rate 3e-4"
    " --use_lora --deepspeed finetune/ds_config_zero2.json",
    "finetune_qlora_single_gpu.sh": "--fp16 True --per_device_train_batch_size 2 --gradient_accumulation_steps 8"
    " --learning_rate 3e-4 --use_lora --q_lora --deepspeed finetune/ds_config_zero2.json",
    "finetune_qlora_ds.sh": "--fp16 True --per_device_train_batch_size 2 --gradient_accumulation_steps 8"
    " --learning_rate 3e-4 --use_lora --q_lora --deepspeed finetune/ds_config_zero2.json",
}
CONVERSATIONS = [
    {"id": f"identity_{n}", "conversations": [{"from": "user", "value": q}, {"from": "assistant", "value": a}]}
    for n, (q, a) in enumerate((("hi", "hello"), ("one?", "two")))
]

PAIRS = [{"instruction": "q", "input": "", "chosen": "yes", "rejected": "no"}] * 2
SAMPLES = [{"instruction": "q", "input": "", "output": "a", "history": [["b", "c"]], "system": "s"}] * 2
KTO = [{"instruction": f"q{n}", "input": "", "output": f"a{n}", "kto_tag": n == 0} for n in range(2)]
DATA = {
    "identity": (SAMPLES, {"file_name": "identity.json"}),
    "pairs": (
        PAIRS,
        {
            "file_name": "pairs.json",
            "ranking": True,
            "columns": {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"},
        },
    ),
    "kto_en_demo": (
        KTO,
        {
            "file_name": "kto_en_demo.json",
            "columns": {"prompt": "instruction", "query": "input", "response": "output", "kto_tag": "kto_tag"},
        },
    ),
    "c4_demo": ([{"text": "Some words."}] * 2, {"file_name": "c4_demo.json", "columns": {"prompt": "text"}}),
}
TRAIN = """
### model
model_name_or_path: {model}
trust_remote_code: true

### method
stage: {stage}
do_train: true
{method}

### dataset
dataset: {dataset}
template: qwen
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 1
dataloader_num_workers: 4

### output
output_dir: saves/{name}
logging_steps: 10
save_steps: 500
overwrite_output_dir: true
save_only_model: false
report_to: none  # choices: [none, wandb, tensorboard, swanlab, mlflow]

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 1.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""
LORA = "finetuning_type: lora\nlora_rank: 8\nlora_target: all"
FILES: dict[str, dict[str, str]] = {
    "llama3_lora_sft": {"stage": "sft", "method": LORA, "dataset": "identity"},
    "llama3_lora_pretrain": {"stage": "pt", "method": LORA, "dataset": "c4_demo"},
    "llama3_lora_dpo": {"stage": "dpo", "method": f"{LORA}\npref_beta: 0.1\npref_loss: sigmoid", "dataset": "pairs"},
    "llama3_lora_kto": {"stage": "kto", "method": f"{LORA}\npref_beta: 0.1", "dataset": "kto_en_demo"},
    "llama3_lora_reward": {"stage": "rm", "method": LORA, "dataset": "pairs"},
    "llama3_qlora_otfq_sft": {
        "stage": "sft",
        "method": f"{LORA}\nquantization_bit: 4\nquantization_method: bnb\ndouble_quantization: false",
        "dataset": "identity",
    },
    "llama3_freeze_sft": {
        "stage": "sft",
        "method": "finetuning_type: freeze\nfreeze_trainable_layers: 2\nfreeze_trainable_modules: all",
        "dataset": "identity",
    },
    "llama3_full_sft": {
        "stage": "sft",
        "method": "finetuning_type: full\ndeepspeed: finetune/ds_config_zero3.json",
        "dataset": "identity",
    },
}


def deepspeed(stage: int) -> dict[str, Any]:
    """The DeepSpeed files that come with the scripts."""
    return {
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
        "bf16": {"enabled": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto"}},
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "none"}, "overlap_comm": True},
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 100,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    wide = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 2048}  # finetune.py's rank is 64
    return write_model(tmp_path_factory.mktemp("model"), **wide)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    for name in ("finetune", "data"):
        (tmp_path / name).mkdir()
    for stage in (2, 3):
        (tmp_path / "finetune" / f"ds_config_zero{stage}.json").write_text(json.dumps(deepspeed(stage)))
    (tmp_path / "chat.json").write_text(json.dumps(CONVERSATIONS))
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({name: entry for name, (_, entry) in DATA.items()}))
    for records, entry in DATA.values():
        (tmp_path / "data" / entry["file_name"]).write_text(json.dumps(records))
    return tmp_path


def invoke(runner: CliRunner, *words: str) -> str:
    result = runner.invoke(cli, list(words))
    ops.use(OPS)
    assert result.exit_code == 0, f"{result.output}{result.exception!r}"
    return result.output


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_launch_script_of_finetune_py(script: str, model: Path, folder: Path, runner: CliRunner) -> None:
    words = f"--model_name_or_path {model} --data_path chat.json --output_dir output_qwen {SCRIPTS[script]} {COMMON}"
    output = invoke(runner, "train", *words.split())
    assert "2 records, 2 samples" in output
    results = json.loads((folder / "output_qwen" / "all_results.json").read_text())
    assert results["steps"] == 1
    assert results["train_loss"] > 0
    saved = "adapter_model.safetensors" if "lora" in script else "model.safetensors"
    assert (folder / "output_qwen" / saved).is_file()


@pytest.mark.parametrize("name", FILES)
def test_a_training_file_of_llama_factory(name: str, model: Path, folder: Path, runner: CliRunner) -> None:
    (folder / f"{name}.yaml").write_text(TRAIN.format(model=model, name=name, **FILES[name]))
    output = invoke(runner, "train", f"{name}.yaml")
    assert "2 records" in output
    assert json.loads((folder / "saves" / name / "all_results.json").read_text())["steps"] == 1
    (folder / f"{name}.yaml").write_text(TRAIN.format(model=model, name="checked", **FILES[name]))
    assert "2 records" in invoke(runner, "train", f"{name}.yaml", "--check")


def test_the_other_files_of_the_tutorial(model: Path, folder: Path, runner: CliRunner) -> None:
    """Train an adapter, merge it, talk to both; the predict file is not trained from."""
    (folder / "sft.yaml").write_text(TRAIN.format(model=model, name="sft", **FILES["llama3_lora_sft"]))
    invoke(runner, "train", "sft.yaml")
    adapted = f"model_name_or_path: {model}\nadapter_name_or_path: saves/sft\ntemplate: qwen\ntrust_remote_code: true\n"
    (folder / "merge.yaml").write_text(
        f"{adapted}\n### export\nexport_dir: merged\nexport_size: 5\nexport_device: cpu\nexport_legacy_format: false\n"
    )
    assert "merged" in invoke(runner, "export", "merge.yaml")
    (folder / "chat.yaml").write_text(f"{adapted}finetuning_type: lora\ninfer_backend: huggingface\ndo_sample: false\n")
    words = ("hello", "--max-tokens", "5", "--weights", "float", "--dtype", "float32")
    answer = invoke(runner, "chat", "chat.yaml", *words)
    (folder / "merged.yaml").write_text("model_name_or_path: merged\ntemplate: qwen\ndo_sample: false\n")
    assert invoke(runner, "chat", "merged.yaml", *words) == answer
    (folder / "predict.yaml").write_text(
        f"{adapted}stage: sft\ndo_predict: true\nfinetuning_type: lora\neval_dataset: identity\ncutoff_len: 2048\n"
        "output_dir: saves/predict\npredict_with_generate: true\nper_device_eval_batch_size: 1\n"
    )
    result = runner.invoke(cli, ["train", "predict.yaml"])
    assert result.exit_code == 2
    assert "do_predict is true and do_train is not given" in result.stderr
    assert not (folder / "saves" / "predict").exists()
