"""Health, readiness, metrics, the model list, logs and traces."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from qwenkit.serve import logs
from qwenkit.serve.app import create_app
from qwenkit.serve.tracing import OtlpTracing
from qwenkit.text.tokenizer import Tokenizer
from tests.serve.conftest import MakeServer, StartServer, asking, running, wait_until
from tests.serve.scripted import ScriptedEngine

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


def test_health_of_an_idle_server(live_server: StartServer) -> None:
    live = live_server()
    for path in ("/health", "/ready"):
        assert live.get(path).json()["status"] == "ok"
        assert httpx.head(live.url + path, timeout=60).status_code == 200


def test_a_stuck_step_makes_health_503_until_it_ends(live_server: StartServer) -> None:
    live = live_server(stall_timeout=0.6)
    live.engine.gate.clear()
    with asking(live.url + "/v1/chat/completions", CHAT):
        wait_until(lambda: live.engine.has_work)
    wait_until(lambda: live.get("/health").status_code == 503)
    assert live.get("/ready").status_code == 503
    assert live.get("/health").json()["heartbeat_age"] > 0.6
    assert live.get("/metrics").status_code == 200
    refused = live.post("/v1/chat/completions", CHAT)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "engine_unhealthy"
    live.engine.gate.set()
    wait_until(lambda: live.get("/health").status_code == 200)
    wait_until(lambda: not live.engine.has_work)
    live.server.driver.stall_timeout = (
        60.0  # an idle engine's heart beats every 0.5 seconds: a slow machine would look stuck
    )
    assert live.post("/v1/chat/completions", CHAT).status_code == 200


def test_draining_is_healthy_and_not_ready(live_server: StartServer) -> None:
    live = live_server()
    live.server.driver.draining = True
    assert live.get("/health").status_code == 200
    assert live.get("/ready").status_code == 503
    assert live.post("/v1/chat/completions", CHAT).status_code == 503


@pytest.mark.parametrize("prefix", ["qwenkit", "vllm"])
def test_metrics_bear_the_names_of_vllm(live_server: StartServer, prefix: str) -> None:
    live = live_server(metrics_prefix=prefix)
    for _ in range(3):
        assert live.post("/v1/chat/completions", CHAT).status_code == 200
    families = {family.name: family for family in text_string_to_metric_families(live.get("/metrics").text)}
    for name in (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries", "prefix_cache_hits",
        "prompt_tokens", "generation_tokens", "request_success", "num_preemptions", "admission_rejections",
        "corrupted_requests", "time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
        "request_time_per_output_token_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
        "request_decode_time_seconds",
    ):  # fmt: skip
        assert f"{prefix}:{name}" in families, name

    def value(name: str, suffix: str, **labels: str) -> float:
        samples = families[f"{prefix}:{name}"].samples
        wanted = {"model_name": "tiny"} | labels
        return next(s.value for s in samples if s.name.endswith(suffix) and wanted.items() <= s.labels.items())

    assert value("request_success", "_total", finished_reason="stop") == 3
    assert value("generation_tokens", "_total") == 3 * len("Hello!") + 3
    assert value("e2e_request_latency_seconds", "_count") == 3
    assert value("inter_token_latency_seconds", "_count") == 3 * len("Hello!")
    requests = families[f"{prefix}:http_requests"].samples
    assert any(s.labels == {"method": "POST", "route": "/v1/chat/completions", "status": "200"} for s in requests)


def test_models_are_listed_for_both_clients(live_server: StartServer) -> None:
    live = live_server(
        served_model_name=("org/one", "two"), api_key=("k",), server_fields={"adapters": {"poet": "/adapters/poet"}}
    )
    client = openai.OpenAI(base_url=live.url + "/v1", api_key="k", max_retries=0)
    listed = {model.id: model for model in client.models.list()}
    assert list(listed) == ["org/one", "two", "poet"]
    assert listed["poet"].model_dump()["parent"] == "org/one"
    assert client.models.retrieve("org/one").object == "model"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.models.retrieve("three")
    other = anthropic.Anthropic(base_url=live.url, api_key="k", max_retries=0)
    assert [model.id for model in other.models.list()] == ["org/one", "two", "poet"]


def test_version(live_server: StartServer) -> None:
    assert live_server().get("/version").json()["version"]


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What the server's loggers write, with the loggers put back afterwards."""
    loggers = [logging.getLogger(name) for name in ("qwenkit", "uvicorn")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield io.StringIO()
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.mark.parametrize("contents", [False, True])
def test_the_log_has_counts_and_contents_only_when_asked(
    live_server: StartServer, lines: io.StringIO, contents: bool
) -> None:
    live = live_server(["a private answer"], log_contents=contents, api_key=("secret-key",))
    logs.configure("json", lines)
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "a private question"}]}
    headers = {"Authorization": "Bearer secret-key", "x-request-id": "r-1"}
    assert live.post("/v1/chat/completions", chat, headers=headers).status_code == 200
    live.get("/health")
    wait_until(lambda: lines.getvalue().count("\n") >= 2)
    records: list[dict[str, Any]] = [json.loads(line) for line in lines.getvalue().splitlines()]
    request = next(record for record in records if record["event"] == "request")
    answer = next(record for record in records if record["event"] == "answer")
    assert (request["request_id"], request["status"], request["path"]) == ("r-1", 200, "/v1/chat/completions")
    assert request["key"] == answer["key"] == "key-1"
    assert answer["request_id"] == "r-1"
    assert answer["completion_tokens"] == len("a private answer") + 1
    assert answer["finish_reason"] == "stop"
    assert len(records) == 2, "machines that ask for health are not worth a line"
    assert ("private" in lines.getvalue()) == contents
    assert "secret-key" not in lines.getvalue()


