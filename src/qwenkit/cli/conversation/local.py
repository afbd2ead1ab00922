"""A model in this process as something to talk to.

In: an LLM. Out: pieces of its answers. The first Ctrl-C is kept until the engine has finished its step, so that the next
question meets an engine in order; a second one does not wait.
"""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

from qwenkit.cli.conversation.state import Piece
from qwenkit.engine.sampling import SamplingParams

if TYPE_CHECKING:
    from qwenkit.engine.llm import LLM
    from qwenkit.engine.request import Delta


class Local:
    """The LLM behind `qwenkit chat`; a prompt is messages (through the model's template) or plain text."""

    def __init__(
        self,
        llm: LLM,
        name: str,
        *,
        adapter: str | None = None,
        variables: Mapping[str, Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """adapter: one that `llm` has loaded; variables: for the chat template, such as enable_thinking; defaults: fields of
        SamplingParams that hold here where none is given, before the model's own."""
        self.llm = llm
        self.name = name
        self._defaults = dict(defaults or {})
        self._adapter: dict[str, Any] = {} if adapter is None else {"adapter": adapter}
        self._variables = dict(variables or {})

    def stream(self, prompt: str | Sequence[Mapping[str, str]], params: SamplingParams) -> Generator[Piece, None, None]:
        """See Talker. ValueError for a prompt that the template refuses or the context cannot hold."""
        missing = {name: value for name, value in self._defaults.items() if getattr(params, name) is None}
        params = replace(params, **missing)
        with _ctrl_c_kept() as pressed:
            variables = {} if isinstance(prompt, str) else self._variables
            deltas = cast("Generator[Delta, None, None]", self.llm.stream(prompt, params, **self._adapter, **variables))
            with closing(deltas):  # closing it takes the request out of the engine
                for delta in deltas:
                    yield Piece(delta.text, tokens=len(delta.token_ids), finish_reason=delta.finish_reason)
                    if pressed:
                        raise KeyboardInterrupt

    def defaults(self) -> Mapping[str, Any]:
        return asdict(self.llm.default_params) | self._defaults

    def doing(self) -> str:
        """What is being done before the first piece, for a spinner."""
        progress = self.llm.prefill_progress
        return "reading the prompt" if progress is None else "reading the prompt: {} of {} tokens".format(*progress)


@contextmanager
def _ctrl_c_kept() -> Iterator[list[int]]:
    """While it lasts the first Ctrl-C is only put into the list, and the second one raises."""
    pressed: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
