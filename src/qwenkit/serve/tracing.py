"""OpenTelemetry spans: one for each HTTP request, under the trace that the client may have begun.

In: the request's headers and what became of it. Out: spans at a collector (OTLP over HTTP). The library is an extra and imported
only where an endpoint is given; without one nothing here costs anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from starlette.types import Scope

from qwenkit.installation import install_extra


class Span:
    """What happened in one request. This one forgets it."""

    def ended(self, method: str, route: str, status: int) -> None:
        """The HTTP answer is out."""

    def answered(self, fields: dict[str, Any]) -> None:
        """The engine has finished a request, with these counts and times."""


_FORGETFUL = Span()
current: ContextVar[Span] = ContextVar("span", default=_FORGETFUL)
"""The span of the request that the running task answers."""


class Tracing:
    """Makes no spans."""

    @contextmanager
    def request(self, scope: Scope, request_id: str) -> Iterator[Span]:
        yield _FORGETFUL

    def shutdown(self) -> None:
        """Send what has not been sent."""


class OtlpTracing(Tracing):
    """Sends spans to `endpoint`, such as http://127.0.0.1:4318/v1/traces, or gives them to `exporter`.

    Raises ValueError where the extra `telemetry` is not installed.
    """

    def __init__(self, endpoint: str, exporter: Any = None) -> None:
        try:
            from opentelemetry import propagate, trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            raise ValueError(
                f"otlp_endpoint needs the extra telemetry: {install_extra('telemetry')} ({error})"
            ) from None
        self._trace, self._extract = trace, propagate.extract
        self._provider = TracerProvider(resource=Resource.create({"service.name": "qwenkit"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("qwenkit.serve")

    @contextmanager
    def request(self, scope: Scope, request_id: str) -> Iterator[Span]:
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        span = self._tracer.start_span(
            scope["method"],
            context=self._extract(carrier),
            kind=self._trace.SpanKind.SERVER,
            attributes={"http.request.method": scope["method"], "qwenkit.request_id": request_id},
        )
        wrapped = _OtlpSpan(span, self._trace)
        token = current.set(wrapped)
        try:
            yield wrapped
        finally:
            current.reset(token)
            span.end()

    def shutdown(self) -> None:
        self._provider.shutdown()


class _OtlpSpan(Span):
    """Names of attributes are those of OpenTelemetry's conventions for HTTP and for generative AI."""

    def __init__(self, span: Any, trace: Any) -> None:
        self._span, self._trace = span, trace

    def ended(self, method: str, route: str, status: int) -> None:
        self._span.update_name(f"{method} {route}".strip())
        self._span.set_attribute("http.route", route)
        self._span.set_attribute("http.response.status_code", status)
        if status >= 500 or not status:
            self._span.set_status(self._trace.StatusCode.ERROR)

    def answered(self, fields: dict[str, Any]) -> None:
        self._span.set_attribute("gen_ai.usage.input_tokens", fields["prompt_tokens"])
        self._span.set_attribute("gen_ai.usage.output_tokens", fields["completion_tokens"])
        self._span.set_attribute("gen_ai.response.finish_reasons", [fields["finish_reason"]])
        if fields["ttft_ms"] is not None:
            self._span.set_attribute("gen_ai.server.time_to_first_token", fields["ttft_ms"] / 1000)
