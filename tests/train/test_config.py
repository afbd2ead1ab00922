"""TrainConfig: from YAML, JSON and texts, with every error one sentence that names the field."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from qwenkit.text.chatml import NAMED
from qwenkit.train.config import CHOICES, TrainConfig
from qwenkit.train.settings_file import parse_assignments, read_settings
from qwenkit.weights.templated import OWN


def test_yaml_and_assignments_become_one_config(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: smollm2\nlearning_rate: 1e-4\ndataset: a, b\nlora_target: [q_proj, v_proj]\nval_size: 2\n")
    settings = read_settings(path) | parse_assignments(["max-steps=7", "packing=yes", "ema=none", "mix_weights=1,3"])
    config = TrainConfig.from_settings(settings)
    assert config.learning_rate == 1e-4  # YAML itself reads 1e-4 as a text
    assert config.dataset == ("a", "b")
    assert config.lora_target == ("q_proj", "v_proj")
    assert config.val_size == 2.0
    assert (config.max_steps, config.packing, config.ema, config.mix_weights) == (7, True, None, (1.0, 3.0))


def test_what_is_printed_is_read_back(tmp_path: Path) -> None:
    config = TrainConfig(
        model="m", dataset=("x",), sample_prompts=("Hi, you", "二"), variables=("name=A, B",), max_steps=3
    )
    path = tmp_path / "printed.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert TrainConfig.from_settings(read_settings(path)) == config


def test_every_field_says_what_it_is() -> None:
    assert all(field.metadata["help"] for field in fields(TrainConfig))
    assert all(getattr(TrainConfig(), name) in allowed for name, allowed in CHOICES.items())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lora_rnak": 8}, "lora_rnak is not a setting of train; did you mean lora_rank?"),
        ({"lora_rank": "eight"}, "lora_rank is 'eight', allowed is a whole number"),
        ({"lora_rank": 0}, "lora_rank is 0, allowed is a whole number, 1 or more"),
        ({"lora_rank": True}, "lora_rank is True, allowed is a whole number"),
        ({"learning_rate": -1}, "learning_rate is -1.0, allowed is a number, 0 or more"),
        ({"learning_rate": "nan"}, "learning_rate is nan, allowed is a number, 0 or more"),
        ({"learning_rate": "inf"}, "learning_rate is inf, allowed is a number, 0 or more"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0, allowed is a number, 0 to less than 1"),
        ({"warmup_ratio": 1.5}, "warmup_ratio is 1.5, allowed is a number, 0 to 1"),
        ({"stage": "ppo"}, "stage is 'ppo', allowed are pt, sft, dpo, kto, orpo, rm"),
        ({"shuffle": "maybe"}, "shuffle is 'maybe', allowed is true or false"),
        ({"report_to": "wandb,tensorbord"}, "report_to is 'tensorbord', allowed are tensorboard, wandb"),
        ({"seed": None}, "seed is None, allowed is a whole number"),
        ({"variables": ["name"]}, "variables holds 'name', allowed is name=text"),
        ({"dataset": "a", "mix_weights": "1,2"}, "mix_weights has 2 weights for 1 data sets"),
        ({"val_size": 0.1, "eval_dataset": "b"}, "val_size and eval_dataset are both given"),
        ({"streaming": True}, "streaming needs max_steps"),
    ],
)
def test_wrong_settings_are_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(sentence)) as caught:
        TrainConfig.from_settings(settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [1, 2", "is no YAML that can be read"),
        ("- a\n- b", "must hold lines"),
        ("model: a\nmodel: b", "the key model stands twice"),
        ("model: !!python/object/apply:os.system ['true']", "is no YAML that can be read"),
        ("[" * 100_000, "is no YAML that can be read"),
    ],
)
def test_files_that_are_no_settings(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_settings(path)


def test_words_that_are_no_assignment() -> None:
    with pytest.raises(ValueError, match="'lora' is neither a file nor key=value"):
        parse_assignments(["lora"])


def test_several_whole_texts_on_the_command_line_are_a_yaml_list() -> None:
    words = parse_assignments(['variables=[name=Kit, "author=A, B"]', "dataset=[x, y]"])
    config = TrainConfig.from_settings({"model": "m", **words})
    assert config.variables == ("name=Kit", "author=A, B")
    assert config.dataset == ("x", "y")
    with pytest.raises(ValueError, match="not a YAML list"):
        TrainConfig.from_settings({"model": "m", "variables": "[a: b: c]"})


@pytest.mark.parametrize(
    ("settings", "batch_size"),
    [
        ({}, 8),
        ({"packing": True}, 1),
        ({"stage": "pt"}, 1),
        ({"stage": "pt", "packing": False}, 8),
        ({"stage": "kto"}, 8),
        ({"packing": True, "per_device_train_batch_size": 4}, 4),
    ],
)
def test_a_micro_batch_is_eight_samples_or_one_pack_unless_said(settings: dict[str, Any], batch_size: int) -> None:
    assert TrainConfig.from_settings(settings).batch_size == batch_size


def test_the_help_of_template_names_what_is_allowed() -> None:
    (field,) = (field for field in fields(TrainConfig) if field.name == "template")
    for name in (OWN, *NAMED, ".jinja"):
        assert name in field.metadata["help"]
