"""The routes of the gateway."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from coordinator.gateway.asked import Asked, read_chat, read_completion
from coordinator.gateway.body import Body, read_body
from coordinator.gateway.call import Call
from coordinator.gateway.caller import caller_of
from coordinator.gateway.config import GatewayConfig, split
from coordinator.gateway.failures import ApiError, api_error
from coordinator.gateway.keys import ApiKeys
from coordinator.gateway.replies import Reply
from coordinator.gateway.served_model import ModelWatch, ServedModel
from coordinator.gateway.tracing import Scoped
from sequoia.client import AsyncClient
from sequoia.errors import PermissionDenied, SequoiaError, Unauthenticated
from sequoia.request_scope import REQUEST_ID, current_scope
from sequoia.tracing import Tracing

_log = logging.getLogger(__name__)

_CLIENT_CLOSED_REQUEST = 499
_PAGE = Path(__file__).with_name("page.html")
# What a page of one file may do: run what is in it, and ask the gateway that sent it.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'"
)
_PAGE_HEADERS = {"content-security-policy": _PAGE_POLICY}


def build_app(config: GatewayConfig, client: AsyncClient, keys: ApiKeys, tracing: Tracing | None = None) -> Starlette:
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
    cors = Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=[REQUEST_ID, "retry-after"],
    )
    scoped = Middleware(Scoped, tracing=tracing)
    handlers: dict[Any, Callable[[Request, Any], Any]] = {
        ApiError: lambda _, error: _failure(error),
        SequoiaError: lambda _, error: _failure(api_error(error)),
        HTTPException: _unknown_route,
        ClientDisconnect: lambda _, error: Response(status_code=_CLIENT_CLOSED_REQUEST),
        Exception: lambda _, error: _failure(ApiError(500, "a fault of ours; please report it", code="internal")),
    }
    return Starlette(routes=routes, middleware=[scoped, cors] if origins else [scoped], exception_handlers=handlers)


class Gateway:
    """One handler a route."""

    def __init__(self, config: GatewayConfig, client: AsyncClient, keys: ApiKeys) -> None:
        self._config, self._client, self._keys = config, client, keys
        self._watch = ModelWatch(split(config.model_names))

    async def chat(self, request: Request) -> Response:
        """The next message of a conversation."""
        return await self._answer(request, read_chat)

    async def completions(self, request: Request) -> Response:
        """What follows a text."""
        return await self._answer(request, read_completion)

    async def models(self, request: Request) -> Response:
        """All names of the model."""
        served = await self._served(request)
        return JSONResponse({"object": "list", "data": [served.to_dict(name) for name in served.names]})

    async def model(self, request: Request) -> Response:
        """The model by one of its names."""
        served, name = await self._served(request), request.path_params["name"]
        served.check(name)
        return JSONResponse(served.to_dict(name))

    async def health(self, request: Request) -> Response:
        """Whether a request would be served. No key is asked."""
        try:
            served = await self._watch.look(self._client)
        except (Unauthenticated, PermissionDenied):
            # It answers; whom it lets in is not asked here.
            return JSONResponse({"status": "serving"})
        return JSONResponse({"status": "serving", "model": served.names[0]})

    async def page(self, request: Request) -> Response:
        """A chat that shows what speculation does. It holds no secret: it asks for the key, where one is needed."""
        return HTMLResponse(_PAGE.read_text(), headers=_PAGE_HEADERS)

    async def _served(self, request: Request) -> ServedModel:
        caller = caller_of(request, self._client, self._keys)
        try:
            return await self._watch.current(caller)
        except SequoiaError as error:
            raise caller.failure(error) from error

    async def _answer(self, request: Request, read: Callable[[Body], Asked]) -> Response:
        """A failure has the request's id as well: it is what a client can be asked for."""
        scope, names = current_scope(), dict[str, str]()
        assert scope is not None, "the middleware makes one"
        try:
            caller = caller_of(request, self._client, self._keys)
            asked = read(await read_body(request, self._config.max_body_bytes, self._config.body_timeout_seconds))
            names |= asked.names
            try:
                served = await self._watch.current(caller)
                served.check(asked.model)
                call = Call(caller, asked, Reply(asked, served), scope.request_id)
                return await (call.stream(request) if asked.streams else call.whole(request))
            except SequoiaError as error:
                raise caller.failure(error, names) from error
        except (ApiError, SequoiaError) as error:
            failure = error if isinstance(error, ApiError) else api_error(error, names)
            failure.headers[REQUEST_ID] = scope.request_id
            return _failure(failure)


def _failure(error: ApiError) -> Response:
    _log.info("refused", extra={"status": error.status, "error": error.message})
    return JSONResponse(error.to_dict(), error.status, headers=error.headers)


def _unknown_route(request: Request, error: HTTPException) -> Response:
    asked = f"{request.method} {request.url.path}"
    reason = "is not served; see /v1/models, /v1/completions and /v1/chat/completions"
    return _failure(ApiError(error.status_code, f"{asked} {reason}", headers=error.headers or {}))
