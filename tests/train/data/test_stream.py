"""DataStream: every sample once for any number of ranks, exact resumption anywhere, mixtures, splits, streaming like stored."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenkit.text.chat import JinjaChat
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.train.batch import TrainBatch
from qwenkit.train.config import TrainConfig
from qwenkit.train.data import DataStream

from .conftest import Write

ConfigOf = Callable[..., TrainConfig]


@pytest.fixture
def stream(tokenizer: Tokenizer, chat: JinjaChat, config_of: ConfigOf) -> Callable[..., DataStream]:
    def make(*dataset: str, rank: int = 0, world_size: int = 1, split: Any = "train", **given: Any) -> DataStream:
        if given.get("streaming"):
            given.setdefault("max_steps", 1)
        return DataStream(config_of(*dataset, **given), tokenizer, chat, rank=rank, world_size=world_size, split=split)

    return make


def rows(count: int, mark: str = "q") -> list[dict[str, str]]:
    return [{"instruction": f"{mark}{i}", "output": "a" * (i * 7 % 40 + 1)} for i in range(count)]


def documents(batches: Iterator[TrainBatch] | list[TrainBatch]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(ids, labels) of every document in which something is learned."""
    found = []
    for batch in batches:
        assert sum(batch.lengths) == batch.num_tokens
        ids, labels = batch.ids.split(batch.lengths), batch.labels.split(batch.lengths)
        found += [
            (tuple(i.tolist()), tuple(each.tolist()))
            for i, each in zip(ids, labels, strict=True)
            if (each != -100).any()
        ]
        assert all(int(each[0]) == -100 for each in labels)
    return found


