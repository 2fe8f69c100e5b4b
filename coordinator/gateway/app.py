"""The routes of the gateway."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from coordinator.gateway.answering import Piece, generate, stream
from coordinator.gateway.asked import Asked, read_chat, read_completion
from coordinator.gateway.body import Body, read_body
from coordinator.gateway.config import GatewayConfig, split
from coordinator.gateway.failures import ApiError, api_error
from coordinator.gateway.keys import ApiKeys
from coordinator.gateway.replies import Reply, event
from coordinator.gateway.served_model import ModelWatch
from sequoia.client import AsyncClient
from sequoia.errors import SequoiaError

_log = logging.getLogger(__name__)

Result = TypeVar("Result")
_CLIENT_CLOSED_REQUEST = 499
# A proxy that gathers pieces would make a stream one lump.
_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
_PAGE = Path(__file__).with_name("page.html")
# What a page of one file may do: run what is in it, and ask the gateway that sent it.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'"
)
_PAGE_HEADERS = {"content-security-policy": _PAGE_POLICY}


def build_app(config: GatewayConfig, client: AsyncClient, keys: ApiKeys) -> Starlette:
    """The application; `client` is the caller's to close."""
    gateway = Gateway(config, client, keys)
    routes = [
        Route("/v1/chat/completions", gateway.chat, methods=["POST"]),
        Route("/v1/completions", gateway.completions, methods=["POST"]),
        Route("/v1/models", gateway.models, methods=["GET"]),
        Route("/v1/models/{name:path}", gateway.model, methods=["GET"]),
        Route("/", gateway.page, methods=["GET"]),
        Route("/health", gateway.health, methods=["GET"]),
    ]
    origins = split(config.cors_origins)
    cors = Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    handlers: dict[Any, Callable[[Request, Any], Any]] = {
        ApiError: lambda _, error: _failure(error),
        SequoiaError: lambda _, error: _failure(api_error(error)),
        HTTPException: _unknown_route,
        ClientDisconnect: lambda _, error: Response(status_code=_CLIENT_CLOSED_REQUEST),
        Exception: lambda _, error: _failure(ApiError(500, "a fault of ours; please report it", code="internal")),
    }
    return Starlette(routes=routes, middleware=[cors] if origins else [], exception_handlers=handlers)


class Gateway:
    """One handler a route."""

    def __init__(self, config: GatewayConfig, client: AsyncClient, keys: ApiKeys) -> None:
        self._config, self._client, self._keys = config, client, keys
        self._watch = ModelWatch(client, split(config.model_names))

    async def chat(self, request: Request) -> Response:
        """The next message of a conversation."""
        return await self._answer(request, read_chat)

    async def completions(self, request: Request) -> Response:
        """What follows a text."""
        return await self._answer(request, read_completion)

    async def models(self, request: Request) -> Response:
        """All names of the model."""
        self._owner(request)
        served = await self._watch.current()
        return JSONResponse({"object": "list", "data": [served.to_dict(name) for name in served.names]})

    async def model(self, request: Request) -> Response:
        """The model by one of its names."""
        self._owner(request)
        served, name = await self._watch.current(), request.path_params["name"]
        served.check(name)
        return JSONResponse(served.to_dict(name))

    async def health(self, request: Request) -> Response:
        """Whether a request would be served. No key is asked."""
        served = await self._watch.look()
        return JSONResponse({"status": "serving", "model": served.names[0]})

    async def page(self, request: Request) -> Response:
        """A chat that shows what speculation does. It holds no secret: it asks for the key, where one is needed."""
        return HTMLResponse(_PAGE.read_text(), headers=_PAGE_HEADERS)

    def _owner(self, request: Request) -> str:
        return self._keys.owner(request.headers.get("authorization", ""))

    async def _answer(self, request: Request, read: Callable[[Body], Asked]) -> Response:
        owner = self._owner(request)
        asked = read(await read_body(request, self._config.max_body_bytes, self._config.body_timeout_seconds))
        served = await self._watch.current()
        served.check(asked.model)
        call = Call(self._client, asked, Reply(asked, served), owner)
        try:
            return await (call.stream(request) if asked.streams else call.whole(request))
        except SequoiaError as error:
            raise api_error(error, asked.names) from error


class Call:
    """One request on its way: its answers, their reply, and the log of it."""

    def __init__(self, client: AsyncClient, asked: Asked, reply: Reply, owner: str) -> None:
        self._client, self._asked, self._reply = client, asked, reply
        self._log_fields = {"request_id": f"req_{secrets.token_hex(8)}", "endpoint": asked.endpoint, "owner": owner}

    async def whole(self, request: Request) -> Response:
        """All at once, when it is there."""
        told = self._reply.whole(await _unless_gone(request, generate(self._client, self._asked)))
        self._log("answered")
        return JSONResponse(told, headers=self._headers)

    async def stream(self, request: Request) -> Response:
        """As it comes. What fails before the first piece is an error with a status of its own."""
        pieces = stream(self._client, self._asked)
        first = await _unless_gone(request, _next(pieces))
        return _EventStream(pieces, self._events(first, pieces), self._headers | _STREAM_HEADERS)

    async def _events(self, first: Piece, pieces: AsyncIterator[Piece]) -> AsyncIterator[str]:
        for told in (*self._reply.opening(), *self._reply.pieces(*first)):
            yield told
        try:
            async for index, chunk in pieces:
                for told in self._reply.pieces(index, chunk):
                    yield told
        except SequoiaError as error:
            self._log("failed", error=str(error))
            yield event(api_error(error, self._asked.names).to_dict())
            return
        for told in self._reply.closing():
            yield told
        self._log("answered")

    @property
    def _headers(self) -> dict[str, str]:
        return {"x-request-id": self._log_fields["request_id"]}

    def _log(self, what: str, **fields: object) -> None:
        _log.info(what, extra={**self._log_fields, **self._reply.usage, **fields})


class _EventStream(StreamingResponse):
    """Closes the answers with the response, whether or not anything of it was sent."""

    def __init__(self, pieces: AsyncGenerator[Piece], events: AsyncIterator[str], headers: dict[str, str]) -> None:
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._pieces):
            await super().__call__(scope, receive, send)


async def _next(pieces: AsyncGenerator[Piece]) -> Piece:
    return await anext(pieces)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of the work, which is cancelled when the client goes away: ClientDisconnect then."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _failure(error: ApiError) -> Response:
    _log.info("refused", extra={"status": error.status, "error": error.message})
    return JSONResponse(error.to_dict(), error.status, headers=error.headers)


def _unknown_route(request: Request, error: HTTPException) -> Response:
    asked = f"{request.method} {request.url.path}"
    reason = "is not served; see /v1/models, /v1/completions and /v1/chat/completions"
    return _failure(ApiError(error.status_code, f"{asked} {reason}", headers=error.headers or {}))
