"""The page as the whole server serves it: behind the key, with the routes that talk to an engine."""

from __future__ import annotations

from playwright.sync_api import Browser, expect

from qwenkit.text.tokenizer import Tokenizer
from tests.serve.conftest import StartServer, wait_until
from tests.serve.page.conftest import KEY, until
from tests.serve.page.test_page import finished, send
from tests.serve.scripted import ScriptedEngine


def test_only_the_page_itself_is_open(live_server: StartServer) -> None:
    live = live_server(api_key=(KEY,), requests_per_minute=1)
    page = live.get("/")
    assert page.status_code == 200
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert page.headers["cache-control"] == "no-cache"
    assert live.post("/render", {"text": "*a*"}).status_code == 401
    headers = {"Authorization": f"Bearer {KEY}"}
    for _ in range(3):
        answer = live.post("/render", {"text": "*a*"}, headers=headers)
        assert answer.json() == {"html": "<p><em>a</em></p>\n"}, "rendering is no request of those that are counted"


def test_talking_to_the_server(live_server: StartServer, browser: Browser, tokenizer: Tokenizer) -> None:
    engine = ScriptedEngine(tokenizer, ["Hello **you**!", "so on " * 500], seconds=0.01)
    live = live_server(engine=engine, api_key=(KEY,))
    page = browser.new_context(locale="en-GB").new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(live.url)
    page.locator("#key").fill(KEY)
    page.get_by_role("button", name="Enter the key").click()
    until(page, "state.models.length === 1")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Seed").fill("3")
    page.get_by_label("Max tokens").fill("3000")
    page.get_by_role("button", name="Done").click()
    send(page, "Hi")
    finished(page)
    expect(page.locator(".md strong")).to_have_text("you")
    tokens = len(tokenizer.encode("Hello **you**!")) + 1
    expect(page.locator(".stats")).to_contain_text(f"{tokens} tokens")
    send(page, "Go on")
    expect(page.locator(".md").last).to_contain_text("so on so on")
    page.keyboard.press("Escape")
    finished(page)
    expect(page.locator(".stats").last).to_contain_text("Stopped")
    expect(page.locator(".stats").last).not_to_contain_text("≈")
    wait_until(lambda: not engine.has_work, why="leaving ends the request")
    send(page, "x " * 5000)
    expect(page.locator(".problem p")).to_contain_text("4096")
    page.context.close()
    assert not errors
