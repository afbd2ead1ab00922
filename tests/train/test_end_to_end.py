"""From data to a model that has learned it, through the command line alone: preferences, and QLoRA over a GPTQ folder."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file

from qwenkit import LLM, SamplingParams
from qwenkit.cli.main import cli
from qwenkit.model.context import pack
from qwenkit.weights.checkpoint import open_checkpoint
from qwenkit.weights.load import load_model
from tests.tiny_models import write_model

PROMPTS = ("say ab", "say cd", "say ef", "say gh")
GOOD, BAD = "yes", "no"


def invoke(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli, list(words))
    assert result.exit_code == code, result.output
    return result.output


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A tiny model, its data sets, and a short run."""
    model = write_model(tmp_path / "model", "qwen2", hidden_size=64, intermediate_size=128)
    data = {
        "pairs": [{"instruction": prompt, "chosen": GOOD, "rejected": BAD} for prompt in PROMPTS],
        "thumbs": [
            {"instruction": prompt, "output": answer, "kto_tag": answer == GOOD}
            for prompt in PROMPTS
            for answer in (GOOD, BAD)
        ],
        "answers": [{"instruction": prompt, "output": GOOD} for prompt in PROMPTS],
    }
    info: dict[str, Any] = {name: {"file_name": f"{name}.json"} for name in data}
    info["pairs"] |= {"ranking": True, "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}}
    info["thumbs"]["columns"] = {"prompt": "instruction", "response": "output", "kto_tag": "kto_tag"}
    for name, content in (data | {"dataset_info": info}).items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return [
        *("train", f"model={model}", f"dataset_dir={tmp_path}", f"output_dir={tmp_path / 'out'}", "save_steps=none"),
        *(f"cache_dir={tmp_path / 'cache'}", "max_steps=12", "logging_steps=1", "learning_rate=0.005"),
    ]


@torch.no_grad()
def preference(folder: Path) -> float:
    """Mean log p of the first token of the good answer less that of the bad one."""
    checkpoint = open_checkpoint(folder)
    model, tokenizer, chat = load_model(folder, dtype=torch.float32), checkpoint.tokenizer(), checkpoint.chat()
    assert chat is not None
    good, bad = (tokenizer.encode(answer)[0] for answer in (GOOD, BAD))
    found = []
    for prompt in PROMPTS:
        ids = chat.render([{"role": "user", "content": prompt}]).ids
        logits = model.logits(model(*pack([list(ids)], model.config)))[-1]
        found.append(float(logits[good] - logits[bad]))
    return sum(found) / len(found)


@pytest.mark.parametrize(
    ("stage", "method"), [("dpo", "lora"), ("dpo", "full"), ("dpo", "qlora"), ("orpo", "lora"), ("kto", "lora")]
)
def test_preferences_are_learned(words: list[str], tmp_path: Path, stage: str, method: str) -> None:
    invoke(*words, f"stage={stage}", f"method={method}", f"dataset={'thumbs' if stage == 'kto' else 'pairs'}")
    records = log(tmp_path / "out")
    assert len(records) == 12
    assert records[-1]["loss"] < records[0]["loss"]
    if stage == "kto":
        assert records[-1]["reward_liked"] > records[-1]["reward_disliked"]
    else:
        assert records[-1]["accuracy"] == 1.0
    exported = tmp_path / "out"
    if method != "full":
        exported = tmp_path / "exported"
        adapter = ("--adapter", str(tmp_path / "out"), "--output", str(exported))
        invoke("export", "--model", str(tmp_path / "model"), *adapter)
    assert preference(exported) > preference(tmp_path / "model") + 0.5


@pytest.mark.filterwarnings("ignore")  # transformers' own, while it loads
def test_a_reward_model_is_learned(words: list[str], tmp_path: Path) -> None:
    invoke(*words, "stage=rm", "method=full", "dataset=pairs")
    records = log(tmp_path / "out")
    assert records[-1]["accuracy"] == 1.0
    judge = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
    checkpoint = open_checkpoint(tmp_path / "model")
    chat = checkpoint.chat()
    assert chat is not None
    for prompt in PROMPTS:
        scores = []
        for answer in (GOOD, BAD):
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            ids = chat.render(messages, add_generation_prompt=False).ids
            with torch.no_grad():
                scores.append(float(judge(torch.tensor([list(ids)])).logits))
        assert scores[0] > scores[1]


@pytest.mark.parametrize(("stage", "dataset"), [("dpo", "dpo_en_demo"), ("rm", "dpo_en_demo"), ("kto", "kto_en_demo")])
def test_the_demo_data_of_preferences(
    words: list[str], data_folder: Path, tmp_path: Path, stage: str, dataset: str
) -> None:
    settings = ("max_samples=12", "max_steps=2", "cutoff_len=250", "overlong=truncate")
    invoke(*words, f"stage={stage}", f"dataset={dataset}", f"dataset_dir={data_folder / 'sft'}", *settings)
    records = log(tmp_path / "out")
    assert [record["current_steps"] for record in records] == [1, 2]
    assert all(record["loss"] > 0 for record in records)


def test_qlora_over_a_gptq_folder(words: list[str], tmp_path: Path) -> None:
    """Quantize, train an adapter over what came out, load it again and train on."""
    packed = tmp_path / "int4"
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 60)
    quantize = ("--bits", "4", "--group-size", "32", "--samples", "4", "--length", "64", "--device", "cpu")
    invoke(
        "quantize", str(tmp_path / "model"), "--output", str(packed), "--data", str(tmp_path / "text.txt"), *quantize
    )
    over = [f"model={packed}", "method=qlora", "dataset=answers"]
    invoke(*words, *over)
    first = [record["loss"] for record in log(tmp_path / "out")]
    assert first[-1] < 0.5 * first[0]
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(packed)
    again = tmp_path / "again"
    invoke(*words, *over, f"adapter={tmp_path / 'out'}", f"output_dir={again}", "learning_rate=0", "max_steps=1")
    (record,) = log(again)
    assert record["loss"] < first[-1] * 1.05
    name = "adapter_model.safetensors"
    assert (again / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    llm = LLM(packed, device="cpu", kv_memory="16MiB", max_model_len=64, lora={"taught": again})
    greedy = SamplingParams(temperature=0, max_tokens=4)
    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    for adapter, taught in (("taught", True), (None, False)):
        for answer in llm.chat(conversations, greedy, adapter=adapter):
            assert answer.text.startswith(GOOD) is taught
    given = ("--adapter", str(again), "--output", str(tmp_path / "merged"))
    refusal = invoke("export", "--model", str(packed), *given, code=2)
    assert "would be rounded away" in refusal
    assert "merge it into the 16-bit model" in refusal


@pytest.mark.parametrize(("method", "parallel"), [("full", "fsdp"), ("lora", "ddp")])
def test_two_processes_train_as_one(words: list[str], tmp_path: Path, method: str, parallel: str) -> None:
    """The whole command under torchrun, on CPUs. The four samples are one step's batch, however they are dealt out."""
    settings = [f"method={method}", "dataset=answers", "device=cpu", "max_steps=4"]
    invoke(*words, *settings, "per_device_train_batch_size=4")
    both = tmp_path / "both"
    command = [*words, *settings, f"parallel={parallel}", f"output_dir={both}", "per_device_train_batch_size=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "qwenkit", *command, "--nproc", "2"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    alone = tmp_path / "out"
    records = log(both)
    assert [record["current_steps"] for record in records] == [1, 2, 3, 4]
    expected = [record["loss"] for record in log(alone)]
    assert [record["loss"] for record in records] == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < 0.9 * expected[0]
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    ours, theirs = load_file(both / name), load_file(alone / name)
    assert ours.keys() == theirs.keys()
    for key in ours:  # Adam's first steps have the size of the learning rate, 5e-3, whatever a gradient's
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=2e-4)
    exported = both
    if method == "lora":
        exported = tmp_path / "exported"
        invoke("export", "--model", str(tmp_path / "model"), "--adapter", str(both), "--output", str(exported))
    assert preference(exported) > preference(tmp_path / "model")
