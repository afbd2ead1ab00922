"""The one renderer of conversations: chat, serving and training all get their ids here.

In: messages in the OpenAI shape, optionally tool definitions. Out: `Rendered`, the prompt's ids and a mask over what
the assistant said. `JinjaChat` follows the template a model brings along and gives the ids transformers gives, except
that control tokens written by a caller stay plain text. Qwen-1, which has no template, is in chat_qwen1.py.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qwenkit.text.template import GENERATION_END, GENERATION_START, ChatTemplate, Disguise
from qwenkit.text.tokenizer import Tokenizer, TokenLimitError

ROLES = ("system", "user", "assistant", "tool")
_MARKS = re.compile(f"({GENERATION_START}|{GENERATION_END})")


@dataclass(frozen=True)
class Rendered:
    """A conversation as ids.

    mask has one entry per id, True on what the assistant produced: its text and the token that ends its turn, never a
    header or a generation prompt. None: the template does not show who speaks.
    """

    ids: list[int]
    mask: list[bool] | None


class ChatFormat(Protocol):
    """How one model wants a conversation written."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        max_tokens: int | None = None,
        **variables: Any,
    ) -> Rendered:
        """Ids and mask of `messages`; with add_generation_prompt, up to where the assistant's next answer begins.

        variables: what else the model's format knows, such as Qwen3's enable_thinking. Raises ValueError, naming
        the message and the field, for messages that are malformed or that the format has no place for, and
        TokenLimitError for more than `max_tokens` tokens.
        """
        ...


