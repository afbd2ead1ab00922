"""Routes of the web page: `GET /` answers with the page, `POST /render` turns markdown into HTML for it.

The page is one HTML document, put together from the files of this folder, and no more than a client of the API: it holds
nothing of the server, so it needs no key, while `/render` is protected like every other route. Its Content-Security-Policy
allows the one inline script and the one inline style by their hashes, requests to the same origin, and nothing else.
"""

import base64
import contextlib
import hashlib
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request, Response
from pydantic import BaseModel, Field

from qwenkit.serve.body import JsonRoute, RequestModel
from qwenkit.serve.caller import caller
from qwenkit.serve.errors import ApiError
from qwenkit.serve.page.worker import BusyError, Renderer

SCRIPTS = ("texts.js", "store.js", "api.js", "view.js", "dialogs.js", "page.js")
MAX_TEXT = 1 << 20  # characters of one text to render


class RenderRequest(RequestModel):
    """Markdown as a model wrote it, possibly cut anywhere."""

    text: str = Field(description=f"Markdown, at most {MAX_TEXT} characters.")
    partial: bool = Field(
        False, description="Whether more is to come: an open formula at the end is then shown as it is."
    )


class RenderAnswer(BaseModel):
    """HTML without scripts, handlers, images or links of other kinds than http, https and mailto; formulas as MathML."""

    html: str


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    renderer = getattr(app.state, "renderer", None)
    if renderer is not None:
        renderer.close()
        app.state.renderer = None


router = APIRouter(lifespan=lifespan, route_class=JsonRoute)


@router.get("/", include_in_schema=False)
async def index() -> Response:
    document, headers = assemble()
    return Response(document, media_type="text/html", headers=headers)


@router.post("/render")
async def render(request: RenderRequest, http: Request) -> RenderAnswer:
    """Markdown to safe HTML, as the page shows it."""
    if len(request.text) > MAX_TEXT:
        raise ApiError(413, f"text has {len(request.text)} characters, at most {MAX_TEXT} are allowed.", param="text")
    state = http.app.state
    if getattr(state, "renderer", None) is None:  # the process starts with the first text
        state.renderer = Renderer()
    try:
        return RenderAnswer(
            html=await state.renderer.html(request.text, caller.get().namespace, partial=request.partial)
        )
    except BusyError as error:
        raise ApiError(
            429, str(error), type="rate_limit_error", headers={"Retry-After": str(error.retry_after)}
        ) from error


@cache
def assemble() -> tuple[bytes, dict[str, str]]:
    """The page as one document, and the headers that go with it."""
    folder = Path(__file__).parent
    style = (folder / "page.css").read_text(encoding="utf-8")
    script = "".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    assert "</script" not in script.lower()
    assert "</style" not in style.lower()
    html = (folder / "index.html").read_text(encoding="utf-8")
    html = html.replace("<style></style>", f"<style>{style}</style>")
    html = html.replace("<script></script>", f"<script>{script}</script>")
    policy = {
        "default-src": "'none'",
        "script-src": digest(script),
        "style-src": digest(style),
        "connect-src": "'self'",
        "img-src": "data:",  # the icon of the page
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "qwenkit",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cache-Control": "no-cache",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }
    return html.encode(), headers


def digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
