"""Formulas in markdown to MathML: what is one, what is none, and that nothing in one becomes script or takes long."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenkit.serve.page import render
from qwenkit.serve.page.mathml import ATTRIBUTES, ELEMENTS

HTML = {"p", "span", "code", "em", "strong", "br", "div", "pre", "ul", "ol", "li", "a", "h1", "h2", "hr", "blockquote"}
NAMES = {*ATTRIBUTES, "alttext", "class", "start", "href", "title", "rel", "target", "data-language"}


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.names: set[str] = set()
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}


@pytest.mark.parametrize(
    "text", ["$a_1*b*c_2$", r"\(a_1*b*c_2\)", "$$a_1*b*c_2$$", r"\[a_1*b*c_2\]", "**so** $a_1*b*c_2$, with words"]
)
def test_markdown_does_not_see_a_formula(text: str) -> None:
    html = render.render(text)
    assert html.count("<msub>") == 2
    assert "<em>" not in html
    assert ('display="block"' in html) == ("$$" in text or "[" in text)


def test_environments_and_lines() -> None:
    html = render.render("\\begin{align}\na &= b \\\\\nc &= d\n\\end{align}")
    assert html.count("<mtr>") == 2
    assert render.render("\\[\nx^2\n\\]").count("<msup>") == 1


@pytest.mark.parametrize(
    "text", ["costs $5 and $6", "from $5 to $10, or US$7", "$HOME and $PATH of a shell", "a dollar: \\$x_1\\$", "$ 5 $"]
)
def test_money_stays_text(text: str) -> None:
    assert "<math" not in render.render(text)
    assert 'class="math"' not in render.render(text)


@pytest.mark.parametrize(
    "text", ["`$x_1$`", "```\n$x_1$ \\(y\\)\n```", "    $x_1$", "~~~latex\n\\[x\\]\n~~~", "``\\(x`y\\)``"]
)
def test_code_is_left_alone(text: str) -> None:
    html = render.render(text)
    assert "<math" not in html
    assert re.search(r"\$|\\", html)


@pytest.mark.parametrize(
    "latex", [r"\frac{a}{", r"\nosuchcommand x", r"\begin{nosuch}x\end{nosuch}", r"a}{b_1", r"\def\x{1}\x"]
)
def test_broken_latex_is_shown_as_its_source(latex: str) -> None:
    html = render.render(f"so \\({latex}\\) it is")
    assert f'<code class="math">\\({latex}\\)</code>' in html


def test_an_open_formula_at_the_end_of_a_partial_text_is_kept_from_markdown() -> None:
    assert "<em>" not in render.render(r"so \(a_1*b*c", partial=True)
    assert r"\(a_1*b*c" in render.render(r"so \(a_1*b*c", partial=True)


@pytest.mark.parametrize(
    "latex",
    [
        r"\text{<script>alert(1)</script>}",
        r"\href{javascript:alert(1)}{x}",
        r"\url{javascript:alert(1)}",
        "<img src=x onerror=alert(1)>",
        r"\color{red;background:url(//x)}{a}",
        r"\style{background:url(//x)}{a}",
        r"\class{x\" onclick=\"alert(1)}{a}",
        r"\unicode{x3c}script",
        "&#x3c;script&#x3e;",
        r"\text{\" onmouseover=\"alert(1)}",
        "</math><script>alert(1)</script>",
        r"\rule{99999em}{99999em}",
    ],
)
@pytest.mark.parametrize("delimiters", [("$", "$"), ("$$", "$$"), (r"\(", r"\)"), (r"\[", r"\]")])
def test_a_hostile_formula_becomes_no_script(latex: str, delimiters: tuple[str, str]) -> None:
    check_harmless(render.render(f"a {delimiters[0]}{latex}{delimiters[1]} b"))


PIECES = (
    *(
        "$",
        "$$",
        r"\(",
        r"\)",
        r"\[",
        r"\]",
        "{",
        "}",
        "^",
        "_",
        "&",
        r"\\",
        "x",
        " ",
        "\n",
        "`",
        "\ue000",
        "0",
        "\ue001",
    ),
    *(r"\frac", r"\text", r"\href", r"\color", r"\begin{align}", r"\end{align}", r"\left(", r"\right)", r"\sqrt[3]"),
    *("<script>", "onclick=", '"', "'", "<!--", "-->", "]]>", "javascript:", r"\hspace{9999em}", r"\mathbb", r"\boxed"),
)


@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join), st.booleans())
def test_no_formula_becomes_script(text: str, partial: bool) -> None:
    check_harmless(render.render(text, partial=partial))
    check_harmless(render.render(f"${text}$", partial=partial))


def check_harmless(html: str) -> None:
    seen = Tags(html)
    assert seen.tags <= HTML | set(ELEMENTS)
    assert seen.names <= NAMES
    assert "9999" not in re.sub(r'alttext="[^"]*"|<code.*?</code>|>[^<]*<', "", html)


@pytest.mark.parametrize(
    "text",
    [
        " ".join(f"$x_{{{index}}}^2$" for index in range(10_000)),
        r"\(" * 50_000,
        "$" * 100_000,
        "$a " * 60_000,
        "$" + "{" * 5000 + "}" * 5000 + "$",
        "$" + r"\frac" * 1500 + "$",
        r"\begin{align}" * 8000,
        "$$a\n\n" * 20_000,
        "$$" + "a" * 200_000 + "$$",
    ],
    ids=["10000 formulas", "open", "signs", "words", "braces", "fractions", "environments", "blank lines", "long"],
)
def test_time_and_size_are_bounded(text: str) -> None:
    began = time.process_time()
    html = render.render(text)
    assert time.process_time() - began < 20, "some CPU seconds at most; the server allows two and then shows the source"
    assert len(html) < 20 * len(text)
