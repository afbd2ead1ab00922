"""Qwen-1's ChatML, which came as code (qwen_generation_utils.make_context, openai_api.py) and not as a template.

In: messages: a system message first, then user and assistant in turn (`in_turn` makes that of any conversation); with tools,
results after the assistant's calls, all written as ReAct text. Out: ids and mask. The pieces of a turn are tokenized apart, and
the history is a window: whole turns, newest first, as long as they fit.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qwenkit.text import react
from qwenkit.text.chat import Rendered, checked_messages, mask_of_parts
from qwenkit.text.tokenizer import Tokenizer

DEFAULT_SYSTEM = "You are a helpful assistant."

_Marked = list[tuple[int, bool]]  # ids, each with whether the assistant produced it


class Qwen1Chat:
    """max_window_size: tokens of system text and history a prompt may have (generation_config.json)."""

    def __init__(self, tokenizer: Tokenizer, *, max_window_size: int) -> None:
        for control in ("<|im_start|>", "<|im_end|>"):
            if control not in tokenizer.special_tokens:
                raise ValueError(f"Qwen-1's chat format needs the control token {control}, which the tokenizer lacks")
        self._tokenizer = tokenizer
        self._max_window_size = max_window_size
        self._start, self._end = tokenizer.special_tokens["<|im_start|>"], tokenizer.special_tokens["<|im_end|>"]
        self._newline = self._prompt("\n")

    def to_json(self) -> dict[str, Any]:
        """Arguments that make the same format in another process, given the tokenizer."""
        return {"max_window_size": self._max_window_size}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        max_tokens: int | None = None,
        **variables: Any,
    ) -> Rendered:
        """See `ChatFormat.render`.

        With a generation prompt the last message is the user's query: earlier turns are left out, oldest first, unless
        system, turns and the newer turns together stay below max_window_size; the query is not counted, but one that
        alone is longer raises ValueError. Without one (training) nothing is left out, the assistant may have the last
        word, and the text ends with a newline. If the last message is a tool's result, query and unfinished answer stay
        together and the prompt ends in "Thought:". Tools that stood in a turn left out are told with the query.
        `max_tokens` holds for each turn: those left out count nothing together.
        """
        given = zip(checked_messages(messages), messages, strict=True)
        messages = in_turn(
            [{**each, "content": each["content"] or "", "tool_calls": said.get("tool_calls")} for each, said in given]
        )
        checked = [dict(message) for message in messages]
        system = checked.pop(0)["content"] if checked[0]["role"] == "system" else DEFAULT_SYSTEM
        offset = len(messages) - len(checked)
        if tools or any(message["role"] == "tool" or message.get("tool_calls") for message in checked):
            system = system.lstrip("\n").rstrip()
            # Arguments go into the prompt letter for letter, so the calls are as the caller wrote them.
            turns = react.turns(checked, offset, tools or ())
        else:
            turns = _plain_turns(checked, offset)
        first = self._turn("system", [(system, False)], max_tokens)
        continuing = add_generation_prompt and bool(checked) and checked[-1]["role"] == "tool"
        if continuing:
            turns[-1][1].append((f"\n{react.THOUGHT}", False))
        blocks = [[*self._newline, *self._turn(role, parts, max_tokens)] for role, parts in turns]
        if continuing:
            del blocks[-1][-1]  # the end token: the assistant's turn goes on
        if not add_generation_prompt:
            return _rendered(first, *blocks, self._newline)
        if not continuing and len(blocks) % 2 == 0:
            raise ValueError("messages: the last one must be the user's, for the assistant to answer")
        history, query = (blocks[:-2], blocks[-2] + blocks[-1]) if continuing else (blocks[:-1], blocks[-1])
        window = self._window(len(first), history)
        if tools and history and not window and not continuing:
            query = [*self._newline, *self._turn(*react.asked(turns[-1], tools), max_tokens)]
        query_length = len(query) - len(self._newline)
        if query_length > self._max_window_size:
            raise ValueError(
                f"the last message takes {query_length} tokens, more than the {self._max_window_size} of max_window_size"
            )
        if continuing:
            return _rendered(first, window, query)
        header = [*self._newline, (self._start, False), *self._prompt("assistant"), *self._newline]
        return _rendered(first, window, query, header)

    def _prompt(self, text: str) -> _Marked:
        return [(id, False) for id in self._tokenizer.encode(text)]

    def _turn(self, role: str, parts: react.Parts, max_tokens: int | None) -> _Marked:
        """A whole turn. The assistant produced the parts marked so, and the end token of its turn."""
        ids = self._tokenizer.encode("".join(text for text, _ in parts), max_tokens=max_tokens)
        said = zip(ids, mask_of_parts(self._tokenizer, ids, parts), strict=True)
        header = [(self._start, False), *self._prompt(role), *self._newline]
        return [*header, *said, (self._end, role == "assistant")]

    def _window(self, system_length: int, history: list[_Marked]) -> _Marked:
        """The newest turns of `history`, user's and assistant's in pairs, that fit beside the system text."""
        window: _Marked = []
        for index in range(len(history) - 2, -1, -2):
            pair = history[index] + history[index + 1]
            if system_length + len(pair) + len(window) >= self._max_window_size:
                break
            window = pair + window
        return window


def in_turn(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages, whose contents are texts, in the order that the format has: one system message, then turns that alternate.

    Neighbours of one role are joined by a blank line; a later system message is part of the user's turn. Calls and results of
    tools are left as they are.
    """
    done: list[dict[str, Any]] = []
    for message in messages:
        role = message["role"]
        if role == "system" and any(each["role"] != "system" for each in done):
            role = "user"
        last = done[-1] if done else None
        if (
            last is not None
            and last["role"] == role != "tool"
            and not (last.get("tool_calls") or message.get("tool_calls"))
        ):
            last["content"] = "\n\n".join(filter(None, (last["content"], message["content"])))
        else:
            done.append({**message, "role": role})
    return done


def _plain_turns(messages: Sequence[Mapping[str, Any]], offset: int) -> list[tuple[str, react.Parts]]:
    for index, message in enumerate(messages):
        expected = ("user", "assistant")[index % 2]
        if message["role"] != expected:
            raise ValueError(
                f"messages[{offset + index}].role is {message['role']!r}, but {expected!r} comes here: Qwen-1 takes "
                "one system message first, then user and assistant in turn"
            )
    return [(message["role"], [(message["content"], message["role"] == "assistant")]) for message in messages]


def _rendered(*blocks: _Marked) -> Rendered:
    return Rendered([id for block in blocks for id, _ in block], [said for block in blocks for _, said in block])
