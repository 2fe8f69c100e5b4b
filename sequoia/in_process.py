"""Calls of services that the same process serves: the same messages and the same stubs, without a connection."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextvars import Context
from typing import Any, NoReturn

import grpc

_log = logging.getLogger(__name__)

Metadata = Sequence[tuple[str, Any]]
Status = tuple[grpc.StatusCode, str, Metadata]
Behaviour = Callable[[AsyncIterator[Any], "LocalContext"], Awaitable[None]]


class LocalServices:
    """What `add_...Servicer_to_server` takes for a server, and what a stub takes for a channel.

    Messages are handed over as they are: whoever sends one must not change it afterwards.
    """

    def __init__(self) -> None:
        self._handlers: dict[str, Any] = {}

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """As a grpc.aio.Server has it."""
        self._handlers |= {f"/{service}/{name}": each for name, each in handlers.items()}

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """As a grpc.aio.Server has it; the registered ones are the same."""

    def unary_unary(self, method: str, *_: object, **__: object) -> Callable[..., Awaitable[Any]]:
        """As a grpc.aio.Channel has it."""
        behaviour = self._handlers[method].unary_unary

        async def answer(request: Any, context: LocalContext) -> None:
            await context.write(await behaviour(request, context))

        def call(request: Any, *, timeout: float | None = None, metadata: Metadata = (), **_: object) -> Awaitable[Any]:
            return LocalCall(lambda _, context: answer(request, context), timeout, metadata).read()

        return call

    def stream_stream(self, method: str, *_: object, **__: object) -> Callable[..., LocalCall]:
        """As a grpc.aio.Channel has it."""
        behaviour = self._handlers[method].stream_stream

        def call(*, timeout: float | None = None, metadata: Metadata = ()) -> LocalCall:
            return LocalCall(behaviour, timeout, metadata)

        return call

    async def close(self) -> None:
        """Nothing is open."""


class LocalContext:
    """What handlers see of a call: the part of a grpc.aio.ServicerContext that ours use."""

    def __init__(self, answers: _Queue, metadata: Metadata) -> None:
        self._answers, self._metadata = answers, metadata
        self.status: Status = (grpc.StatusCode.OK, "", ())

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

    def __init__(self, behaviour: Behaviour, timeout: float | None, metadata: Metadata) -> None:
        self._requests, self._answers = _Queue(), _Queue()
        self._status: Status | None = None  # None: it has not ended
        self._is_cancelled = False  # by its caller
        context = LocalContext(self._answers, metadata)
        loop = asyncio.get_running_loop()
        # In a context of its own: of the caller's request a handler knows what the metadata tell, and no more.
        self._task = loop.create_task(self._run(behaviour, context), context=Context())
        self._timer = None if timeout is None else loop.call_later(timeout, self._expire)

    async def write(self, request: Any) -> None:
        """Raises asyncio.InvalidStateError when the call has ended."""
        if self._status is not None:
            raise asyncio.InvalidStateError("the call has ended")
        self._requests.put(request)

    async def read(self) -> Any:
        """The next answer, or grpc.aio.EOF. Raises AioRpcError when the call has failed, and asyncio.CancelledError
        when its caller has cancelled it.

        Whoever is cancelled here cancels the call.
        """
        try:
            return await anext(self._answers)
        except asyncio.CancelledError:
            self.cancel()
            raise
        except StopAsyncIteration:
            if self._is_cancelled:
                raise asyncio.CancelledError from None
            code, details, metadata = await self._ended()
            if code is grpc.StatusCode.OK:
                return grpc.aio.EOF
            raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*metadata), details) from None

    def cancel(self) -> None:
        """End it; the handler is cancelled."""
        self._is_cancelled = self._is_cancelled or self._status is None
        self._give_up((grpc.StatusCode.CANCELLED, "cancelled by its caller", ()))

    async def code(self) -> grpc.StatusCode:
        """How it ended."""
        return (await self._ended())[0]

    async def details(self) -> str:
        """Why it ended."""
        return (await self._ended())[1]

    async def trailing_metadata(self) -> grpc.aio.Metadata:
        """What came with its end."""
        return grpc.aio.Metadata(*(await self._ended())[2])

    async def _run(self, behaviour: Behaviour, context: LocalContext) -> None:
        try:
            await behaviour(self._requests, context)
        except grpc.aio.AbortError:
            pass
        except asyncio.CancelledError:
            context.status = grpc.StatusCode.CANCELLED, "the handler was cancelled", ()
            raise
        except Exception as error:  # noqa: BLE001 - as grpc.aio does
            _log.exception("handler failed")
            context.status = grpc.StatusCode.UNKNOWN, f"{type(error).__name__}: {error}", ()
        finally:
            self._end(context.status)

    def _expire(self) -> None:
        self._give_up((grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", ()))

    def _give_up(self, status: Status) -> None:
        if self._status is None:
            self._answers.clear()
            self._task.cancel()
            self._end(status)

    def _end(self, status: Status) -> None:
        if self._status is None:
            self._status = status
            self._answers.finish()
            if self._timer is not None:
                self._timer.cancel()

    async def _ended(self) -> Status:
        await self._answers.end.wait()
        assert self._status is not None
        return self._status


class _Queue:
    """Messages in one direction, for one reader."""

    def __init__(self) -> None:
        self._messages: deque[Any] = deque()
        self._reader: asyncio.Future[None] | None = None
        self.end = asyncio.Event()

    def put(self, message: Any) -> None:
        self._messages.append(message)
        self._wake()

    def clear(self) -> None:
        self._messages.clear()

    def finish(self) -> None:
        self.end.set()
        self._wake()

    def __aiter__(self) -> _Queue:
        return self

    async def __anext__(self) -> Any:
        while not self._messages:
            if self.end.is_set():
                raise StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return self._messages.popleft()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
