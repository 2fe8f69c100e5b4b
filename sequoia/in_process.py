"""Calls of services that the same process serves: the same messages and the same stubs, without a connection."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, NoReturn

import grpc

_log = logging.getLogger(__name__)

Metadata = Sequence[tuple[str, Any]]


class LocalServices:
    """What `add_...Servicer_to_server` takes for a server, and what a stub takes for a channel.

    Messages are handed over as they are: whoever sends one must not change it afterwards.
    """

    def __init__(self) -> None:
        self._handlers: dict[str, grpc.RpcMethodHandler] = {}

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler]) -> None:
        """As a grpc.aio.Server has it."""
        self._handlers |= {f"/{service}/{name}": each for name, each in handlers.items()}

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """As a grpc.aio.Server has it; the registered ones are the same."""

    def unary_unary(self, method: str, *_: object, **__: object) -> Callable[..., Awaitable[Any]]:
        """As a grpc.aio.Channel has it."""
        behaviour = self._handlers[method].unary_unary

        async def call(request: Any, *, timeout: float | None = None, metadata: Metadata = (), **_: object) -> Any:
            one = LocalCall(lambda _, context: _answered(behaviour, request, context), timeout, metadata)
            try:
                return await one.read()
            finally:
                one.cancel()

        return call

    def stream_stream(self, method: str, *_: object, **__: object) -> Callable[..., LocalCall]:
        """As a grpc.aio.Channel has it."""
        behaviour = self._handlers[method].stream_stream

        def call(*, timeout: float | None = None, metadata: Metadata = ()) -> LocalCall:
            return LocalCall(behaviour, timeout, metadata)

        return call

    async def close(self) -> None:
        """Nothing is open."""


async def _answered(behaviour: Callable[..., Awaitable[Any]], request: Any, context: LocalContext) -> None:
    await context.write(await behaviour(request, context))


class LocalContext:
    """What handlers see of a call: the part of a grpc.aio.ServicerContext that ours use."""

    def __init__(self, answers: _Queue, metadata: Metadata) -> None:
        self._answers, self._metadata = answers, metadata
        self.status: tuple[grpc.StatusCode, str, Metadata] = (grpc.StatusCode.OK, "", ())

    def invocation_metadata(self) -> Metadata:
        """What the caller told beside its messages."""
        return self._metadata

    async def write(self, answer: Any) -> None:
        """One answer."""
        self._answers.put(answer)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        """End the call."""
        self.status = code, details, trailing_metadata
        raise grpc.aio.AbortError(details)


class LocalCall:
    """One call: the part of a grpc.aio.StreamStreamCall that ours use."""

    def __init__(
        self,
        behaviour: Callable[[AsyncIterator[Any], LocalContext], Awaitable[None]],
        timeout: float | None,
        metadata: Metadata,
    ) -> None:
        self._requests, self._answers = _Queue(), _Queue()
        self._context = LocalContext(self._answers, metadata)
        self._task = asyncio.ensure_future(self._run(behaviour))
        self._timer = None
        if timeout is not None:
            self._timer = asyncio.get_running_loop().call_later(timeout, self._expire)

    async def write(self, request: Any) -> None:
        """Raises asyncio.InvalidStateError when the call has ended."""
        if self._answers.has_ended:
            raise asyncio.InvalidStateError("the call has ended")
        self._requests.put(request)

    async def read(self) -> Any:
        """The next answer, or grpc.aio.EOF. Raises AioRpcError when the call has failed.

        Whoever is cancelled here cancels the call.
        """
        try:
            return await anext(self._answers)
        except asyncio.CancelledError:
            self.cancel()
            raise
        except StopAsyncIteration:
            code, details, metadata = self._context.status
            if code is grpc.StatusCode.OK:
                return grpc.aio.EOF
            raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*metadata), details) from None

    def cancel(self) -> None:
        """End it; the handler is cancelled."""
        self._end(grpc.StatusCode.CANCELLED, "cancelled by its caller")

    async def code(self) -> grpc.StatusCode:
        """How it ended."""
        await self._answers.end
        return self._context.status[0]

    async def details(self) -> str:
        """Why it ended."""
        await self._answers.end
        return self._context.status[1]

    async def trailing_metadata(self) -> Any:
        """What came with its end."""
        await self._answers.end
        return grpc.aio.Metadata(*self._context.status[2])

    async def _run(self, behaviour: Callable[[AsyncIterator[Any], LocalContext], Awaitable[None]]) -> None:
        try:
            await behaviour(self._requests, self._context)
        except grpc.aio.AbortError:
            pass
        except Exception as error:  # noqa: BLE001 - as grpc.aio does
            _log.exception("handler failed")
            self._context.status = grpc.StatusCode.UNKNOWN, f"{type(error).__name__}: {error}", ()
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._answers.finish()

    def _expire(self) -> None:
        self._end(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")

    def _end(self, code: grpc.StatusCode, details: str) -> None:
        if not self._answers.has_ended:
            self._context.status = code, details, ()
            self._answers.finish()
            self._task.cancel()


class _Queue:
    """Messages in one direction, for one reader."""

    def __init__(self) -> None:
        self._messages: deque[Any] = deque()
        self._reader: asyncio.Future[None] | None = None
        self.end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def has_ended(self) -> bool:
        return self.end.done()

    def put(self, message: Any) -> None:
        self._messages.append(message)
        self._wake()

    def finish(self) -> None:
        if not self.end.done():
            self.end.set_result(None)
            self._wake()

    def __aiter__(self) -> _Queue:
        return self

    async def __anext__(self) -> Any:
        while not self._messages:
            if self.has_ended:
                raise StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return self._messages.popleft()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
