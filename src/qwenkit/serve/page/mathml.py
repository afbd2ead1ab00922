"""LaTeX of one formula to MathML, which browsers draw by themselves.

In: the source between the delimiters. Out: MathML with the elements and attributes of a list, written out anew and escaped, or
ValueError for a source that is no valid formula. latex2mathml converts; what it makes of elements that browsers do not draw
(MathML Core has no menclose and no mathvariant but "normal") is rewritten here.
"""

import contextlib
import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

MAX_LATEX = 8192  # characters
MAX_BRACES = 40  # braces in braces
MAX_DEPTH = 120  # elements in elements
MAX_LENGTH = {"": 10.0, "em": 20.0, "ex": 40.0, "px": 300.0, "pt": 240.0, "%": 300.0}  # nothing reaches over other text

# Elements, with the number of children where it is fixed.
ELEMENTS: dict[str, int | None] = {
    **dict.fromkeys(("math", "mrow", "mi", "mn", "mo", "mtext", "mspace", "mstyle", "mpadded", "mphantom", "msqrt")),
    **dict.fromkeys(("mtable", "mtr", "mtd")),
    **dict.fromkeys(("mfrac", "mroot", "msub", "msup", "munder", "mover"), 2),
    **dict.fromkeys(("msubsup", "munderover"), 3),
}
LEAVES = ("mi", "mn", "mo", "mtext")
FLAGS = (
    *("displaystyle", "stretchy", "fence", "separator", "largeop", "movablelimits", "accent", "accentunder"),
    "symmetric",
)
LENGTHS = ("width", "height", "depth", "lspace", "rspace", "voffset", "minsize", "maxsize", "linethickness")
ATTRIBUTES = {
    **dict.fromkeys(FLAGS, re.compile("true|false")),
    **dict.fromkeys(LENGTHS, re.compile(r"[+-]?(\d{1,4}\.?\d{0,4}|\.\d{1,4})(em|ex|px|pt|%|)")),
    **dict.fromkeys(("mathcolor", "mathbackground"), re.compile(r"[a-zA-Z]{3,20}|#[0-9a-fA-F]{3,8}")),
    "display": re.compile("block|inline"),
    "form": re.compile("prefix|infix|postfix"),
    "mathvariant": re.compile("normal"),
    "scriptlevel": re.compile(r"[+-]?\d"),
    "columnalign": re.compile("left|center|right"),
    "class": re.compile("boxed|struck|(line-below|line-after| )+"),
}

DEFINITIONS = re.compile(r"\\(?:(?:re)?new|provide)(?:command|environment)|\\[egx]?def\b|\\let\b|\\DeclareMathOperator")
ENVIRONMENT = re.compile(r"\\(begin|end)\s*\{\s*([a-zA-Z]+)(\*?)\s*\}")
COLUMNS = re.compile(r"\s*\{\d+\}")  # the argument of alignat
ALIGNED = ("align", "aligned", "alignat", "alignedat", "flalign", "eqnarray", "split")
CENTERED = ("gather", "gathered", "multline", "multlined")
NUMBERED = ("equation", "displaymath", "math")  # no environment of columns: one formula, whose number is left out
TABULAR = ("matrix", "pmatrix", "bmatrix", "Bmatrix", "vmatrix", "Vmatrix", "smallmatrix", "array", "cases", "substack")
REWRITTEN = (
    (
        re.compile(r"\\(?:label|vspace\*?)\s*\{[^{}]*\}|\\(?:nonumber|notag|protect|allowbreak|nolimits)(?![a-zA-Z])"),
        " ",
    ),
    (re.compile(r"\\tag\*?\s*\{([^{}]*)\}"), r"\\qquad\\text{(\1)}"),
    (re.compile(r"\\eqref\s*\{([^{}]*)\}"), r"\\text{(\1)}"),
    (re.compile(r"\\(?:nicefrac|sfrac)(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\math(?:bbm|ds)(?![a-zA-Z])"), r"\\mathbb"),
    (re.compile(r"\\AA(?![a-zA-Z])"), r"\\text{Å}"),
    (re.compile(r"\\hdots(?![a-zA-Z])"), r"\\ldots"),
    (re.compile(r"\\hfill?(?![a-zA-Z])"), r"\\quad"),
    (re.compile(r"\\(arg)(?![a-zA-Z])"), r"\\operatorname{\1}"),
    (re.compile(r"\\(argmax|argmin)(?![a-zA-Z])"), r"\\operatorname*{\1}"),
    (re.compile(r"\\not\s*="), r"\\neq"),
)
MATH_IN_TEXT = re.compile(r"\\(text\w*|mbox)\s*\{([^{}]*\$[^{}]*)\}")