def same(left: list[TrainBatch], right: list[TrainBatch]) -> bool:
    return [(b.ids.tolist(), b.labels.tolist(), b.lengths, b.origins, b.pairs) for b in left] == [
        (b.ids.tolist(), b.labels.tolist(), b.lengths, b.origins, b.pairs) for b in right
    ]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_every_sample(
    write: Write, stream: Callable[..., DataStream], packing: bool, streaming: bool, world_size: int
) -> None:
    write("a.json", rows(23))
    given_settings = {"packing": packing, "streaming": streaming, "cutoff_len": 160, "per_device_train_batch_size": 2}
    (reference,) = [documents(iter(stream("a.json", cutoff_len=160)))]
    parts = [list(stream("a.json", rank=r, world_size=world_size, **given_settings)) for r in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    assert Counter(d for part in parts for d in documents(part)) == Counter(reference)
    assert len(reference) == 23
    if packing:
        assert all(batch.num_tokens <= 320 for part in parts for batch in part)


@pytest.mark.parametrize("kind", ["plain", "packing", "pt", "dpo", "interleave"])
@pytest.mark.parametrize("streaming", [False, True])
def test_resuming_anywhere_is_exact(
    write: Write, stream: Callable[..., DataStream], kind: str, streaming: bool
) -> None:
    """At each batch of two epochs: the state as JSON, a new stream, and what follows is the same bit for bit."""
    write("a.jsonl", rows(17))
    write("b.json", rows(9, "other"))
    write("t.txt", "\n".join("word " * (i % 9 + 1) for i in range(14)))
    write("p.csv", "instruction,chosen,rejected\n" + "".join(f"q{i},{'y' * i}!,{'n' * i}?\n" for i in range(11)))
    names, extra = {
        "plain": (["a.jsonl", "b.json"], {"per_device_train_batch_size": 3}),
        "packing": (["a.jsonl", "b.json"], {"packing": True, "cutoff_len": 160}),
        "pt": (["t.txt"], {"stage": "pt", "cutoff_len": 50}),
        "dpo": (["p.csv"], {"stage": "dpo"}),
        "interleave": (
            ["a.jsonl", "b.json"],
            {"mix_strategy": "interleave_over", "mix_weights": (3.0, 1.0), "packing": True},
        ),
    }[kind]
    given_settings = {"streaming": streaming, "buffer_size": 5, **extra}
    whole = stream(*names, **given_settings)
    batches, states = [], [json.dumps(whole.state_dict())]
    for _ in range(2):
        for batch in whole:
            batches.append(batch)
            states.append(json.dumps(whole.state_dict()))
    assert whole.epoch == 2
    for done in range(len(batches)):
        resumed = stream(*names, **given_settings)
        resumed.load_state_dict(json.loads(states[done]))
        assert json.dumps(resumed.state_dict()) == states[done]
        rest: list[TrainBatch] = []
        while resumed.epoch < 2:
            rest += list(resumed)
        assert same(rest, batches[done:]), done


def test_another_number_of_ranks_goes_on_where_the_first_stopped(
    write: Write, stream: Callable[..., DataStream]
) -> None:
    write("a.json", rows(20))
    one = stream("a.json")
    first = [batch for _, batch in zip(range(6), one, strict=False)]
    state = one.state_dict()
    rest = []
    for rank in range(3):
        part = stream("a.json", rank=rank, world_size=3)
        part.load_state_dict(state)
        rest += list(part)
    assert Counter(documents(first + rest)) == Counter(documents(iter(stream("a.json"))))


@given(data=st.data())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_streaming_gives_what_reading_first_gives(
    data: st.DataObject, write: Write, stream: Callable[..., DataStream]
) -> None:
    count, buffer = data.draw(st.integers(1, 25)), data.draw(st.integers(1, 30))
    packing, stage = data.draw(st.booleans()), data.draw(st.sampled_from(["sft", "pt"]))
    write("a.jsonl", rows(count) if stage == "sft" else [{"text": row["output"]} for row in rows(count)])
    given_settings = {"packing": packing, "stage": stage, "cutoff_len": 170}
    streamed = list(stream("a.jsonl", streaming=True, buffer_size=buffer, **given_settings))
    stored = list(stream("a.jsonl", **given_settings))
    if stage == "pt" and packing:  # texts are cut where they happen to come, so only their tokens are the same
        assert Counter(t for b in streamed for t in b.ids.tolist()) == Counter(
            t for b in stored for t in b.ids.tolist()
        )
    else:
        assert Counter(documents(streamed)) == Counter(documents(stored))


def test_epochs_differ_and_seeds_differ(write: Write, stream: Callable[..., DataStream]) -> None:
    write("a.json", rows(20))
    for streaming in (False, True):
        one, other = stream("a.json", streaming=streaming), stream("a.json", streaming=streaming, seed=7)
        epochs = [documents(iter(one)), documents(iter(one)), documents(iter(other))]
        assert epochs[0] != epochs[1] != epochs[2]
        assert Counter(epochs[0]) == Counter(epochs[1]) == Counter(epochs[2])
        in_order = stream("a.json", streaming=streaming, shuffle=False)
        assert [batch.origins for batch in in_order] == [["a.json:1"]] * 20  # json.dumps wrote one line


def test_validation_split(write: Write, stream: Callable[..., DataStream]) -> None:
    write("a.jsonl", rows(30))
    for streaming, size in ((False, 5), (False, 0.2), (True, 5)):
        train = documents(iter(stream("a.jsonl", streaming=streaming, val_size=size)))
        held_out = documents(iter(stream("a.jsonl", streaming=streaming, val_size=size, split="eval")))
        assert len(held_out) == (5 if size == 5 else 6)
        assert not set(train) & set(held_out)
        assert len(train) + len(held_out) == 30
    with pytest.raises(ValueError, match="splits 30 of 30"):
        stream("a.jsonl", val_size=30)
    with pytest.raises(ValueError, match="no evaluation data"):
        stream("a.jsonl", split="eval")
    with pytest.raises(ValueError, match=r"val_size is 0\.2, streaming"):
        stream("a.jsonl", streaming=True, val_size=0.2)


def test_a_conversation_does_not_leak_into_the_other_split(
    write: Write, tokenizer: Tokenizer, thinking_chat: JinjaChat, config_of: ConfigOf
) -> None:
    turns = [
        {"instruction": f"q{i}", "output": "a", "history": [[f"q{i}", "<think>\nt\n</think>\n\nx"]]} for i in range(12)
    ]
    write("a.jsonl", turns)
    streams = [
        DataStream(config_of("a.jsonl", val_size=4), tokenizer, thinking_chat, split=s) for s in ("train", "eval")
    ]
    lines = [{origin for batch in each for origin in batch.origins} for each in streams]
    assert not lines[0] & lines[1]
    assert [len(each) for each in lines] == [8, 4]


def test_max_samples_and_num_samples(write: Write, stream: Callable[..., DataStream]) -> None:
    write("a.jsonl", rows(30))
    write("dataset_info.json", {"many": {"file_name": "a.jsonl", "num_samples": 45}})
    for streaming in (False, True):
        few = {origin for batch in stream("a.jsonl", max_samples=4, streaming=streaming) for origin in batch.origins}
        assert few == {f"a.jsonl:{line}" for line in (1, 2, 3, 4)}
    counts = Counter(documents(iter(stream("many"))))
    assert (sum(counts.values()), len(counts), max(counts.values())) == (45, 30, 2)


@pytest.mark.parametrize("streaming", [False, True])
def test_mixing_by_weight(write: Write, stream: Callable[..., DataStream], streaming: bool) -> None:
    write("a.jsonl", rows(300))
    write("b.jsonl", rows(60, "b"))

    def files(**given_settings: Any) -> Counter[str]:
        batches = stream("a.jsonl", "b.jsonl", streaming=streaming, **given_settings)
        return Counter(origin.split(":")[0] for batch in batches for origin in batch.origins)

    assert files() == {"a.jsonl": 300, "b.jsonl": 60}
    under = files(mix_strategy="interleave_under", mix_weights=(1.0, 1.0))
    assert under["b.jsonl"] == 60
    assert 35 < under["a.jsonl"] < 100
    over = files(mix_strategy="interleave_over", mix_weights=(1.0, 1.0))
    assert over["a.jsonl"] == 300
    assert 230 < over["b.jsonl"] < 380
    with pytest.raises(ValueError, match="mix_weights need"):
        files(mix_weights=(1.0, 1.0))


def test_pairs_stay_together(write: Write, stream: Callable[..., DataStream]) -> None:
    pairs = [{"instruction": f"q{i}", "chosen": "y" * (i + 1), "rejected": "n"} for i in range(7)]
    write("p.jsonl", pairs)
    for world_size in (1, 3):
        parts = [list(stream("p.jsonl", stage="dpo", rank=r, world_size=world_size)) for r in range(world_size)]
        batches = [batch for part in parts for batch in part]
        places = [pair for batch in batches for pair in batch.pairs or []]
        assert len(places) == 7
        assert all((pair.chosen, pair.rejected) == (0, 1) for pair in places)
        assert sum(batch.pairs == [] for batch in batches) == (2 if world_size == 3 else 0)


def test_states_of_other_data_are_refused(write: Write, stream: Callable[..., DataStream]) -> None:
    write("a.jsonl", rows(5))
    write("b.jsonl", rows(6))
    for streaming in (False, True):
        state = stream("a.jsonl", streaming=streaming).state_dict()
        for other in (stream("b.jsonl", streaming=streaming), stream("a.jsonl", streaming=streaming, cutoff_len=99)):
            with pytest.raises(ValueError, match="has changed since"):
                other.load_state_dict(state)
        with pytest.raises(ValueError, match="another setting of streaming"):
            stream("a.jsonl", streaming=not streaming).load_state_dict(state)


def test_nothing_left(write: Write, stream: Callable[..., DataStream]) -> None:
    write("a.jsonl", rows(5))
    with pytest.raises(ValueError, match=r"hold nothing(.|\n)*over-long: 5 .drop"):
        stream("a.jsonl", cutoff_len=3)
    with pytest.raises(ValueError, match="hold nothing"):
        list(stream("a.jsonl", cutoff_len=3, streaming=True))
    with pytest.raises(ValueError, match="dataset is empty"):
        stream()
