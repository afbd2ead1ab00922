"""An answer in the shape of OpenAI's /v1/responses: output items, and the typed events that stream them.

In: the request, what the parser found in the answer, piece by piece, and how it ended. Out: the events in their order, numbered
by sequence_number, and the whole response, which is the same whether or not the events were sent.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qwenkit.serve.api.reply import Usage
from qwenkit.serve.api.responses_protocol import ResponsesRequest
from qwenkit.serve.api.stream import COMMENT

if TYPE_CHECKING:
    from qwenkit.engine.request import Delta
    from qwenkit.engine.sampling import SamplingParams
    from qwenkit.serve.errors import ApiError
    from qwenkit.text.answer import AnswerEvent

Event = dict[str, Any]
_PART = {"reasoning": "reasoning_text", "message": "output_text"}


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


class ResponseWriter:
    """One response (a foreign.Writer); `params` are those that the engine runs with."""

    def __init__(self, request: ResponsesRequest, model: str, params: SamplingParams) -> None:
        self._output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None  # the item being written
        self._number = 0
        self._response = {**_described(request, params), "id": _id("resp"), "model": model}

    def start(self, _usage: Usage) -> list[Event]:
        out: list[Event] = []
        for kind in ("response.created", "response.in_progress"):
            self._tell(out, kind, response=self.whole())
        return out

    def push(self, events: Sequence[AnswerEvent]) -> list[Event]:
        out: list[Event] = []
        for event in events:
            if event.kind == "tool_call":
                call = {"type": "function_call", "id": _id("fc"), "call_id": _id("call"), "name": event.text}
                self._begin(out, {**call, "arguments": "", "status": "in_progress"})
            elif event.kind == "arguments":
                assert self._open is not None
                self._open["arguments"] += event.text
                self._tell(out, "response.function_call_arguments.delta", **self._place(), delta=event.text)
            elif event.kind == "reasoning":
                self._text(out, "reasoning", event.text)
            else:
                self._text(out, "message", event.text)
        return out

    def finish(self, last: Delta, usage: Usage) -> list[Event]:
        """The end: why the engine stopped, and the numbers of tokens."""
        out: list[Event] = []
        cut = last.finish_reason == "length"
        status = "incomplete" if cut else "completed"
        self._end(out, status)
        counted = usage.as_json()
        self._response["status"] = status
        self._response["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        self._response["completed_at"] = None if cut else int(time.time())
        self._response["usage"] = {
            "input_tokens": counted["prompt_tokens"],
            "input_tokens_details": counted["prompt_tokens_details"] | {"cache_write_tokens": 0},
            "output_tokens": counted["completion_tokens"],
            "output_tokens_details": counted["completion_tokens_details"],
            "total_tokens": counted["total_tokens"],
        }
        self._tell(out, f"response.{status}", response=self.whole())
        return out

    def fail(self, error: ApiError) -> list[Event]:
        """The end, when the server could not go on after the stream had begun."""
        out: list[Event] = []
        if self._open is not None:
            self._open["status"] = "incomplete"
        self._response["status"] = "failed"
        self._response["error"] = {"code": "server_error", "message": error.message}
        self._tell(out, "response.failed", response=self.whole())
        return out

    def whole(self) -> dict[str, Any]:
        """The response as far as it is written; whole after `finish`."""
        return {**self._response, "output": [_copy(item) for item in self._output]}

    def keep_alive(self) -> bytes:
        return COMMENT

    def _text(self, out: list[Event], kind: str, text: str) -> None:
        if self._open is None or self._open["type"] != kind:
            self._begin(out, _message() if kind == "message" else _reasoning())
        assert self._open is not None
        self._open["content"][0]["text"] += text
        extra: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        self._tell(out, f"response.{_PART[kind]}.delta", **self._place(), content_index=0, delta=text, **extra)

    def _begin(self, out: list[Event], item: dict[str, Any]) -> None:
        self._end(out, "completed")
        self._open = item
        self._output.append(item)
        place = {"output_index": len(self._output) - 1}
        if item["type"] == "function_call":
            self._tell(out, "response.output_item.added", **place, item=_copy(item))
            return
        self._tell(out, "response.output_item.added", **place, item={**item, "content": []})
        part = dict(item["content"][0])
        self._tell(out, "response.content_part.added", **self._place(), content_index=0, part=part)

    def _end(self, out: list[Event], status: str) -> None:
        item = self._open
        if item is None:
            return
        place = self._place()
        item["status"] = status
        if item["type"] == "function_call":
            whole = {"name": item["name"], "arguments": item["arguments"]}
            self._tell(out, "response.function_call_arguments.done", **place, **whole)
        else:
            part = dict(item["content"][0])
            extra: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            kind = f"response.{_PART[item['type']]}.done"
            self._tell(out, kind, **place, content_index=0, text=part["text"], **extra)
            self._tell(out, "response.content_part.done", **place, content_index=0, part=part)
        self._tell(out, "response.output_item.done", output_index=place["output_index"], item=_copy(item))
        self._open = None

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self._output) - 1}

    def _tell(self, out: list[Event], kind: str, **fields: Any) -> None:
        out.append({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1


def _message() -> dict[str, Any]:
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    return {"type": "message", "id": _id("msg"), "status": "in_progress", "role": "assistant", "content": [part]}


def _reasoning() -> dict[str, Any]:
    part = {"type": "reasoning_text", "text": ""}
    return {"type": "reasoning", "id": _id("rs"), "status": "in_progress", "summary": [], "content": [part]}


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    return {**item, "content": [dict(part) for part in item["content"]]} if "content" in item else dict(item)


def _described(request: ResponsesRequest, params: SamplingParams) -> dict[str, Any]:
    """What a response repeats of its request, with what was not given as it was decided for it."""
    choice = request.tool_choice
    text: dict[str, Any] = {"format": {"type": "text"}}
    if request.text is not None:
        text |= request.text.model_dump(by_alias=True, exclude_none=True)
    return {
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "frequency_penalty": params.frequency_penalty,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "presence_penalty": params.presence_penalty,
        "previous_response_id": None,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {
            "effort": None if request.reasoning is None else request.reasoning.effort,
            "summary": None if request.reasoning is None else request.reasoning.summary,
        },
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": params.temperature,
        "text": text,
        "tool_choice": "auto" if choice is None else choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [_echo(tool.model_dump()) for tool in request.tools or ()],
        "top_logprobs": 0,
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": request.user,
    }


def _echo(tool: dict[str, Any]) -> dict[str, Any]:
    return tool | {"strict": bool(tool["strict"])}
