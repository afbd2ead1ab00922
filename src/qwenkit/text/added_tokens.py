"""Tokens that are found in text as they are written, before any byte-pair merging: control and user-defined tokens.

In: the added tokens of a tokenizer, with the flags Hugging Face's format gives them. Out: a text cut into ordinary
pieces and token ids. One matcher serves all vocabularies, so that the question "may this text become a control
token?" has one answer, given by which tokens a matcher was built from.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# The classes of the `tokenizers` library (Rust's \w and \s), which are not Python's: marks and joiners are parts of words,
# superscripts and fractions are not, and the separators U+001C to U+001F are no white space.
_WORD_CATEGORIES = frozenset(("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "Pc"))
_JOINERS = "\u200c\u200d"
_CIRCLED_LETTERS = ((0x24B6, 0x24E9), (0x1F130, 0x1F149), (0x1F150, 0x1F169), (0x1F170, 0x1F189))  # alphabetic symbols
_WHITE_SPACE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {
    chr(i) for i in range(0x2000, 0x200B)
}


def is_word(character: str) -> bool:
    """Whether a character is part of a word; "" is not."""
    if not character:
        return False
    in_class = unicodedata.category(character) in _WORD_CATEGORIES or character in _JOINERS
    return in_class or any(first <= ord(character) <= last for first, last in _CIRCLED_LETTERS)


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
            if token.single_word and (is_word(text[start - 1 : start]) or is_word(text[stop : stop + 1])):
                continue
            if token.lstrip:
                while start > position and text[start - 1] in _WHITE_SPACE:
                    start -= 1
            if token.rstrip:
                while stop < len(text) and text[stop] in _WHITE_SPACE:
                    stop += 1
            if start > position:
                yield text[position:start]
            yield token.id
            position = stop
        if position < len(text):
            yield text[position:]
