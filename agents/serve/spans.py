"""Requests and steps as spans (`serve --otel`): OpenTelemetry makes them and sends them where its OTEL_* variables say.

Upstreams are told of the step that they are asked in. Texts are in no span.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from opentelemetry import context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers

from agents.serve.tracing import Trace

_LAST_S = 3.0  # what was not sent by then when the service ends is lost
_FORMAT = TraceContextTextMapPropagator()


class Spans:
    """What makes spans and sends them by OTLP over HTTP, beside the event loop."""

    def __init__(self) -> None:
        """Read the environment; nothing is sent."""
        named = Resource.create()
        if str(named.attributes[SERVICE_NAME]).startswith("unknown_service"):
            named = named.merge(Resource({SERVICE_NAME: "trim-routing"}))
        self._provider = TracerProvider(resource=named, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("trim-routing")

    def trace(self, headers: Headers) -> Trace:
        """Return the trace of a request that begins in this task."""
        return _Noted(headers, self._tracer)

    def close(self) -> None:
        """Send what there is, if that does not take long."""
        last = threading.Thread(target=self._provider.shutdown, daemon=True)
        last.start()
        last.join(_LAST_S)


class _Noted(Trace):
    def __init__(self, headers: Headers, tracer: Tracer) -> None:
        super().__init__(headers)
        self._tracer = tracer
        context.attach(_FORMAT.extract(self._brought))  # the request's task takes it along when it ends

    def headers(self) -> dict[str, str]:
        told: dict[str, str] = {}
        _FORMAT.inject(told)
        return told

    def request(self) -> AbstractContextManager[None]:
        return self._span("chat", self.told, SpanKind.SERVER)

    def step(self, name: str, told: dict[str, Any]) -> AbstractContextManager[None]:
        return self._span(name, told, SpanKind.INTERNAL)

    @contextmanager
    def _span(self, name: str, told: dict[str, Any], kind: SpanKind) -> Iterator[None]:
        # An error's words may be those of a model, which is why they are not noted.
        own: dict[str, Any] = {"kind": kind, "record_exception": False, "set_status_on_exception": False}
        with self._tracer.start_as_current_span(name, **own) as span:
            try:
                yield
            except Exception:
                span.set_status(StatusCode.ERROR)
                raise
            finally:
                known = {name: value for name, value in told.items() if value not in (None, ())}
                span.set_attributes({name if "." in name else f"trim.{name}": known[name] for name in known})
                if known.get("status", 0) >= 500:
                    span.set_status(StatusCode.ERROR)
