"""Numbers for Prometheus under the names that vLLM's dashboards know, with a prefix of choice.

In: what the driver sees of each request, and which requests were refused. Out: the text of /metrics. Each server has a registry
of its own, so that several can live in one process. What the engine knows better, such as blocks in use, is read when asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)
_TOKENS = (1, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)


class Metrics:
    """`model_name` labels every metric, as vLLM does."""

    def __init__(self, prefix: str = "qwenkit", model_name: str = "") -> None:
        self.registry = CollectorRegistry()
        self._prefix = f"{prefix}:"
        self._label = model_name
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that began to be answered.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.prefix_cache_queries = self._counter(
            "prefix_cache_queries", "Prompt tokens looked up in the prefix cache."
        )
        self.prefix_cache_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._success = self._many(Counter, "request_success", "Finished answers by reason.", "finished_reason")
        self._rejections = self._many(
            Counter, "admission_rejections", "Requests refused at the door, by reason.", "reason"
        )
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _SECONDS
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of an answer.", _TOKEN_SECONDS
        )
        self.time_per_output_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean of a request after its first token.", _TOKEN_SECONDS
        )
        self.e2e_latency = self._histogram("e2e_request_latency_seconds", "From arrival to the end.", _SECONDS)
        self.queue_time = self._histogram(
            "request_queue_time_seconds", "From arrival to the first step with it.", _SECONDS
        )
        self.prefill_time = self._histogram(
            "request_prefill_time_seconds", "From the first step to the first token.", _SECONDS
        )
        self.decode_time = self._histogram("request_decode_time_seconds", "From the first token to the end.", _SECONDS)
        self.request_prompt_tokens = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Tokens generated for a request.", _TOKENS
        )
        self._http = Counter(
            f"{self._prefix}http_requests",
            "HTTP answers by method, route and status.",
            ("method", "route", "status"),
            registry=self.registry,
        )

    def finished(self, reason: str) -> None:
        self._success.labels(self._label, reason).inc()

    def rejected(self, reason: str) -> None:
        self._rejections.labels(self._label, reason).inc()

    def http(self, method: str, route: str, status: int) -> None:
        self._http.labels(method, route, str(status)).inc()

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge that is read whenever metrics are asked for."""
        gauge = Gauge(self._prefix + name, text, ("model_name",), registry=self.registry)
        gauge.labels(self._label).set_function(read)

    def watch_count(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A counter that somebody else counts, read whenever metrics are asked for."""
        self.registry.register(_Watched(self._prefix + name, text, self._label, read))

    def exposition(self) -> bytes:
        """What /metrics answers, in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(self._prefix + name, text, ("model_name",), registry=self.registry).labels(self._label)

    def _many(self, kind: type[Counter], name: str, text: str, label: str) -> Counter:
        return kind(self._prefix + name, text, ("model_name", label), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        name = self._prefix + name
        return Histogram(name, text, ("model_name",), registry=self.registry, buckets=buckets).labels(self._label)


class _Watched(Collector):
    def __init__(self, name: str, text: str, label: str, read: Callable[[], float]) -> None:
        self._name, self._text, self._label, self._read = name, text, label, read

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=("model_name",))
        family.add_metric((self._label,), self._read())
        yield family
