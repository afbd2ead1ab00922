"""An OpenAI-compatible server as something to talk to (DashScope's compatible mode, vLLM, qwenkit's own server, …).

In: a URL, a key, messages and settings. Out: pieces of the answer as the server streams them. Whatever goes wrong on the way
is one ValueError. Leaving the stream closes the connection. No torch here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import httpx
from httpx_sse import EventSource, SSEError

from qwenkit.cli.conversation.state import Piece
from qwenkit.engine.sampling import SamplingParams

TIMEOUT = httpx.Timeout(60.0, connect=10.0, read=600.0)  # seconds; a server may read a long prompt for minutes


class Remote:
    """A model behind a URL. `model` is the server's name for it; without one the only one that the server lists is taken.

    Raises ValueError for a URL or key that cannot be one, and when the server has to be asked for its models and fails, or
    lists several.
    """

    def __init__(self, url: str, model: str | None, key: str | None, *, timeout: httpx.Timeout = TIMEOUT) -> None:
        self.base = api_base(url)
        if key and not (key.isascii() and key.isprintable()):
            raise ValueError("the API key holds characters that no key has (only printable ASCII is allowed)")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            self._client = httpx.Client(headers=headers, timeout=timeout)
        except (ImportError, httpx.InvalidURL, ValueError) as error:
            raise ValueError(f"the proxy settings of the environment cannot be used: {error}") from None
        try:
            self.name = model or self._only_model()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the connection back."""
        self._client.close()

    def defaults(self) -> Mapping[str, Any]:
        """Nothing: the server does not tell."""
        return {}

    def stream(self, prompt: str | Sequence[Mapping[str, str]], params: SamplingParams) -> Generator[Piece, None, None]:
        """See Talker. The server's token count, where it tells one, replaces the count of pieces in the last piece."""
        assert not isinstance(prompt, str), "a server's chat takes messages"
        body = {
            "model": self.name,
            "messages": list(prompt),
            "stream": True,
            "stream_options": {"include_usage": True},
        } | _as_json(params)
        pieces = 0
        finished = False
        with (
            self._explained(),
            self._client.stream(
                "POST", self._at("chat/completions"), json=body, headers={"Accept": "text/event-stream"}
            ) as response,
        ):
            self._check(response)
            for event in EventSource(response).iter_sse():
                if event.data.strip() == "[DONE]":
                    return
                piece, usage = self._read_event(event.data)
                finished = finished or piece.finish_reason is not None
                if piece.text or piece.reasoning or piece.finish_reason:
                    pieces += piece.tokens
                    yield piece
                if usage is not None:
                    yield Piece(tokens=usage - pieces)
                    pieces = usage
        if not finished:
            raise ValueError(f"{self.base} closed the connection in the middle of the answer")

    def _read_event(self, data: str) -> tuple[Piece, int | None]:
        """The piece of one event, and the length of the whole answer where the event tells it."""
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            raise ValueError(f"{self.base} sent an event that is no JSON: {_short(data)}") from None
        if isinstance(event, dict) and event.get("error") is not None:
            raise ValueError(f"{self.base} reports: {_message(event)}")
        try:
            usage = event.get("usage") or {}
            total = usage.get("completion_tokens")
            choice = (event.get("choices") or [{}])[0]
            delta = choice.get("delta") or {}
            text = delta.get("content") or ""
            reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
            reason = choice.get("finish_reason")
        except (AttributeError, LookupError, TypeError):
            raise ValueError(f"{self.base} sent an event of an unknown shape: {_short(data)}") from None
        known = isinstance(text, str) and isinstance(reasoning, str) and isinstance(reason, str | None)
        if not known or not isinstance(total, int | None):
            raise ValueError(f"{self.base} sent an event of an unknown shape: {_short(data)}")
        return Piece(text, reasoning, 1 if text or reasoning else 0, reason or None), total

    def _only_model(self) -> str:
        with self._explained(), self._client.stream("GET", self._at("models")) as response:
            self._check(response)
            try:
                names = [model["id"] for model in json.loads(response.read())["data"]]
            except (ValueError, LookupError, TypeError, RecursionError):
                names = []
        names = [name for name in names if isinstance(name, str) and name]
        if not names:
            raise ValueError(f"{self.base} lists no models: name one with --model")
        if len(names) > 1:
            listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise ValueError(f"{self.base} has several models: choose one with --model ({listed})")
        return str(names[0])

    def _at(self, path: str) -> httpx.URL:
        return self.base.copy_with(path=f"{self.base.path}/{path}")

    def _check(self, response: httpx.Response) -> None:
        if response.status_code == 200:
            return
        text = _start_of(response)
        try:
            text = _message(json.loads(text))
        except (ValueError, RecursionError):
            text = _short(text)
        hint = "; give --api-key or set OPENAI_API_KEY" if response.status_code == 401 else ""
        raise ValueError(
            f"{self.base} answered {response.status_code} {response.reason_phrase}{': ' if text else ''}{text}{hint}"
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Every failure of the connection as one ValueError."""
        try:
            yield
        except SSEError:
            raise ValueError(f"{self.base} does not stream its answer (text/event-stream is what is needed)") from None
        except httpx.ConnectTimeout:
            raise ValueError(f"{self.base} did not take the connection in time") from None
        except httpx.TimeoutException:
            raise ValueError(f"{self.base} has been silent for too long") from None
        except httpx.ConnectError as error:
            reason = re.sub(r"^\[Errno -?\d+\] ", "", str(error))
            raise ValueError(f"cannot connect to {self.base}: {reason}") from None
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError) as error:
            raise ValueError(f"{self.base} broke the connection off: {error or type(error).__name__}") from None
        except httpx.HTTPError as error:
            raise ValueError(f"{self.base} cannot be talked to: {error}") from None


def api_base(url: str) -> httpx.URL:
    """The URL under which `chat/completions` lies: `/v1` is added unless the path names a version; ValueError for no URL."""
    try:
        base = httpx.URL(url.strip())
    except (httpx.InvalidURL, UnicodeError):
        base = httpx.URL("")
    if base.scheme not in ("http", "https") or not base.host:
        raise ValueError(
            f"--url is {url!r}, allowed is http://HOST… or https://HOST…, such as http://localhost:8000/v1"
        )
    path = base.path.rstrip("/").removesuffix("/chat/completions")
    if not re.search(r"/v\d+\w*(/|$)", path):
        path += "/v1"
    return base.copy_with(path=path, fragment=None)


def find_key(url: str, given: str | None, environ: Mapping[str, str]) -> str | None:
    """The key for a server: the one given, DASHSCOPE_API_KEY for a host of DashScope, else OPENAI_API_KEY."""
    names = ["OPENAI_API_KEY"]
    host = api_base(url).host
    if "dashscope" in host and host.endswith(".aliyuncs.com"):
        names.insert(0, "DASHSCOPE_API_KEY")
    return given or next((key for name in names if (key := environ.get(name, "").strip())), None)


def _as_json(params: SamplingParams) -> dict[str, Any]:
    """The settings that are not at their defaults. Those that OpenAI's interface does not know go beside the others."""
    return {
        field.name: value
        for field in fields(params)
        if (value := getattr(params, field.name)) != getattr(_UNSET, field.name)
    }


_UNSET = SamplingParams()


def _message(answer: Any) -> str:
    """What a JSON error body says; its shapes differ from server to server."""
    for key in ("error", "message", "detail"):
        if isinstance(answer, dict) and answer.get(key):
            answer = answer[key]
    return _short(answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:300]}…"


def _start_of(response: httpx.Response, limit: int = 20_000) -> str:
    """The first characters of a body, however long it is."""
    text = ""
    for part in response.iter_text():
        text += part
        if len(text) > limit:
            break
    return text
