"""Every recipe is read by TrainConfig, fits the GPUs that it states, and says how it is run."""

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from qwenkit.cli.main import cli
from qwenkit.cli.plan import find_sizes
from qwenkit.settings import parse_size
from qwenkit.train.config import TrainConfig
from qwenkit.train.plan import plan_memory
from qwenkit.train.settings_file import read_settings
from tests.conftest import ROOT

RECIPES = sorted(path for path in (ROOT / "src" / "qwenkit" / "recipes").glob("*.yaml") if path.name != "sizes.yaml")
SIZES_OF_DOCUMENT_003 = ("0.5b", "1.8b", "4b", "7b", "14b", "32b", "72b")


def stated(path: Path) -> dict[str, str]:
    """The `# key: value` lines at the head of a recipe."""
    return dict(re.findall(r"^# (\w+): (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE))


def test_there_is_one_for_each_size() -> None:
    names = {path.stem for path in RECIPES}
    for size in SIZES_OF_DOCUMENT_003:
        assert {f"qwen1.5-{size}-pretrain", f"qwen1.5-{size}-finetune"} <= names
    for size in ("1.8b", "7b", "14b", "72b"):
        assert {f"qwen-{size}-lora", f"qwen-{size}-qlora"} <= names
    assert "qwen-7b-lora-multinode" in names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_fits_its_gpus(path: Path) -> None:
    head, settings = stated(path), read_settings(path)
    config = TrainConfig.from_settings(settings)
    plan = plan_memory(find_sizes(config.model, path.parent), config, gpus=int(head["gpus"]))
    assert plan.total <= parse_size("gpu_memory", head["gpu_memory"])
    if "72b" in path.stem:
        assert head["layout"] == f"dp_shard {plan.shard}, tensor_parallel {plan.tensor}"
    words = shlex.split(head["run"])
    assert words[:3] == ["qwenkit", "train", f"recipes/{path.name}"]
    flags = dict(zip(words[3::2], words[4::2], strict=True))
    assert int(flags.get("--nproc", 1)) * int(flags.get("--nnodes", 1)) == int(head["gpus"])


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen1.5-0.5B", 0.46),
        ("Qwen1.5-7B", 7.72),
        ("Qwen1.5-32B", 32.51),
        ("Qwen1.5-72B", 72.29),
        ("Qwen-14B-Chat", 14.17),
    ],
)
def test_sizes_are_those_of_the_published_models(name: str, billions: float) -> None:
    sizes = find_sizes(f"Qwen/{name}", ROOT / "src" / "qwenkit" / "recipes")
    plan = plan_memory(sizes, TrainConfig(method="qlora", cutoff_len=64))
    assert plan.parameters - plan.trained == pytest.approx(billions * 1e9, rel=0.01)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen1.5-MoE-A2.7B-Chat", 14.32),
        ("Qwen2-57B-A14B-Instruct", 57.41),
        ("Qwen2.5-3B", 3.09),
        ("Qwen2.5-7B-Instruct", 7.62),
        ("Qwen2.5-14B", 14.77),
        ("Qwen2.5-32B-Instruct", 32.76),
        ("Qwen2.5-72B", 72.71),
        ("Qwen2.5-Coder-0.5B-Instruct", 0.49),
        ("Qwen3-0.6B-Base", 0.60),
        ("Qwen3-8B", 8.19),
        ("Qwen3-32B", 32.76),
        ("Qwen3-30B-A3B-Instruct-2507", 30.53),
        ("Qwen3-235B-A22B", 235.09),
        ("Qwen3-Coder-480B-A35B-Instruct", 480.15),
    ],
)
def test_later_sizes_are_those_of_the_published_models(name: str, billions: float) -> None:
    """Counted from the configuration: to plan the largest ones takes a minute."""
    sizes = find_sizes(name)
    hidden, heads, kv = sizes.hidden_size, sizes.num_attention_heads, sizes.num_key_value_heads
    attention = hidden * sizes.head_dim * 2 * (heads + kv)
    mlp = 3 * hidden * sizes.intermediate_size
    if sizes.moe is not None:
        shared = sizes.moe.shared_expert_intermediate_size or 0
        mlp = 3 * hidden * (sizes.moe.num_experts * sizes.moe.intermediate_size + shared)
        mlp += hidden * sizes.moe.num_experts
    embeddings = sizes.vocab_size * hidden * (1 if sizes.tie_word_embeddings else 2)
    assert sizes.num_hidden_layers * (attention + mlp) + embeddings == pytest.approx(billions * 1e9, rel=0.01)


def test_recipes_and_sizes_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "Qwen/Qwen2.5-7B" in run("Qwen/Qwen2.5-7B", "method=lora", "cutoff_len=64")
    assert "72" in run("recipes/qwen1.5-72b-finetune.yaml", "--gpus", "32")


def run(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli, ["plan", "train", *words])
    assert result.exit_code == code, result.output
    return result.output


def test_plan_prints_a_table_and_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = ("Qwen/Qwen1.5-0.5B", "method=lora", "cutoff_len=512", "loss_chunk=4096", "--gpu-memory", "3GiB")
    words += ("per_device_train_batch_size=1",)
    table = run(*words)
    assert "Qwen/Qwen1.5-0.5B: 0.47 B parameters, 3.8 M trained, lora" in table
    assert re.search(r"^weights +0\.88 GiB$", table, flags=re.MULTILINE)
    assert "fits into 3.0 GiB; largest per_device_train_batch_size: " in table
    record = json.loads(run(*words, "--json"))
    assert record["largest_batch"] >= 1
    assert record["total"] <= record["gpu_memory"] == 3 * 2**30
    refused = run("Qwen/Qwen1.5-0.5B", "method=full", "cutoff_len=512", "--gpu-memory", "2GiB", code=1)
    assert "does not fit into 2.0 GiB; largest per_device_train_batch_size: not even 1" in refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("Qwen/Qwen1.5-7X",), "did you mean Qwen/Qwen1.5-7B?"),
        (("Qwen/Qwen1.5-7B", "methd=lora"), "methd is not a setting of train; did you mean method?"),
        (("Qwen/Qwen1.5-7B", "--gpu-memory", "much"), "gpu-memory is 'much', allowed is a size such as 80GiB"),
        (("Qwen/Qwen1.5-7B", "--gpus", "-1"), "gpus is -1"),
        (("recipes/none.yaml",), "no such file"),
    ],
)
def test_plan_refuses_in_one_sentence(words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert message in run(*words, code=2)
