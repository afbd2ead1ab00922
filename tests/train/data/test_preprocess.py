"""The preparation tools: WikiText cleaned and cut, alpaca turned into messages, MindRecord that training reads."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qwenkit.text.chat import JinjaChat
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.train.config import TrainConfig
from qwenkit.train.data import DataStream
from qwenkit.train.data.mindrecord import MindRecordReader
from qwenkit.train.data.preprocess import (
    clean_wikitext,
    convert_alpaca,
    messages_to_mindrecord,
    wiki_chunks,
    wiki_to_mindrecord,
)

from .conftest import Write

WIKI = (
    ' \n = Title = \n \n One @,@ 000 ( about ) half @-@ way , he said " hi " . \n Second \'s line ; N of 3 @.@ 5 ° C . \n \n'
    " = = Part = = \n \n Third [ x ] { y } : end ! \n"
)


def test_cleaning() -> None:
    cleaned = clean_wikitext(WIKI)
    assert 'One,000 (about) half-way, he said "hi".' in cleaned
    assert "Second's line; 1 of 3.5°C." in cleaned
    assert "== Part ==" in cleaned
    assert "[x] {y}" in cleaned


def test_wiki_chunks_skip_headings_and_drop_the_tail(write: Write, tokenizer: Tokenizer) -> None:
    path = write("wiki.train.tokens", WIKI)
    kept = [p for p in clean_wikitext(WIKI).split("\n\n") if p and not p.strip().startswith("=")]
    ids = [id for paragraph in kept for id in tokenizer.encode(paragraph)]
    chunks = list(wiki_chunks(path, tokenizer, seq_length=15))
    assert chunks == [ids[start : start + 16] for start in range(0, len(ids) - 15, 16)]
    assert len(list(wiki_chunks(path, tokenizer, seq_length=15, repeat=3))) == len(ids) * 3 // 16


def test_wiki_to_mindrecord_and_into_training(
    write: Write, tmp_path: Path, tokenizer: Tokenizer, config_of: Callable[..., TrainConfig]
) -> None:
    path = write("wiki.train.tokens", WIKI)
    count = wiki_to_mindrecord(path, tmp_path / "wiki.mindrecord", tokenizer, seq_length=15)
    with MindRecordReader(tmp_path / "wiki.mindrecord") as reader:
        rows = [row["input_ids"].tolist() for row in reader.rows()]
    assert rows == list(wiki_chunks(path, tokenizer, seq_length=15))
    assert count == len(rows)
    config = config_of("wiki.mindrecord", stage="pt", packing=False, shuffle=False, cutoff_len=16)
    assert [batch.ids.tolist() for batch in DataStream(config, tokenizer, None)] == rows


def test_the_wiki_format_trains_on_the_file_itself(
    write: Write, tokenizer: Tokenizer, config_of: Callable[..., TrainConfig]
) -> None:
    write("wiki.train.tokens", WIKI)
    write("dataset_info.json", {"wiki": {"file_name": "wiki.train.tokens", "formatting": "wiki"}})
    config = config_of("wiki", stage="pt", packing=False, shuffle=False)
    texts = [tokenizer.decode(batch.ids.tolist()) for batch in DataStream(config, tokenizer, None)]
    assert [text.split()[0] for text in texts] == ["One,000", "Third"]


def test_alpaca_to_messages_to_mindrecord(
    write: Write, tmp_path: Path, tokenizer: Tokenizer, chat: JinjaChat, config_of: Callable[..., TrainConfig]
) -> None:
    rows = [{"instruction": "Add.", "input": "1+1", "output": "2"}, {"instruction": "Hi.", "input": "", "output": "Yo"}]
    source = write("alpaca_data.json", rows)
    target = tmp_path / "alpaca-data-messages.json"
    assert convert_alpaca(source, target) == 2
    lines = [json.loads(line) for line in target.read_text("utf-8").splitlines()]
    assert [line["type"] for line in lines] == ["chatml", "chatml"]
    assert [message["content"] for message in lines[0]["messages"]] == ["You are a helpful assistant.", "Add: 1+1", "2"]
    assert lines[1]["messages"][1]["content"] == "Hi."

    assert messages_to_mindrecord(target, tmp_path / "qa.mindrecord", tokenizer, seq_length=120, num_partitions=2) == 2
    with MindRecordReader(tmp_path / "qa.mindrecord0") as reader:
        (row,) = reader.rows()
    assert len(row["input_ids"]) == 121
    learned = row["target_ids"] != -100
    assert (learned == row["attention_mask"].astype(bool)).all()
    text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nAdd: 1+1<|im_end|>\n"
    text += "<|im_start|>assistant\n2<|im_end|>\n"
    assert tokenizer.decode(row["input_ids"][learned].tolist(), skip_special=False) == text

    config = config_of("qa.mindrecord0", shuffle=False, labels="mindformers")
    from_record = list(DataStream(config, tokenizer, chat))
    from_messages = list(DataStream(config_of(target.name, shuffle=False, labels="mindformers"), tokenizer, chat))
    assert [b.ids.tolist() for b in from_record] == [b.ids.tolist() for b in from_messages]
    assert [b.labels.tolist() for b in from_record] == [b.labels.tolist() for b in from_messages]


def test_bad_entries_are_named(write: Write, tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write("a.jsonl", '{"instruction": "q", "output": "a"}\n{"instruction": "q"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: the field output is missing"):
        convert_alpaca(source, tmp_path / "out.json")
    assert not list(tmp_path.glob("out*"))
    source = write("m.jsonl", '{"messages": [{"role": "alien", "content": "x"}]}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl:1: messages\[0\]\.role"):
        messages_to_mindrecord(source, tmp_path / "m.mindrecord", tokenizer, seq_length=8)
