"""Tokens that are found in text as they are written, before any byte-pair merging: control and user-defined tokens.

In: the added tokens of a tokenizer, with the flags Hugging Face's format gives them. Out: a text cut into ordinary
pieces and token ids. One matcher serves all vocabularies, so that the question "may this text become a control
token?" has one answer, given by which tokens a matcher was built from.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_WORD = re.compile(r"\w")


@dataclass(frozen=True)
class AddedToken:
    """One added token; the flags mean what they mean in a tokenizer.json.

    special: a control token, which text alone must never produce. normalized: looked for after normalisation, not
    before. lstrip, rstrip: the match takes the whitespace beside it along. single_word: no match inside a word.
    """

    content: str
    id: int
    special: bool
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class AddedTokenMatcher:
    """Finds added tokens in a text, leftmost first and of those the longest."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self._tokens = {token.content: token for token in tokens if token.content}
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    @property
    def empty(self) -> bool:
        return self._pattern is None

    def split(self, text: str) -> Iterator[str | int]:
        """Yield the non-empty stretches of ordinary text and the ids of the tokens between them, in order."""
        if self._pattern is None:
            if text:
                yield text
            return
        position = 0
        for match in self._pattern.finditer(text):
            token, (start, stop) = self._tokens[match.group()], match.span()
            if token.single_word and (_WORD.match(text[start - 1 : start]) or _WORD.match(text[stop : stop + 1])):
                continue
            if token.lstrip:
                while start > position and text[start - 1].isspace():
                    start -= 1
            if token.rstrip:
                while stop < len(text) and text[stop].isspace():
                    stop += 1
            if start > position:
                yield text[position:start]
            yield token.id
            position = stop
        if position < len(text):
            yield text[position:]