def test_the_log_as_text_cannot_be_forged(lines: io.StringIO) -> None:
    logs.configure("text", lines)
    scope = {"method": "GET", "path": "/x\n2026 INFO request status=200", "client": ("1.2.3.4", 5)}
    logs.log_access(scope, "r", "", 404, 0.0123, False)
    assert lines.getvalue().count("\n") == 1
    assert "status=404 ms=12.3" in lines.getvalue()


def test_spans_say_what_a_request_cost(make_server: MakeServer) -> None:
    exporter = InMemorySpanExporter()
    tracing = OtlpTracing("http://unused", exporter)
    server = make_server()
    with running(server, app=create_app(server, tracing=tracing)) as live:
        parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        assert live.post("/v1/chat/completions", CHAT, headers={"traceparent": parent}).status_code == 200
    tracing.shutdown()
    (span,) = exporter.get_finished_spans()
    assert span.name == "POST /v1/chat/completions"
    assert format(span.context.trace_id, "032x") == "0af7651916cd43dd8448eb211c80319c"
    attributes = dict(span.attributes or {})
    assert attributes["http.response.status_code"] == 200
    assert attributes["gen_ai.usage.output_tokens"] == len("Hello!") + 1
    assert attributes["gen_ai.response.finish_reasons"] == ("stop",)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seats", [0, 1])
def test_a_client_that_hangs_up_takes_its_request_along(
    live_server: StartServer, tokenizer: Tokenizer, stream: bool, seats: int
) -> None:
    """Whether it waits (no seats) or is being answered."""
    engine = ScriptedEngine(tokenizer, ["x" * 4000], max_num_seqs=seats, seconds=0.002)
    live = live_server(engine=engine)
    body = CHAT | {"stream": stream}
    scheduler = engine.scheduler
    with asking(live.url + "/v1/chat/completions", body):
        wait_until(lambda: bool(scheduler.running if seats else scheduler.waiting))
    wait_until(lambda: not engine.has_work)
    assert engine.aborted == [0]
    assert engine.pool.num_free == engine.pool.num_blocks
    state = live.get("/ready").json()
    assert (state["running"], state["waiting"]) == (0, 0)