class JinjaChat:
    """The template of a model's tokenizer_config.json, chat_template.jinja or GGUF.

    variables: what the template may use besides the messages, as bos_token and eos_token. They are the model's own
    and are trusted; those given to `render` are the caller's and are not.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, *, variables: Mapping[str, Any] | None = None) -> None:
        self.source = template
        """The template as the model brought it."""
        self._tokenizer = tokenizer
        self._template = ChatTemplate(template)
        self._variables = dict(variables or {})
        self._disguise = Disguise(tokenizer.special_tokens)
        self._is_chatml = (
            "<|im_start|>" in template and {"<|im_start|>", "<|im_end|>"} <= tokenizer.special_tokens.keys()
        )

    def to_json(self) -> dict[str, Any]:
        """Arguments that make the same format in another process, given the tokenizer."""
        return {"template": self.source, "variables": self._variables}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        max_tokens: int | None = None,
        **variables: Any,
    ) -> Rendered:
        """See `ChatFormat.render`. With ChatML headers the mask comes from them, else from {% generation %} blocks.

        A ChatML answer that begins with a line break may share a token with the end of its header, which is then not
        marked. A token that a {% generation %} block shares with the text beside it is marked.
        """
        for index, tool in enumerate(tools or ()):
            if not isinstance(tool, Mapping):
                raise ValueError(f"tools[{index}] is a {type(tool).__name__}, not an object describing a function")
        checked = checked_messages(messages)
        others = {"documents": None, **variables, "tools": None if tools is None else list(tools)}
        ids, generated = self._encode(self._text(checked, others, add_generation_prompt), max_tokens)
        if self._is_chatml:
            return Rendered(ids, chatml_mask(self._tokenizer, ids))
        return Rendered(ids, generated if self._template.marks_generation else None)

    def _text(self, messages: list[dict[str, Any]], others: dict[str, Any], add_generation_prompt: bool) -> str:
        """The rendered text, with calls as they were made; for a template that fails on arguments that are no object, they
        are the only member of one."""
        try:
            return self._text_of(messages, others, add_generation_prompt)
        except ValueError:
            wrapped = [_with_object_arguments(message) for message in messages]
            if wrapped == messages:
                raise
            return self._text_of(wrapped, others, add_generation_prompt)

    def _text_of(self, messages: list[dict[str, Any]], others: dict[str, Any], add_generation_prompt: bool) -> str:
        """The same of one form of the messages. Content that is null stays null for templates that ask whether it is none;
        for one that fails on it, or writes it out as the word None, it is an empty text."""
        empty = [message | {"content": ""} if message["content"] is None else message for message in messages]

        def render(messages: list[dict[str, Any]]) -> str:
            try:
                given = {
                    name: self._disguise.put_on(value, name)
                    for name, value in ({"messages": messages} | others).items()
                }
            except RecursionError:
                raise ValueError("messages or tools are nested too deeply") from None
            return self._template.render(self._variables | given | {"add_generation_prompt": add_generation_prompt})

        if all(message["content"] is not None for message in messages):
            return render(messages)
        try:
            text = render(messages)
        except ValueError:
            return render(empty)
        if "None" not in text:
            return text
        try:
            without = render(empty)
        except ValueError:
            return text
        return text if text.count("None") <= without.count("None") else without

    def _encode(self, text: str, max_tokens: int | None) -> tuple[list[int], list[bool]]:
        """Ids of a rendered text, and which of them lie in {% generation %} blocks."""
        ids: list[int] = []
        mask: list[bool] = []
        generated = False
        for piece in self._tokenizer.split_control(text):
            if isinstance(piece, int):
                ids.append(piece)
                mask.append(generated)
                continue
            parts: list[tuple[str, bool]] = []
            for part in _MARKS.split(piece):
                if part in (GENERATION_START, GENERATION_END):
                    generated = part == GENERATION_START
                else:
                    parts.append((self._disguise.take_off(part), generated))
            piece_ids = self._tokenizer.encode("".join(part for part, _ in parts), max_tokens=max_tokens)
            ids += piece_ids
            if max_tokens is not None and len(ids) > max_tokens:
                raise TokenLimitError(max_tokens)
            mask += mask_of_parts(self._tokenizer, piece_ids, parts)
        return ids, mask


def mask_of_parts(tokenizer: Tokenizer, ids: Sequence[int], parts: Sequence[tuple[str, bool]]) -> list[bool]:
    """Which of `ids`, the encoding of all parts together, hold a byte of a part that is marked True."""
    if len(parts) == 1:
        return [parts[0][1]] * len(ids)
    token_bytes = tokenizer.token_bytes
    # One flag a byte. Bytes are counted after encoding, because normalisation may change their number.
    flags = b"".join(
        bytes([marked]) * sum(len(token_bytes(id)) for id in tokenizer.encode(part)) for part, marked in parts
    )
    mask, position = [], 0
    for id in ids:
        end = position + len(token_bytes(id))
        mask.append(1 in flags[position:end])
        position = end
    return mask


def chatml_mask(tokenizer: Tokenizer, ids: Sequence[int]) -> list[bool]:
    """True from after each "<|im_start|>assistant\\n" up to and including the "<|im_end|>" that closes the turn.

    Exact, because only the format itself can have put these control tokens there. A turn left open is not marked.
    """
    start, end = tokenizer.special_tokens["<|im_start|>"], tokenizer.special_tokens["<|im_end|>"]
    mask = [False] * len(ids)
    header: bytes | None = None  # bytes of the header being read; None outside of one
    said_from: int | None = None  # where the open assistant turn's text begins
    for index, id in enumerate(ids):
        if id == start:
            header, said_from = b"", None
        elif id == end:
            if said_from is not None:
                mask[said_from : index + 1] = [True] * (index + 1 - said_from)
            header = said_from = None
        elif header is not None:
            header += tokenizer.token_bytes(id)
            role, newline, _ = header.partition(b"\n")
            if newline:
                header, said_from = None, index + 1 if role == b"assistant" else None
    return mask


def checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of `messages` with every content as text and tool-call arguments as objects.

    The content of an assistant that calls tools may be None. A thought called `reasoning` or `thinking` is there as
    `reasoning_content` too, the name that templates of Qwen read.

    Raises ValueError naming the message and the field: a role other than those of `ROLES`, a content that is neither
    text nor a list of text parts, or none where one is needed.
    """
    if not messages:
        raise ValueError("messages is empty; at least one message is needed")
    return [_checked_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _checked_message(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{name} is a {type(message).__name__}, not an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{name}.role is {role!r}, allowed are {', '.join(ROLES)}")
    calls = message.get("tool_calls")
    content = message.get("content")
    null = content is None and role == "assistant" and calls
    checked = {**message, "content": None if null else _joined_text(content, f"{name}.content")}
    if role == "assistant" and message.get("reasoning_content") is None:
        thought = next((message[key] for key in ("reasoning", "thinking") if isinstance(message.get(key), str)), None)
        if thought is not None:
            checked["reasoning_content"] = thought
    if calls is not None:
        if not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
            raise ValueError(f"{name}.tool_calls is not a list of objects")
        checked["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
    return checked


def _joined_text(content: Any, name: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        raise ValueError(f"{name} is missing, text or a list of text parts is needed")
    if not isinstance(content, list | tuple):
        raise ValueError(f"{name} is a {type(content).__name__}, allowed are text and a list of text parts")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text":
            raise ValueError(f"{name}[{index}] has the type {kind!r}, allowed is 'text'")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{name}[{index}].text is missing or not text")
        texts.append(part["text"])
    return "".join(texts)


def _with_parsed_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call with its arguments as an object, for OpenAI sends them as a JSON string, which `tojson` would quote again."""
    checked = dict(call)
    if isinstance(call.get("function"), Mapping):
        checked["function"] = _with_parsed_arguments(call["function"])
    if "arguments" in call or "function" not in call:
        checked["arguments"] = parsed_arguments(call.get("arguments"))
    return checked


def parsed_arguments(given: Any) -> Any:
    """Arguments of a call as an object: none at all are an empty one, and one that was written as a text twice is read twice.

    What is no object is returned as it is: a call that failed is history too.
    """
    value = given
    for _ in range(3):
        if value is None or (isinstance(value, str) and not value.strip()):
            return {}
        if not isinstance(value, str):
            break
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            break
    return value if isinstance(value, Mapping) else given


def _with_object_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose calls have objects as arguments, for templates that go through their members."""

    def wrapped(call: Mapping[str, Any]) -> dict[str, Any]:
        done = dict(call)
        if isinstance(call.get("function"), Mapping):
            done["function"] = wrapped(call["function"])
        if "arguments" in call and not isinstance(call["arguments"], Mapping):
            done["arguments"] = {"arguments": call["arguments"]}
        return done

    calls = message.get("tool_calls")
    return message | {"tool_calls": [wrapped(call) for call in calls]} if calls else message
