"""A server with the page and a chat route that plays scripts, and a headless Chromium to visit it with."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from playwright.sync_api import Browser, Page, expect, sync_playwright

from qwenkit.serve.errors import ApiError, install_handlers
from qwenkit.serve.page.page import router
from qwenkit.serve.page.worker import Renderer
from tests.serve.conftest import PATIENCE

KEY = "page-key"
expect.set_options(timeout=1000 * PATIENCE)


@dataclass
class Script:
    """One answer: its deltas, the seconds between them, and how it ends."""

    deltas: list[dict[str, Any]]
    pause: float = 0.0
    hold: threading.Event | None = None  # what the end waits for
    finish: str = "stop"
    error: ApiError | None = None  # instead of an answer
    breaks: str | None = None  # an error inside the stream, after the deltas


@dataclass
class Site:
    """What the tests see of the server: its address, the requests it got, the scripts it will play."""

    url: str = ""
    scripts: list[Script] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    aborted: int = 0
    key: str | None = None
    models: list[str] = field(default_factory=lambda: ["tiny-qwen", "other-qwen"])

    def say(self, *texts: str, **settings: Any) -> None:
        self.scripts.append(Script([{"content": text} for text in texts], **settings))


def make_app(site: Site) -> FastAPI:
    app = FastAPI()
    app.state.renderer = Renderer(timeout=60.0)
    install_handlers(app)
    app.include_router(router)

    def check(http: Request) -> None:
        if site.key is not None and http.headers.get("authorization") != f"Bearer {site.key}":
            raise ApiError(401, "no valid API key")

    @app.get("/v1/models")
    async def models(http: Request) -> dict[str, Any]:
        check(http)
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in site.models]}

    @app.post("/v1/chat/completions")
    async def chat(http: Request) -> StreamingResponse:
        check(http)
        site.requests.append(orjson.loads(await http.body()))
        script = site.scripts.pop(0) if site.scripts else Script([{"content": "And so on."}])
        if script.error is not None:
            raise script.error
        return StreamingResponse(play(site, script), media_type="text/event-stream")

    return app


async def play(site: Site, script: Script) -> AsyncIterator[bytes]:
    def event(chunk: dict[str, Any]) -> bytes:
        return b"data: " + orjson.dumps(chunk) + b"\n\n"

    try:
        yield event({"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]})
        for delta in script.deltas:
            yield event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
            await asyncio.sleep(script.pause)
        while script.hold is not None and not script.hold.is_set():
            await asyncio.sleep(0.005)
        if script.breaks is not None:
            yield event({"error": {"message": script.breaks, "type": "server_error"}})
            return
        yield event({"choices": [{"index": 0, "delta": {}, "finish_reason": script.finish}]})
        yield event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 42, "total_tokens": 51}})
        yield b"data: [DONE]\n\n"
    except (asyncio.CancelledError, GeneratorExit):
        site.aborted += 1
        raise


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    server = uvicorn.Server(uvicorn.Config(make_app(site), host="127.0.0.1", port=0, log_level="error"))
    server.config.timeout_graceful_shutdown = 1
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + PATIENCE
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    site.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield site
    server.should_exit = True
    thread.join(PATIENCE)


@pytest.fixture(scope="module")  # no longer: Playwright keeps an event loop running in this thread
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs a browser: neither chromium nor google-chrome is on the path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


def until(page: Page, condition: str) -> None:
    """Waits for a condition in JavaScript. Playwright's own wait evaluates text inside the page, which its policy forbids."""
    deadline = time.monotonic() + PATIENCE
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(10)


VisitPage = Callable[..., Page]

# Runs before the page: what its policy blocked is kept where a test can read it.
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) =>
    violations.push(`${event.violatedDirective} ${event.blockedURI}`));
"""


@pytest.fixture
def visit(site: Site, browser: Browser) -> Iterator[VisitPage]:
    """visit(**settings of a browser context) -> the page, opened. At the end nothing may have gone wrong in it."""
    pages: list[tuple[Page, list[str]]] = []

    def visit(**settings: Any) -> Page:
        context = browser.new_context(**({"locale": "en-GB", "viewport": {"width": 1100, "height": 760}} | settings))
        context.set_default_timeout(1000 * PATIENCE)
        context.add_init_script(WATCH)
        page = context.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: (errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(site.url)
        until(page, "state.models.length > 0 || !document.getElementById('notice').hidden")
        pages.append((page, errors))
        return page

    yield visit
    for page, errors in pages:
        violations = page.evaluate("violations")
        page.context.close()
        assert not errors
        assert not violations
