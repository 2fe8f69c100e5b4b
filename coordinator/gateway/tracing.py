"""Around what is asked over HTTP: the request's id, and its span."""

from __future__ import annotations

import secrets
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sequoia.request_scope import request_scope
from sequoia.tracing import OpenSpan, Tracing, traced

_PATHS = ("/v1/chat/completions", "/v1/completions")


class Scoped:
    """Middleware: until the last byte of the answer is sent, its request is the one that code runs for."""

    def __init__(self, app: ASGIApp, tracing: Tracing | None) -> None:
        self._app, self._tracing = app, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in _PATHS:
            await self._app(scope, receive, send)
            return
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        with request_scope(headers, _new_id), traced(self._tracing, f"POST {scope['path']}") as span:
            await self._app(scope, receive, send if span is None else _Observed(send, span))


class _Observed:
    """Tells the span the answer's status."""

    def __init__(self, send: Send, span: OpenSpan) -> None:
        self._send, self._span = send, span

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            status: Any = message["status"]
            self._span.tell({"http_status": status})
        await self._send(message)


def _new_id() -> str:
    return f"req_{secrets.token_hex(8)}"
