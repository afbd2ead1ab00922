"""Markdown to HTML: what may come out, whatever goes in; the process that does it; the route."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from qwenkit.serve.errors import install_handlers
from qwenkit.serve.page import page, render
from qwenkit.serve.page.worker import BusyError, Renderer

ALLOWED = {
    **{tag: set() for tag in ("p", "br", "hr", "em", "strong", "s", "ul", "li", "blockquote")},
    "code": {"class"},
    **{tag: set() for tag in ("table", "thead", "tbody", "tr", "h1", "h2", "h3", "h4", "h5", "h6")},
    "ol": {"start"},
    "th": {"class"},
    "td": {"class"},
    "pre": {"class"},
    "span": {"class"},
    "div": {"class", "data-language"},
    "a": {"href", "title", "rel", "target"},
}
PIECES = [
    *(
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "</div>",
        "</pre>",
        "</code>",
        "<a href='javascript:x'>",
        "<!--",
        "-->",
    ),
    *(
        "javascript:alert(1)",
        "data:text/html,x",
        'https://a.example/?q="><b>',
        "mailto:a@b.c",
        "&lt;",
        "&#106;avascript:",
        '" onclick="x',
    ),
    *(
        "[",
        "]",
        "(",
        ")",
        "![",
        "](",
        "<",
        ">",
        "`",
        "```",
        "~~~",
        "```html\n",
        '```py " x',
        "\n",
        "\n\n",
        "    ",
        "\t",
        "> ",
        "- ",
        "1. ",
        "# ",
    ),
    *(
        "|",
        "|-|:-:|\n",
        "*",
        "**",
        "_",
        "~~",
        "\\",
        "\x00",
        "\u2028",
        "text",
        "[a]: javascript:x",
        "[a]: https://b",
        "[a]",
        "你好",
    ),
]


class Checker(HTMLParser):
    """Collects what is not on the list of tags and attributes, and links to elsewhere than the three schemes."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.wrong: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ALLOWED:
            self.wrong.append(tag)
            return
        for name, value in attrs:
            if name not in ALLOWED[tag]:
                self.wrong.append(f"{tag} {name}")
            if name == "href" and not re.match(r"(https?://|mailto:)", value or "", re.IGNORECASE):
                self.wrong.append(f"href {value}")

    def handle_comment(self, data: str) -> None:
        self.wrong.append("comment")

    def handle_decl(self, decl: str) -> None:
        self.wrong.append("declaration")

    def handle_data(self, data: str) -> None:
        self.text += data


def check(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert not checker.wrong, (checker.wrong, html)
    return checker


@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=40).map("".join))
def test_only_tags_of_the_list_come_out(text: str) -> None:
    html = render.render(text)
    check(html)
    assert not re.search(r"<[^>]*\s(on\w+|style|src)\s*=", re.sub(r'"[^"]*"', '""', html))


@given(st.text(max_size=200))
def test_code_keeps_every_character(code: str) -> None:
    code = re.sub(r"[\r\x00]|`{3}", "?", code) + "\n"
    for language in ("python", "html", "no-such-language", ""):
        assert check(render.render(f"````{language}\n{code}````")).text.rstrip("\n") == code.rstrip("\n")


@given(st.text(max_size=200))
def test_plain_keeps_every_character(text: str) -> None:
    text = re.sub(r"[\r\x00]", "?", text)
    assert check(render.plain(text)).text == text


def test_markdown_is_markdown() -> None:
    html = render.render("# A\n\n**b** ~~c~~ `d`\n\n1. e\n\n| f | g |\n|--:|:-:|\n| 1 | 2 |\n")
    for part in (
        "<h1>A</h1>",
        "<strong>b</strong>",
        "<s>c</s>",
        "<code>d</code>",
        "<ol>",
        '<td class="right">1</td>',
        '<td class="center">2</td>',
    ):
        assert part in html


def test_links_and_images() -> None:
    link = '<a href="https://a.example/" title="t&quot;" rel="noopener noreferrer nofollow" target="_blank">x</a>'
    assert render.render("[x](https://a.example/ 't\"')") == f"<p>{link}</p>\n"
    assert '<a href="https://a.example/p.png"' in render.render("![pic](https://a.example/p.png)")
    assert "<img" not in render.render("![pic](https://a.example/p.png)")
    assert render.render("[![pic](https://a.example/p.png)](https://b.example)").count("<a ") == 1
    assert render.render("https://a.example").count("<a ") == 0
    for url in ("javascript:x", "//a.example", "/v1/models", "data:image/png;base64,x", "file:///etc/passwd", "x"):
        assert "<a " not in render.render(f"[t]({url}) ![t]({url})")


