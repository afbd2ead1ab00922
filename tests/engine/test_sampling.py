"""SamplingParams: what is allowed, what is said about the rest, and where defaults come from."""

import math
from typing import Any

import pytest

from qwenkit.engine.sampling import SamplingParams


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("top_k", -2),
        ("top_k", 2.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 2.1),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("n", 0),
        ("logprobs", -1),
        ("prompt_logprobs", -1),
        ("seed", 2**63),
        ("seed", "1"),
        ("stop", ("",)),
        ("stop", (3,)),
        ("stop_token_ids", (-1,)),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {1: math.nan}),
    ],
)
def test_out_of_range_values_are_named(field: str, bad: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{field} .*allowed (is|are) ") as caught:
        SamplingParams(**{field: bad})
    assert "\n" not in str(caught.value)


def test_min_tokens_beyond_max_tokens() -> None:
    with pytest.raises(ValueError, match=r"min_tokens is 5, allowed is at most max_tokens \(4\)"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_a_single_stop_string_is_one_stop_string() -> None:
    assert SamplingParams(stop="END").stop == ("END",)


def test_defaults_come_from_the_models_generation_config() -> None:
    config = {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "repetition_penalty": 1.05,
        "eos_token_id": 2,
    }
    defaults = SamplingParams.from_generation_config(config)
    merged = SamplingParams(top_p=0.5, max_tokens=9).with_defaults(defaults)
    assert (merged.temperature, merged.top_p, merged.top_k, merged.repetition_penalty, merged.min_p) == (
        0.7,
        0.5,
        20,
        1.05,
        0,
    )
    assert merged.max_tokens == 9


def test_a_model_that_does_not_say_do_sample_is_greedy() -> None:
    assert SamplingParams.from_generation_config({"temperature": 0.7}).temperature == 0
    assert SamplingParams(temperature=0.6).with_defaults(SamplingParams.from_generation_config({})).temperature == 0.6


def test_a_bad_generation_config_is_named() -> None:
    with pytest.raises(ValueError, match=r"^generation_config.json: top_p is 7"):
        SamplingParams.from_generation_config({"do_sample": True, "top_p": 7})
