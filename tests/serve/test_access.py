"""The doors: who may call which route, from where, how much, and under which id."""

from __future__ import annotations

import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from qwenkit.serve.access import ADMIN_ROUTES, OPEN_ROUTES
from qwenkit.serve.app import create_app
from qwenkit.serve.config import ServeConfig
from qwenkit.serve.keys import Keys
from tests.serve.conftest import HTTP, LiveServer, MakeServer, StartServer

KEY, OTHER, ADMIN = "key-of-alice", "key-of-bob", "key-of-the-admin"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


def routes(app: Any) -> list[tuple[str, str]]:
    """(method, path) of every route, with something in the place of its parameters."""
    document = app.openapi()
    found = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    found |= {("GET", "/"), ("GET", "/openapi.json"), ("GET", "/nothing/here"), ("POST", "/render")}
    return sorted((method, re.sub(r"\{[^}]*\}", "x", path)) for method, path in found)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_every_route_needs_a_key_but_the_written_list(live_server: StartServer) -> None:
    live = live_server(api_key=(KEY, OTHER), admin_key=ADMIN)
    asked = routes(live.app)
    assert len(asked) > 10
    for method, path in asked:
        for headers in (
            {},
            bearer("wrong"),
            {"Authorization": KEY},
            {"x-api-key": KEY[:-1]},
            {"x-api-key": b"\xd0\xba\xff"},
        ):
            status = httpx.request(method, live.url + path, headers=headers, **HTTP).status_code
            if path in OPEN_ROUTES:
                assert status == 200, (method, path)
            else:
                assert status == 401, (method, path, headers)
    for headers in (bearer(KEY), {"x-api-key": OTHER}, {"authorization": f"bearer {KEY}"}, bearer(ADMIN)):
        assert live.get("/v1/models", headers=headers).status_code == 200
        assert live.get("/metrics", headers=headers).status_code == 200
    refusal = live.get("/v1/models")
    assert refusal.json()["error"] == {
        "message": refusal.json()["error"]["message"],
        "type": "authentication_error",
        "param": None,
        "code": "invalid_api_key",
    }
    assert live.post("/v1/messages").json()["type"] == "error", "Anthropic's shape under Anthropic's path"


def test_administration_needs_its_own_key(live_server: StartServer) -> None:
    closed, live = live_server(api_key=(KEY,)), live_server(api_key=(KEY,), admin_key=ADMIN)
    body = {"lora_name": "poet", "lora_path": "/nowhere"}
    assert any(path in ADMIN_ROUTES for _, path in routes(live.app))
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/admin/whatever"):
        assert closed.post(path, body, headers=bearer(KEY)).status_code == 403
        assert live.post(path, body).status_code == 401
        assert live.post(path, body, headers=bearer(KEY)).status_code == 403
    answer = live.post("/v1/load_lora_adapter", body, headers=bearer(ADMIN))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "lora_path"
    open_server = live_server()
    assert open_server.post("/v1/load_lora_adapter", body).status_code == 403


def test_keys_come_from_flags_a_file_and_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# the team\nfile-key\n\nalice alices-key\n")
    config = ServeConfig(api_key=("flag-key",), api_key_file=str(path))
    keys = Keys.of(config, {"QWENKIT_API_KEYS": " env-one, env-two\n", "QWENKIT_ADMIN_KEY": "boss"})
    names = {}
    for key in ("flag-key", "file-key", "alices-key", "env-one", "env-two", "boss"):
        owner = keys.owner([key.encode()])
        assert owner is not None
        names[key] = owner.name
    assert names["alices-key"] == "alice"
    assert names["boss"] == "admin"
    assert len(set(names.values())) == len(names)
    assert keys.owner([b""]) is None
    assert keys.owner([]) is None
    same = Keys([("another-name", "flag-key")]).owner([b"flag-key"])
    assert same is not None
    assert same.namespace == keys.owner([b"flag-key"]).namespace, "what a key owns survives a restart"  # type: ignore[union-attr]
    assert keys.has(same.namespace)
    assert keys.has(""), "the admin's"
    assert not keys.has("ab" * 12)
    assert Keys().has("")
    assert not Keys([("a", "key")]).has(""), "what was made when no key was needed waits for such days"
    path.write_text("one two three\n")
    with pytest.raises(ValueError, match="line 1"):
        Keys.of(config, {})
    with pytest.raises(ValueError, match="admin_key is also an API key"):
        Keys([("a", "same")], "same")
    with pytest.raises(ValueError, match="without blanks") as caught:
        Keys([("a", "geheim nis")])
    assert "geheim" not in str(caught.value)


def test_without_keys_foreign_pages_and_names_stay_out(live_server: StartServer) -> None:
    live = live_server()
    port = live.url.rpartition(":")[2]
    assert live.get("/v1/models", headers={"Host": f"localhost:{port}"}).status_code == 200
    assert live.get("/v1/models", headers={"Origin": live.url}).status_code == 200
    assert live.get("/v1/models", headers={"Host": f"rebound.example:{port}"}).status_code == 403
    assert live.get("/v1/models", headers={"Origin": "https://evil.example"}).status_code == 403
    assert live_server(allow_no_key=True).get("/v1/models", headers={"Host": "box.lan"}).status_code == 200


