"""One request on its way: answered as a whole or as a stream, and ended with its client."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from coordinator.gateway.answering import Piece, generate, stream
from coordinator.gateway.asked import Asked
from coordinator.gateway.caller import Caller
from coordinator.gateway.replies import Reply, event
from sequoia.errors import SequoiaError
from sequoia.request_scope import REQUEST_ID

_log = logging.getLogger(__name__)

Result = TypeVar("Result")
# A proxy that gathers pieces would make a stream one lump.
_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Call:
    """Its answers, their reply, and the log of it."""

    def __init__(self, caller: Caller, asked: Asked, reply: Reply, request_id: str) -> None:
        self._caller, self._client, self._asked, self._reply = caller, caller.client, asked, reply
        self._headers = {REQUEST_ID: request_id}
        self._log_fields = {"endpoint": asked.endpoint, "owner": caller.owner}

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
        outcome = "left by its client"
        try:
            for told in (*self._reply.opening(), *self._reply.pieces(*first)):
                yield told
            async for index, chunk in pieces:
                for told in self._reply.pieces(index, chunk):
                    yield told
            for told in self._reply.closing():
                yield told
            outcome = "answered"
        except SequoiaError as error:
            outcome = f"failed: {error}"
            yield event(self._caller.failure(error, self._asked.names).to_dict())
        finally:
            self._log(outcome)

    def _log(self, outcome: str) -> None:
        _log.info(outcome, extra={**self._log_fields, **self._reply.usage})


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
