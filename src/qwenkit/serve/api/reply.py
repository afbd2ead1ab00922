"""What the answers of chat and completions have in common: ids, usage, log-probabilities, the frame around a streamed chunk.

In: Deltas and AnswerEvents. Out: plain objects in OpenAI's shapes, and the bytes of an event.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

import orjson
from starlette.responses import Response

from qwenkit.engine.request import Delta, TokenLogprob
from qwenkit.serve.api.protocol import GenerationRequest
from qwenkit.text.answer import AnswerEvent
from qwenkit.text.tokenizer import Tokenizer

LOWEST = -9999.0  # stands for minus infinity, which JSON does not have


class Usage:
    """Counts tokens of a request: `prompt_tokens` once, however many answers it has."""

    def __init__(self, prompt_tokens: int, think_end_id: int | None = None) -> None:
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0
        self.cached_tokens = 0
        self._think_end_id = think_end_id
        self._thought: dict[int, int] = {}  # tokens of each answer's thinking, once it is known to think
        self._unclear: dict[int, int] = {}  # tokens before the first event says what they are
        self._done: set[int] = set()  # answers past their thinking

    def count(self, index: int, events: Sequence[AnswerEvent], delta: Delta) -> None:
        """Add what a step brought to answer `index`."""
        self.completion_tokens += len(delta.token_ids)
        self.cached_tokens = max(self.cached_tokens, delta.num_cached_tokens)
        if index in self._done:
            return
        size = len(delta.token_ids)
        if any(event.kind == "reasoning" for event in events) or index in self._thought:
            self._thought[index] = self._thought.get(index, 0) + self._unclear.pop(index, 0) + size
        else:
            self._unclear[index] = self._unclear.get(index, 0) + size
        if self._think_end_id in delta.token_ids or any(event.kind != "reasoning" for event in events):
            self._done.add(index)

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": sum(self._thought.values())},
        }


class Frame:
    """Around every chunk of a stream: id, object, created and model, encoded once."""

    def __init__(self, kind: str, prefix: str, model: str, request: GenerationRequest) -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = model
        self.kind = kind
        options = request.stream_options
        self.include_usage = options is not None and (options.include_usage or options.continuous_usage_stats)
        self.continuous = options is not None and options.continuous_usage_stats
        self._head = b"data: " + orjson.dumps(self.head())[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if self.include_usage else b"]}\n\n"

    def head(self) -> dict[str, Any]:
        return {"id": self.id, "object": self.kind, "created": self.created, "model": self.model}

    def chunk(self, choice: dict[str, Any], usage: Usage) -> bytes:
        """An event with a piece of one answer."""
        if self.continuous:
            return self._head + orjson.dumps(choice) + b'],"usage":' + orjson.dumps(usage.as_json()) + b"}\n\n"
        return self._head + orjson.dumps(choice) + self._tail

    def usage_chunk(self, usage: Usage) -> bytes:
        """The event before the end, with no choices; b"" where none was asked for."""
        return self._head + b'],"usage":' + orjson.dumps(usage.as_json()) + b"}\n\n" if self.include_usage else b""

    def whole(self, choices: list[dict[str, Any]], usage: Usage, **more: Any) -> Response:
        """The answer that is not streamed."""
        body = self.head() | {"choices": choices, "usage": usage.as_json()} | more
        return Response(orjson.dumps(body), media_type="application/json")


def visible_logprobs(delta: Delta) -> tuple[TokenLogprob, ...]:
    """Log-probabilities of a step's tokens, without the end token, of which nobody sees anything."""
    logprobs = delta.logprobs or ()
    ended = delta.finish_reason == "stop" and not isinstance(delta.stop_reason, str)
    return logprobs[:-1] if ended else logprobs


def chat_logprob(tokenizer: Tokenizer, one: TokenLogprob) -> dict[str, Any]:
    """A token in the shape of chat: its text, its bytes and the likeliest at its place."""
    top = [_token(tokenizer, token, logprob) for token, logprob in one.top]
    return _token(tokenizer, one.token_id, one.logprob) | {"top_logprobs": top}


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    return {"token": data.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(data)}


def finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def prompt_logprobs(
    tokenizer: Tokenizer, known: Sequence[TokenLogprob | None] | None
) -> list[dict[str, Any] | None] | None:
    """vLLM's shape: for each token of the prompt an object from token id to log-probability, rank and text."""
    if known is None:
        return None
    return [None if one is None else _by_id(tokenizer, one) for one in known]


def _by_id(tokenizer: Tokenizer, one: TokenLogprob) -> dict[str, Any]:
    ranks = {token: place for place, (token, _) in enumerate(one.top, start=1)}
    values = {one.token_id: one.logprob} | dict(one.top)
    return {
        str(token): {
            "logprob": finite(logprob),
            "rank": ranks.get(token),
            "decoded_token": tokenizer.token_bytes(token).decode("utf-8", "replace"),
        }
        for token, logprob in values.items()
    }


def well_formed(text: str) -> str:
    """`text` with U+FFFD for half a surrogate pair, which JSON may carry and UTF-8 cannot."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
