"""SamplingParams: how one request wants its tokens chosen and when it ends.

In: what a user gives; None means "the model's own default", which `generation_config.json` holds.
Out: a validated, frozen value; `with_defaults` leaves no None that the sampler would have to interpret.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from qwenkit.engine.config import option
from qwenkit.engine.grammar import Grammar

GREEDY_BELOW = 1e-5  # temperatures under this are greedy, as in vLLM


@dataclass(frozen=True)
class SamplingParams:
    """Sampling and stopping of one request.

    The logits of a step go through: logit_bias, min_tokens (stop ids barred), repetition penalty (over prompt and output),
    frequency and presence penalty (over output), the grammar's mask, temperature, top_k, top_p, min_p, and then the draw.
    Raises ValueError naming the field, what was given and what is allowed.
    """

    temperature: float | None = option(None, "randomness: 0 takes the likeliest token")
    top_k: int | None = option(None, "draw from the k likeliest tokens only; 0 or -1 for all")
    top_p: float | None = option(None, "draw from the likeliest tokens that together reach this probability")
    min_p: float | None = option(None, "drop tokens less likely than this share of the likeliest")
    repetition_penalty: float | None = option(None, "divide the score of tokens already in prompt or answer; 1 is off")
    presence_penalty: float = option(0.0, "subtract from the score of tokens already in the answer")
    frequency_penalty: float = option(0.0, "subtract from the score for each time a token is in the answer")
    seed: int | None = option(None, "the same seed gives the same answer, whatever else runs")
    stop: tuple[str, ...] = option((), "end the answer before this text (may be given several times)")
    stop_token_ids: tuple[int, ...] = option((), "end the answer at this token id (may be given several times)")
    max_tokens: int | None = option(None, "longest answer, in tokens (default: what is left of the context)")
    min_tokens: int = option(0, "do not end the answer before so many tokens")
    n: int = option(1, "how many answers to the same prompt")
    logprobs: int | None = option(None, "report log-probabilities of each token and of this many likeliest others")
    prompt_logprobs: int | None = option(None, "the same for the tokens of the prompt")
    logit_bias: Mapping[int, float] = option(
        (), "add to the score of a token id, as ID=BIAS (may be given several times)"
    )
    ignore_eos: bool = option(False, "go on after the model's end token")
    skip_special_tokens: bool = option(True, "leave control tokens out of the text")
    grammar: Grammar | None = None  # what the answer must look like
    grammar_after: int | None = (
        None  # the token id after which the grammar holds (the end of thinking); None: from the start
    )

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        set_(self, "stop_token_ids", tuple(self.stop_token_ids))
        set_(self, "logit_bias", dict(self.logit_bias))
        _number(self, "temperature", "a number of at least 0", lambda x: x >= 0)
        _number(self, "top_p", "a number above 0 and up to 1", lambda x: 0 < x <= 1)
        _number(self, "min_p", "a number from 0 to 1", lambda x: 0 <= x <= 1)
        _number(self, "repetition_penalty", "a number above 0 and up to 2", lambda x: 0 < x <= 2)
        _number(self, "presence_penalty", "a number from -2 to 2", lambda x: -2 <= x <= 2)
        _number(self, "frequency_penalty", "a number from -2 to 2", lambda x: -2 <= x <= 2)
        _whole(self, "top_k", "-1 or 0 (off) or a whole number of at least 1", lambda x: x >= -1)
        _whole(self, "max_tokens", "a whole number of at least 1", lambda x: x >= 1)
        _whole(self, "min_tokens", "a whole number of at least 0", lambda x: x >= 0)
        _whole(self, "n", "a whole number of at least 1", lambda x: x >= 1)
        _whole(self, "logprobs", "a whole number of at least 0", lambda x: x >= 0)
        _whole(self, "prompt_logprobs", "a whole number of at least 0", lambda x: x >= 0)
        _whole(self, "grammar_after", "a token id (a whole number from 0)", lambda x: x >= 0)
        _whole(self, "seed", "a whole number below 2**63 in size", lambda x: abs(x) < 2**63)
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise ValueError(f"grammar is {self.grammar!r}, allowed is a Grammar")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}, allowed is at most max_tokens ({self.max_tokens})")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop is {self.stop!r}, allowed are texts that are not empty")
        if not all(_is_id(token) for token in self.stop_token_ids):
            raise ValueError(f"stop_token_ids is {self.stop_token_ids!r}, allowed are token ids (whole numbers from 0)")
        for token, bias in self.logit_bias.items():
            if not _is_id(token) or not _is_number(bias) or not -100 <= bias <= 100:
                raise ValueError(
                    f"logit_bias has {token!r}: {bias!r}, "
                    "allowed are token ids (whole numbers from 0) with numbers from -100 to 100"
                )

    def with_defaults(self, defaults: SamplingParams) -> SamplingParams:
        """Fill what was left None from `defaults` (only the fields that a model's generation_config may decide)."""
        filled = {name: getattr(defaults, name) for name in _NEUTRAL if getattr(self, name) is None}
        return replace(self, **filled)

    @classmethod
    def from_generation_config(cls, generation_config: Mapping[str, Any]) -> SamplingParams:
        """A model's own defaults. As in transformers, a file that does not say do_sample means greedy decoding.

        Raises ValueError when the file holds a value that is out of range.
        """
        given: dict[str, Any] = {name: generation_config.get(name) for name in _NEUTRAL}
        values = {name: _NEUTRAL[name] if value is None else value for name, value in given.items()}
        if not generation_config.get("do_sample", False):
            values["temperature"] = 0.0
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"generation_config.json: {error}") from None


_NEUTRAL: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
assert set(_NEUTRAL) <= {field.name for field in fields(SamplingParams)}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(params: SamplingParams, name: str, allowed: str, holds: Any) -> None:
    value = getattr(params, name)
    if value is not None and not (_is_number(value) and holds(value)):
        raise ValueError(f"{name} is {value!r}, allowed is {allowed}")


def _whole(params: SamplingParams, name: str, allowed: str, holds: Any) -> None:
    value = getattr(params, name)
    if value is not None and not (isinstance(value, int) and not isinstance(value, bool) and holds(value)):
        raise ValueError(f"{name} is {value!r}, allowed is {allowed}")
