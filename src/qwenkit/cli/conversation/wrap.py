"""Word wrap of text that arrives in pieces.

In: pieces of text. Out: the same text with line ends where a word would cross the terminal's border. A word is held back until
it is complete; one that is wider than a line is cut. Chinese and Japanese characters are two columns wide and words of their own.
"""

from __future__ import annotations

from wcwidth import wcwidth

CLOSING = frozenset("，。、；：？！）】》」』〉”’")  # which begin no line


class WordWrap:
    """Columns of one line; `width` may change between calls (a window that is resized), None is no wrap."""

    def __init__(self) -> None:
        self.column = 0
        self._word = ""
        self._word_width = 0
        self._is_cut = False  # the word is wider than a line, and its beginning is written

    def feed(self, text: str, width: int | None) -> str:
        """What can be written now."""
        if width is None:
            return self.flush(None) + text
        parts: list[str] = []
        for char in text:
            columns = max(wcwidth(char), 0)
            if char == "\n":
                parts += self.flush(width), char
                self.column, self._is_cut = 0, False
            elif char.isspace() and char != "\N{NO-BREAK SPACE}":
                parts.append(self.flush(width))
                self._is_cut = False
                columns = 8 - self.column % 8 if char == "\t" else columns
                if self.column + columns <= width:  # a space at the border is the line's end
                    parts.append(char)
                    self.column += columns
                else:
                    self.column = width
            elif not columns and not self._word:  # a mark on the character before
                parts.append(char)
            else:
                if self._word and columns == 2 and char not in CLOSING:
                    parts.append(self.flush(width))
                    self._is_cut = False
                self._word += char
                self._word_width += columns
                if self._word_width > width:  # wider than a line: cut at the border
                    parts.append(self.flush(width))
                    self._is_cut = True
        return "".join(parts)

    def flush(self, width: int | None) -> str:
        """The word that was held back."""
        word, self._word = self._word, ""
        total, self._word_width = self._word_width, 0
        if width is None or not word:
            return word
        start = ""
        if self.column and self.column + total > width and total <= width and not self._is_cut:
            start, self.column = "\n", 0
        parts = [start]
        for char in word:
            columns = max(wcwidth(char), 0)
            if self.column + columns > width and columns <= width:
                parts.append("\n")
                self.column = 0
            parts.append(char)
            self.column += columns
        return "".join(parts)
