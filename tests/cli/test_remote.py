"""`--url`: what is sent to an OpenAI-compatible server, what comes back, and everything that can go wrong on the way."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenkit.cli.conversation.remote import Remote, api_base, find_key
from qwenkit.cli.conversation.state import Conversation, Message, Piece
from qwenkit.cli.main import cli
from qwenkit.engine.sampling import SamplingParams

MESSAGES = [{"role": "user", "content": "hi"}]
Writer = Callable[[BaseHTTPRequestHandler], None]


def event(content: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {} if content is None else {"content": content}, "finish_reason": None} | more
    return b"data: " + json.dumps({"choices": [choice]}, ensure_ascii=False).encode() + b"\n\n"


USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 7}}\n\n'
DONE = b"data: [DONE]\n\n"
END = event(None, finish_reason="stop") + USAGE + DONE


class Server:
    """A server whose next answer a test writes; it remembers the requests."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.answer: Writer = sse(event("Hi"), END)
        self.models: Writer = body(200, {"data": [{"id": "first"}, {"id": "second"}]})
        self.gone = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append((self.path, dict(self.headers), None))
                outer.models(self)

            def do_POST(self) -> None:
                data = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, dict(self.headers), data))
                try:
                    outer.answer(self)
                except OSError:
                    outer.gone.set()
                self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


def sse(*parts: bytes, kind: str = "text/event-stream") -> Writer:
    def write(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", kind)
        handler.end_headers()
        for part in parts:
            handler.wfile.write(part)
            handler.wfile.flush()

    return write


def body(status: int, content: Any) -> Writer:
    def write(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.end_headers()
        handler.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

    return write


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "OPENAI_API_KEY", "DASHSCOPE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with closing(Server()) as server:
        yield server


def ask(server: Server, params: SamplingParams | None = None, **more: Any) -> list[Piece]:
    with closing(Remote(server.url, "m", None, **more)) as remote:
        return list(remote.stream(MESSAGES, params or SamplingParams()))


def test_only_what_was_set_is_sent(server: Server) -> None:
    ask(server)
    path, headers, sent = server.requests[-1]
    assert path == "/v1/chat/completions"
    assert "Authorization" not in headers
    assert sent == {"model": "m", "messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}}
    params = SamplingParams(
        temperature=0, top_k=5, repetition_penalty=1.1, stop=("a",), seed=3, max_tokens=9, logit_bias={5: 1.0}
    )
    ask(server, params)
    extra = {name: value for name, value in server.requests[-1][2].items() if name not in sent}
    assert extra == {
        "temperature": 0,
        "top_k": 5,
        "repetition_penalty": 1.1,
        "stop": ["a"],
        "seed": 3,
        "max_tokens": 9,
        "logit_bias": {"5": 1.0},
    }


def test_pieces_and_the_servers_own_count(server: Server) -> None:
    server.answer = sse(event(""), event("Hel"), event("lo", finish_reason="length"), USAGE, DONE)
    pieces = ask(server)
    assert "".join(piece.text for piece in pieces) == "Hello"
    assert sum(piece.tokens for piece in pieces) == 7
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["length"]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thoughts_are_apart(server: Server, name: str) -> None:
    server.answer = sse(event(None, delta={name: "hm", "content": None}), event("yes"), END)
    pieces = ask(server)
    assert [(piece.reasoning, piece.text) for piece in pieces[:2]] == [("hm", ""), ("", "yes")]


@settings(max_examples=25, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=8), st.data())
def test_characters_split_over_packets_arrive_whole(text: str, data: st.DataObject) -> None:
    text = f"é好🙂\u2028\r{text}"
    stream = b": comment\n\n" + event(text) + END
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    parts = [stream[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True)]

    def packets(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=iter(parts))

    with closing(Remote("http://127.0.0.1", "m", None)) as remote:
        remote._client.close()
        remote._client = httpx.Client(transport=httpx.MockTransport(packets))
        assert "".join(piece.text for piece in remote.stream(MESSAGES, SamplingParams())) == text


def test_the_key_and_the_only_model(server: Server) -> None:
    server.models = body(200, {"data": [{"id": "first"}]})
    with closing(Remote(server.url + "/v1/", None, "sk-1")) as remote:
        assert remote.name == "first"
        assert server.requests[-1][0] == "/v1/models"
        assert server.requests[-1][1]["Authorization"] == "Bearer sk-1"
        assert dict(remote.defaults()) == {}


FAILURES: list[tuple[Writer, str]] = [
    (body(401, {"error": {"message": "bad key"}}), "answered 401 Unauthorized: bad key; give --api-key or set OPENAI"),
    (body(404, b"<html>\nnot here</html>"), "answered 404 Not Found: <html> not here</html>"),
    (body(400, {"object": "error", "message": "too long"}), "answered 400 Bad Request: too long"),
    (body(422, {"detail": [{"msg": "x"}]}), r'answered 422 .*: \[{"msg": "x"}\]'),
    (body(500, b""), "answered 500 Internal Server Error$"),
    (body(500, b"x" * 100_000), "answered 500 Internal Server Error: x{300}…$"),
    (body(302, b""), "answered 302 Found"),
    (sse(b"{}", kind="application/json"), "does not stream its answer"),
    (sse(b"data: {oops\n\n"), "sent an event that is no JSON: {oops"),
    (sse(b"data: [1]\n\n"), "sent an event of an unknown shape"),
    (sse(b'data: {"choices": [{"delta": {"content": 5}}]}\n\n'), "unknown shape"),
    (sse(b'data: {"choices": {"a": 1}}\n\n'), "unknown shape"),
    (sse(b'data: {"choices": [], "usage": {"completion_tokens": "x"}}\n\n'), "unknown shape"),
    (sse(b'data: {"error": {"message": "overloaded"}}\n\n'), "reports: overloaded"),
    (sse(event("half")), "closed the connection in the middle of the answer"),
    (sse(b"data: " + b"[" * 100_000 + b"\n\n"), "no JSON"),
]


@pytest.mark.parametrize(("answer", "said"), FAILURES, ids=range(len(FAILURES)))
def test_failures_are_one_sentence(server: Server, answer: Writer, said: str) -> None:
    server.answer = answer
    with pytest.raises(ValueError, match=said) as caught:
        ask(server)
    assert "\n" not in str(caught.value)
    assert server.url in str(caught.value)


def test_a_connection_that_breaks_midway(server: Server) -> None:
    def write(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Content-Length", "10000")
        handler.end_headers()
        handler.wfile.write(event("half"))

    server.answer = write
    with closing(Remote(server.url, "m", None)) as remote:
        conversation = Conversation(remote)
        with pytest.raises(ValueError, match="broke the connection off"):
            list(conversation.ask("hi"))
    assert conversation.messages == [Message("user", "hi"), Message("assistant", "half", partial=True)]


def test_silence(server: Server) -> None:
    released = threading.Event()
    server.answer = lambda handler: released.wait(10) and None
    try:
        with pytest.raises(ValueError, match="has been silent for too long"):
            ask(server, timeout=httpx.Timeout(5, read=0.1))
    finally:
        released.set()


def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"cannot connect to {url}/v1: Connection refused$"):
            Remote(url, None, None)


@pytest.mark.parametrize("content", [b"no JSON", {}, {"data": []}, {"data": [{"id": 5}]}, []])
def test_a_server_without_models(server: Server, content: Any) -> None:
    server.models = body(200, content)
    with pytest.raises(ValueError, match="lists no models: name one with --model"):
        Remote(server.url, None, None)


def test_a_server_with_several_models(server: Server) -> None:
    server.models = body(200, {"data": [{"id": "first"}, {"id": "second"}]})
    with pytest.raises(ValueError, match=r"has several models: choose one with --model \(first, second\)"):
        Remote(server.url, None, None)


def test_leaving_closes_the_connection(server: Server) -> None:
    def write(handler: BaseHTTPRequestHandler) -> None:
        sse()(handler)
        while True:  # until the reader is gone
            handler.wfile.write(event("more "))

    server.answer = write
    with closing(Remote(server.url, "m", None)) as remote:
        conversation = Conversation(remote)
        pieces = conversation.ask("hi")
        next(pieces)
        pieces.close()
        assert server.gone.wait(10)
        assert conversation.messages[-1] == Message("assistant", "more ", partial=True)


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://h:8000", "http://h:8000/v1"),
        ("http://h:8000/", "http://h:8000/v1"),
        (" http://h/v1/ ", "http://h/v1"),
        ("https://h/v1/chat/completions", "https://h/v1"),
        ("https://dashscope.aliyuncs.com/compatible-mode", "https://dashscope.aliyuncs.com/compatible-mode/v1"),
        ("https://h/api/paas/v4", "https://h/api/paas/v4"),
        ("https://h/v1beta/openai/", "https://h/v1beta/openai"),
        ("https://h/v1?a=b", "https://h/v1?a=b"),
    ],
)
def test_urls(url: str, base: str) -> None:
    assert str(api_base(url)) == base


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://h", "http://", "h", "http://h:port"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(ValueError, match=r"^--url is .*, allowed is http://HOST… or https://HOST…"):
        api_base(url)


