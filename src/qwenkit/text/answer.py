"""How one model writes answers: what its chat template teaches and its vocabulary has tokens for.

In: a tokenizer and a chat format. Out: an `AnswerFormat`, which makes a parser for each answer and the grammar of an answer
that calls a tool.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from qwenkit.text import react, tool_calls, xml_calls
from qwenkit.text.answer_parser import (
    HERMES_RULES,
    REACT_KINDS,
    REACT_RULES,
    REASONING,
    UNSAID,
    AnswerEvent,
    AnswerParser,
    Rules,
)
from qwenkit.text.answer_tags import TagReader
from qwenkit.text.chat import ChatFormat, JinjaChat
from qwenkit.text.chat_qwen1 import Qwen1Chat
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.text.tool_calls import CallText, ToolCall
from qwenkit.text.untagged_calls import Untagged, UntaggedCall, UntaggedXmlCall

__all__ = ["THINK", "THINK_END", "AnswerEvent", "AnswerFormat", "AnswerParser"]

THINK, THINK_END = "<think>", "</think>"


@dataclass(frozen=True)
class AnswerFormat:
    """How one model writes answers. Made by `of`.

    tool_style: the text of its calls, which is the one that its chat template teaches; None: its chat format has no tools,
    or writes them in a way that is not known.
    thinks: whether it puts reasoning in <think> tags. stop: stop strings that a prompt with tools needs.
    think_end_id: the token that ends thinking; None if it does not think or the vocabulary has no such token.
    """

    tokenizer: Tokenizer
    tool_style: Literal["hermes", "xml", "react"] | None
    thinks: bool
    stop: tuple[str, ...] = ()
    think_end_id: int | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer, chat_format: ChatFormat) -> "AnswerFormat":
        """The format that a model's chat format asks for and its vocabulary has tokens for."""
        if isinstance(chat_format, Qwen1Chat):
            return cls(tokenizer, "react", thinks=False, stop=("\n" + react.OBSERVATION,))
        template = chat_format.source if isinstance(chat_format, JinjaChat) else ""
        style: Literal["hermes", "xml"] | None = None
        if tool_calls.CALL in template:  # Qwen3-Coder puts XML into the same tags
            style = "xml" if xml_calls.FUNCTION in template else "hermes"
        think_end_id = tokenizer.token_id(THINK_END)
        thinks = THINK_END in template or think_end_id is not None
        return cls(tokenizer, style, thinks, think_end_id=think_end_id)

    def parser(
        self,
        prompt_ids: Sequence[int],
        *,
        tools: bool,
        thinking: bool = True,
        skip_special: bool = True,
        definitions: Sequence[Mapping[str, Any]] = (),
        whole: bool = False,
    ) -> AnswerParser:
        """A parser for one answer to this prompt, whose end decides whether the answer begins inside reasoning.

        tools: whether calls are looked for. thinking: False leaves <think> tags and what they hold in the content.
        skip_special: whether the engine leaves control tokens out of the text (SamplingParams.skip_special_tokens).
        definitions: the tools that may be called; their schemas give arguments in XML their types, and a call that
        is not written as it should be counts only if it names one of them. whole: nothing is shown before the end.
        """
        react_text = self.tool_style == "react" and tools
        kinds = dict(REACT_KINDS) if react_text else {}
        if self.thinks and thinking:
            kinds |= {THINK: "think", THINK_END: "answer"}
        tagged = self.tool_style in ("hermes", "xml") and tools
        if tagged:
            kinds |= {tool_calls.CALL: "call", tool_calls.CALL_END: "call_end"}
        rules: Rules = (
            REACT_RULES
            if react_text
            else {
                state: known
                for state, transitions in HERMES_RULES.items()
                if (known := {kind: next for kind, next in transitions.items() if kind in kinds.values()})
            }
        )
        reader = TagReader(self.tokenizer, kinds, at_line_start=react_text, skip_special=skip_special)
        stands = "none"
        if react_text:
            open = self.tokenizer.decode(prompt_ids[-16:]).endswith("\n" + react.THOUGHT)
        else:
            stands = self.prompt_thinking(prompt_ids) if self.thinks and thinking else "none"
            open = stands == "open"
        schemas = tool_calls.known_schemas(definitions)
        new_call, untagged = self._readers(schemas)
        return AnswerParser(
            reader,
            rules,
            REASONING if open else UNSAID,
            new_call,
            re.compile(r"\A[ \t\r\n]+" if react_text else r"\A[ \t\r\n]*[\r\n]"),
            untagged=untagged if tagged and schemas else None,
            whole=whole,
            thought_closed=stands == "closed",
        )

    def _readers(
        self, schemas: Mapping[str, Any]
    ) -> tuple[Callable[[], CallText], tuple[Callable[[], Untagged], Callable[[str], list[ToolCall] | None]] | None]:
        """What makes a reader of a call; of an answer that may be one without tags, and of its text."""
        if self.tool_style == "react":
            return react.ReactCall, None
        if self.tool_style == "xml":
            read = partial(xml_calls.xml_calls, schemas=schemas)
            return partial(xml_calls.XmlCall, schemas), (partial(UntaggedXmlCall, schemas), read)
        return partial(tool_calls.HermesCall, schemas), (partial(UntaggedCall, schemas), tool_calls.json_calls)

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
        write = xml_calls.xml_grammar if self.tool_style == "xml" else tool_calls.hermes_grammar
        grammar = write(schemas, parallel=parallel, tags=tags)
        if may_think and self.thinks:
            thought = f"{self._grammar_tag(THINK)} THOUGHT {self._grammar_tag(THINK_END)}"
            grammar = f"{grammar.replace('start: ', 'start: thought? ', 1)}thought: {thought}\nTHOUGHT: /(.|\\n)*/\n"
        return grammar

    def _grammar_tag(self, tag: str) -> str:
        id = self.tokenizer.token_id(tag)
        return f'"{tag}"' if id is None else f"<[{id}]>"
