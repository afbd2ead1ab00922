"""Files and flags of the trainers that are replaced, as their documents give them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwenkit.compat.sources import read_flags
from qwenkit.compat.translate import Translation, is_foreign, translate
from qwenkit.train.config import TrainConfig
from qwenkit.train.settings_file import read_settings

# Document 001: every key of its training file, in its order, with its value.
FINETUNE_YAML = """
model_name_or_path: models/qwen2
### method
stage: sft
do_train: true
finetuning_type: lora
lora_target: all
### dataset
dataset_dir: data/
dataset: my_identity
template: qwen
cutoff_len: 1024
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
### output
output_dir: saves/qwen-7b
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
### train
per_device_train_batch_size: 4
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 70.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
fp16: true
ddp_timeout: 180000000
### eval
val_size: 0.1
per_device_eval_batch_size: 4
eval_strategy: steps
eval_steps: 500
"""

# finetune_lora_single_gpu.sh and, with the DeepSpeed file, its siblings.
FINETUNE_FLAGS = """
--model_name_or_path Qwen/Qwen-7B --data_path data/chat.json --bf16 True --output_dir output_qwen --num_train_epochs 5
--per_device_train_batch_size 2 --per_device_eval_batch_size 1 --gradient_accumulation_steps 8 --evaluation_strategy no
--save_strategy steps --save_steps 1000 --save_total_limit 10 --learning_rate 3e-4 --weight_decay 0.1 --adam_beta2 0.95
--warmup_ratio 0.01 --lr_scheduler_type cosine --logging_steps 1 --report_to none --model_max_length 512
--lazy_preprocess True --gradient_checkpointing --use_lora
"""


def as_config(translation: Translation) -> TrainConfig:
    return TrainConfig.from_settings(translation.settings)


def write_type(folder: Path, model_type: str) -> None:
    (folder / "models" / "qwen2").mkdir(parents=True)
    (folder / "models" / "qwen2" / "config.json").write_text(json.dumps({"model_type": model_type}))


def test_the_training_file_of_the_document(tmp_path: Path) -> None:
    write_type(tmp_path, "qwen2")
    path = tmp_path / "qwen_finetune.yaml"
    path.write_text(FINETUNE_YAML)
    translation = translate(read_settings(path), folder=tmp_path)
    config = as_config(translation)
    assert config.model == "models/qwen2"
    assert (config.stage, config.method, config.lora_target) == ("sft", "lora", ("all",))
    assert (config.lora_rank, config.alpha) == (8, 16)
    assert (config.dataset_dir, config.dataset, config.template) == ("data/", ("my_identity",), "qwen")
    assert (config.cutoff_len, config.max_samples, config.overwrite_cache) == (1024, 1000, True)
    assert (config.preprocessing_num_workers, config.output_dir) == (16, "saves/qwen-7b")
    assert (config.logging_steps, config.save_steps, config.plot_loss) == (10, 500, True)
    assert config.overwrite_output_dir
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (4, 8)
    assert (config.learning_rate, config.num_train_epochs) == (1e-4, 70)
    assert (config.lr_scheduler_type, config.warmup_ratio, config.ddp_timeout) == ("cosine", 0.1, 180000000)
    assert (config.val_size, config.per_device_eval_batch_size, config.eval_steps) == (0.1, 4, 500)
    assert config.dtype == "bfloat16"
    assert config.overlong == "truncate"
    assert [note.split(" ")[0] for note in translation.notes] == ["template", "as", "overlong=truncate", "fp16:"]
    assert "bfloat16 is used" in translation.notes[-1]
    assert "dtype=float16" in translation.notes[-1]


@pytest.mark.parametrize(("model_type", "dtype"), [("qwen2", "bfloat16"), ("qwen3", "bfloat16"), ("qwen", "float16")])
def test_fp16_by_type(tmp_path: Path, model_type: str, dtype: str) -> None:
    write_type(tmp_path, model_type)
    translation = translate({"model_name_or_path": "models/qwen2", "fp16": True}, folder=tmp_path)
    assert as_config(translation).dtype == dtype
    assert any("float16's range" in note for note in translation.notes) == (dtype == "bfloat16")


def test_the_flags_of_finetune_py() -> None:
    translation = translate(read_flags(FINETUNE_FLAGS.split()))
    config = as_config(translation)
    assert (config.model, config.dataset, config.dataset_dir) == ("Qwen/Qwen-7B", ("data/chat.json",), ".")
    assert (config.method, config.lora_rank, config.alpha, config.lora_dropout) == ("lora", 64, 16, 0.05)
    assert set(config.lora_target) == {"c_attn", "c_proj", "w1", "w2"}
    assert (config.labels, config.bad_samples) == ("qwen1", "drop")
    assert (config.dtype, config.cutoff_len, config.overlong) == ("bfloat16", 512, "truncate")
    assert (config.num_train_epochs, config.save_steps, config.save_total_limit) == (5, 1000, 10)
    assert (config.learning_rate, config.weight_decay, config.adam_beta2) == (3e-4, 0.1, 0.95)
    assert (config.warmup_ratio, config.lr_scheduler_type, config.logging_steps) == (0.01, "cosine", 1)
    assert config.gradient_checkpointing
    assert config.report_to == ()
    assert config.modules_to_save == ("embed_tokens", "lm_head")
    assert any(note.startswith("lazy_preprocess has no effect") for note in translation.notes)


def test_chat_models_keep_their_embedding_and_full_has_no_lora() -> None:
    flags = read_flags(FINETUNE_FLAGS.replace("Qwen-7B", "Qwen-7B-Chat").split())
    assert as_config(translate(flags)).modules_to_save == ()
    full = as_config(translate({key: value for key, value in flags.items() if key != "use_lora"}))
    assert (full.method, full.lora_rank) == ("full", TrainConfig().lora_rank)
    assert as_config(translate(flags | {"q_lora": "True"})).method == "qlora"
    names = as_config(translate(flags | {"lora_target_modules": ["c_attn", "w1"]})).lora_target
    assert names == ("c_attn", "w1")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": "ppo"}, "stage is 'ppo', but allowed are pt, sft, rm, dpo, kto and orpo"),
        ({"do_train": False}, "do_train is false, but `qwenkit train` only trains"),
        ({"quantization_bit": 8}, "quantization_bit is 8, allowed is 4"),
        ({"do_train": None, "do_predict": True}, "do_predict is true and do_train is not given.*`qwenkit generate`"),
        ({"do_eval": True}, "do_eval is true and do_train is not given.*`qwenkit eval`"),
        ({"optim": "lion_8bit"}, "optim is 'lion_8bit', allowed are adamw"),
        ({"fp16": True, "bf16": True}, "bf16 and fp16 are both true"),
        ({"bf16": "perhaps"}, "bf16 is 'perhaps', allowed is true or false"),
        ({"eval_strategy": "best"}, "eval_strategy is 'best', allowed are no, steps, epoch"),
        ({"save_strategy": "often"}, "save_strategy is 'often', allowed are no, steps, epoch, best"),
        ({"use_galore": True}, "use_galore is True, but GaLore is not supported"),
        ({"export_dir": "out"}, "`qwenkit export` takes this file"),
        ({"pref_loss": "kto_pair"}, "pref_loss is 'kto_pair', allowed are"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        translate({"model_name_or_path": "m"} | settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"use_galore": False}, {}),
        ({"quantization_bit": 4}, {"method": "qlora"}),
        ({"pure_bf16": True}, {"dtype": "bfloat16", "master_weights": "stochastic"}),
        ({"optim": "adamw_torch"}, {"optim": "adamw"}),
        ({"max_steps": -1}, {"max_steps": None}),
        ({"max_steps": 7}, {"max_steps": 7}),
        ({"report_to": "none"}, {"report_to": ()}),
        ({"report_to": ["tensorboard"]}, {"report_to": ("tensorboard",)}),
        ({"resume_from_checkpoint": True}, {"resume_from_checkpoint": "latest"}),
        ({"resume_from_checkpoint": False}, {"resume_from_checkpoint": None}),
        ({"save_strategy": "no"}, {"save_strategy": "no"}),
        ({"eval_strategy": False}, {"eval_steps": None}),  # YAML reads a bare no as false
        ({"pref_loss": "orpo", "stage": "dpo", "orpo_beta": 0.2}, {"stage": "orpo", "pref_beta": 0.2}),
        ({"neat_packing": True}, {"packing": True}),
        ({"packing": True}, {"packs": True, "batch_size": 8}),
        ({"stage": "pt"}, {"packs": True, "batch_size": 8}),
        ({"stage": "sft"}, {"packs": False, "batch_size": 8}),
        ({"additional_target": "embed_tokens,lm_head"}, {"modules_to_save": ("embed_tokens", "lm_head")}),
        ({"disable_gradient_checkpointing": True}, {"gradient_checkpointing": False}),
        ({"fsdp": "full_shard auto_wrap"}, {"parallel": "fsdp"}),
        ({"no_cuda": True}, {"device": "cpu"}),
        ({"lora_rank": 16}, {"lora_rank": 16, "alpha": 32}),
        ({"fp16": True, "dtype": "float16"}, {"dtype": "float16"}),
    ],
)
def test_what_other_keys_become(settings: dict[str, Any], expected: dict[str, Any]) -> None:
    config = as_config(translate({"model_name_or_path": "m"} | settings))
    assert {name: getattr(config, name) for name in expected} == expected


def test_own_settings_pass_untouched_and_unknown_keys_are_left_to_be_refused() -> None:
    settings = {"model": "m", "method": "full", "dtype": "float16"}
    assert not is_foreign(settings)
    assert translate(settings) == Translation(settings, [])
    with pytest.raises(ValueError, match="learning_rat is not a setting of train; did you mean learning_rate"):
        as_config(translate({"model_name_or_path": "m", "learning_rat": 1}))


def test_yaml_written_from_a_translation_says_the_same() -> None:
    config = as_config(translate(yaml.safe_load(FINETUNE_YAML)))
    assert TrainConfig.from_settings(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("default", "default"), (None, "default"), ("qwen2", "qwen"), ("qwen3", "chatml"), ("own.jinja", "own.jinja")],
)
def test_templates(theirs: str | None, ours: str) -> None:
    translation = translate({"model_name_or_path": "m", "template": theirs})
    assert as_config(translation).template == ours
    assert any("keeps its own" in note for note in translation.notes) is (theirs in ("qwen2", "qwen3"))