def test_keys() -> None:
    both = {"OPENAI_API_KEY": "o\n", "DASHSCOPE_API_KEY": "d"}
    assert find_key("http://h", "given", both) == "given"
    assert find_key("http://h", None, both) == "o"
    for host in ("dashscope", "dashscope-intl", "cn-hongkong.dashscope"):
        assert find_key(f"https://{host}.aliyuncs.com/compatible-mode/v1", None, both) == "d"
    assert find_key("https://dashscope.aliyuncs.com", None, {"OPENAI_API_KEY": "o"}) == "o"
    assert find_key("https://dashscope.aliyuncs.com.evil.example", None, both) == "o"
    assert find_key("http://h", None, {}) is None
    with pytest.raises(ValueError, match="printable ASCII"):
        Remote("http://127.0.0.1", "m", "schlüssel")


def test_the_verb(server: Server, runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-env")
    server.models = body(200, {"data": [{"id": "first"}]})
    result = runner.invoke(cli, ["chat", "--url", server.url, "--top-k", "2"], input="hello")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Hi\n", "")
    _, headers, sent = server.requests[-1]
    assert headers["Authorization"] == "Bearer sk-env"
    assert (sent["model"], sent["messages"], sent["top_k"]) == ("first", [{"role": "user", "content": "hello"}], 2)
    server.answer = body(500, b"")
    result = runner.invoke(cli, ["chat", "hello", "--model", "m", "--url", server.url])
    assert (result.exit_code, result.stderr) == (2, f"error: {server.url}/v1 answered 500 Internal Server Error\n")


def test_no_torch_on_this_path(server: Server) -> None:
    code = (
        "import sys; from qwenkit.cli.main import cli;"
        f"cli(['chat', 'hello', '--model', 'm', '--url', {server.url!r}], standalone_mode=False);"
        "import qwenkit.cli.conversation.terminal; sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (0, "Hi\n"), done.stderr
