"""The cache: used again when nothing changed, made anew when anything did, whole or not there; and what `check` reports."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwenkit.text.chat import JinjaChat
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.train.config import TrainConfig
from qwenkit.train.data import DataError, DataStream, Report, check
from qwenkit.train.data import cache as cache_module
from qwenkit.train.data.cache import open_store
from qwenkit.train.data.pipeline import Pipeline
from qwenkit.train.data.registry import find_sources
from tests.tiny_models import CHAT_TEMPLATE

from .conftest import Write

ConfigOf = Callable[..., TrainConfig]
ROWS = [{"instruction": f"q{i}", "output": "a" * (i + 1)} for i in range(6)]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stores that were made."""
    made: list[str] = []
    build = cache_module._build

    def counted(pipeline: Pipeline, folder: Path, key: str, workers: int) -> None:
        made.append(key)
        build(pipeline, folder, key, workers)

    monkeypatch.setattr(cache_module, "_build", counted)
    return made


def test_any_change_makes_another_store(
    write: Write, config_of: ConfigOf, tokenizer: Tokenizer, chat: JinjaChat, built: list[str]
) -> None:
    path = write("a.jsonl", ROWS)
    config = config_of("a.jsonl")

    def open_it(config: TrainConfig, format: JinjaChat = chat) -> int:
        (source,) = find_sources(config.dataset, Path(config.dataset_dir))
        return len(open_store(config, source, tokenizer, format))

    assert [open_it(config), open_it(config)] == [6, 6]
    assert len(built) == 1
    open_it(replace(config, seed=5, packing=True, per_device_train_batch_size=4))
    assert len(built) == 1
    for number, changed in enumerate(
        ({"cutoff_len": 40}, {"labels": "qwen1"}, {"system": "s"}, {"max_samples": 2}, {"mask_history": True}), start=2
    ):
        open_it(replace(config, **changed))
        assert len(built) == number
    open_it(config, JinjaChat(tokenizer, CHAT_TEMPLATE + " "))
    assert len(built) == 7
    before = path.stat()
    path.write_text(path.read_text().replace("q0", "r0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time, other bytes
    open_it(config)
    assert len(built) == 8
    open_it(replace(config, overwrite_cache=True))
    assert len(built) == 9
    assert len(set(built)) == 8


@pytest.mark.parametrize("workers", [3])
def test_any_number_of_processes_gives_the_same_store(
    write: Write,
    config_of: ConfigOf,
    tokenizer: Tokenizer,
    chat: JinjaChat,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qwenkit.train.data.workers.BYTES_PER_WORKER", 1)
    many = [{"instruction": f"q{i}", "output": "" if i % 50 == 3 else "a" * (i % 30 + 1)} for i in range(300)]
    write("a.jsonl", many)
    config = config_of("a.jsonl", bad_samples="drop")
    (source,) = find_sources(config.dataset, Path(config.dataset_dir))
    alone = open_store(config, source, tokenizer, chat)
    content = {path.name: path.read_bytes() for path in alone.folder.glob("*.bin")}
    again = replace(config, overwrite_cache=True, preprocessing_num_workers=workers)
    shared_out = open_store(again, source, tokenizer, chat)
    assert {path.name: path.read_bytes() for path in shared_out.folder.glob("*.bin")} == content
    assert shared_out.report == alone.report
    assert (len(alone), alone.report.counts[("a.jsonl", "empty answer", "drop")]) == (294, 6)
    with pytest.raises(DataError, match="6 records"):
        open_store(replace(again, bad_samples="error"), source, tokenizer, chat)
    (source.files[0].parent / "x.csv").write_bytes(b"\xff\xfe,a\n1,2\n")
    (broken,) = find_sources(["x.csv"], Path(config.dataset_dir))
    with pytest.raises(ValueError, match="no header that can be read"):
        open_store(again, broken, tokenizer, chat)


def test_a_store_that_is_made_again_is_replaced_only_by_a_whole_one(
    write: Write, config_of: ConfigOf, tokenizer: Tokenizer, chat: JinjaChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("a.jsonl", ROWS)
    config = config_of("a.jsonl")
    (source,) = find_sources(config.dataset, Path(config.dataset_dir))
    store = open_store(config, source, tokenizer, chat)
    replaced = os.replace

    def refuses(old: Path, new: Path) -> None:
        if Path(new) == store.folder and not Path(old).name.startswith("."):
            raise OSError("share away")
        replaced(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuses)
        with pytest.raises(OSError, match="share away"):
            open_store(replace(config, overwrite_cache=True), source, tokenizer, chat)
    assert len(open_store(config, source, tokenizer, chat)) == len(ROWS)


def test_the_default_cache(
    write: Write,
    config_of: ConfigOf,
    tokenizer: Tokenizer,
    chat: JinjaChat,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QWENKIT_CACHE", str(tmp_path / "root"))
    write("a.jsonl", ROWS)
    config = config_of("a.jsonl", cache_dir=None)
    (source,) = find_sources(config.dataset, Path(config.dataset_dir))
    assert open_store(config, source, tokenizer, chat).folder.parent == tmp_path / "root" / "tokenized"


def test_nothing_half_written_stays(
    write: Write, config_of: ConfigOf, tokenizer: Tokenizer, chat: JinjaChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("a.jsonl", ROWS)
    config = config_of("a.jsonl")
    (source,) = find_sources(config.dataset, Path(config.dataset_dir))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            open_store(config, source, tokenizer, chat)
    assert list(Path(str(config.cache_dir)).iterdir()) == []
    store = open_store(config, source, tokenizer, chat)
    os.truncate(store.folder / "ids.bin", 8)
    with pytest.raises(ValueError, match=r"ids\.bin has another size"):
        open_store(config, source, tokenizer, chat)


BAD = (
    '{"instruction": "q", "output": "a"}\n'
    '{"instruction": "q", "output": ""}\n'
    "{nonsense\n"
    '{"conversations": [{"from": "alien", "value": "x"}]}\n'
    f'{{"instruction": "{"q" * 50}", "output": "{"a" * 60}"}}\n'
    '{"instruction": "q"}\n'
)


def test_check_reports_file_and_line(write: Write, config_of: ConfigOf, tokenizer: Tokenizer, chat: JinjaChat) -> None:
    write("bad.jsonl", BAD)
    report = check(config_of("bad.jsonl", cutoff_len=100), tokenizer, chat)
    found = {(issue.line, issue.kind, issue.action) for issue in report.issues}
    assert found == {
        (2, "empty answer", "error"),
        (3, "not readable", "error"),
        (4, "bad role", "error"),
        (5, "over-long", "drop"),
        (6, "missing field", "error"),
    }
    assert report.num_errors == 4
    assert report.datasets["bad.jsonl"]["records"] == 6
    assert report.datasets["bad.jsonl"]["samples"] == 1
    text = str(report)
    assert "bad.jsonl:4: conversations[0].from is 'alien'" in text
    assert "over-long: 1 (drop)" in text
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


@pytest.mark.parametrize("streaming", [False, True])
def test_policies(write: Write, config_of: ConfigOf, tokenizer: Tokenizer, chat: JinjaChat, streaming: bool) -> None:
    write("bad.jsonl", BAD)
    given: dict[str, Any] = {"cutoff_len": 100, "streaming": streaming, "max_steps": 1, "buffer_size": 4}

    def batches(**settings: Any) -> tuple[list[str], Report]:
        stream = DataStream(config_of("bad.jsonl", **given, **settings), tokenizer, chat)
        return sorted(origin for batch in stream for origin in batch.origins), stream.report

    with pytest.raises(DataError, match=r"bad\.jsonl:2: empty answer") as caught:
        batches()
    assert caught.value.report.num_errors == (1 if streaming else 4)
    origins, report = batches(bad_samples="drop")
    assert origins == ["bad.jsonl:1"]
    assert report.counts[("bad.jsonl", "over-long", "drop")] == 1
    origins, report = batches(bad_samples="drop", overlong="truncate")
    assert origins == ["bad.jsonl:1", "bad.jsonl:5"]
    assert report.counts[("bad.jsonl", "over-long", "truncate")] == 1
    origins, report = batches(bad_samples="drop", overlong="split")
    assert origins == ["bad.jsonl:1", "bad.jsonl:5", "bad.jsonl:5"]
    with pytest.raises(DataError, match=r"bad\.jsonl:5: over-long: \d+ tokens, cutoff_len is 100"):
        batches(bad_samples="drop", overlong="error")


def test_the_demo_sets_are_clean(data_folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(data_folder / "tokenizer")
    template = json.loads((data_folder / "tokenizer" / "tokenizer_config.json").read_text("utf-8"))["chat_template"]
    chat = JinjaChat(tokenizer, template)
    for stage, names in {
        "sft": ("identity", "alpaca_zh_demo", "glaive_toolcall_en_demo"),
        "dpo": ("dpo_en_demo",),
        "kto": ("kto_en_demo",),
        "pt": ("c4_demo",),
    }.items():
        folder = str(data_folder / "sft")
        config = TrainConfig(stage=stage, dataset=names, dataset_dir=folder, max_samples=25, cutoff_len=8192)
        report = check(config, tokenizer, chat)
        assert report.num_errors == 0, str(report)
        assert all(sizes["records"] == 25 and sizes["targets"] for sizes in report.datasets.values())
