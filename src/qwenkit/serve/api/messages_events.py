"""An answer in Anthropic's shape: content blocks, and the events that stream them.

In: what the parser found in an answer, piece by piece, and how the answer ended. Out: the events of /v1/messages in their
order, and the whole message, which is the same whether or not the events were sent.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qwenkit.serve.api.reply import Usage

if TYPE_CHECKING:
    from qwenkit.engine.request import Delta
    from qwenkit.serve.errors import ApiError
    from qwenkit.text.answer import AnswerEvent

Event = dict[str, Any]
PATH = "/v1/messages"


class MessageWriter:
    """One message (a foreign.Writer)."""

    def __init__(self, model: str, stop_sequences: Sequence[str] = ()) -> None:
        self._stop_sequences = frozenset(stop_sequences)
        self._content: list[dict[str, Any]] = []
        self._arguments = ""  # of the open tool_use block, or of the last one
        self._open: str | None = None  # type of the open block
        self._usage: dict[str, Any] = {}
        self._message: dict[str, Any] = {
            "id": f"msg_{uuid.uuid4().hex[:24]}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }

    def start(self, usage: Usage) -> list[Event]:
        """The message's head. Tokens of the prompt that were found in the prefix cache are not in input_tokens."""
        self._usage = {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": 0,
        }
        head = {**self._message, "content": [], "usage": dict(self._usage)}
        return [{"type": "message_start", "message": head}, {"type": "ping"}]

    def push(self, events: Sequence[AnswerEvent]) -> list[Event]:
        out: list[Event] = []
        for event in events:
            if event.kind == "tool_call":
                call_id = f"toolu_{uuid.uuid4().hex[:24]}"
                self._begin(out, {"type": "tool_use", "id": call_id, "name": event.text, "input": {}})
            elif event.kind == "arguments":
                assert self._open == "tool_use"
                self._arguments += event.text
                self._delta(out, {"type": "input_json_delta", "partial_json": event.text})
            elif event.kind == "reasoning":
                self._text(out, "thinking", event.text)
            else:
                self._text(out, "text", event.text)
        return out

    def finish(self, last: Delta, usage: Usage) -> list[Event]:
        """The end: why the engine stopped, and the numbers of tokens."""
        out: list[Event] = []
        self._end(out)
        called = any(block["type"] == "tool_use" for block in self._content)
        if last.finish_reason == "length":
            reason = "max_tokens"
        elif isinstance(last.stop_reason, str) and last.stop_reason in self._stop_sequences:
            reason = "stop_sequence"
            self._message["stop_sequence"] = last.stop_reason
        else:
            reason = "tool_use" if called else "end_turn"
        self._message["stop_reason"] = reason
        details = usage.as_json()["completion_tokens_details"]
        self._usage["output_tokens"] = usage.completion_tokens
        self._usage["output_tokens_details"] = {"thinking_tokens": details["reasoning_tokens"]}
        ended = {name: self._message[name] for name in ("stop_reason", "stop_sequence")}
        out.append({"type": "message_delta", "delta": ended, "usage": dict(self._usage)})
        out.append({"type": "message_stop"})
        return out

    def fail(self, error: ApiError) -> list[Event]:
        """The end, when the server could not go on after the stream had begun."""
        return [error.body(PATH)]

    def whole(self) -> dict[str, Any]:
        """The whole message, after `finish`."""
        return {**self._message, "content": self._content, "usage": self._usage}

    def keep_alive(self) -> bytes:
        return b'event: ping\ndata: {"type": "ping"}\n\n'

    def _text(self, out: list[Event], kind: str, text: str) -> None:
        if self._open != kind:
            self._begin(out, {"type": "text", "text": ""} if kind == "text" else _thinking())
        self._content[-1][kind] += text
        self._delta(out, {"type": f"{kind}_delta", kind: text})

    def _begin(self, out: list[Event], block: dict[str, Any]) -> None:
        self._end(out)
        self._open, self._arguments = block["type"], ""
        self._content.append(block)
        out.append({"type": "content_block_start", "index": len(self._content) - 1, "content_block": dict(block)})

    def _end(self, out: list[Event]) -> None:
        if self._open is None:
            return
        block = self._content[-1]
        if self._open == "tool_use":
            block["input"] = json.loads(self._arguments or "{}", strict=False)  # the parser let only objects through
        elif self._open == "thinking":
            self._delta(out, {"type": "signature_delta", "signature": ""})
        out.append({"type": "content_block_stop", "index": len(self._content) - 1})
        self._open = None

    def _delta(self, out: list[Event], delta: dict[str, Any]) -> None:
        out.append({"type": "content_block_delta", "index": len(self._content) - 1, "delta": delta})


def _thinking() -> dict[str, Any]:
    return {"type": "thinking", "thinking": "", "signature": ""}
