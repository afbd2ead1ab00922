"""`qwenkit train` end to end on a tiny model: folders, resume, refusals, stages, one command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qwenkit.cli.main import cli
from qwenkit.cli.train import read_config
from qwenkit.text.chatml import NAMED
from qwenkit.weights.checkpoint import open_checkpoint
from tests.tiny_models import CHAT_TEMPLATE, IM_END, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), "qwen2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"instruction": f"say {word}", "output": word * 2} for word in ("ab", "cd", "ef", "gh", "ij", "kl")]
    (folder / "words.json").write_text(json.dumps(rows))
    pairs = [{"instruction": row["instruction"], "chosen": row["output"], "rejected": "no"} for row in rows]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    info = {
        "words": {"file_name": "words.json"},
        "pairs": {
            "file_name": "pairs.json",
            "ranking": True,
            "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
        },
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


@pytest.fixture
def settings(model: Path, data: Path, tmp_path: Path) -> list[str]:
    return [
        *(f"model={model}", "dataset=words", f"dataset_dir={data}", f"output_dir={tmp_path / 'out'}"),
        *(f"cache_dir={tmp_path / 'cache'}", "max_steps=4", "save_steps=2", "logging_steps=1", "learning_rate=0.01"),
    ]


def invoke(*words: str) -> Result:
    return CliRunner().invoke(cli, ["train", *words])


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]


def test_lora_leaves_an_adapter_checkpoints_log_results_and_plots(settings: list[str], tmp_path: Path) -> None:
    result = invoke(
        *settings, "val_size=2", "eval_steps=2", "plot_loss=true", "ema=0.5", "sample_prompts=who", "--max-steps", "6"
    )
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    for folder in (out, out / "ema", out / "checkpoint-6"):
        assert (folder / "adapter_config.json").is_file(), folder
    assert {"training_loss.png", "training_eval_loss.png", "all_results.json"} <= {path.name for path in out.iterdir()}
    losses = [line["loss"] for line in log(out) if "loss" in line]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert [line["current_steps"] for line in log(out) if "eval_loss" in line] == [2, 4, 6]
    assert any("answer" in line for line in log(out))
    assert json.loads((out / "all_results.json").read_text())["steps"] == 6


@pytest.mark.parametrize("method", ["full", "freeze", "qlora"])
def test_methods(settings: list[str], tmp_path: Path, method: str) -> None:
    result = invoke(*settings, f"method={method}", "gradient_checkpointing=true")
    assert result.exit_code == 0, result.output
    kept = "adapter_model.safetensors" if method == "qlora" else "model.safetensors"
    assert (tmp_path / "out" / kept).is_file()


@pytest.mark.parametrize("stage", ["pt", "dpo", "orpo", "rm"])
def test_stages(settings: list[str], tmp_path: Path, stage: str) -> None:
    dataset = [] if stage == "pt" else ["dataset=pairs"]
    words = [f"stage={stage}", *dataset]
    if stage == "pt":
        (tmp_path / "text.txt").write_text("To be, or not to be.\n" * 30)
        words += [f"dataset={tmp_path / 'text.txt'}", "cutoff_len=64"]
    result = invoke(*settings, *words, "per_device_train_batch_size=2")
    assert result.exit_code == 0, result.output
    assert len(log(tmp_path / "out")) == 4


def test_an_earlier_run_is_not_overwritten_unasked(settings: list[str], tmp_path: Path) -> None:
    assert invoke(*settings).exit_code == 0
    refused = invoke(*settings)
    assert refused.exit_code == 2
    assert "holds checkpoint-4 of an earlier run" in refused.output
    more = invoke(*settings, "max_steps=6", "resume_from_checkpoint=latest")
    assert more.exit_code == 0, more.output
    assert [line["current_steps"] for line in log(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]
    assert invoke(*settings, "overwrite_output_dir=true", "max_steps=1").exit_code == 0
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]


def test_what_a_finished_run_has_left_is_not_replaced_unasked(settings: list[str], tmp_path: Path) -> None:
    words = [word for word in settings if not word.startswith("save_steps")] + ["save_steps=null"]
    assert invoke(*words).exit_code == 0
    adapter = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    for more in ([], ["resume_from_checkpoint=latest"], ["--check"]):
        refused = invoke(*words, *more)
        assert refused.exit_code == 2, refused.output
        assert "holds all_results.json of an earlier run; overwrite_output_dir=true replaces it" in refused.output
    refused = invoke(*words, "resume_from_checkpoint=nowhere", "overwrite_output_dir=true")
    assert "resume_from_checkpoint is 'nowhere', which is no folder" in refused.output
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == adapter
    assert invoke(*words, "overwrite_output_dir=true", "max_steps=1").exit_code == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() != adapter


def test_a_refused_run_deletes_nothing(settings: list[str], tmp_path: Path) -> None:
    """overwrite_output_dir deletes when the new run begins, not before all that can be refused was."""
    assert invoke(*settings).exit_code == 0
    before = snapshot(tmp_path / "out")
    for bad in ("dataset=nothing", "model=nowhere/at/all/x", "export_size=large", "lora_target=none_such"):
        assert invoke(*settings, "overwrite_output_dir=true", bad).exit_code == 2
    assert snapshot(tmp_path / "out") == before


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(checkpoint: Path) -> None:
    file = next((checkpoint / "weights").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(data)


def test_latest_with_damaged_checkpoints(settings: list[str], tmp_path: Path) -> None:
    """One damaged: it is renamed and named, and the run goes on from the one before. All damaged: nothing is touched."""
    out = tmp_path / "out"
    assert invoke(*settings).exit_code == 0
    flip(out / "checkpoint-4")
    more = invoke(*settings, "max_steps=6", "resume_from_checkpoint=latest", "save_total_limit=1")
    assert more.exit_code == 0, more.output
    assert "checkpoint-4 is damaged and renamed to checkpoint-4.damaged" in more.output
    assert "checkpoint-2, step 2 of 6" in more.output
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-4.damaged", "checkpoint-6"}
    assert [line["current_steps"] for line in log(out)] == [1, 2, 3, 4, 5, 6]
    flip(out / "checkpoint-6")
    before = snapshot(out)
    for _ in range(2):
        refused = invoke(*settings, "max_steps=8", "resume_from_checkpoint=latest")
        assert refused.exit_code == 2
        assert "checkpoint-6 is not whole" in refused.output
        assert len(refused.output.strip().splitlines()) == 1
        assert snapshot(out) == before


def test_a_checkpoint_that_cannot_be_read_now(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert invoke(*settings).exit_code == 0
    before = snapshot(out)
    opened = Path.open

    def away(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.suffix == ".safetensors" and "checkpoint-" in str(path):
            raise OSError(116, "Stale file handle", str(path))
        return opened(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", away)
        refused = invoke(*settings, "max_steps=8", "resume_from_checkpoint=latest")
    assert refused.exit_code == 2
    assert "checkpoint-4 cannot be read (Stale file handle), which need not be damage" in refused.output
    assert snapshot(out) == before


def test_steps_of_another_size(settings: list[str], tmp_path: Path) -> None:
    """Where epochs say how long a run is, the records that were seen are counted; with max_steps, steps of whatever size."""
    words = [*(word for word in settings if "_steps=" not in word), "save_steps=1", "logging_steps=1"]
    first = ["per_device_train_batch_size=2", "gradient_accumulation_steps=1", "num_train_epochs=1"]
    assert invoke(*words, *first).exit_code == 0
    same = ["per_device_train_batch_size=1", "gradient_accumulation_steps=2", "resume_from_checkpoint=latest"]
    result = invoke(*words, *same, "num_train_epochs=2")
    assert result.exit_code == 0, result.output
    assert log(tmp_path / "out")[-1]["current_steps"] == 6
    assert "a step has" not in result.output
    refused = invoke(*words, *same, "num_train_epochs=1")
    assert refused.exit_code == 2
    assert "checkpoint-6 is at step 6, but the run has 3: nothing is left to train" in refused.output
    other = ["per_device_train_batch_size=1", "gradient_accumulation_steps=3", "resume_from_checkpoint=latest"]
    shutil.copytree(tmp_path / "out", tmp_path / "kept")
    result = invoke(*words, *other, "max_steps=7")
    assert result.exit_code == 0, result.output
    assert "a step has 3 samples now (per_device_train_batch_size * gradient_accumulation_steps" in result.output
    assert "had 2 before the checkpoint; max_steps, warm-up and save_steps count steps whatever" in result.output
    assert "checkpoint-6, step 6 of 7" in result.output
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "kept").rename(tmp_path / "out")
    result = invoke(*words, *other, "num_train_epochs=4")
    assert result.exit_code == 0, result.output
    assert "the 12 samples that were seen are 4 steps of this size" in result.output
    assert "checkpoint-6, step 4 of 8" in result.output
    assert [line["current_steps"] for line in log(tmp_path / "out")] == [*range(1, 9)]


def test_a_loss_that_is_not_finite_is_null_in_json(settings: list[str], tmp_path: Path) -> None:
    result = invoke(*settings, "learning_rate=1e38", "nan_policy=skip", "max_grad_norm=1e30", "method=full")
    assert result.exit_code == 0, result.output
    texts = [path.read_text() for name in ("*.json", "*.jsonl") for path in (tmp_path / "out").rglob(name)]
    assert len(texts) > 5
    assert all("NaN" not in text and "Infinity" not in text for text in texts)
    assert any("null" in text for text in texts)


def test_check_reads_everything_and_trains_nothing(settings: list[str], tmp_path: Path) -> None:
    good = invoke(*settings, "--check")
    assert good.exit_code == 0
    assert "words: 6 records" in good.output
    (tmp_path / "bad.json").write_text('[{"instruction": "a", "output": ""}]')
    bad = invoke(*settings, f"dataset={tmp_path / 'bad.json'}", "--check")
    assert bad.exit_code == 1
    assert "bad.json" in bad.output
    assert not (tmp_path / "out").exists()


def test_print_config(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\nlora_rank: 4\n")
    result = invoke(str(path), "lora_rank=5", "--lora-alpha", "7", "--print-config")
    assert result.exit_code == 0
    assert "model: m\n" in result.output
    assert "lora_rank: 5\n" in result.output
    assert "lora_alpha: 7.0\n" in result.output


def test_keys_of_other_trainers(tmp_path: Path) -> None:
    path = tmp_path / "llama_factory.yaml"
    path.write_text(
        "model_name_or_path: Qwen/Qwen2-0.5B\nstage: sft\ndo_train: true\nfinetuning_type: lora\nlora_target: all\n"
        "dataset: identity\ntemplate: qwen\noutput_dir: saves\n"
    )
    config, _ = read_config([str(path), "max_steps=3"])
    assert (config.model, config.method, config.max_steps) == ("Qwen/Qwen2-0.5B", "lora", 3)
    config, _ = read_config(
        ["--model_name_or_path", "Qwen/Qwen-7B", "--data_path", "d.json", "--use_lora", "--lora_r=4"]
    )
    assert (config.model, config.method, config.lora_rank) == ("Qwen/Qwen-7B", "lora", 4)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "model is missing"),
        (["model=m"], "dataset is missing"),
        (["model=m", "datset=x"], "datset is not a setting of train; did you mean dataset?"),
        (["--lora-rnak", "3"], "lora_rnak is not a setting of train; did you mean lora_rank?"),
        (["model=m", "dataset=d", "early_stopping_patience=1"], "early_stopping_patience needs evaluation data"),
        (["nowhere.yaml"], "no such file"),
    ],
)
def test_refusals_are_one_sentence(words: list[str], sentence: str) -> None:
    result = invoke(*words)
    assert result.exit_code == 2
    assert sentence in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_help_lists_every_setting() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    for name in ("--learning-rate", "--use-dora", "--nproc", "--check"):
        assert name in result.output


@pytest.mark.parametrize(
    ("template", "begin"),
    [("qwen", "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"), ("chatml", "")],
)
def test_a_base_model_learns_the_template_that_is_named(
    settings: list[str], tmp_path: Path, template: str, begin: str
) -> None:
    """A LLaMA-Factory file with `template: qwen` and a model without one: what is trained, saved and exported speaks it."""
    base = write_model(tmp_path / "base")
    (base / "tokenizer_config.json").write_text("{}")
    (base / "generation_config.json").write_text("{}")
    refused = invoke(*settings, f"model={base}")
    assert refused.exit_code == 2
    assert "template is missing: the model has none; allowed are qwen, chatml and .jinja files" in refused.output
    words = [f"model_name_or_path={base}", "finetuning_type=lora", f"template={template}", *settings[1:]]
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    exported = tmp_path / "exported"
    arguments = ["export", "--model", str(base), "--adapter", str(tmp_path / "out"), "--output", str(exported)]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    for folder in (base, exported):
        assert (open_checkpoint(folder).chat() is None) is (folder is base)
    checkpoint = open_checkpoint(exported)
    chat = checkpoint.chat()
    assert chat is not None
    rendered = checkpoint.tokenizer().decode(chat.render([{"role": "user", "content": "hi"}]).ids, skip_special=False)
    assert rendered == f"{begin}<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert checkpoint.eos_token_ids[0] == IM_END


def test_a_model_keeps_the_template_that_it_has(model: Path, settings: list[str], tmp_path: Path) -> None:
    assert invoke(*settings, "template=chatml").exit_code == 0
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"] == CHAT_TEMPLATE


def test_a_template_of_ones_own(settings: list[str], tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(NAMED["qwen"])
    assert invoke(*settings, f"template={own}", "method=full").exit_code == 0
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == own.read_text()
    assert open_checkpoint(tmp_path / "out").chat() is not None
    result = invoke(*settings, "template=none.jinja", "overwrite_output_dir=true")
    assert result.exit_code == 2
    assert "template: there is no file 'none.jinja'" in result.output


@pytest.mark.parametrize("wanted", [True, False])
def test_a_balance_loss_that_the_model_asks_for_is_said_to_be_left_out(
    settings: list[str], tmp_path: Path, wanted: bool
) -> None:
    write_model(tmp_path / "moe", "qwen3_moe", output_router_logits=wanted, router_aux_loss_coef=0.5)
    result = invoke(*settings, f"model={tmp_path / 'moe'}", "max_steps=1", "save_steps=1", "method=full")
    assert result.exit_code == 0, result.output
    assert ("router_aux_loss_coef" in result.output) is wanted
