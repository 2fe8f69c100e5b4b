"""Which request a line of the log, or a call to another part of the system, belongs to."""

from __future__ import annotations

import re
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

REQUEST_ID = "x-request-id"
# W3C Trace Context. What is no such thing is left out: it came from anybody, and is sent on.
_TRACEPARENT, _TRACESTATE = "traceparent", "tracestate"
_CARRIED = {
    _TRACEPARENT: re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}"),
    _TRACESTATE: re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,510}[\x21-\x7e])?"),
}
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(slots=True)
class RequestScope:
    """A request while it runs."""

    request_id: str
    trace: dict[str, str]  # W3C Trace Context that its calls are below, as headers; empty: there is none

    @property
    def log_fields(self) -> dict[str, str]:
        """Of its log lines."""
        trace_id = self.trace.get(_TRACEPARENT, "")[3:35]
        return {"request_id": self.request_id, **({"trace_id": trace_id} if trace_id else {})}


_current: ContextVar[RequestScope | None] = ContextVar("request_scope", default=None)


@contextmanager
def request_scope(
    metadata: Iterable[tuple[str, Any]] | None, new_id: Callable[[], str] = lambda: secrets.token_hex(8)
) -> Iterator[RequestScope]:
    """Around a request that came with that metadata, or with these headers, in lower case.

    Its id is the one that it brings, or a new one.
    """
    came = {key: value for key, value in metadata or () if isinstance(value, str)}
    given = came.get(REQUEST_ID, "")
    trace = {key: came[key] for key, known in _CARRIED.items() if known.fullmatch(came.get(key, ""))}
    scope = RequestScope(given if _ID.fullmatch(given) else new_id(), trace if _TRACEPARENT in trace else {})
    token = _current.set(scope)
    try:
        yield scope
    finally:
        _current.reset(token)


def current_scope() -> RequestScope | None:
    """The request that this code runs for; None: it runs for none."""
    return _current.get()


def call_metadata() -> tuple[tuple[str, str], ...]:
    """What a call carries on: id and trace of the request it is made for, or the trace of the program that makes it.

    A program that has a span has loaded OpenTelemetry; for the others it is not.
    """
    scope = _current.get()
    if scope is not None:
        return ((REQUEST_ID, scope.request_id), *scope.trace.items())
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return tuple(carrier.items())
