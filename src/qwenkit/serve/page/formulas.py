r"""Formulas cut out of markdown, which would eat their backslashes, underscores and stars.

In: markdown with `\(…\)`, `\[…\]`, `$$…$$`, `$…$` and environments of LaTeX. Out: the text with a placeholder for each formula,
which is a letter to markdown, and the formulas. What is code stays in the text. A dollar sign is one of money unless a formula
is seen: no space inside of the two signs, no digit or letter before the first, no digit or word after the second.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from qwenkit.serve.page.mathml import MAX_LATEX, to_mathml

OPEN, CLOSE = "\ue000", "\ue001"  # around the number of a formula; a text that has them itself keeps them as source
PLACEHOLDER = re.compile(f"{OPEN}(\\d+){CLOSE}")
SIGNS = re.compile(rf"\\[(\[]|\\begin|\$|[{OPEN}{CLOSE}]")  # a text without them has no formula
ENVIRONMENTS = "equation|displaymath|math|align|aligned|alignat|flalign|eqnarray|gather|gathered|multline|split"

TOKEN = re.compile(
    rf"""
    (?P<begin>\\begin\{{(?P<name>{ENVIRONMENTS})(?P<star>\*?)\}}) |
    (?P<bracket>\\[(\[]) |
    (?P<escape>\\[^\n]) |
    (?P<dollars>\$+) |
    (?P<ticks>`+) |
    (?P<link>\]\([^\s()<>\\]+|<?\b[a-zA-Z][a-zA-Z0-9+.-]{{1,15}}://[!-;=?-\[\]-_a-~]*) |
    (?P<marker>[{OPEN}{CLOSE}])
    """,
    re.VERBOSE,
)
BLANK_LINE = re.compile(r"\n[ \t>]*(?=\n)")
LINE_MARKS = re.compile(r"[ \t>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)*[ \t>]*")
QUOTE = re.compile(r"[ \t]*((?:>[ \t]?)+)")
PRICE = re.compile(
    r"\d[\d.,]*(?:[kKMB]|bn|mn)?[.,;:!?)]*(?:\s+|(?=[\u3040-\u9fff])|$)(?P<word>[^\W\d_]{2,}|[\u3040-\u9fff])"
)
OPERATOR_WORDS = frozenset(("mod", "sin", "cos", "tan", "log", "ln", "exp", "max", "min", "gcd", "lcm", "lim", "pi"))
SUFFIX = re.compile(r"(?:th|st|nd|rd|s|d)?(?![A-Za-z0-9_{])")  # the $n$th
PROSE = re.compile(r"(?:^|\s)([^\W\d_]{3,})(?=[\s,;.!?)])")
CLOSERS = {"$": r"(?<!\$)\$(?!\$)", "$$": r"(?<!\$)\$\$(?!\$)"}
TEXT_GROUP = r"\\(?:text[a-z]*|mbox)\{[^{}]*\}"  # which may have formulas in dollar signs
LONG = 60  # characters of a formula in a line of text that may be wider than a phone
MATHEMATICS = re.compile(r"\\[a-zA-Z]|[_^{}=]")
EATEN = re.compile(r"[\\_^{}]")  # by markdown, or a sign that more than a word is coming


@dataclass(frozen=True)
class Formula:
    """`latex` between delimiters; `source` with them, as it stood. `latex` is None for what is only shown as it stood."""

    source: str
    latex: str | None = None
    display: bool = False
    is_text: bool = False  # no formula: characters that markdown must not see

    def html(self) -> str:
        """MathML, or the source where it is no LaTeX that can be shown."""
        if self.is_text:
            return escape(self.source)
        if self.latex is not None:
            try:
                math = to_mathml(self.latex, self.display)
                if self.display:
                    return f'<span class="formula">{math}</span>'
                return f'<span class="formula inline">{math}</span>' if len(self.latex) > LONG else math
            except ValueError:
                pass
        return f'<code class="math">{escape(self.source)}</code>'


@dataclass
class Formulas:
    """The formulas of one text, by number."""

    found: list[Formula] = field(default_factory=list)
    numbers: dict[Formula, int] = field(default_factory=dict)

    def placeholder(self, formula: Formula) -> str:
        """The same for the same formula, so that labels of links stay the same."""
        number = self.numbers.setdefault(formula, len(self.found))
        if number == len(self.found):
            self.found.append(formula)
        return f"{OPEN}{number}{CLOSE}"

    def to_html(self, text: str) -> str:
        """A text of markdown as HTML."""
        return PLACEHOLDER.sub(lambda match: self.found[int(match.group(1))].html(), escape(text))

    def to_source(self, text: str) -> str:
        """A text as it stood in the markdown, for code and attributes."""
        return PLACEHOLDER.sub(lambda match: self.found[int(match.group(1))].source, text)


def cut_formulas(text: str, code: Sequence[tuple[int, int, bool]], *, partial: bool = False) -> tuple[str, Formulas]:
    """The text with placeholders, and the formulas behind them.

    `code` has the code blocks as (start, end, is_fence), positions in the text, in order. `partial`: more of the text is to
    come, so a formula that is open at its end is kept from markdown until it is closed.
    """
    scanner = _Scanner(text, code, partial)
    scanner.run()
    return "".join(scanner.parts), scanner.formulas


class _Scanner:
    """One pass from left to right; `position` never goes back."""

    def __init__(self, text: str, code: Sequence[tuple[int, int, bool]], partial: bool) -> None:
        self.text = text
        self.code = list(code)
        self.partial = partial
        self.formulas = Formulas()
        self.parts: list[str] = []
        self.position = 0
        self.fences = [start for start, _, is_fence in code if is_fence]
        self.breaks = sorted([match.start() for match in BLANK_LINE.finditer(text)] + self.fences)
        self.end = len(text.rstrip())
        self.unmatched: set[str] = set()  # closing delimiters of formulas that are shown as they stand
        self.last_sign: int | None = None  # of mathematics in the text, once it is known
        self.closers: dict[str, tuple[int, int]] = {}  # of a kind: searched from, found at (or the end of the text)

    def run(self) -> None:
        text, blocks = self.text, iter(self.code)
        block = next(blocks, None)
        search = 0
        while (match := TOKEN.search(text, search)) is not None:
            start = match.start()
            while block is not None and block[1] <= start:
                block = next(blocks, None)
            if block is not None and block[0] <= start and match.lastgroup != "marker":
                search = block[1]
                continue
            search = self._token(match)
        rest = text[self.position :]
        if self.partial and not (self.code and self.code[-1][1] >= len(text)):  # half a delimiter
            rest = re.sub(r"((?<!\\)(?:\\\\)*)\\$", r"\1", rest)
        self.parts.append(rest)

    def _token(self, match: re.Match[str]) -> int:
        """Take in what begins at the match; the position from which to search on."""
        start, stop = match.span()
        if match.group("marker"):
            return self._cut(start, stop, Formula(match.group(), is_text=True))
        if match.group("ticks"):
            return self._skip_code(match)
        if match.group("begin"):
            name = match.group("name") + match.group("star")
            return self._delimited(match, rf"\end{{{name}}}", display=True, keep=True)
        if match.group("bracket"):
            is_display = match.group() == r"\["
            return self._delimited(match, r"\]" if is_display else r"\)", display=is_display)
        if match.group("dollars"):
            return {1: self._dollar, 2: self._dollars}.get(stop - start, lambda match: match.end())(match)
        if match.group() in self.unmatched:
            return self._cut(start, stop, Formula(match.group(), is_text=True))
        return stop

    def _cut(self, start: int, stop: int, formula: Formula) -> int:
        self.parts += self.text[self.position : start], self.formulas.placeholder(formula)
        self.position = stop
        return stop

    def _skip_code(self, match: re.Match[str]) -> int:
        limit = self._paragraph_end(match.start())
        ticks = match.group()
        close = re.compile(rf"(?<!`){ticks}(?!`)").search(self.text, match.end(), limit)
        if close is not None:
            return close.end()
        return limit if self.partial and limit >= self.end else match.end()

    def _paragraph_end(self, position: int) -> int:
        index = bisect_left(self.breaks, position)
        return self.breaks[index] if index < len(self.breaks) else len(self.text)

    def _fence_after(self, position: int) -> int:
        index = bisect_left(self.fences, position)
        return self.fences[index] if index < len(self.fences) else len(self.text)

    def _closer(self, closer: str, position: int) -> int:
        """Where `closer` next stands unescaped; the length of the text if it does not."""
        searched, found = self.closers.get(closer, (0, -1))
        if not searched <= position <= found:
            found = len(self.text)
            for match in re.compile(rf"{CLOSERS.get(closer, re.escape(closer))}|{TEXT_GROUP}|\\.", re.DOTALL).finditer(
                self.text, position
            ):
                if match.group() == closer:
                    found = match.start()
                    break
            self.closers[closer] = position, found
        return found

    def _delimited(self, match: re.Match[str], closer: str, *, display: bool, keep: bool = False) -> int:
        r"""A formula in `\(…\)`, `\[…\]` or an environment, whose \begin and \end belong to the LaTeX."""
        start, stop = match.span()
        limit = self._limit(start, stop, display, is_block=keep)
        found = self._closer(closer, stop)
        end = found + len(closer)
        if found < limit and end - start <= MAX_LATEX and self.text[stop:found].strip():
            latex = self.text[start:end] if keep else self.text[stop:found]
            return self._cut(start, end, self._formula(start, end, latex, display))
        if (
            found >= limit >= self.end
            and (self.partial or self._is_mathematics(stop))
            and self.end - start <= MAX_LATEX
        ):
            return self._show_rest(start)
        self.unmatched.add(closer)
        return self._cut(start, stop, Formula(match.group(), is_text=True))

    def _limit(self, start: int, stop: int, display: bool, *, is_block: bool = False) -> int:
        """Where a formula must have ended: blank lines may be in one that has its lines for itself, code in none."""
        return (
            self._fence_after(start)
            if is_block or (display and self._is_alone(start, stop))
            else self._paragraph_end(start)
        )

    def _is_alone(self, start: int, stop: int) -> bool:
        """Whether a delimiter is all there is on its line, but for the marks of lists and quotes."""
        begin = max(self.text.rfind("\n", 0, start) + 1, start - 40)
        line_end = self.text.find("\n", stop)
        after = self.text[stop : len(self.text) if line_end < 0 else line_end]
        return LINE_MARKS.fullmatch(self.text, begin, start) is not None and not after.strip()

    def _is_mathematics(self, position: int) -> bool:
        if self.last_sign is None:
            self.last_sign = max((match.start() for match in MATHEMATICS.finditer(self.text)), default=-1)
        return self.last_sign >= position

    def _formula(self, start: int, end: int, latex: str, display: bool) -> Formula:
        """A formula whose lines may be those of a quote: their marks are none of the LaTeX."""
        line = QUOTE.match(self.text, self.text.rfind("\n", 0, start) + 1, start)
        if line is not None and "\n" in latex:
            marks = line.group(1).count(">")
            latex = re.sub(rf"\n[ \t]*(?:>[ \t]?){{0,{marks}}}", "\n", latex)
        return Formula(self.text[start:end], latex, display)

    def _show_rest(self, start: int) -> int:
        return self._cut(start, self.end, Formula(self.text[start : self.end]))

    def _dollars(self, match: re.Match[str]) -> int:
        text, (start, stop) = self.text, match.span()
        limit = self._limit(start, stop, display=True)
        found = self._closer("$$", stop)
        if found < limit:
            latex = text[stop:found]
            if found - start > MAX_LATEX or not latex.strip() or is_prose(latex):
                return stop
            return self._cut(start, found + 2, self._formula(start, found + 2, latex, True))
        is_open = self._is_mathematics(stop) or (self.partial and not is_prose(text[stop : self.end]))
        if limit >= self.end and self.end - start <= MAX_LATEX and is_open:
            return self._show_rest(start)
        return stop

    def _dollar(self, match: re.Match[str]) -> int:
        text, (start, stop) = self.text, match.span()
        before, after = text[start - 1 : start], text[stop : stop + 1]
        if not after or after.isspace() or (before.isascii() and before.isalnum()):
            return stop
        limit = min(self._paragraph_end(start), start + MAX_LATEX)
        found = self._closer("$", stop)
        if found < limit:
            latex = text[stop:found]
            is_closed = not latex[-1].isspace() and SUFFIX.match(text, found + 1) is not None
            if not is_closed or "`" in latex or "$$" in latex or is_price(latex) or is_prose(latex):
                return stop
            return self._cut(start, found + 1, self._formula(start, found + 1, latex, False))
        rest = text[stop : self.end]
        if self.partial and limit >= self.end and not after.isdigit() and EATEN.search(rest) and "\n" not in rest:
            return self._show_rest(start)
        return stop


def is_price(latex: str) -> bool:
    """Whether a number and a word follow a dollar sign: `$5 and 10$`."""
    match = PRICE.match(latex)
    return match is not None and match.group("word") not in OPERATOR_WORDS


def is_prose(latex: str) -> bool:
    """Whether there are words, and no sign of mathematics."""
    words = (match.group(1) for match in PROSE.finditer(latex))
    return MATHEMATICS.search(latex) is None and any(word not in OPERATOR_WORDS for word in words)
