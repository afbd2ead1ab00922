"""The nouns that travel through the engine: a sequence of tokens being written, and what the outside gets to see of it.

One request with n answers is n sequences that share their prompt. A `Sequence` is the engine's own, mutable state; `Delta` is
what a step adds to one answer; `RequestOutput` and `Completion` are the finished result.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qwenkit.engine.blocks import chain_hash
from qwenkit.engine.matcher import Matcher
from qwenkit.engine.sampling import SamplingParams
from qwenkit.text.stream import Detokenizer, StopStrings


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a token under the model's unmodified distribution, with the likeliest tokens at that place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """What one step added to one answer. `finish_reason` (stop, length or error) is set on the last one.

    `stop_reason` is the stop string or the stop token id that ended it; `text` never ends in half a character. `error` says what
    went wrong where the engine could not compute an answer any further; no token comes with it. `error_field` names the field of
    SamplingParams at fault where it is the request's and not the engine's.
    """

    request_id: int
    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    error_field: str | None = None
    admitted_at: float = 0.0  # time.monotonic() of the first step with it


@dataclass(frozen=True)
class Completion:
    """One finished answer. `token_ids` includes the end token, `text` does not. `error`: why it is no whole answer, where
    finish_reason is error."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprob] | None = None
    error: str | None = None


@dataclass(frozen=True)
class RequestOutput:
    """All answers to one prompt. `num_cached_tokens` of the prompt were found in the prefix cache."""

    prompt_token_ids: list[int]
    completions: list[Completion]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    num_cached_tokens: int = 0

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.completions[0].text


class TokenCounts:
    """The distinct ids of a growing list of tokens, and how often each was written after the prompt, for penalties; each token is
    looked at once."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._ids = np.empty(64, dtype=np.int64)
        self._counts = np.zeros(64, dtype=np.float32)
        self._looked_at = 0

    def of(self, tokens: list[int], num_prompt: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids (count,) int64 and counts (count,) fp32 of `tokens`, which begin with the tokens of the last call."""
        for place in range(self._looked_at, len(tokens)):
            at = self._places.setdefault(tokens[place], len(self._places))
            if at == self._ids.shape[0]:
                self._ids = np.concatenate((self._ids, np.empty_like(self._ids)))
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
            self._ids[at] = tokens[place]
            self._counts[at] += place >= num_prompt
        self._looked_at = len(tokens)
        return self._ids[: len(self._places)], self._counts[: len(self._places)]


@dataclass(eq=False)
class Sequence:
    """One answer being written.

    `tokens` is prompt and answer; the first `num_computed` of them have keys and values in the blocks of `block_table`.
    A preempted sequence keeps its tokens and loses its blocks: it is computed again later, and nothing is sampled twice.
    """

    request_id: int
    index: int
    tokens: list[int]
    num_prompt: int
    params: SamplingParams
    seed: int
    max_tokens: int
    stop_ids: frozenset[int]
    detokenizer: Detokenizer
    stop_strings: StopStrings | None
    rope_alpha: float | None = None
    adapter: str | None = None  # its key, see Adapters
    num_computed: int = 0
    num_cached: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    followers: list[Sequence] = field(
        default_factory=list
    )  # answers 1 .. n-1, until the prompt is computed and they start
    priority: int = 0
    principal: str = ""  # on whose behalf; principals get equal shares of the engine
    order: int = 0  # age: how many came before; given by the scheduler, as is `turn`
    turn: int = 0  # older sequences of its principal that run at its priority
    cache_namespace: str = ""
    admitted_at: float = 0.0
    matcher: Matcher | None = None
    token_counts: TokenCounts = field(default_factory=TokenCounts)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values are still to be computed; 1 while decoding."""
        return len(self.tokens) - self.num_computed

    def rest_of_text(self) -> str:
        """Text of an answer that ends here which was held back: it might have become a character, or a stop string."""
        text = self.detokenizer.finish()
        if self.stop_strings is None:
            return text
        text, matched = self.stop_strings.push(text)
        return text if matched is not None else text + self.stop_strings.flush()

    def extend_hashes(self, block_size: int) -> list[bytes]:
        """Chained hashes of all blocks that the tokens fill. What else decides a key or value is in the chain's first link:
        for Qwen-1 the rotary stretch, and the adapter; and whose blocks are not to be shared with whom.
        """
        hashes = self.block_hashes
        parent = hashes[-1] if hashes else repr((self.rope_alpha, self.cache_namespace, self.adapter)).encode()
        for start in range(len(hashes) * block_size, len(self.tokens) - block_size + 1, block_size):
            parent = chain_hash(parent, self.tokens[start : start + block_size])
            hashes.append(parent)
        return hashes
