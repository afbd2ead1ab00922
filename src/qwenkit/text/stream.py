"""Text as it arrives: ids of a growing answer to text, and stop strings found in it.

In: ids, a few at a time, then pieces of text. Out: text that will not change any more. Joined together it is exactly
what the whole answer gives at once, however the answer was cut up.
"""

import codecs
from collections.abc import Iterable, Sequence

from qwenkit.text.tokenizer import Tokenizer


class Detokenizer:
    """Incremental `Tokenizer.decode`: never gives out half a character."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete; the bytes of a character still incomplete wait."""
        tokenizer, skip = self._tokenizer, self._skip_special
        return self._decoder.decode(
            b"".join(tokenizer.token_bytes(id) for id in ids if not (skip and tokenizer.is_special(id)))
        )

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that never became complete, else nothing."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Finds the first stop string to be completed in an answer that arrives in pieces, and cuts the text before it.

    Of several completed by the same character, the longest counts. tokenizer: of an answer whose text leaves control tokens
    out; a stop string that holds one of them then matches the token itself. None: control tokens are in the text.
    """

    def __init__(self, stops: Sequence[str], tokenizer: Tokenizer | None = None) -> None:
        if "" in stops:
            raise ValueError("stop: an empty string is not allowed, it would stop every answer at once")
        self._marks: dict[int, str] = {}  # token id -> half a surrogate pair, which no text of an answer holds
        self._stops = {self._marked(stop, tokenizer): stop for stop in stops}
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str, token: int | None = None) -> tuple[str, str | None]:
        """Text that is safe to show, and the stop string found, after which nothing more comes out.

        token: the one that `text` came with. Held back is the longest end of the text that a stop string could begin with.
        """
        if self._matched is not None:
            return "", self._matched
        text = self._held + text + ("" if token is None else self._marks.get(token, ""))
        # (end, start): the first to be completed, and of those ending together the one that begins first
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            end, start = min(found)
            self._held, self._matched = "", self._stops[text[start:end]]
            return self._shown(text[:start]), self._matched
        keep = next(
            (size for size in range(min(self._longest - 1, len(text)), 0, -1) if self._may_begin(text[-size:])), 0
        )
        safe = text[: len(text) - keep]
        self._held = text[len(safe) :]
        return self._shown(safe), None

    def flush(self) -> str:
        """The text still held back, at the end of an answer that no stop string ended."""
        held, self._held = self._held, ""
        return self._shown(held)

    def _may_begin(self, ending: str) -> bool:
        return any(stop.startswith(ending) for stop in self._stops)

    def _marked(self, stop: str, tokenizer: Tokenizer | None) -> str:
        if tokenizer is None:
            return stop
        pieces = (
            self._marks.setdefault(piece, chr(0xD800 + len(self._marks))) if isinstance(piece, int) else piece
            for piece in tokenizer.split_control(stop)
        )
        return "".join(pieces)

    def _shown(self, text: str) -> str:
        return (
            "".join(character for character in text if not "\ud800" <= character <= "\udfff") if self._marks else text
        )
