"""Each format becomes the same conversation; what breaks the rules is named; the registry finds files and refuses the rest."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwenkit.train.data.fields import BadRecordError
from qwenkit.train.data.formats import Example, RecordReader, check_order
from qwenkit.train.data.registry import DataSource, find_sources

from .conftest import Write

TURNS = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
EXPECTED = tuple({"role": role, "content": content} for role, content in TURNS)


def read(record: dict[str, Any], stage: str = "sft", **settings: Any) -> Example:
    source = DataSource(
        "x", (), **{k: v for k, v in settings.items() if k in ("formatting", "columns", "tags", "ranking")}
    )
    reader = RecordReader(source, stage, system=settings.get("system"), variables=settings.get("variables", {}))
    return reader.read(record)


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]]},
        {"conversations": [{"from": ("human", "gpt")[i % 2], "value": t} for i, (_, t) in enumerate(TURNS)]},
        {"id": "1", "conversations": [{"from": role, "value": text} for role, text in TURNS]},
        {"messages": [{"role": role, "content": text} for role, text in TURNS]},
        {"messages": [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in TURNS]},
        {"type": "chatml", "messages": [{"role": role, "content": text} for role, text in TURNS]},
        {"messages": json.dumps([{"role": role, "content": text} for role, text in TURNS])},
    ],
)
def test_one_conversation_in_every_format(record: dict[str, Any]) -> None:
    assert read(record).messages == EXPECTED


def test_alpaca_joins_input_and_takes_system() -> None:
    example = read({"instruction": "do", "input": "this", "output": "ok", "system": "S"})
    assert [m["content"] for m in example.messages] == ["S", "do\nthis", "ok"]
    assert read({"instruction": "q", "output": "a"}, system="T").messages[0] == {"role": "system", "content": "T"}


def test_columns_and_tags_of_the_registry() -> None:
    columns = {"prompt": "question", "response": "reply"}
    example = read({"question": "q", "reply": "a", "input": "never"}, formatting="alpaca", columns=columns)
    assert [m["content"] for m in example.messages] == ["q", "a"]
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "bot"}
    record = {"talk": [{"who": "me", "says": "q"}, {"who": "bot", "says": "a"}]}
    example = read(record, formatting="sharegpt", columns={"messages": "talk"}, tags=tags)
    assert [m["role"] for m in example.messages] == ["user", "assistant"]


def test_tools() -> None:
    record = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": '[{"name": "f", "parameters": {}}]',
    }
    example = read(record)
    assert [m["role"] for m in example.messages] == ["user", "assistant", "tool", "assistant"]
    assert example.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert example.tools == ({"type": "function", "function": {"name": "f", "parameters": {}}},)


QUESTION, YES, NO = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "y"), ("assistant", "n")))


@pytest.mark.parametrize(
    "record",
    [
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "y"},
            "rejected": {"from": "gpt", "value": "n"},
        },
        {"instruction": "q", "input": "", "chosen": "y", "rejected": "n"},
        {"instruction": "q", "output": ["y", "n"]},
        {"messages": [QUESTION], "chosen": "y", "rejected": "n"},
        {"chosen": [QUESTION, YES], "rejected": [QUESTION, NO]},
    ],
)
def test_pairs(record: dict[str, Any]) -> None:
    example = read(record, "dpo")
    assert example.messages == ({"role": "user", "content": "q"},)
    assert example.chosen is not None
    assert example.rejected is not None
    assert (example.chosen["content"], example.rejected["content"]) == ("y", "n")


def test_liked_or_not() -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert [read({"messages": messages, "label": label}, "kto").liked for label in (True, 0, "false")] == [
        True,
        False,
        False,
    ]
    with pytest.raises(BadRecordError, match="label is missing"):
        read({"messages": messages}, "kto")


def test_plain_text_and_names_in_it() -> None:
    assert read({"text": "I am {{name}}."}, "pt", variables={"name": "Q"}).text == "I am Q."
    assert read({"raw": "x"}, "pt", columns={"prompt": "raw"}, formatting="alpaca").text == "x"
    reader = RecordReader(DataSource("x", ()), "sft", system=None, variables={})
    assert "{{name}}" in reader.read({"instruction": "hi", "output": "I am {{name}}"}).messages[1]["content"]
    assert reader.unfilled == {"name"}


def test_ready_ids() -> None:
    example = read({"input_ids": [5, 6, 0, 0], "target_ids": [-100, 6, -100, -100]})
    assert (example.ids, example.labels) == ([5, 6], [-100, 6])


@pytest.mark.parametrize(
    ("record", "stage", "kind", "message"),
    [
        ({"instruction": "q", "output": ""}, "sft", "empty answer", "output is empty"),
        ({"instruction": "q"}, "sft", "missing field", "output is missing"),
        ({"instruction": "", "output": "a"}, "sft", "empty prompt", "instruction"),
        ({"instruction": "q", "output": 5}, "sft", "wrong type", "output is 5"),
        (
            {"conversations": [{"from": "alien", "value": "q"}]},
            "sft",
            "bad role",
            r"conversations\[0\]\.from is 'alien'",
        ),
        ({"conversations": [{"from": "human"}]}, "sft", "missing field", r"conversations\[0\]\.value is missing"),
        ({"conversations": "x"}, "sft", "missing field", "a list of messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "sft", "unsupported field", "text parts"),
        ({"instruction": "q", "output": "a", "images": ["x.png"]}, "sft", "unsupported field", "images"),
        ({"question": "q"}, "sft", "missing field", "no known format"),
        ({"text": "x"}, "sft", "missing field", "plain text has no answers"),
        ({"text": "  "}, "pt", "empty text", "text is empty"),
        ({"instruction": "q", "output": "a"}, "pt", "missing field", "stage pt needs a text"),
        ({"instruction": "q", "chosen": "a"}, "dpo", "missing field", "rejected is missing"),
        ({"input_ids": [1, 2], "labels": [1]}, "sft", "wrong type", "labels has 1 entries"),
        ({"input_ids": [1, 2], "labels": [1, 3]}, "sft", "wrong type", "differs from input_ids"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "sft", "wrong type", "no valid JSON"),
    ],
)
def test_bad_records(record: dict[str, Any], stage: str, kind: str, message: str) -> None:
    with pytest.raises(BadRecordError, match=message) as caught:
        read(record, stage)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ("ua", None), ("suata", None), ("uattau", None),
        ("au", "at the beginning"), ("uua", "after 'user'"), ("usa", "after 'user'"), ("uaa", "after 'assistant'"),
        ("uta", "after 'user'"), ("u", "no answer"),
    ],
)  # fmt: skip
def test_who_may_speak_when(roles: str, message: str | None) -> None:
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    messages = tuple({"role": names[role], "content": "x"} for role in roles)
    if message is None:
        check_order(messages, answered=True)
    else:
        with pytest.raises(BadRecordError, match=message):
            check_order(messages, answered=True)


def test_registry(write: Write, tmp_path: Path) -> None:
    write("a.json", [])
    for name in ("train-0.jsonl", "train-1.jsonl", "test-0.jsonl"):
        (tmp_path / "folder" / "en").mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / "en" / name).write_text("")
    (tmp_path / "folder" / "en" / "README.md").write_text("")
    write(
        "dataset_info.json",
        {
            "a": {"file_name": "a.json", "num_samples": 3},
            "f": {"file_name": "folder", "subset": "en", "split": "train", "formatting": "sharegpt"},
            "hub": {"hf_hub_url": "someone/something"},
            "script": {"script_url": "x.py"},
            "typo": {"file_name": "a.json", "colums": {}},
            "gone": {"file_name": "gone.json"},
            "column": {"file_name": "a.json", "columns": {"promt": "x"}},
        },
    )
    found = find_sources(["a", "f", "a.json"], tmp_path)
    assert [[path.name for path in source.files] for source in found] == [
        ["a.json"],
        ["train-0.jsonl", "train-1.jsonl"],
        ["a.json"],
    ]
    assert found[0].num_samples == 3
    for name, message in (
        ("hub", "not a local file .hf_hub_url: someone/something."),
        ("script", "not a local file"),
        ("typo", "unknown key 'colums'; did you mean columns"),
        ("column", "did you mean prompt"),
        ("hubb", "did you mean hub"),
    ):
        with pytest.raises(ValueError, match=message):
            find_sources([name], tmp_path)
    with pytest.raises(FileNotFoundError, match=r"gone\.json does not exist"):
        find_sources(["gone"], tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": ', r"dataset_info\.json is not valid JSON"),
        (b'{"a": "\xff"}', r"dataset_info\.json is not valid JSON"),
        (b"[]", r"dataset_info\.json must hold a JSON object, found a list"),
        (b'\xef\xbb\xbf{"a": {}}', "a has no file_name"),  # Windows' editors put a byte order mark there
    ],
)
def test_a_registry_that_is_none(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "dataset_info.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        find_sources(["a"], tmp_path)


def test_the_demo_registry_is_understood(data_folder: Path) -> None:
    names = [
        "identity",
        "alpaca_zh_demo",
        "glaive_toolcall_en_demo",
        "dpo_en_demo",
        "kto_en_demo",
        "wiki_demo",
        "c4_demo",
    ]
    assert [source.name for source in find_sources(names, data_folder / "sft")] == names


@pytest.mark.parametrize(
    "record",
    [
        {"query": "c", "response": "d", "history": [["a", "b"]]},
        {"prompt": "c", "completion": "d", "history": [["a", "b"]]},
        {"conversation": [{"human": "a", "assistant": "b"}, {"human": "c", "assistant": "d"}]},
        {
            "prompt": [{"role": r, "content": c} for r, c in TURNS[:3]],
            "completion": [{"role": "assistant", "content": "d"}],
        },
        {"messages": [{"from": r, "content": c} for r, c in TURNS]},
        {"question": "c", "answer": "d", "history": [["a", "b"]]},
    ],
)
def test_shapes_of_other_trainers(record: dict[str, Any]) -> None:
    assert read(record).messages == EXPECTED


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "y", "rejected": "n"},
        {"query": "q", "response": "y", "rejected_response": "n"},
        {"messages": [QUESTION, YES], "rejected_response": "n"},
        {"messages": [QUESTION, YES], "rejected_messages": [NO]},
        {"prompt": [QUESTION], "chosen": [YES], "rejected": [NO]},
    ],
)
def test_pairs_of_other_trainers(record: dict[str, Any]) -> None:
    example = read(record, "dpo")
    assert example.messages == ({"role": "user", "content": "q"},)
    assert (example.chosen or {})["content"] == "y"
    assert (example.rejected or {})["content"] == "n"


def test_a_text_stays_a_text_and_an_empty_one_is_not_missing() -> None:
    example = read({"instruction": "q", "chosen": '{"role": "user"}', "rejected": ""}, "dpo")
    assert (example.chosen or {})["content"] == '{"role": "user"}'
    assert (example.rejected or {})["content"] == ""
    assert read({"instruction": "q", "output": "[1, 2]"}).messages[-1]["content"] == "[1, 2]"


@pytest.mark.parametrize(
    ("value", "thoughts", "said"),
    [
        ('{"name": "f", "arguments": {}}', None, ""),
        ('[{"name": "f", "arguments": {}}]', None, ""),
        ('<think>why</think>\n{"name": "f", "arguments": {}}', "why", ""),
        ('Wait.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', None, "Wait."),
        ('{"function": {"name": "f", "arguments": {}}}', None, ""),
    ],
)
def test_spellings_of_a_call(value: str, thoughts: str | None, said: str) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": value}]
    call = read({"conversations": turns}).messages[1]
    assert call["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    assert (call.get("reasoning_content"), call["content"]) == (thoughts, said)


@pytest.mark.parametrize("mark", [{"weight": 0}, {"loss": False}, {"train": False}, {"loss_scale": 0.0}])
def test_marks_of_answers_that_are_not_learned(mark: dict[str, Any]) -> None:
    record = {"messages": [QUESTION, YES | mark]}
    assert read(record).messages[1]["weight"] == 0
    with pytest.raises(BadRecordError, match="allowed are 0, 1, true and false"):
        read({"messages": [QUESTION, YES | {next(iter(mark)): "no"}]})


def test_keys_of_a_message_that_are_not_known_are_noted() -> None:
    reader = RecordReader(DataSource("x", ()), "sft", system=None, variables={})
    reader.read({"messages": [QUESTION | {"name": "Ann"}, YES | {"mood": "glad", "thinking": "hm", "refusal": None}]})
    assert reader.notes == [("unknown key of a message", "messages[1] has 'mood', which is not read")]


def test_nulls_of_tables_only() -> None:
    tool = {"name": "f", "parameters": {"properties": {"a": {"default": None}, "b": None}}}
    reader = RecordReader(DataSource("x", ()), "sft", system=None, variables={})
    record = {"messages": [QUESTION, YES], "tools": [tool]}
    in_json, in_table = reader.read(record).tools, reader.read(record, "parquet").tools
    assert in_json is not None
    assert in_json[0]["function"] == tool
    assert in_table is not None
    assert in_table[0]["function"] == {"name": "f", "parameters": {"properties": {"a": {}}}}


@pytest.mark.parametrize("tools", [" ", "null", "[]", "", [], None])
def test_no_tools(tools: Any) -> None:
    assert read({"messages": [QUESTION, YES], "tools": tools}).tools is None


def test_a_data_set_comes_with_qwenkit(tmp_path: Path, write: Write) -> None:
    (source,) = find_sources(["identity"], tmp_path)
    records = json.loads(source.files[0].read_text(encoding="utf-8"))
    assert len(records) >= 40
    assert all("{{name}}" in record["output"] or "{{author}}" in record["output"] for record in records)
    write("dataset_info.json", {"identity": {"file_name": "own.json"}})
    write("own.json", [])
    (own,) = find_sources(["identity"], tmp_path)
    assert own.files == (tmp_path / "own.json",)