def test_highlighting_and_its_limits() -> None:
    assert '<span class="k">def</span>' in render.render("```python\ndef f(): pass\n```")
    assert 'data-language="&quot;&gt;&lt;b&gt;"' in render.render('```"><b>\nx\n```')
    long = "x = 1\n" * (render.MAX_HIGHLIGHTED // 6 + 1)
    assert "<span" not in render.render(f"```python\n{long}```")
    assert render.render("*" * (render.MAX_MARKDOWN + 1)).startswith('<pre class="plain">')


@pytest.mark.parametrize(
    "text", ["> " * 5000, "- " * 5000, "[" * 5000, "*_" * 5000, "![" * 2000, "(" * 9000, "1. " * 4000]
)
def test_deep_nesting_is_no_error(text: str) -> None:
    check(render.render(text))


@pytest.fixture
def renderer() -> Iterator[Renderer]:
    renderer = Renderer(timeout=60.0)
    yield renderer
    renderer.close()


def test_the_process_renders_as_the_function_does(renderer: Renderer) -> None:
    for text in ("", "**a**", "你好 🙂\n\n```python\nprint(1)\n```", "x" * 200_000):
        assert renderer.render(text) == render.render(text)
    assert "<strong>?</strong>" in renderer.render("**\ud800**"), "half a character"


def test_a_text_that_takes_too_long_is_shown_plain_and_frees_the_core(renderer: Renderer) -> None:
    renderer.render("start")
    first = renderer._process
    assert first is not None
    renderer.timeout = 0.05
    hard = "[a](b" * 50_000
    assert renderer.render(hard) == render.plain(hard)
    assert first.poll() is not None
    renderer.timeout = 60.0
    assert renderer.render("**b**") == "<p><strong>b</strong></p>\n"
    assert renderer._process is not first


def test_a_slow_start_is_no_texts_fault(renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text(f"import runpy, time\ntime.sleep(1.5)\nrunpy.run_path({render.__file__!r}, run_name='__main__')\n")
    monkeypatch.setattr(render, "__file__", str(slow))
    renderer.timeout = 1.0
    assert renderer.render("**b**") == "<p><strong>b</strong></p>\n"


def test_a_process_that_died_is_replaced(renderer: Renderer) -> None:
    renderer.render("start")
    assert renderer._process is not None
    renderer._process.kill()
    renderer._process.wait()
    assert renderer.render("**b**") == "<p><strong>b</strong></p>\n"


def test_only_so_many_texts_wait(renderer: Renderer) -> None:
    renderer.max_waiting = 2

    async def three() -> list[object]:
        return await asyncio.gather(*(renderer.html("**b**") for _ in range(3)), return_exceptions=True)

    results = asyncio.run(three())
    assert results[:2] == ["<p><strong>b</strong></p>\n"] * 2
    assert isinstance(results[2], BusyError)


def test_the_process_imports_nothing_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("markdown_it.py", "html.py", "pygments.py"):
        (tmp_path / name).write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    renderer = Renderer()
    try:
        assert renderer.render("**b**") == "<p><strong>b</strong></p>\n"
    finally:
        renderer.close()


def test_the_routes() -> None:
    app = FastAPI()
    install_handlers(app)
    app.include_router(page.router)
    with TestClient(app) as client:
        answer = client.get("/")
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'sha256-")
        assert "unsafe" not in policy
        for tag in ("script", "style"):
            inline = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, flags=re.DOTALL)
            assert len(inline) == 1
            assert page.digest(inline[0]) in policy
        assert not re.search(
            r"\s(on\w+|style|src)=", re.sub(r"<(script|style)>.*?</\1>", "", answer.text, flags=re.DOTALL)
        )
        assert client.post("/render", json={"text": "*a*"}).json() == {"html": "<p><em>a</em></p>\n"}
        assert client.post("/render", json={"text": 5}).status_code == 400
        assert client.post("/render", json={"text": "a", "mode": "b"}).headers["x-ignored-fields"] == "mode"
        long = client.post("/render", json={"text": "a" * (page.MAX_TEXT + 1)})
        assert long.status_code == 413
        assert str(page.MAX_TEXT) in long.json()["error"]["message"]
        app.state.renderer.max_waiting = 0
        busy = client.post("/render", json={"text": "a"})
        assert busy.status_code == 429
        assert busy.headers["retry-after"] == "1"
    assert app.state.renderer is None
