"""A collector of traces: OTLP over real gRPC, kept in memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc


@dataclass(frozen=True)
class CollectedSpan:
    """One span as it came; times in seconds, attributes without their prefix."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start: float
    end: float
    is_error: bool
    attributes: dict[str, Any]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self._spans: list[CollectedSpan] = []
        self._came = threading.Condition()
        self.address = ""

    def Export(self, request: pb.ExportTraceServiceRequest, context: Any) -> pb.ExportTraceServiceResponse:
        """What every exporter calls."""
        with self._came:
            for each in request.resource_spans:
                service = _values(each.resource.attributes)["service.name"]
                self._spans += [_span(service, span) for scoped in each.scope_spans for span in scoped.spans]
            self._came.notify_all()
        return pb.ExportTraceServiceResponse()

    def trace(self, trace_id: str, *names: str) -> Sequence[CollectedSpan]:
        """The spans of a trace, when those with these names have come. Raises AssertionError where they do not."""
        found: list[CollectedSpan] = []

        def is_there() -> bool:
            found[:] = [span for span in self._spans if span.trace_id == trace_id]
            return set(names) <= {span.name for span in found}

        with self._came:
            assert self._came.wait_for(is_there, 10), f"of {names}: {[span.name for span in found]}"
        return sorted(found, key=lambda span: span.start)


def only(spans: Sequence[CollectedSpan], name: str) -> CollectedSpan:
    """The one span of that name."""
    [found] = named(spans, name)
    return found


def named(spans: Sequence[CollectedSpan], name: str) -> Sequence[CollectedSpan]:
    """The spans of that name."""
    return [span for span in spans if span.name == name]


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that listens."""
    server, collector = grpc.server(ThreadPoolExecutor(4)), Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(0)


def _span(service: str, span: Any) -> CollectedSpan:
    return CollectedSpan(
        service,
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano / 1e9,
        span.end_time_unix_nano / 1e9,
        span.status.code == span.status.STATUS_CODE_ERROR,
        {key.removeprefix("sequoia."): value for key, value in _values(span.attributes).items()},
    )


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


def eventually(is_so: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether it becomes so."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
