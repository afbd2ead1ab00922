"""AnswerParser: what a model's answer says: content, reasoning and tool calls, told apart while the answer is being written.

In: the prompt's ids, then what each engine step brings. Out: events; added up they are the whole answer, the same however
it was cut into pieces. One machine reads the tags of Qwen2.5 and Qwen3 (<think>, <tool_call> with JSON or XML) and the lines
of Qwen-1 (ReAct); a table of transitions says which. A call's events come once it is complete and well-formed, arguments in
one piece: what was sent cannot be taken back, and a call that is cut or malformed has to come out as content, for never may
a model's output be an error. A streamed and a whole answer differ in one thing only: where a thought has no opening tag, the
whole answer has it as a thought, and in a stream it was content before its closing tag came.
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qwenkit.text import react
from qwenkit.text.answer_tags import Item, Tag, TagReader
from qwenkit.text.tool_calls import CallText, ToolCall
from qwenkit.text.untagged_calls import Untagged

# States. In UNSAID nothing but blanks has come yet, other than reasoning; FINAL is content in which no tag counts.
UNSAID, CONTENT, REASONING, CALL, FINAL = "unsaid", "content", "reasoning", "call", "final"
Rules = Mapping[str, Mapping[str, str]]  # state -> kind of a tag -> the next state; any other tag is text

# A model may quote <tool_call> while it thinks (the prompt told it of the tag), so there it is text.
# An end of thinking in content is a stray one, see `_read_stray_end`.
HERMES_RULES: Rules = {
    UNSAID: {"think": REASONING, "call": CALL, "answer": UNSAID},
    CONTENT: {"call": CALL, "answer": UNSAID},
    REASONING: {"answer": UNSAID},
}
REACT_RULES: Rules = {
    UNSAID: {"think": REASONING, "call": CALL, "answer": FINAL},
    CONTENT: {"think": REASONING, "call": CALL, "answer": FINAL},
    REASONING: {"call": CALL, "answer": FINAL},
}
REACT_KINDS = {
    react.THOUGHT: "think",
    react.ACTION: "call",
    react.ACTION_INPUT: "input",
    react.OBSERVATION: "call_end",
    react.FINAL_ANSWER: "answer",
}
_BLANK = " \t\r\n"


@dataclass(frozen=True)
class AnswerEvent:
    """One thing an answer said. "tool_call" opens call number `tool_index`, its text is the function's name; "arguments"
    adds text to that call's arguments; "content" and "reasoning" add text to theirs.
    """

    kind: Literal["content", "reasoning", "tool_call", "arguments"]
    text: str
    tool_index: int = 0


class _QuotedCall:
    """A call that stands in a thought which is not closed. It counts only if nothing follows it: a model may quote one."""

    def __init__(self, opening: Tag, call: CallText) -> None:
        self.items: list[Item] = [opening]
        self._call = call
        self._is_closed = False

    def add(self, item: Item) -> bool:
        """Take the next item; False, and the item is not taken, if the call cannot be the answer's end any more."""
        if self._is_closed:
            taken = isinstance(item, str) and not item.strip(_BLANK)
        elif isinstance(item, Tag) and not self._call.holds(item):
            taken = self._is_closed = item.kind == "call_end"
        else:
            taken = self._call.add(item if isinstance(item, str) else item.text)
        if taken:
            self.items.append(item)
        return taken

    def calls(self) -> list[ToolCall] | None:
        """The calls, if their end tag came."""
        return self._call.calls(closed=True) if self._is_closed else None


