"""Markdown of a model to HTML that is safe to show, and the program that does it for the server (see worker.py).

Raw HTML is text, links lead only to http, https and mailto, images become links, so nothing is fetched, and code is highlighted
by Pygments with classes, never with styles. Formulas become MathML (formulas.py, mathml.py). Run as a program it reads texts from
standard input, each as a byte that says whether more of the text is to come, eight bytes of length (little endian) and UTF-8,
until the input ends. For each it writes to standard output eight bytes of CPU time (nanoseconds), eight of length, and the HTML.
"""

import re
import signal
import sys
import time
from collections.abc import Sequence
from functools import cache, lru_cache
from html import escape
from typing import TYPE_CHECKING, Any

from qwenkit.serve.page.formulas import SIGNS, Formulas, cut_formulas

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

MAX_MARKDOWN = 1 << 18  # characters; a longer text is shown as it is
MAX_HIGHLIGHTED = 1 << 16  # characters of one code block; a longer one is shown in one colour
MAX_NESTING = 24  # quotes in lists in quotes
MAX_LANGUAGE = 30  # characters of a code block's label

NEWLINE = re.compile("\r\n?")
SAFE_LINK = re.compile(r"(https?://|mailto:)[^\s<>\"]+", re.IGNORECASE)
ALIGNMENT = re.compile(r"text-align:(left|center|right)")


def render(text: str, *, partial: bool = False) -> str:
    """Markdown to HTML; a text that is too long, or that the parser fails on, is escaped and shown as it is.

    `partial`: more of the text is to come. A formula that is open at its end is then shown as it stands.
    """
    if len(text) > MAX_MARKDOWN:
        return plain(text)
    formulas = Formulas()
    try:
        markdown = NEWLINE.sub("\n", text)
        if SIGNS.search(markdown):
            markdown, formulas = cut_formulas(markdown, code_blocks(markdown), partial=partial)
        return str(parser().render(markdown, {"formulas": formulas}))
    except (RecursionError, ValueError, IndexError):
        return plain(text)


def code_blocks(text: str) -> list[tuple[int, int, bool]]:
    """Code blocks of a markdown text in order: where they start and end, and whether fences do it."""
    starts = [0, *(match.end() for match in re.finditer("\n", text)), len(text)]
    env: dict[str, Any] = {}
    tokens: list[Token] = []
    markdown = parser()
    markdown.block.parse(text, markdown, env, tokens)
    blocks = [(token.map, token.type == "fence") for token in tokens if token.type in ("fence", "code_block")]
    return [(starts[lines[0]], starts[min(lines[1], len(starts) - 1)], is_fence) for lines, is_fence in blocks if lines]


def plain(text: str) -> str:
    return f'<pre class="plain">{escape(text)}</pre>'


@cache
def parser() -> "MarkdownIt":
    from markdown_it import MarkdownIt

    options = {"html": False, "linkify": False, "typographer": False, "maxNesting": MAX_NESTING}
    markdown = MarkdownIt("commonmark", options).enable(["table", "strikethrough"])
    markdown.validateLink = lambda url: SAFE_LINK.fullmatch(url) is not None  # type: ignore[method-assign]
    markdown.add_render_rule("fence", fence)
    markdown.add_render_rule("code_block", fence)
    markdown.add_render_rule("image", image)
    markdown.add_render_rule("link_open", link_open)
    markdown.add_render_rule("text", text_part)
    markdown.add_render_rule("code_inline", code_inline)
    for cell in ("th_open", "td_open"):
        markdown.add_render_rule(cell, table_cell)
    return markdown


def text_part(renderer: Any, tokens: "Sequence[Token]", index: int, options: Any, env: Any) -> str:
    return str(env["formulas"].to_html(tokens[index].content))


def code_inline(renderer: Any, tokens: "Sequence[Token]", index: int, options: Any, env: Any) -> str:
    return f"<code>{escape(env['formulas'].to_source(tokens[index].content))}</code>"


def fence(renderer: Any, tokens: "Sequence[Token]", index: int, options: Any, env: Any) -> str:
    """A code block: its language, and its text highlighted if Pygments knows the language."""
    token = tokens[index]
    words = env["formulas"].to_source(token.info).split(maxsplit=1)
    language = words[0][:MAX_LANGUAGE] if words else ""
    code = highlight(env["formulas"].to_source(token.content), language.lower())
    return f'<div class="code" data-language="{escape(language)}"><pre><code>{code}</code></pre></div>\n'


@lru_cache(maxsize=128)  # a growing text comes again and again, with the same blocks at its front
def highlight(code: str, language: str) -> str:
    from pygments import highlight as to_html  # type: ignore[import-untyped]
    from pygments.formatters import HtmlFormatter  # type: ignore[import-untyped]
    from pygments.lexers import get_lexer_by_name  # type: ignore[import-untyped]
    from pygments.util import ClassNotFound  # type: ignore[import-untyped]

    if not language or len(code) > MAX_HIGHLIGHTED:
        return escape(code)
    try:
        lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return escape(code)
    return str(to_html(code, lexer, HtmlFormatter(nowrap=True)))


def image(renderer: Any, tokens: "Sequence[Token]", index: int, options: Any, env: Any) -> str:
    """An image is a link to it, or only its description where it stands in a link already."""
    token = tokens[index]
    source = str(token.attrGet("src") or "")
    words = renderer.renderInlineAsText(token.children or [], options, env)
    label = escape(env["formulas"].to_source(words) or source)
    open_links = sum(token.nesting for token in tokens[:index] if token.type in ("link_open", "link_close"))
    return label if open_links else f'<a href="{escape(source)}" {LINK}>{label}</a>'


LINK = 'rel="noopener noreferrer nofollow" target="_blank"'


def link_open(renderer: Any, tokens: "Sequence[Token]", index: int, options: Any, env: Any) -> str:
    token = tokens[index]
    words = env["formulas"].to_source(str(token.attrGet("title") or ""))
    title = f' title="{escape(words)}"' if words else ""
    return f'<a href="{escape(str(token.attrGet("href") or ""))}"{title} {LINK}>'


def table_cell(renderer: Any, tokens: "Sequence[Token]", index: int, options: Any, env: Any) -> str:
    """Alignment as a class: the page's policy allows no style attributes."""
    token = tokens[index]
    aligned = ALIGNMENT.search(str(token.attrGet("style") or ""))
    return f'<{token.tag} class="{aligned.group(1)}">' if aligned else f"<{token.tag}>"


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides when this process ends
    while len(head := sys.stdin.buffer.read(9)) == 9:
        began = time.process_time_ns()
        text = sys.stdin.buffer.read(int.from_bytes(head[1:], "little")).decode()
        html = render(text, partial=head[0] == 1).encode()
        spent = time.process_time_ns() - began
        sys.stdout.buffer.write(spent.to_bytes(8, "little") + len(html).to_bytes(8, "little") + html)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
