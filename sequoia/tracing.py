"""Traces: spans of OpenTelemetry, sent over OTLP where the process's environment asks for it.

Nothing of OpenTelemetry is loaded before that, and no global of it is set: a process may be two services.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sequoia.errors import InvalidArgument
from sequoia.request_scope import current_scope

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

Attribute = str | bool | int | float

_FAREWELL_SECONDS = 1.0
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


class OpenSpan:
    """A span that is open. The ones below it are told when they have ended: a step that never ends has none."""

    def __init__(self, tracer: Tracer, span: Span, context: Context) -> None:
        self._tracer, self._span, self._context = tracer, span, context

    def tell(self, attributes: Mapping[str, Attribute]) -> None:
        """Something is known of it; names are ours."""
        self._span.set_attributes(_named(attributes))

    def ended(self, name: str, seconds: float, attributes: Mapping[str, Attribute]) -> None:
        """Something below it has ended just now, and took so long."""
        end = time.time_ns()
        start = end - max(0, round(seconds * 1e9))
        self._tracer.start_span(name, self._context, attributes=_named(attributes), start_time=start).end(end)


class Tracing:
    """The spans of one service. A thread sends them; what a collector does not take in time is dropped.

    The SDK reads its own settings from OTEL_* variables. Raises InvalidArgument where it is not installed.
    """

    def __init__(self, service: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            raise InvalidArgument(
                f"traces are asked for (OTEL_*), and {error.name} is missing: pip install sequoia-serving[tracing]"
            ) from error
        self._exporter = OTLPSpanExporter()
        self._provider = TracerProvider(resource=Resource.create({"service.name": service}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("sequoia")

    def close(self) -> None:
        """Send what is left, as far as the collector takes it at once: nobody's end waits for one that is broken."""
        enough = threading.Timer(_FAREWELL_SECONDS, self._exporter.shutdown)
        enough.start()
        self._provider.shutdown()
        enough.cancel()

    @contextmanager
    def span(self, name: str) -> Iterator[OpenSpan | None]:
        """Around a request: below the span that it was sent under, and above what the calls made for it begin.

        None where the sampler does not want it.
        """
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        scope, w3c = current_scope(), TraceContextTextMapPropagator()
        assert scope is not None, "a span is inside of its request's scope"
        above = w3c.extract(scope.trace)
        named = _named({"request_id": scope.request_id})
        span = self._tracer.start_span(name, above, SpanKind.SERVER, attributes=named)
        context = set_span_in_context(span, above)
        scope.trace = {}
        w3c.inject(scope.trace, context)
        try:
            yield OpenSpan(self._tracer, span, context) if span.is_recording() else None
        except Exception as error:
            # No more of it: messages may repeat what was asked.
            span.set_status(Status(StatusCode.ERROR, type(error).__name__))
            raise
        finally:
            span.end()


@contextmanager
def traced(tracing: Tracing | None, name: str) -> Iterator[OpenSpan | None]:
    """`tracing.span(name)`, or nothing."""
    if tracing is None:
        yield None
        return
    with tracing.span(name) as span:
        yield span


@contextmanager
def tracing_as_asked(service: str, environ: Mapping[str, str]) -> Iterator[Tracing | None]:
    """For the life of a process, named `service` where OTEL_SERVICE_NAME does not name it; None: nobody asks for it.

    Raises InvalidArgument for what is asked and cannot be.
    """
    if not _is_asked(environ):
        yield None
        return
    protocol = next(filter(None, (environ.get(name) for name in _PROTOCOLS)), "grpc")
    if protocol != "grpc":
        raise InvalidArgument(f"{_PROTOCOLS[1]} is {protocol!r}; traces are sent with grpc only")
    tracing = Tracing(environ.get("OTEL_SERVICE_NAME") or service)
    try:
        yield tracing
    finally:
        tracing.close()


def _is_asked(environ: Mapping[str, str]) -> bool:
    exporter = environ.get("OTEL_TRACES_EXPORTER", "")
    if exporter == "none" or environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    return exporter == "otlp" or any(environ.get(name) for name in _ENDPOINTS)


def _named(attributes: Mapping[str, Attribute]) -> dict[str, Attribute]:
    return {f"sequoia.{name}": value for name, value in attributes.items()}