def test_cors_is_off_unless_an_origin_is_named(live_server: StartServer) -> None:
    origin = "https://chat.example.org"
    ask = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    off = live_server(api_key=(KEY,))
    answer = off.get("/v1/models", headers=bearer(KEY) | {"Origin": origin})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert httpx.options(off.url + "/v1/chat/completions", headers=ask, **HTTP).status_code == 401
    on = live_server(api_key=(KEY,), cors_origin=(origin,))
    answer = httpx.options(on.url + "/v1/chat/completions", headers=ask, **HTTP)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == origin
    assert "access-control-allow-credentials" not in answer.headers
    answer = on.get("/v1/models", headers=bearer(KEY) | {"Origin": origin})
    assert answer.headers["access-control-allow-origin"] == origin
    assert on.get("/v1/models", headers={"Origin": origin}).headers["access-control-allow-origin"] == origin
    stranger = httpx.options(on.url + "/v1/models", headers=ask | {"Origin": "https://evil.example"}, **HTTP)
    assert "access-control-allow-origin" not in stranger.headers


def test_bodies_are_capped_whether_they_say_their_length_or_not(live_server: StartServer) -> None:
    live = live_server(max_body="10KiB")
    long = json.dumps(CHAT | {"user": "x" * 11000}).encode()
    headers = {"content-type": "application/json"}
    answers = [
        live.post("/v1/chat/completions", content=long, headers=headers),
        live.post("/v1/chat/completions", content=iter([long[:6000], long[6000:]]), headers=headers),
    ]
    for answer in answers:
        assert answer.status_code == 413
        assert "10240 bytes" in answer.json()["error"]["message"]
    assert live.post("/v1/chat/completions", CHAT).status_code == 200


def test_a_body_that_never_comes_is_not_waited_for(live_server: StartServer) -> None:
    live = live_server(header_timeout=0.3)
    with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2]))) as client:
        client.settimeout(60)
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
                       b"Content-Type: application/json\r\n\r\n{")  # fmt: skip
        began = time.monotonic()
        assert b" 408 " in client.recv(100)
        assert time.monotonic() - began < 30


def test_requests_a_minute(live_server: StartServer) -> None:
    live = live_server(api_key=(KEY, OTHER), requests_per_minute=2)
    statuses = [live.post("/v1/chat/completions", CHAT, headers=bearer(KEY)).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    refused = live.post("/v1/chat/completions", CHAT, headers=bearer(KEY))
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert live.post("/v1/chat/completions", CHAT, headers=bearer(OTHER)).status_code == 200
    assert live.get("/v1/models", headers=bearer(KEY)).status_code == 200


def test_ids_and_headers_of_answers(live_server: StartServer) -> None:
    live = live_server()
    for path in ("/health", "/v1/models", "/nothing"):
        answer = live.get(path)
        assert re.fullmatch(r"req-[0-9a-f]{32}", answer.headers["x-request-id"])
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert "server" not in answer.headers or answer.headers["server"] == "uvicorn"
    assert live.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for odd in ("a b", "x" * 200, "<script>"):
        assert live.get("/health", headers={"x-request-id": odd}).headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/nothing", None, 404, "not_found"),
        ("DELETE", "/v1/models", None, 405, "method_not_allowed"),
        ("GET", "/v1/models/other", None, 404, "model_not_found"),
        ("POST", "/v1/load_lora_adapter", b'{"lora_name": "a"}', 400, "missing_required_parameter"),
        ("POST", "/v1/load_lora_adapter", b'{"lora_name": ', 400, "bad_json"),
        ("POST", "/v1/load_lora_adapter", b'{"lora_name": NaN, "lora_path": "b"}', 400, "bad_json"),
        ("POST", "/v1/load_lora_adapter", b'{"lora_name": 1e999, "lora_path": "-Infinity"}', 400, "invalid_value"),
        ("POST", "/v1/load_lora_adapter", b"[" * 100_000, 400, "bad_json"),
        ("POST", "/v1/load_lora_adapter", b"9" * 10_000, 400, "bad_json"),
    ],
)  # fmt: skip
def test_refusals_have_one_shape(
    live_server: StartServer, method: str, path: str, body: bytes | None, status: int, code: str | None
) -> None:
    live = live_server(admin_key=ADMIN)
    headers = bearer(ADMIN) | {"content-type": "application/json"}
    answer = httpx.request(method, live.url + path, content=body, headers=headers, **HTTP)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    if code == "unknown_parameter":
        assert error["param"] == "odd"
        assert "odd" in error["message"]


def test_a_bug_in_a_route_is_answered_500_with_the_id(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(make_server())

    async def broken() -> None:
        raise RuntimeError("secret detail")

    app.router.routes.append(APIRoute("/broken", broken))
    transport = httpx.ASGITransport(app=app)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/broken", headers={"x-request-id": "r-9"})

    import asyncio

    answer = asyncio.run(ask())
    assert answer.status_code == 500
    assert "r-9" in answer.json()["error"]["message"]
    assert "secret" not in answer.text
    assert "secret detail" in caplog.text, "the log has it"


def test_many_wrong_requests_leave_the_server_as_it_was(live_server: StartServer) -> None:
    live: LiveServer = live_server(api_key=(KEY,))
    for number in range(50):
        live.post("/v1/chat/completions", content=b"{" * number)
    assert live.get("/ready").json()["running"] == 0
