"""A conversation at a terminal: the prompt with history, completion and several lines, and the answers under it.

In: keys. Out: text on the screen. What a line means is `commands`' and `conversation`'s business. Ctrl-C stops an answer or
clears the line; end-of-file leaves.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output

from qwenkit.cli.conversation.commands import COMMANDS, run_command
from qwenkit.cli.conversation.screen import Meter, Screen, doing_of, show_answer
from qwenkit.cli.conversation.state import SETTINGS, Conversation, Piece
from qwenkit.cli.errors import sentence


class Terminal:
    """Runs a conversation until the user leaves. `input` and `output` replace the real terminal in tests."""

    def __init__(
        self,
        conversation: Conversation,
        screen: Screen,
        history: History,
        *,
        input: Input | None = None,
        output: Output | None = None,
    ) -> None:
        self.conversation = conversation
        self.screen = screen
        self.session: PromptSession[str] = PromptSession(
            history=history,
            multiline=True,
            key_bindings=_keys(),
            completer=SlashCompleter(),
            prompt_continuation="  ",
            input=input,
            output=output,
        )

    def run(self) -> None:
        """Read lines and answer them until /exit or end-of-file."""
        self.screen.line(f"{self.conversation.talker.name}: /help shows the commands, /exit or Ctrl-D leaves", dim=True)
        while True:
            try:
                line = self.session.prompt(HTML("<b>&gt; </b>")).strip()
            except KeyboardInterrupt:
                self.screen.line("(/exit or Ctrl-D leaves)", dim=True)
                continue
            except EOFError:
                return
            if line and not self.handle(line):
                return

    def handle(self, line: str) -> bool:
        """Do what a line says; False when the user wants to leave. Errors are shown, not raised."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                outcome = run_command(self.conversation, line)
                if outcome.show:
                    self.screen.line(outcome.show)
                if outcome.answer is not None:
                    self._answer(outcome.answer)
                return not outcome.leave
            self._answer(self.conversation.ask(line[1:] if line.startswith("//") else line))
        except (ValueError, OSError) as error:
            self.screen.line(f"error: {sentence(error)}")
        return True

    def _answer(self, pieces: Generator[Piece, None, None]) -> None:
        meter = Meter(asked=time.monotonic())
        stopped = False
        try:
            show_answer(pieces, self.screen, meter, doing_of(self.conversation.talker))
        except KeyboardInterrupt:
            stopped = True
        self.screen.line(meter.summary(stopped=stopped), dim=True)


def open_history(path: Path) -> History:
    """What was typed in earlier conversations; in memory only where the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def newline(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


class SlashCompleter(Completer):
    """Commands after a slash, names of settings after /set, files after /save and /load; nothing in a message."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or text.startswith("//"):
            return
        name, space, rest = text[1:].partition(" ")
        if not space:
            for known, command in COMMANDS.items():
                if known.startswith(name):
                    yield Completion(known, -len(name), display=f"/{known}", display_meta=command.english)
        elif name == "set":
            before, _, word = rest.rpartition(" ")
            value_is_due = sum(2 if "=" in part else 1 for part in before.split()) % 2
            for flag in SETTINGS.values():
                if flag.name.startswith(word) and not value_is_due:
                    yield Completion(flag.name, -len(word), display_meta=flag.help)
        elif name in ("save", "load"):
            yield from self._paths.get_completions(Document(rest), complete_event)
