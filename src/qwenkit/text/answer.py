"""What a model's answer says: content, reasoning and tool calls, told apart while the answer is being written.

In: the prompt's ids, then what each engine step brings. Out: events; added up they are the whole answer, the same however
it was cut into pieces, so a streamed and a whole answer cannot differ. One machine reads the tags of Qwen2.5 and Qwen3
(<think>, <tool_call>) and the lines of Qwen-1 (ReAct); a table of transitions says which. A call's events come once it is
complete and well-formed, arguments in one piece: what was sent cannot be taken back, and a call that is cut or malformed
has to come out as content, for never may a model's output be an error.
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qwenkit.text import react, tool_calls
from qwenkit.text.answer_tags import Item, Tag, TagReader
from qwenkit.text.chat import ChatFormat, JinjaChat
from qwenkit.text.chat_qwen1 import Qwen1Chat
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.text.tool_calls import CallText

THINK, THINK_END = "<think>", "</think>"

# States. In UNSAID nothing but blanks has come yet, other than reasoning; FINAL is content in which no tag counts.
UNSAID, CONTENT, REASONING, CALL, FINAL = "unsaid", "content", "reasoning", "call", "final"
Rules = Mapping[str, Mapping[str, str]]  # state -> kind of a tag -> the next state; any other tag is text

# A model may quote <tool_call> while it thinks (the prompt told it of the tag), so there it is text.
_HERMES: Rules = {UNSAID: {"think": REASONING, "call": CALL}, CONTENT: {"call": CALL}, REASONING: {"answer": UNSAID}}
_REACT: Rules = {
    UNSAID: {"think": REASONING, "call": CALL, "answer": FINAL},
    CONTENT: {"think": REASONING, "call": CALL, "answer": FINAL},
    REASONING: {"call": CALL, "answer": FINAL},
}
_REACT_KINDS = {
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


class AnswerParser:
    """Reads one answer; made by `AnswerFormat.parser`. Never raises on what a model writes.

    No character is lost, except the tags themselves and blanks beside them: those before a tag, after a tag up to the
    last line break (ReAct: all), and all where nothing else stands between two tags. What goes on after a tag begins on
    a new line. A call whose end tag is missing because the answer ends there, or the next call begins, counts.
    """

    def __init__(
        self, reader: TagReader, rules: Rules, state: str, new_call: Callable[[], CallText], leading: re.Pattern[str]
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

    @property
    def num_tool_calls(self) -> int:
        """Complete, well-formed calls so far."""
        return self._num_tool_calls

    def push(self, token_ids: Sequence[int], text: str) -> list[AnswerEvent]:
        """What is certain after the ids and text of one engine `Delta`."""
        self._read(self._reader.push(token_ids, text))
        return self._take_events()

    def finish(self) -> list[AnswerEvent]:
        """The end of the answer: all that was held back."""
        self._read(self._reader.finish())
        while self._state == CALL:
            if not self._close_call():
                self._read(self._give_up())
        if self._blanks and not self._after_tag:
            self._emit(AnswerEvent(self._kind, self._blanks))
        self._blanks = ""
        return self._take_events()

    def _read(self, items: Iterable[Item]) -> None:
        todo = deque(items)
        while todo:
            item = todo.popleft()
            if self._state == CALL:
                todo.extendleft(reversed(self._read_in_call(item)))
            elif isinstance(item, Tag):
                self._read_tag(item)
            else:
                self._say(item)

    def _read_tag(self, tag: Tag) -> None:
        state = self._rules.get(self._state, {}).get(tag.kind)
        if state is None:
            self._say(tag.text)
            return
        if state == CALL:
            self._opening, self._call, self._call_items = tag, self._new_call(), []
        if state != CALL or self._state == REASONING:
            self._blanks, self._after_tag = "", True
        # Blanks before a call in content stay: they come out with it if it is none.
        self._state = state

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
            if self._close_call():
                return [] if item.kind == "call_end" else [item]
            return [*self._give_up(), item]
        self._call_items.append(item)
        return [] if self._call.add(item if isinstance(item, str) else item.text) else self._give_up()

    def _close_call(self) -> bool:
        """End the call, if its text is well-formed."""
        calls = self._call.calls()
        for call in calls or ():
            self._events.append(AnswerEvent("tool_call", call.name, self._num_tool_calls))
            self._events.append(AnswerEvent("arguments", call.arguments, self._num_tool_calls))
            self._num_tool_calls += 1
        if calls:
            self._state, self._blanks, self._after_tag = CONTENT, "", True
        return bool(calls)

    def _give_up(self) -> list[Item]:
        """The opening tag was text. What followed it is read again: another call may begin there."""
        self._state = CONTENT
        self._say(self._opening.text)
        return self._call_items

    def _emit(self, event: AnswerEvent) -> None:
        if self._events and self._events[-1].kind == event.kind:
            event = AnswerEvent(event.kind, self._events.pop().text + event.text)
        self._events.append(event)

    def _take_events(self) -> list[AnswerEvent]:
        events, self._events = self._events, []
        return events


@dataclass(frozen=True)
class AnswerFormat:
    """How one model writes answers. Made by `of`.

    tool_style: the text of its calls; None: its chat format has no tools, or writes them in a way that is not known.
    thinks: whether it puts reasoning in <think> tags. stop: stop strings that a prompt with tools needs.
    think_end_id: the token that ends thinking; None if it does not think or the vocabulary has no such token.
    """

    tokenizer: Tokenizer
    tool_style: Literal["hermes", "react"] | None
    thinks: bool
    stop: tuple[str, ...] = ()
    think_end_id: int | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer, chat_format: ChatFormat) -> "AnswerFormat":
        """The format that a model's chat format asks for and its vocabulary has tokens for."""
        if isinstance(chat_format, Qwen1Chat):
            return cls(tokenizer, "react", thinks=False, stop=("\n" + react.OBSERVATION,))
        template = chat_format.source if isinstance(chat_format, JinjaChat) else ""
        # Qwen3-Coder puts XML into the same tags.
        hermes = tool_calls.CALL in template and "<function=" not in template
        think_end_id = tokenizer.token_id(THINK_END)
        thinks = THINK_END in template or think_end_id is not None
        return cls(tokenizer, "hermes" if hermes else None, thinks, think_end_id=think_end_id)

    def parser(
        self, prompt_ids: Sequence[int], *, tools: bool, thinking: bool = True, skip_special: bool = True
    ) -> AnswerParser:
        """A parser for one answer to this prompt, whose end decides whether the answer begins inside reasoning.

        tools: whether calls are looked for. thinking: False leaves <think> tags and what they hold in the content.
        skip_special: whether the engine leaves control tokens out of the text (SamplingParams.skip_special_tokens).
        """
        react_text = self.tool_style == "react" and tools
        kinds = dict(_REACT_KINDS) if react_text else {}
        if self.thinks and thinking:
            kinds |= {THINK: "think", THINK_END: "answer"}
        if self.tool_style == "hermes" and tools:
            kinds |= {tool_calls.CALL: "call", tool_calls.CALL_END: "call_end"}
        rules: Rules = (
            _REACT
            if react_text
            else {
                state: known
                for state, transitions in _HERMES.items()
                if (known := {kind: next for kind, next in transitions.items() if kind in kinds.values()})
            }
        )
        reader = TagReader(self.tokenizer, kinds, at_line_start=react_text, skip_special=skip_special)
        if react_text:
            open = self.tokenizer.decode(prompt_ids[-16:]).endswith("\n" + react.THOUGHT)
        else:
            open = self.thinks and thinking and self.prompt_thinking(prompt_ids) == "open"
        return AnswerParser(
            reader,
            rules,
            REASONING if open else UNSAID,
            react.ReactCall if react_text else tool_calls.HermesCall,
            re.compile(r"\A[ \t\r\n]+" if react_text else r"\A[ \t\r\n]*[\r\n]"),
        )

    def prompt_thinking(self, prompt_ids: Sequence[int]) -> Literal["open", "closed", "none"]:
        """Where a prompt leaves thinking: inside <think>, after </think>, or up to the model (none).

        Only the last turn counts, because users write these tags too.
        """
        start = self.tokenizer.special_tokens.get("<|im_start|>")
        turn: list[int] = []
        for id in reversed(prompt_ids):
            if id == start or (start is None and len(turn) == 32):
                break
            turn.append(id)
        text = self.tokenizer.decode(reversed(turn))
        ids = self.tokenizer.token_id(THINK), self.think_end_id
        if None not in ids:
            last = next((id for id in turn if id in ids), None)
            opened, closed = last == ids[0], last == ids[1]
        else:
            opened, closed = text.rfind(THINK) > text.rfind(THINK_END), text.rfind(THINK_END) > text.rfind(THINK)
        if start is None and not text.rstrip().endswith((THINK, THINK_END)):
            return "none"
        return "open" if opened else "closed" if closed else "none"

    def tool_grammar(
        self, tools: Sequence[Mapping[str, Any]], *, choice: str, parallel: bool, may_think: bool = False
    ) -> str:
        """llguidance's lark text of an answer that calls a tool: any (choice "required") or the one named.

        parallel: several calls in one answer, which ReAct cannot write. may_think: let the answer begin with a block of
        reasoning, for a prompt that leaves thinking to the model. Raises ValueError if the model has no format for
        calls, for malformed tools and for a name that no tool has.
        """
        if self.tool_style is None:
            raise ValueError("tools: this model's chat format has no tool calls that can be read")
        schemas = tool_calls.argument_schemas(tools, choice)
        if self.tool_style == "react":
            return react.react_grammar(schemas)
        tags = self._grammar_tag(tool_calls.CALL), self._grammar_tag(tool_calls.CALL_END)
        grammar = tool_calls.hermes_grammar(schemas, parallel=parallel, tags=tags)
        if may_think and self.thinks:
            thought = f"{self._grammar_tag(THINK)} THOUGHT {self._grammar_tag(THINK_END)}"
            grammar = f"{grammar.replace('start: ', 'start: thought? ', 1)}thought: {thought}\nTHOUGHT: /(.|\\n)*/\n"
        return grammar

    def _grammar_tag(self, tag: str) -> str:
        id = self.tokenizer.token_id(tag)
        return f'"{tag}"' if id is None else f"<[{id}]>"
