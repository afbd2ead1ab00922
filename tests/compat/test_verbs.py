"""Files of chat, api and export of LLaMA-Factory as settings of our verbs."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from qwenkit.compat.mindformers import refuse_mindformers
from qwenkit.compat.verbs import Inference, is_settings_file, read_export, read_inference


def write(folder: Path, **keys: Any) -> Path:
    path = folder / "file.yaml"
    path.write_text(yaml.safe_dump(keys), encoding="utf-8")
    return path


def test_a_file_of_chat(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        model_name_or_path="m/${stage}",
        adapter_name_or_path="saves/poet",
        template="qwen3",
        finetuning_type="lora",
        stage="sft",
        infer_backend="vllm",
        infer_dtype="bfloat16",
        temperature=0.5,
        max_new_tokens="64",
        enable_thinking=False,
        default_system="Be brief.",
        per_device_train_batch_size=4,
        vllm_maxlen=4096,
        top_p=None,
    )
    found = read_inference(path)
    assert is_settings_file(str(path))
    assert (found.model, found.adapter, found.template, found.system) == ("m/sft", "saves/poet", "chatml", "Be brief.")
    assert found.engine == {"dtype": "bfloat16"}
    assert found.sampling == {"temperature": 0.5, "max_tokens": 64}
    assert found.variables == {"enable_thinking": False}
    assert [note.split(" ")[0] for note in found.notes] == ["infer_backend", "vllm_maxlen"]
    assert read_inference(write(tmp_path, model_name_or_path="m")) == Inference("m")
    assert read_inference(write(tmp_path, model_name_or_path="m", do_sample=False)).sampling == {"temperature": 0.0}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "has no model_name_or_path"),
        (
            {"model_name_or_path": "m", "templat": "x"},
            "templat is not a setting of chat or serve; did you mean template",
        ),
        ({"model_name_or_path": "m", "adapter_name_or_path": "a,b"}, "names 2 adapters, allowed is one"),
        ({"model_name_or_path": "m", "rope_scaling": "yarn"}, "rope_scaling is 'yarn', but the context is"),
        ({"model_name_or_path": "m", "temperature": "warm"}, "temperature is 'warm', allowed is a number"),
        ({"model_name_or_path": "${m}"}, r"\$\{m\} is no key"),
        ({"run_mode": "predict", "model": {"model_config": {}}}, "run_mode belongs to a configuration of MindFormers"),
    ],
)
def test_files_of_chat_that_are_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_inference(write(tmp_path, **keys))


def test_a_file_of_export_may_hold_keys_of_training(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        model_name_or_path="m",
        adapter_name_or_path="a,b",
        export_dir="out",
        export_size=2,
        stage="sft",
        learning_rate=1,
    )
    assert read_export(path, ("model",)) == {"model": "m", "adapter": ("a", "b"), "output": "out", "shard_size": 2}


@pytest.mark.parametrize(
    "settings", [{"run_mode": "finetune"}, {"load_checkpoint": "x"}, {"model": {"model_config": 1}}]
)
def test_mindformers_is_recognised(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="MindFormers, which is not read: recipes/"):
        refuse_mindformers(settings)
    refuse_mindformers({"model": "m", "eval_dataset": "x"})