LIMIT_NAMES = frozenset(
    ("lim", "sup", "inf", "max", "min", "lim sup", "lim inf", "arg max", "arg min", "det", "gcd", "Pr")
)
LARGE_OPERATORS = frozenset("∑∏∐⋀⋁⋂⋃⨀⨁⨂⨄⨆")
LIMITS = {"msub": "munder", "msup": "mover", "msubsup": "munderover"}
SCRIPTS = ("msub", "msup", "msubsup", "munder", "mover", "munderover")
BRACKETS = frozenset("⟨⟩⌊⌋⌈⌉")
OPENING = frozenset("([{⟨⌊⌈|‖")
ENCLOSED = {"box": "boxed", "updiagonalstrike": "struck", "downdiagonalstrike": "struck", "horizontalstrike": "struck"}
MU = re.compile(r"[+-]?\d{1,4}(\.\d{1,4})?mu")
ESCAPED = re.compile(r"\\([%$#&_{}| ])")
REFERENCE = re.compile("&#x([0-9a-fA-F]{1,6});")


@lru_cache(maxsize=1024)  # a growing text comes again and again, with the same formulas in it
def to_mathml(latex: str, display: bool) -> str:
    """MathML of a formula, `display` for one on a line of its own. Raises ValueError for LaTeX that is not valid."""
    from latex2mathml.converter import convert_to_element

    source = prepare(latex, display)
    try:
        math = convert_to_element(source, display="block" if display else "inline")
        adapt(math, 0)
        math.set("alttext", latex.strip())
        return "".join(write(math))
    except ValueError:
        raise
    except (
        Exception
    ) as error:  # its exceptions share no base, and malformed input also ends in IndexError, StopIteration, …
        raise ValueError(f"the formula cannot be converted: {type(error).__name__}") from error


def prepare(latex: str, display: bool) -> str:
    """The source in the words that latex2mathml knows. Raises ValueError for macros, open braces and unknown environments."""
    if not latex.strip():
        raise ValueError("the formula is empty")
    if len(latex) > MAX_LATEX:
        raise ValueError(f"the formula has {len(latex)} characters, at most {MAX_LATEX} are allowed")
    if DEFINITIONS.search(latex):
        raise ValueError("the formula defines macros")
    check_braces(latex)
    for pattern, replacement in REWRITTEN:
        latex = pattern.sub(replacement, latex)
    latex = MATH_IN_TEXT.sub(split_text, latex)
    has_environment = "\\begin" in latex
    latex = "".join(rename_environments(latex))
    if display and not has_environment and re.search(r"\\\\|\\cr(?![a-zA-Z])", latex):
        name = "align*" if re.search(r"(?<!\\)&", latex) else "matrix"
        latex = rf"\begin{{{name}}}{latex}\end{{{name}}}"
    return latex