class AnswerParser:
    """Reads one answer; made by `AnswerFormat.parser`. Never raises on what a model writes.

    No character is lost, except the tags themselves and blanks beside them: those before a tag, after a tag up to the
    last line break (ReAct: all), and all where nothing else stands between two tags. What goes on after a tag begins on
    a new line. A call whose end tag is missing because the answer ends there, or the next call begins, counts.
    """

    def __init__(
        self,
        reader: TagReader,
        rules: Rules,
        state: str,
        new_call: Callable[[], CallText],
        leading: re.Pattern[str],
        *,
        untagged: tuple[Callable[[], Untagged], Callable[[str], list[ToolCall] | None]] | None = None,
        whole: bool = False,
        thought_closed: bool = False,
    ) -> None:
        self._reader = reader
        self._rules = rules
        self._state = state
        self._new_call = new_call
        self._leading = leading  # what of the blanks after a tag is dropped
        self._after_tag = state == REASONING
        self._blanks = ""  # trailing blanks, which a tag would swallow
        self._said: set[str] = set()  # kinds of text there has been
        self._opening = Tag("call", "")
        self._call = new_call()
        self._call_items: list[Item] = []
        self._num_tool_calls = 0
        self._events: list[AnswerEvent] = []
        self._new_untagged = untagged
        self._untagged = untagged[0]() if untagged else None  # the answer as a call without tags, while it may be one
        self._first = state == UNSAID  # no tag has come yet
        self._may_be_thought = whole and self._first and "answer" in rules.get(UNSAID, {})
        self._thought_closed = thought_closed  # by the prompt
        self._held: list[str] = []  # content that may turn out to be a thought or a call
        self._stray: Tag | None = None  # an end of thinking that counts if a line ends behind it
        self._quoted: _QuotedCall | None = None  # a call in a thought, while it may be the answer's end

    @property
    def num_tool_calls(self) -> int:
        """Complete, well-formed calls so far."""
        return self._num_tool_calls

    def push(self, token_ids: Sequence[int], text: str) -> list[AnswerEvent]:
        """What is certain after the ids and text of one engine `Delta`."""
        self._read(self._reader.push(token_ids, text))
        return self._take_events()

    def finish(self, *, cut: bool = False) -> list[AnswerEvent]:
        """The end of the answer: all that was held back. cut: for length, so that the model had more to say."""
        self._read(self._reader.finish())
        if self._quoted is not None:
            calls = None if cut else self._quoted.calls()
            if calls:
                self._quoted = None
                self._tell(calls)
            else:
                self._unquote()
        if self._stray is not None:
            self._end_stray()
        while self._state == CALL:
            if not self._close_call(closed=False):
                self._read(self._give_up())
        if self._blanks and not self._after_tag:
            self._emit(AnswerEvent(self._kind, self._blanks))
        self._blanks = ""
        if self._untagged is not None and self._new_untagged is not None and not self._num_tool_calls:
            calls = self._untagged.calls(self._new_untagged[1])
            if calls:
                self._held = []
                self._tell(calls)
        self._may_be_thought = False
        self._release()
        return self._take_events()

    def _read(self, items: Iterable[Item]) -> None:
        todo = deque(items)
        while todo:
            item = todo.popleft()
            if self._stray is not None:
                if isinstance(item, Tag) or item[0] in "\r\n":
                    self._end_stray()
                else:
                    stray, self._stray = self._stray, None
                    self._say(stray.text)
            if self._quoted is not None and not self._quoted.add(item):
                self._unquote()
            if self._quoted is not None:
                continue
            if self._state == CALL:
                todo.extendleft(reversed(self._read_in_call(item)))
            elif self._state == REASONING and isinstance(item, Tag) and item.kind == "call" and self._ends_thoughts:
                self._quoted = _QuotedCall(item, self._new_call())
            elif isinstance(item, Tag):
                self._read_tag(item)
            else:
                self._say(item)

    @property
    def _ends_thoughts(self) -> bool:
        """Whether a call may be what a thought ends with: not where a table of its own says that it does (ReAct)."""
        return "call" in self._rules.get(UNSAID, {}) and "call" not in self._rules.get(REASONING, {})

    def _unquote(self) -> None:
        """What began like a call in a thought is part of the thought."""
        assert self._quoted is not None
        items, self._quoted = self._quoted.items, None
        for item in items:
            self._say(item if isinstance(item, str) else item.text)

    def _read_tag(self, tag: Tag) -> None:
        state = self._rules.get(self._state, {}).get(tag.kind)
        if state is None:
            self._say(tag.text)
            return
        if state == UNSAID and self._state != REASONING:
            self._read_stray_end(tag)
            return
        self._first = self._may_be_thought = False
        if self._untagged is None or self._held:
            self._release()
        if state == CALL:
            self._opening, self._call, self._call_items = tag, self._new_call(), []
        if state != CALL or self._state == REASONING:
            self._blanks, self._after_tag = "", True
        # Blanks before a call in content stay: they come out with it if it is none.
        self._state = state

    def _read_stray_end(self, tag: Tag) -> None:
        """An end of thinking that did not begin. As the first tag it ends a thought whose opening tag was left out. A
        later one, or one after a prompt that closed the thought, counts on a line of its own; inside a line it is quoted."""
        if self._first and not self._thought_closed:
            self._end_stray()
        elif self._said and "\n" not in self._blanks and not self._after_tag:
            self._say(tag.text)
        else:
            self._stray = tag

    def _end_stray(self) -> None:
        """Leave out the tag; what was held back before it is a thought."""
        self._stray = None
        if self._may_be_thought and self._held:
            thought, self._held = "".join(self._held), []
            self._may_be_thought = False
            self._said = {"reasoning"}
            self._untagged = self._new_untagged[0]() if self._new_untagged else None
            self._events.append(AnswerEvent("reasoning", thought.rstrip(_BLANK)))
        self._first = self._may_be_thought = False
        self._state, self._blanks, self._after_tag = UNSAID, "", True

    def _say(self, text: str) -> None:
        text = self._blanks + text
        said = text.rstrip(_BLANK) if self._after_tag or self._rules.get(self._state) else text
        self._blanks = text[len(said) :]
        if not said:
            return
        kind = self._kind
        if self._after_tag:
            said = self._leading.sub("", said)
            if kind in self._said:
                said = "\n" + said
            self._after_tag = False
        if self._state == UNSAID:
            self._state = CONTENT
        self._said.add(kind)
        self._emit(AnswerEvent(kind, said))

    @property
    def _kind(self) -> Literal["content", "reasoning"]:
        return "reasoning" if self._state == REASONING else "content"

    def _read_in_call(self, item: Item) -> list[Item]:
        """Take `item` into the call, or end the call before it. Returns the items to read again, outside of the call."""
        if isinstance(item, Tag) and not self._call.holds(item):
            if self._close_call(closed=item.kind == "call_end"):
                return [] if item.kind == "call_end" else [item]
            return [*self._give_up(), item]
        self._call_items.append(item)
        return [] if self._call.add(item if isinstance(item, str) else item.text) else self._give_up()

    def _close_call(self, *, closed: bool) -> bool:
        """End the call, if its text is well-formed. closed: by its end tag."""
        calls = self._call.calls(closed=closed)
        if calls:
            self._untagged = None
            self._release()
            self._tell(calls)
            self._state, self._blanks, self._after_tag = CONTENT, "", True
        return bool(calls)

    def _tell(self, calls: Iterable[ToolCall]) -> None:
        for call in calls:
            self._events.append(AnswerEvent("tool_call", call.name, self._num_tool_calls))
            self._events.append(AnswerEvent("arguments", call.arguments, self._num_tool_calls))
            self._num_tool_calls += 1

    def _give_up(self) -> list[Item]:
        """The opening tag was text. What followed it is read again: another call may begin there."""
        self._state = CONTENT
        self._say(self._opening.text)
        return self._call_items

    def _emit(self, event: AnswerEvent) -> None:
        if event.kind == "content":
            if self._untagged is not None and not self._untagged.add(event.text):
                self._untagged = None
            if self._untagged is not None or self._may_be_thought:
                self._held.append(event.text)
                return
            self._release()
        if self._events and self._events[-1].kind == event.kind:
            event = AnswerEvent(event.kind, self._events.pop().text + event.text)
        self._events.append(event)

    def _release(self) -> None:
        """What was held back is content."""
        held, self._held = self._held, []
        if held:
            self._untagged = None
            self._emit(AnswerEvent("content", "".join(held)))

    def _take_events(self) -> list[AnswerEvent]:
        events, self._events = self._events, []
        return events
