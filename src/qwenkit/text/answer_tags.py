"""Where the tags of an answer stand: <think>, <tool_call>, "Action:" and their like, found while the text arrives.

In: what each engine step brings, token ids and text; the text may lag behind the ids and may be cut. Out: items, stretches
of text and tags in order, the same whatever the pieces were. A tag that is one token of the vocabulary counts only where
that token was generated: spelled out of other tokens it is text. A tag the vocabulary lacks is looked for in the text.
"""

import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from qwenkit.text.stream import Detokenizer
from qwenkit.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Tag:
    """One tag of an answer. `text` is what the answer's text has for it: "" where control tokens are left out."""

    kind: str
    text: str


Item: TypeAlias = str | Tag


class TagReader:
    """Cuts one answer into items.

    kinds: tag text -> its kind. at_line_start: tags count only where a line begins, and always as text.
    skip_special: whether control tokens are left out of the text that will arrive.
    """

    def __init__(
        self, tokenizer: Tokenizer, kinds: Mapping[str, str], *, at_line_start: bool = False, skip_special: bool = True
    ) -> None:
        ids = {} if at_line_start else {text: tokenizer.token_id(text) for text in kinds}
        self._token_tags = {
            id: Tag(kinds[text], "" if skip_special and tokenizer.is_special(id) else text)
            for text, id in ids.items()
            if id is not None
        }
        self._text_tags = _TextTags(
            {text: kind for text, kind in kinds.items() if ids.get(text) is None}, at_line_start
        )
        self._detokenizer = Detokenizer(tokenizer, skip_special=skip_special)
        self._generated = 0  # characters that the ids so far stand for
        self._marks: deque[tuple[int, Tag]] = deque()  # tags not given out yet, each with the offset at which it ends
        self._position = 0  # offset of the first character of _text
        self._text = ""  # arrived, but perhaps half a tag

    def push(self, token_ids: Iterable[int], text: str) -> list[Item]:
        """The items that are certain now. `text` is the next piece of the detokenized answer."""
        if not self._token_tags:
            return self._text_tags.push(text)
        for id in token_ids:
            self._generated += len(self._detokenizer.push([id]))
            # A shown tag is ASCII, so its last character is the last one the detokenizer gave.
            if id in self._token_tags:
                self._marks.append((self._generated, self._token_tags[id]))
        self._text += text
        items: list[Item] = []
        while self._marks and self._marks[0][0] <= self._position + len(self._text):
            end, tag = self._marks.popleft()
            items += self._text_tags.push(self._take(end - len(tag.text)))
            items += self._text_tags.flush()
            items.append(tag)
            self._take(end)
        arrived = self._position + len(self._text)
        if self._marks:
            end, tag = self._marks[0]
            arrived = min(arrived, end - len(tag.text))
        return items + self._text_tags.push(self._take(arrived))

    def finish(self) -> list[Item]:
        """What was held back, at the end. Half a tag is text; a tag whose text never came (cut off) does not count."""
        return [*self._text_tags.push(self._text), *self._text_tags.flush()]

    def _take(self, end: int) -> str:
        """Remove and return the text up to offset `end`."""
        size = end - self._position
        taken, self._text, self._position = self._text[:size], self._text[size:], end
        return taken


class _TextTags:
    """Finds tags that are spelled in the text."""

    def __init__(self, kinds: Mapping[str, str], at_line_start: bool) -> None:
        self._kinds = kinds
        self._at_line_start = at_line_start
        choices = "|".join(map(re.escape, sorted(kinds, key=len, reverse=True)))
        self._pattern = re.compile(f"^(?:{choices})" if at_line_start else choices, re.MULTILINE) if kinds else None
        self._longest = max(map(len, kinds), default=0)
        self._held = ""
        self._line_starts = True  # whether the held text stands at the start of a line

    def push(self, text: str) -> list[Item]:
        if self._pattern is None:
            return [text] if text else []
        text = self._held + text
        items: list[Item] = []
        position = 0
        for match in self._pattern.finditer(text):
            if self._at_line_start and match.start() == 0 and not self._line_starts:
                continue
            items += [text[position : match.start()], Tag(self._kinds[match.group()], match.group())]
            position = match.end()
        keep = len(text) - self._size_of_beginning(text, position)
        items.append(text[position:keep])
        self._held = text[keep:]
        if keep:
            self._line_starts = text[keep - 1] == "\n"
        return [item for item in items if item]

    def flush(self) -> list[Item]:
        held, self._held = self._held, ""
        if held:
            self._line_starts = held.endswith("\n")
        return [held] if held else []

    def _size_of_beginning(self, text: str, position: int) -> int:
        """How many characters at the end of text[position:] a tag may begin with."""
        if self._at_line_start:
            start = text.rfind("\n") + 1
            sizes: Sequence[int] = [len(text) - start] if start or self._line_starts else []
        else:
            sizes = range(min(self._longest - 1, len(text) - position), 0, -1)
        for size in sizes:
            if 0 < size <= len(text) - position and any(tag.startswith(text[-size:]) for tag in self._kinds):
                return size
        return 0