def check_braces(latex: str) -> None:
    depth = 0
    for match in re.finditer(r"\\.|[{}]", latex, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if not 0 <= depth <= MAX_BRACES:
            raise ValueError("the formula has a brace that closes nothing, or too many in each other")
    if depth:
        raise ValueError("the formula has an open brace")


def split_text(match: re.Match[str]) -> str:
    """`\\text{if $x$ is odd}` as text, formula, text."""
    command, content = match.groups()
    parts = re.split(r"(?<!\\)\$", content)
    if len(parts) % 2 == 0:
        raise ValueError("a dollar sign inside text has no counterpart")
    return "".join(part if index % 2 else rf"\{command}{{{part}}}" for index, part in enumerate(parts) if part)


def rename_environments(latex: str) -> Iterator[str]:
    position = 0
    for match in ENVIRONMENT.finditer(latex):
        yield latex[position : match.start()]
        position = match.end()
        word, name, star = match.groups()
        if name in ALIGNED:
            arguments = COLUMNS.match(latex, position) if name in ("alignat", "alignedat") and word == "begin" else None
            position = position if arguments is None else arguments.end()
            yield rf"\{word}{{align*}}"
        elif name in CENTERED:
            yield rf"\{word}{{matrix}}"
        elif name == "dcases":
            yield rf"\{word}{{cases}}"
        elif name in TABULAR:
            yield rf"\{word}{{{name}{star}}}"
        elif name not in NUMBERED:
            raise ValueError(f"the environment {name!r} is unknown")
    yield latex[position:]


def adapt(element: "Element", depth: int) -> None:
    """Rewrite what browsers do not draw, in place and below. Raises ValueError for what is no formula."""
    if depth > MAX_DEPTH:
        raise ValueError("the formula is too deep")
    variant = element.attrib.pop("mathvariant", None)
    if element.tag in LEAVES:
        element.text = leaf_text(element, variant)
        if element.tag == "mi" and element.text in BRACKETS:
            element.tag = "mo"
            element.set("stretchy", "false")
        if element.tag == "mo" and element.text in LIMIT_NAMES:
            element.set("movablelimits", "true")
    for child in element:
        adapt(child, depth + 1)
    if element.tag == "menclose":
        notation = element.get("notation", "").split()
        element.tag = "mrow"
        element.set("class", next((ENCLOSED[word] for word in notation if word in ENCLOSED), ""))
    elif element.tag in LIMITS and takes_limits(element[0]):
        element.tag = LIMITS[element.tag]
    elif element.tag == "mtable":
        draw_lines(element)
    elif element.tag in ("mrow", "mtd", "mstyle", "msqrt", "mphantom", "mpadded"):
        join_letters(element)
        space_functions(element)
    expected = ELEMENTS.get(element.tag, -1)
    if expected is not None and len(element) != expected:
        raise ValueError(f"{element.tag} has {len(element)} parts")


def leaf_text(element: "Element", variant: str | None) -> str:
    raw = element.text or ""
    text = raw
    if element.tag == "mtext" or ESCAPED.fullmatch(raw):
        text = ESCAPED.sub(
            lambda match: "‖" if match.group(1) == "|" and element.tag != "mtext" else match.group(1), raw
        )
    elif raw in ("{", "}", "&"):
        raise ValueError(f"{raw} stands where it has no meaning")
    if "\\" in text:
        raise ValueError(f"{text} is not known")
    text = REFERENCE.sub(lambda match: chr(int(match.group(1), 16)) if int(match.group(1), 16) < 0x110000 else "", text)
    if variant == "normal" and element.tag == "mi":
        element.set("mathvariant", "normal")
    elif variant is not None and element.tag in ("mi", "mn"):
        text = "".join(styled(char, variant) for char in text)
    return text


STYLES = {
    "bold": "BOLD",
    "italic": "ITALIC",
    "bold-italic": "BOLD ITALIC",
    "double-struck": "DOUBLE-STRUCK",
    "script": "SCRIPT",
    "bold-script": "BOLD SCRIPT",
    "fraktur": "FRAKTUR",
    "bold-fraktur": "BOLD FRAKTUR",
    "sans-serif": "SANS-SERIF",
    "bold-sans-serif": "SANS-SERIF BOLD",
    "sans-serif-italic": "SANS-SERIF ITALIC",
    "monospace": "MONOSPACE",
}
LETTER = re.compile("(?:LATIN|GREEK) (CAPITAL|SMALL) LETTER ([A-Z]+)|(DIGIT) ([A-Z]+)")


def styled(char: str, variant: str) -> str:
    """The letter or digit in a style of mathematics, where Unicode has it as a character of its own."""
    match = LETTER.fullmatch(unicodedata.name(char, ""))
    style = STYLES.get(variant)
    if match is None or style is None:
        return char
    kind, letter = (group for group in match.groups() if group is not None)
    older = style.replace("FRAKTUR", "BLACK-LETTER")  # some letters had a place before the others came
    for name in (f"MATHEMATICAL {style} {kind} {letter}", f"{older} {kind} {letter}"):
        with contextlib.suppress(KeyError):
            return unicodedata.lookup(name)
    return char


def takes_limits(base: "Element") -> bool:
    """Whether scripts stand under and over the base in a display formula: sums, limits, operators that say so."""
    while base.tag == "mrow" and len(base) == 1:
        base = base[0]
    return base.tag == "mo" and (base.get("movablelimits") == "true" or base.text in LARGE_OPERATORS)


def draw_lines(table: "Element") -> None:
    """Lines between columns and rows as classes of cells."""
    rows = table.get("rowlines", "").split()
    columns = table.get("columnlines", "").split()
    for index, row in enumerate(table):
        for column, cell in enumerate(row):
            lines = [
                name
                for name, kinds, place, count in (
                    ("line-below", rows, index, len(table)),
                    ("line-after", columns, column, len(row)),
                )
                if place < len(kinds) and place + 1 < count and kinds[place] != "none"
            ]
            if lines:
                cell.set("class", " ".join(lines))


def join_letters(row: "Element") -> None:
    """Letters that stand upright one after the other are one word: `\\mathrm{softmax}`."""
    previous: Element | None = None
    for child in list(row):
        upright = child.tag == "mi" and child.get("mathvariant") == "normal" and (child.text or "").isalpha()
        if upright and previous is not None:
            previous.text = f"{previous.text}{child.text}"
            row.remove(child)
        else:
            previous = child if upright else None


def space_functions(row: "Element") -> None:
    """Names of functions as operators, with a thin space to what is no bracket or operator: `sin x`, but `sin(x)`."""
    children = list(row)
    for index, child in enumerate(children):
        name = child
        while name.tag in SCRIPTS and len(name):
            name = name[0]
        if name.tag != "mi" or len(name.text or "") < 2 or not (name.text or "").isalpha() or name.get("mathvariant"):
            continue
        following = first_leaf(children[index + 1]) if index + 1 < len(children) else None
        name.tag = "mo"
        name.set("form", "prefix")
        name.set("lspace", "0.167em" if index and last_leaf(children[index - 1]).tag != "mo" else "0")
        is_operand = following is not None and (following.tag != "mo" or following.get("form") == "prefix")
        is_bracket = following is not None and following.text in OPENING
        name.set("rspace", "0.167em" if is_operand and not is_bracket else "0")


def first_leaf(element: "Element") -> "Element":
    while len(element):
        element = element[0]
    return element


def last_leaf(element: "Element") -> "Element":
    while len(element):
        element = element[0] if element.tag in SCRIPTS else element[-1]
    return element


def write(element: "Element") -> Iterator[str]:
    """The element with its listed attributes. Raises ValueError for an element that is not on the list."""
    if element.tag not in ELEMENTS:
        raise ValueError(f"{element.tag} is not drawn by browsers")
    yield f"<{element.tag}"
    for name, value in element.attrib.items():
        value = MU.sub(in_em, value.strip()) if name in LENGTHS else value
        if name == "alttext" or (name in ATTRIBUTES and is_allowed(name, value)):
            yield f' {name}="{escape(value)}"'
    yield ">"
    if element.tag in LEAVES:
        yield escape(element.text or "")
    for child in element:
        yield from write(child)
    yield f"</{element.tag}>"


def in_em(match: re.Match[str]) -> str:
    return f"{float(match.group()[:-2]) / 18:.4f}em"


def is_allowed(name: str, value: str) -> bool:
    match = ATTRIBUTES[name].fullmatch(value)
    if match is None or name not in LENGTHS:
        return match is not None
    return abs(float(match.group(1))) <= MAX_LENGTH[match.group(2)]
