"""Labels: the mask of the model's own chat format, as served; Qwen-1's and MindFormers' schemes exactly; samples too long."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenkit.text.chat import JinjaChat
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.train.batch import IGNORE, Pair, Sample
from qwenkit.train.config import TrainConfig
from qwenkit.train.data.fields import BadRecordError
from qwenkit.train.data.formats import Example
from qwenkit.train.data.render import Renderer, fit

CONFIG = TrainConfig()


def conversation(*texts: str) -> Example:
    roles = ("user", "assistant")
    return Example(tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(texts)))


def shown(tokenizer: Tokenizer, sample: Any) -> tuple[str, str]:
    """The whole text, and what of it is learned."""
    assert all(label in (IGNORE, id) for id, label in zip(sample.ids, sample.labels, strict=True))
    learned = [label for label in sample.labels if label != IGNORE]
    return tokenizer.decode(sample.ids, skip_special=False), tokenizer.decode(learned, skip_special=False)


def test_answers_and_their_ends_are_learned(tokenizer: Tokenizer, chat: JinjaChat) -> None:
    (sample,) = Renderer(CONFIG, tokenizer, chat).render(conversation("a", "b", "c", "<|im_end|>d"), "f:1").items
    text, learned = shown(tokenizer, sample)
    assert text.endswith("<|im_start|>assistant\n<|im_end|>d<|im_end|>")
    assert learned == "b<|im_end|><|im_end|>d<|im_end|>"
    mask = chat.render(conversation("a", "b", "c", "<|im_end|>d").messages, add_generation_prompt=False).mask
    assert isinstance(sample, Sample)
    assert [label != IGNORE for label in sample.labels] == (mask or [])[: len(sample.ids)]
    assert sample.origin == "f:1"


def test_stripped_thinking_gives_one_sample_an_answer(tokenizer: Tokenizer, thinking_chat: JinjaChat) -> None:
    example = conversation("q1", "<think>\nt1\n</think>\n\na1", "q2", "<think>\nt2\n</think>\n\na2")
    items = Renderer(CONFIG, tokenizer, thinking_chat).render(example, "").items
    user, assistant = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    first, second = "<think>\nt1\n</think>\n\na1<|im_end|>", "<think>\nt2\n</think>\n\na2<|im_end|>"
    assert [shown(tokenizer, sample) for sample in items] == [
        (f"{user}q1{assistant}{first}", first),
        (f"{user}q1{assistant}a1<|im_end|>\n{user}q2{assistant}{second}", second),
    ]


def test_the_empty_thinking_block_belongs_to_the_prompt(tokenizer: Tokenizer, thinking_chat: JinjaChat) -> None:
    renderer = Renderer(CONFIG, tokenizer, thinking_chat)
    (sample,) = renderer.render(conversation("q", "a"), "").items
    assert shown(tokenizer, sample)[1] == "a<|im_end|>"
    served = thinking_chat.render([{"role": "user", "content": "q"}], enable_thinking=False).ids
    assert isinstance(sample, Sample)
    assert sample.ids[: len(served)] == served
    mixed = renderer.render(conversation("q", "a", "r", "<think>\nt\n</think>\n\nb"), "").items
    assert [shown(tokenizer, each)[1] for each in mixed] == ["a<|im_end|>", "<think>\nt\n</think>\n\nb<|im_end|>"]


def test_a_prompt_that_opens_the_thinking_block(tokenizer: Tokenizer) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    renderer = Renderer(CONFIG, tokenizer, JinjaChat(tokenizer, template))
    (sample,) = renderer.render(conversation("q", "<think>\nt\n</think>\n\na"), "").items
    text, learned = shown(tokenizer, sample)
    assert text == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\nt\n</think>\n\na<|im_end|>"
    assert learned == "t\n</think>\n\na<|im_end|>"


def test_generation_blocks_and_formats_that_show_no_speaker(tokenizer: Tokenizer) -> None:
    for marks in (True, False):
        start, end = ("{% generation %}", "{% endgeneration %}") if marks else ("", "")
        template = (
            "{% for m in messages %}{% if m.role == 'user' %}Q:{{ m.content }}\nA:{% else %}"
            + start + "{{ m.content }}<|endoftext|>" + end + "{% endif %}{% endfor %}"
        )  # fmt: skip
        renderer = Renderer(CONFIG, tokenizer, JinjaChat(tokenizer, template))
        (sample,) = renderer.render(conversation("q", "a", "r", "b"), "").items
        assert shown(tokenizer, sample) == (
            "Q:q\nA:a<|endoftext|>Q:r\nA:b<|endoftext|>",
            "a<|endoftext|>b<|endoftext|>",
        )


def test_history_weights_and_prompts(tokenizer: Tokenizer, chat: JinjaChat) -> None:
    example = conversation("a", "b", "c", "d")
    masked = Renderer(replace(CONFIG, mask_history=True), tokenizer, chat).render(example, "").items
    assert [shown(tokenizer, sample)[1] for sample in masked] == ["d<|im_end|>"]
    (whole,) = Renderer(replace(CONFIG, train_on_prompt=True), tokenizer, chat).render(example, "").items
    assert isinstance(whole, Sample)
    assert whole.labels == whole.ids
    weighted = tuple({**m, "weight": 0} if m["content"] == "d" else m for m in example.messages)
    items = Renderer(CONFIG, tokenizer, chat).render(Example(weighted), "").items
    assert [shown(tokenizer, sample)[1] for sample in items] == ["b<|im_end|>"]


def test_pairs_learn_the_last_answer(tokenizer: Tokenizer, chat: JinjaChat) -> None:
    example = Example(
        conversation("a", "b", "c").messages,
        chosen={"role": "assistant", "content": "y"},
        rejected={"role": "assistant", "content": "n"},
    )
    (pair,) = Renderer(replace(CONFIG, stage="dpo"), tokenizer, chat).render(example, "").items
    assert isinstance(pair, Pair)
    assert [shown(tokenizer, sample)[1] for sample in (pair.chosen, pair.rejected)] == ["y<|im_end|>", "n<|im_end|>"]
    liked = Example(conversation("a", "b", "c", "d").messages, liked=False)
    (pair,) = Renderer(replace(CONFIG, stage="kto"), tokenizer, chat).render(liked, "").items
    assert isinstance(pair, Pair)
    assert (pair.rejected, pair.liked, shown(tokenizer, pair.chosen)[1]) == (None, False, "d<|im_end|>")


def test_qwen1_equals_finetune_py(data_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(data_folder / "tokenizer")
    golden = json.loads((data_folder / "qwen1_text_golden.json").read_text("utf-8"))
    case = golden["finetune.preprocess"]
    messages = tuple({"role": turn["from"], "content": turn["value"]} for turn in case["conversations"])
    renderer = Renderer(replace(CONFIG, labels="qwen1"), tokenizer, None)
    (sample,) = renderer.render(Example(messages), "").items
    assert isinstance(sample, Sample)
    padding = case["max_len"] - len(sample.ids)
    assert sample.ids + [151643] * padding == case["input_ids"]
    assert sample.labels + [IGNORE] * padding == case["labels"]
    late = Example(({"role": "assistant", "content": "x"}, *messages[2:]))
    rendering = renderer.render(late, "")
    assert isinstance(rendering.items[0], Sample)
    expected = golden["finetune.leading_assistant_dropped"]
    assert rendering.items[0].ids[: len(expected)] == expected
    assert rendering.notes
    with pytest.raises(BadRecordError, match="'system' has no place") as caught:
        renderer.render(Example((*messages, {"role": "system", "content": "s"})), "")
    assert caught.value.kind == "bad role"
    said = renderer.render(Example(({"role": "system", "content": "Be brief."}, *messages)), "").items[0]
    assert isinstance(said, Sample)
    assert tokenizer.decode(said.ids).startswith("system\nBe brief.")
    assert tokenizer.decode(said.ids).count("system") == 1


def test_mindformers_learns_everything_but_padding(tokenizer: Tokenizer) -> None:
    renderer = Renderer(replace(CONFIG, labels="mindformers"), tokenizer, None)
    (sample,) = renderer.render(conversation("a", "b"), "").items
    text, learned = shown(tokenizer, sample)
    assert text == learned == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    pad = tokenizer.special_tokens["<|endoftext|>"]
    (ready,) = renderer.render(Example(ids=[1, pad, 2, 3], labels=[1, IGNORE, 2, 3]), "").items
    assert isinstance(ready, Sample)
    assert ready.labels == [1, IGNORE, IGNORE, 3]  # what a padding token would predict does not count there


def test_text_ends_with_the_end_of_text(tokenizer: Tokenizer) -> None:
    (sample,) = Renderer(replace(CONFIG, stage="pt"), tokenizer, None).render(Example(text="hi"), "").items
    assert shown(tokenizer, sample) == ("hi<|endoftext|>", "hi<|endoftext|>")


def test_what_cannot_be_rendered(tokenizer: Tokenizer, chat: JinjaChat) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        Renderer(CONFIG, tokenizer, None)
    with pytest.raises(ValueError, match="allows chat only"):
        Renderer(replace(CONFIG, stage="dpo", labels="qwen1"), tokenizer, chat)
    renderer = Renderer(CONFIG, tokenizer, JinjaChat(tokenizer, "{{ raise_exception('no tools here') }}"))
    with pytest.raises(BadRecordError, match="no tools here"):
        renderer.render(conversation("a", "b"), "")
    with pytest.raises(BadRecordError, match="allowed are the tokenizer's ids"):
        Renderer(CONFIG, tokenizer, chat).render(Example(ids=[10**6, 1], labels=[10**6, 1]), "")


@given(st.lists(st.booleans(), min_size=2, max_size=60), st.integers(2, 20))
def test_splitting_keeps_every_target_once(learned: list[bool], cutoff: int) -> None:
    ids = list(range(len(learned)))
    sample = Sample(ids, [id if keep else IGNORE for id, keep in zip(ids, learned, strict=True)])
    pieces = fit(sample, cutoff, "split")
    targets = [label for piece in pieces if isinstance(piece, Sample) for label in piece.labels[1:] if label != IGNORE]
    assert targets == [label for label in sample.labels[1:] if label != IGNORE] or len(ids) <= cutoff
    for piece in pieces:
        assert isinstance(piece, Sample)
        assert piece.num_targets or len(ids) <= cutoff
        assert len(piece.ids) <= cutoff


def test_truncating_and_dropping() -> None:
    sample = Sample([1, 2, 3, 4], [IGNORE, IGNORE, 3, 4], "f:1")
    assert fit(sample, 3, "truncate") == [Sample([1, 2, 3], [IGNORE, IGNORE, 3], "f:1")]
    assert fit(sample, 2, "truncate") == []
    assert fit(sample, 3, "drop") == []
    assert fit(sample, 4, "drop") == [sample]
    short = Sample([1, 2], [IGNORE, 2])
    assert fit(Pair(sample, short), 3, "truncate") == [Pair(Sample([1, 2, 3], [IGNORE, IGNORE, 3], "f:1"), short)]
    assert fit(Pair(sample, short), 2, "truncate") == []
