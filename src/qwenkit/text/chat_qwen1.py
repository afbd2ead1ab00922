"""Qwen-1's ChatML, which came as code (qwen_generation_utils.make_context) and not as a template.

In: messages: at most one system message first, then user and assistant in turn. Out: ids and mask. The pieces of a
turn are tokenized apart, and the history is a window: whole turns, newest first, as long as they fit.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qwenkit.text.chat import Rendered, chatml_mask, checked_messages
from qwenkit.text.tokenizer import Tokenizer

DEFAULT_SYSTEM = "You are a helpful assistant."


class Qwen1Chat:
    """max_window_size: tokens of system text and history a prompt may have (generation_config.json)."""

    def __init__(self, tokenizer: Tokenizer, *, max_window_size: int) -> None:
        for control in ("<|im_start|>", "<|im_end|>"):
            if control not in tokenizer.special_tokens:
                raise ValueError(f"Qwen-1's chat format needs the control token {control}, which the tokenizer lacks")
        self._tokenizer = tokenizer
        self._max_window_size = max_window_size
        self._start, self._end = tokenizer.special_tokens["<|im_start|>"], tokenizer.special_tokens["<|im_end|>"]
        self._newline = tokenizer.encode("\n")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> Rendered:
        """See `ChatFormat.render`.

        With a generation prompt the last message is the user's query: earlier turns are left out, oldest first, unless
        system, turns and the newer turns together stay below max_window_size; the query is not counted, but one that
        alone is longer raises ValueError. Without one (training) nothing is left out, the assistant may have the last
        word, and the text ends with a newline.
        """
        if tools:
            raise ValueError("tools: Qwen-1 needs the ReAct prompt for them, which is not available yet")
        turns = checked_messages(messages)
        system = self._turn("system", turns.pop(0)["content"] if turns[0]["role"] == "system" else DEFAULT_SYSTEM)
        offset = len(messages) - len(turns)
        for index, turn in enumerate(turns):
            expected = ("user", "assistant")[index % 2]
            if turn["role"] != expected:
                raise ValueError(
                    f"messages[{offset + index}].role is {turn['role']!r}, but {expected!r} comes here: Qwen-1 takes "
                    "one system message first, then user and assistant in turn"
                )
            if turn.get("tool_calls"):
                raise ValueError(f"messages[{offset + index}].tool_calls: Qwen-1 has no format for tool calls")
        blocks = [[*self._newline, *self._turn(turn["role"], turn["content"])] for turn in turns]
        if add_generation_prompt:
            ids = self._windowed(system, blocks)
            ids += [*self._newline, self._start, *self._tokenizer.encode("assistant"), *self._newline]
        else:
            ids = [*system, *(id for block in blocks for id in block), *self._newline]
        return Rendered(ids, chatml_mask(self._tokenizer, ids))

    def _turn(self, role: str, content: str) -> list[int]:
        encode = self._tokenizer.encode
        return [self._start, *encode(role), *self._newline, *encode(content), self._end]

    def _windowed(self, system: list[int], blocks: list[list[int]]) -> list[int]:
        if len(blocks) % 2 == 0:
            raise ValueError("messages: the last one must be the user's, for the assistant to answer")
        query = blocks[-1]
        query_length = len(query) - len(self._newline)
        if query_length > self._max_window_size:
            raise ValueError(
                f"the last message takes {query_length} tokens, more than the {self._max_window_size} of max_window_size"
            )
        history: list[int] = []
        for index in range(len(blocks) - 3, -1, -2):
            pair = blocks[index] + blocks[index + 1]
            if len(system) + len(pair) + len(history) >= self._max_window_size:
                break
            history = pair + history
        return system + history + query
