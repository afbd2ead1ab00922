"""A conversation as state: messages, system text and settings, and the exchange with whatever answers. No terminal here.

In: what the user writes. Out: pieces of the answer while it is written. An exchange is kept if any of the answer came; a
message that was refused leaves no trace. Saved as JSON: {"model", "messages", "settings"}.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, Protocol

from qwenkit.cli.options import flags_of
from qwenkit.engine.sampling import SamplingParams
from qwenkit.settings import nearest
from qwenkit.storage import write_json

# One answer at a time is shown as text: settings for several answers or for numbers beside them make no sense here.
NOT_IN_CHAT = ("n", "logprobs", "prompt_logprobs")
SETTINGS = flags_of(SamplingParams, exclude=NOT_IN_CHAT)


@dataclass(frozen=True)
class Piece:
    """What one step adds to an answer. `tokens` adds up to the length of the answer; `reasoning` is not part of it."""

    text: str = ""
    reasoning: str = ""
    tokens: int = 0
    finish_reason: str | None = None


class Talker(Protocol):
    """Whatever answers: a model in this process or one behind a URL."""

    name: str

    def stream(self, prompt: str | Sequence[Mapping[str, str]], params: SamplingParams) -> Generator[Piece, None, None]:
        """The answer's pieces; ValueError for a refused prompt, KeyboardInterrupt for Ctrl-C; closing it ends the request."""

    def defaults(self) -> Mapping[str, Any]:
        """The settings that hold where none is given, as far as they are known."""


@dataclass
class Message:
    """One turn. `partial` marks an answer that was stopped before its end."""

    role: str
    content: str
    partial: bool = False


@dataclass
class Conversation:
    """Everything that /save keeps. `settings` are the given fields of SamplingParams.

    Between two calls `messages` holds whole exchanges: what the user said, then the answer or what there is of it.
    """

    talker: Talker
    system: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    answers: int = 0  # answers begun since the seed was set

    def ask(self, text: str) -> Generator[Piece, None, None]:
        """Say `text` and get the answer's pieces. Close it (or let it raise) to stop: what came until then stays, marked."""
        before = len(self.messages)
        self.messages.append(Message("user", text))
        answer = Message("assistant", "", partial=True)
        try:
            params = self.params()
            self.answers += 1
            with closing(self.talker.stream(self._prompt(), params)) as pieces:
                for piece in pieces:
                    answer.content += piece.text
                    yield piece
            answer.partial = False
        finally:
            if answer.content or not answer.partial:
                self.messages.append(answer)
            else:
                del self.messages[before:]

    def _prompt(self) -> list[dict[str, str]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return system + [{"role": message.role, "content": message.content} for message in self.messages]

    def params(self) -> SamplingParams:
        """The settings for the next answer. A seed counts on from answer to answer, so that /retry gives another one."""
        settings = dict(self.settings)
        if settings.get("seed") is not None:
            settings["seed"] += self.answers
        return SamplingParams(**settings)

    def change(self, changes: Mapping[str, Any]) -> None:
        """Set settings, all or none; None takes one back to the default. ValueError for a name or value that is not allowed."""
        merged = {name: value for name, value in {**self.settings, **changes}.items() if value is not None}
        SamplingParams(**merged)
        self.settings = merged
        if "seed" in changes:
            self.answers = 0

    def undo(self) -> str | None:
        """Take back the last exchange and return what the user had said; None if there is none."""
        if not self.messages:
            return None
        question = self.messages[-2].content
        del self.messages[-2:]
        return question

    def retry(self) -> Generator[Piece, None, None]:
        """Ask the last question again. Its old answer goes once a new one has begun."""
        old = self.messages[-2:]
        del self.messages[-2:]
        rest = len(self.messages)
        try:
            yield from self.ask(old[0].content)
        finally:
            if len(self.messages) == rest:
                self.messages += old

    def clear(self) -> None:
        """Forget all messages; system text and settings stay, and a seed counts from its beginning."""
        self.messages.clear()
        self.answers = 0

    def save(self, path: Path) -> None:
        """Write the conversation. A file that is there is replaced only if it holds a conversation (else ValueError)."""
        if path.exists():
            try:
                _read(path)
            except ValueError:
                raise ValueError(
                    f"{path} is there already and holds no saved conversation: choose another name"
                ) from None
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        turns = [
            {"role": turn.role, "content": turn.content} | ({"partial": True} if turn.partial else {})
            for turn in self.messages
        ]
        record = {"model": self.talker.name, "messages": system + turns, "settings": self.settings}
        write_json(path, record)

    def load(self, path: Path) -> None:
        """Replace messages, system text and settings by saved ones; ValueError, and nothing changed, for any other file."""
        self.system, self.messages, self.settings = _read(path)
        self.answers = 0


def _read(path: Path) -> tuple[str | None, list[Message], dict[str, Any]]:
    def refuse(why: str) -> ValueError:
        return ValueError(f"{path} is no saved conversation: {why}")

    try:
        record = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise refuse(f"it is no JSON text ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise refuse('it has no list "messages"')
    for name in record.keys() - {"model", "messages", "settings"}:
        raise refuse(f"{name!r} is unknown; {nearest(name, ('model', 'messages', 'settings'))}")
    messages = [_message(place, item, refuse) for place, item in enumerate(record["messages"], start=1)]
    system = messages[0].content if messages and messages[0].role == "system" else None
    turns = messages if system is None else messages[1:]
    first = 1 + len(messages) - len(turns)
    for place, (message, due) in enumerate(zip(turns, cycle(("user", "assistant")), strict=False), start=first):
        if message.role != due:
            raise refuse(f"message {place} is of role {message.role!r}, due is {due!r}")
    if len(turns) % 2:
        raise refuse("the last message has no answer")
    settings = record.get("settings", {})
    if not isinstance(settings, dict):
        raise refuse('"settings" is no object')
    try:
        values = {name: setting(name).read_json(value) for name, value in settings.items()}
        SamplingParams(**values)
    except ValueError as error:
        raise refuse(str(error)) from None
    return system, turns, values


def _message(place: int, item: Any, refuse: Callable[[str], ValueError]) -> Message:
    if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in ("role", "content")):
        raise refuse(f'message {place} needs "role" and "content", both texts')
    if not isinstance(item.get("partial", False), bool) or item.keys() - {"role", "content", "partial"}:
        raise refuse(f'message {place} may have "role", "content" and "partial" (true or false) only')
    return Message(item["role"], item["content"], item.get("partial", False))


def setting(name: str) -> Any:
    """The Flag of a setting by its name, dashes or underscores; ValueError naming the nearest for an unknown one."""
    try:
        return SETTINGS[name.replace("-", "_")]
    except KeyError:
        raise ValueError(f"{name!r} is no setting; {nearest(name.replace('-', '_'), SETTINGS)}") from None
