"""The page as people meet it: language, colours, a phone, a keyboard alone, and models that write hostile text."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from tests.serve.page.conftest import Script, Site, VisitPage, until
from tests.serve.page.test_page import finished, send

PHONE = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}

HOSTILE = """
<script>window.hacked = 1</script>
<img src=x onerror="window.hacked = 2">
<svg onload="window.hacked = 3"><a xlink:href="javascript:window.hacked=4">x</a></svg>
<iframe srcdoc="<script>parent.hacked = 5</script>"></iframe>

[press](javascript:window.hacked=6) [press](JaVaScRiPt:window.hacked=6) <javascript:window.hacked=7>
[press](data:text/html,<script>window.hacked=8</script>) [press](vbscript:x) [press](//evil.example) [press](/v1/models)
![picture](x" onerror="window.hacked=9) ![picture](https://evil.example/pixel.png) [a](https://x.example/"onmouseover="window.hacked=10)

```"><img src=x onerror=window.hacked=11>
</code></pre></div><script>window.hacked = 12</script>
```

```html
<script>window.hacked = 13</script><img src=x onerror="window.hacked=14">
```

| <img src=x onerror=window.hacked=15> | b |
|:-:|--:|
| `<script>` | <style>*{display:none}</style> |

[ref]: javascript:window.hacked=16
[ref] &lt;script&gt;window.hacked=17&lt;/script&gt;
"""


def width_fits(page: Page) -> bool:
    return bool(
        page.evaluate(
            "document.documentElement.scrollWidth <= innerWidth && $('scroll').scrollWidth <= $('scroll').clientWidth"
        )
    )


def test_what_a_model_says_never_runs(site: Site, visit: VisitPage) -> None:
    page = visit()
    fetched: list[str] = []
    page.on("request", lambda request: fetched.append(request.url))
    call = {
        "index": 0,
        "id": "1",
        "function": {"name": "<img src=x onerror=window.hacked=20>", "arguments": "<script>"},
    }
    site.scripts.append(Script([{"reasoning_content": HOSTILE}, {"content": HOSTILE}, {"tool_calls": [call]}]))
    send(page, HOSTILE)
    finished(page)
    expect(page.locator(".md .code")).to_have_count(2)
    for link in page.locator(".md a").all():
        assert str(link.get_attribute("href")).startswith("https://"), link
        assert "noopener" in str(link.get_attribute("rel"))
        link.hover()
    assert page.locator("#log :is(script, img, iframe, style, object, embed, form)").count() == 0
    attributes = page.evaluate("""
        [...document.querySelectorAll("#log *")].flatMap((one) => [...one.attributes]).map((one) => one.name)
    """)
    assert not [name for name in attributes if name.startswith(("on", "style"))]
    page.reload()
    expect(page.locator(".md .code")).to_have_count(2)
    page.get_by_role("button", name="Delete: ").click()
    expect(page.locator("#ask-title")).to_contain_text("<script>")
    assert page.evaluate("window.hacked") is None
    assert {url for url in fetched if not url.startswith((site.url, "data:"))} == set()


def test_the_policy_stops_a_script_that_gets_in_all_the_same(site: Site, visit: VisitPage) -> None:
    page = visit()
    blocked = page.evaluate("""() => {
        try { document.body.innerHTML = "<b>text</b>"; return false } catch (error) { return error instanceof TypeError }
    }""")
    assert blocked, "HTML without the page's own policy"
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('img'), {src: 'https://evil.example/x.png'}))"
    )
    until(page, "violations.length >= 2")
    assert page.evaluate("violations.splice(0).map((text) => text.split(' ')[0])") == [
        "require-trusted-types-for",
        "img-src",
    ]


def test_the_language_is_the_browsers_until_it_is_chosen(site: Site, visit: VisitPage) -> None:
    page = visit(locale="zh-CN")
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    expect(page.locator("#new")).to_have_text("新对话")
    expect(page.get_by_role("button", name="设置")).to_be_visible()
    page.get_by_role("button", name="English").click()
    expect(page.locator("#new")).to_have_text("New conversation")
    page.reload()
    expect(page.locator("#new")).to_have_text("New conversation")
    expect(page.locator("#input")).to_have_attribute("placeholder", "Write a message")


def test_both_languages_have_the_same_texts(site: Site, visit: VisitPage) -> None:
    page = visit()
    texts = page.evaluate("TEXTS")
    assert texts["en"].keys() == texts["zh"].keys()
    assert all(texts["en"].values())
    assert all(texts["zh"].values())


def test_colours_follow_the_system_until_they_are_chosen(site: Site, visit: VisitPage) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    page = visit(color_scheme="dark")
    dark = page.evaluate(ground)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(ground)
    assert dark != light
    page.get_by_role("button", name="Colours: as the system").click()
    page.get_by_role("button", name="Colours: light").click()
    assert page.evaluate(ground) == dark
    page.reload()
    assert page.evaluate(ground) == dark
    page.get_by_role("button", name="Colours: dark").click()
    assert page.evaluate(ground) == light


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(site: Site, visit: VisitPage, scheme: str) -> None:
    page = visit(color_scheme=scheme)
    ratio = """(pair) => {
        const probe = document.body.appendChild(document.createElement("i"));
        const light = (name) => {
            probe.style.color = `var(--${name})`;
            const part = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255);
            const [r, g, b] = part.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
        };
        const [a, b] = pair.map(light);
        probe.remove();
        return Math.max(a, b) / Math.min(a, b);
    }"""
    on_ground = [
        (name, ground)
        for name in ("text", "quiet", "accent", "wrong")
        for ground in ("ground", "side", "soft", "raised")
    ]
    for pair in [*on_ground, ("on-accent", "accent"), ("wrong", "wrong-soft"), ("text", "bubble")]:
        assert page.evaluate(ratio, list(pair)) >= 4.5, pair


def test_a_phone_shows_everything_without_scrolling_sideways(site: Site, visit: VisitPage) -> None:
    page = visit(**PHONE)
    wide = "x" * 300
    site.say(f"{wide}\n\n```python\n{wide}\n```\n\n| {' | '.join(['a long head'] * 9)} |\n|{'---|' * 9}\n\n`{wide}`")
    send(page, wide)
    finished(page)
    expect(page.locator(".md table")).to_be_attached()
    assert width_fits(page)
    expect(page.locator("#sidebar")).not_to_be_in_viewport()
    page.get_by_role("button", name="Show conversations").click()
    expect(page.get_by_role("button", name="Hide conversations")).to_be_focused()
    expect(page.locator("#list .open")).to_have_count(1)
    page.get_by_role("button", name="New conversation").first.click()
    expect(page.locator("#input")).to_be_focused()
    expect(page.locator("#sidebar")).not_to_be_in_viewport()
    assert page.locator("#send").bounding_box()["y"] < 640  # type: ignore[index]
    page.get_by_role("button", name="Settings").click()
    assert width_fits(page)
    box = page.locator("#settings").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360


def test_everything_is_reached_by_keyboard(site: Site, visit: VisitPage) -> None:
    page = visit()
    press = page.keyboard.press
    expect(page.locator("#input")).to_be_focused()
    page.keyboard.type("Line one")
    press("Shift+Enter")
    page.keyboard.type("line two")
    press("Enter")
    finished(page)
    expect(page.locator(".bubble")).to_have_text("Line one\nline two")
    expect(page.locator("#input")).to_be_focused()
    reached = set()
    page.evaluate("document.activeElement.blur()")
    for _ in range(25):
        press("Tab")
        reached.add(page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.id"))
        assert page.evaluate("""() => {
            const on = document.activeElement;
            return on === document.body || on.id === "input" || getComputedStyle(on).outlineStyle !== "none";
        }"""), "the focus is seen"
    assert {"new", "language", "Model", "Settings", "Edit", "Answer again", "Copy", "Write a message"} <= reached
    page.get_by_role("button", name="Settings").focus()
    press("Enter")
    expect(page.locator("#settings")).to_be_visible()
    press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    expect(page.get_by_role("button", name="Settings")).to_be_focused()


def test_an_input_method_may_use_enter(site: Site, visit: VisitPage) -> None:
    page = visit()
    page.locator("#input").fill("nihao")
    page.evaluate(
        "$('input').dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
    )
    assert not site.requests
    page.locator("#input").press("Enter")
    finished(page)
    assert len(site.requests) == 1


def test_code_is_copied_as_it_was_written(site: Site, visit: VisitPage) -> None:
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    site.say("```python\nif a < b:\n    print('&')\n```")
    send(page, "Code")
    finished(page)
    page.locator(".copy-code").click()
    until(page, "navigator.clipboard.readText().then((text) => text !== '')")
    assert page.evaluate("navigator.clipboard.readText()") == "if a < b:\n    print('&')\n"
    expect(page.locator("#status")).to_have_text("Copied")


def test_finished_blocks_are_not_drawn_anew(site: Site, visit: VisitPage) -> None:
    page = visit()
    site.say("First block.\n\n", *["more "] * 40, pause=0.02)
    send(page, "Two blocks")
    expect(page.locator(".md p").first).to_have_text("First block.")
    page.evaluate("document.querySelector('.md p').marked = true")
    finished(page)
    expect(page.locator(".md p")).to_have_count(2)
    expect(page.locator(".md p").last).to_contain_text("more " * 39)
    assert page.evaluate("document.querySelector('.md p').marked") is True
