"""Sources of settings as one: later ones win under whatever name; variables are filled in."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenkit.compat.sources import merge, read_flags


@pytest.mark.parametrize(
    ("words", "message"),
    [(["data.json"], "belongs to no flag"), (["--a", "1", "--a", "2"], "--a is given twice")],
)
def test_command_lines_that_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_flags(words)


names = st.text("abcdefgh_", min_size=1).filter(lambda name: not name.startswith("_"))
values = st.text("abc123./", min_size=1)


@given(st.dictionaries(names, st.one_of(values, st.just(True), st.lists(values, min_size=2))))
def test_flags_are_read_back(settings: dict[str, Any]) -> None:
    words = []
    for name, value in settings.items():
        words += [f"--{name}", *([] if value is True else value if isinstance(value, list) else [value])]
    assert read_flags(words) == settings


@pytest.mark.parametrize(
    ("sources", "merged"),
    [
        ([{"model_name_or_path": "a"}, {"model": "b"}], {"model": "b"}),
        ([{"model": "a"}, {"model_name_or_path": "b"}], {"model": "b"}),
        ([{"finetuning_type": "lora", "quantization_bit": 4}, {"method": "full"}], {"method": "full"}),
        ([{"method": "full"}, {"finetuning_type": "lora"}], {"finetuning_type": "lora"}),
        ([{"fp16": True}, {"dtype": "bfloat16"}], {"dtype": "bfloat16"}),
        ([{"warmup_steps": 10}, {"warmup_ratio": 0.1}], {"warmup_ratio": 0.1}),
        ([{"dpo_beta": 0.2}, {"pref_beta": 0.3}], {"pref_beta": 0.3}),
        ([{"evaluation_strategy": "no"}, {"eval_strategy": "steps"}], {"eval_strategy": "steps"}),
        ([{"stage": "sft", "output_dir": "saves/${stage}/${model}"}, {"model_name_or_path": "m"}],
         {"stage": "sft", "output_dir": "saves/sft/m", "model": "m"}),
        ([{"seed": 7, "data_seed": "${seed}"}], {"seed": 7, "data_seed": 7}),
        ([{"system": "Say ${this}."}], {"system": "Say ${this}."}),
    ],
)  # fmt: skip
def test_later_sources_win(sources: list[dict[str, Any]], merged: dict[str, Any]) -> None:
    assert merge(sources) == merged


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output_dir": "saves/${name}"}, r"output_dir is .*\$\{name\} is no key"),
        ({"output_dir": "${oc.env:HOME}/x"}, r"\$\{oc.env:HOME\} is no key"),
        ({"run_name": "a${run_name}"}, "stands for itself"),
        ({"output_dir": "a${"}, "no end that can be read"),
        (
            {"model": "a", "model_name_or_path": "b"},
            "model is 'a', but model_name_or_path, which means the same, is 'b'",
        ),
    ],
)
def test_what_cannot_be_merged(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge([settings])
