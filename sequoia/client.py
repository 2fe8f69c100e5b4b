"""The Python client: prompt in, text and figures out, with or without asyncio.

    from sequoia import Client

    with Client("127.0.0.1:50600") as client:
        print(client.generate("The capital of France is", max_tokens=16, temperature=0).text)
        for chunk in client.stream([Message("user", "Why is the sky blue?")]):
            print(chunk.text, end="")

`prompt` is text, a conversation (a list of `Message`), or token ids. The options are those of `RequestOptions`; what is
left out takes the server's default. A coordinator on another host is reached over TLS, `Client("host:50600",
tls_ca="ca.pem", token=...)`: see `Access`. Every failure is a class of `sequoia.errors`; a wrong argument is an
`InvalidArgument` whose `field` names it, whether it was found here or by the server.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from types import TracebackType
from typing import TypeVar, Unpack

import grpc

from sequoia.access import Access, bearer, tls_of
from sequoia.attempts import Attempts, ask_another
from sequoia.channels import Channels
from sequoia.errors import InvalidArgument
from sequoia.generation import Answer, Chunk, Generation, OutOfStep, Usage
from sequoia.options import Message, Prompt, RequestOptions, Speculation, Stop, build_explain, build_request
from sequoia.request_scope import call_metadata
from sequoia.rpc import open_channel, open_sync_channel
from sequoia.speculation_figures import SpeculationFigures, StageSeconds
from sequoia.topology import TokenLogprobs
from sequoia.v1 import coordinator_pb2 as pb
from sequoia.v1.coordinator_pb2_grpc import CoordinatorServiceStub

__all__ = [
    "DEFAULT_ADDRESS",
    "Access",
    "AsyncClient",
    "Chunk",
    "Client",
    "Generation",
    "Message",
    "Prompt",
    "RequestOptions",
    "Speculation",
    "SpeculationFigures",
    "StageSeconds",
    "Stop",
    "TokenLogprobs",
    "Usage",
]

DEFAULT_ADDRESS = "127.0.0.1:50600"
Response = TypeVar("Response")


class Client:
    """A connection to a coordinator, for use from any thread. `timeout_seconds` is the default deadline of a call.

    `address` may be several, with commas: the first is asked, the next where one is lost. An answer that has begun goes
    on there behind what was received: the same text where a seed or temperature 0 decides it, the same law otherwise.
    Its figures of speculation are then those of the last part. Raises InvalidArgument for another host without TLS.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, timeout_seconds: float = 600.0, **access: Unpack[Access]
    ) -> None:
        self._addresses, self._is_closed = _split(address), False
        self._timeout_seconds = _checked_timeout(timeout_seconds)
        self._metadata, tls = bearer(access.get("token")), tls_of(access)
        self._channels = [Channels(each, tls, open_sync_channel) for each in self._addresses]

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls that still run are cancelled."""
        self._is_closed = True
        for channels in self._channels:
            for channel in channels.all:
                channel.close()

    def generate(
        self, prompt: Prompt, *, timeout_seconds: float | None = None, **options: Unpack[RequestOptions]
    ) -> Generation:
        """The whole answer.

        >>> client.generate("1, 2, 3,", max_tokens=8, temperature=0, stop=["10"]).text
        ' 4, 5, 6'
        """
        request = build_request(prompt, options)
        answer = Answer()
        for _ in self._chunks(request, _checked_timeout(timeout_seconds, self._timeout_seconds), answer):
            pass
        return answer.finished()

    def stream(
        self, prompt: Prompt, *, timeout_seconds: float | None = None, **options: Unpack[RequestOptions]
    ) -> Generator[Chunk]:
        """The answer in pieces, as they are committed. Leaving the loop early cancels the request.

        >>> for chunk in client.stream([Message("user", "Hello!")]):
        ...     print(chunk.text, end="", flush=True)
        """
        request = build_request(prompt, options)
        return self._chunks(request, _checked_timeout(timeout_seconds, self._timeout_seconds), Answer())

    def describe_pair(self, *, timeout_seconds: float | None = None) -> pb.DescribePairResponse:
        """The pair of models that serves, its measured speed, and the tree plans in force."""
        timeout = _checked_timeout(timeout_seconds, self._timeout_seconds)
        return self._first(
            lambda stub: stub.DescribePair(pb.DescribePairRequest(), timeout=timeout, metadata=self._metadata)
        )

    def explain(
        self, *, temperature: float = 0.0, rule: str | None = None, timeout_seconds: float | None = None
    ) -> pb.ExplainResponse:
        """Why requests of that temperature and rule are decoded the way they are, and what was realised lately."""
        timeout = _checked_timeout(timeout_seconds, self._timeout_seconds)
        request = build_explain(temperature, rule)
        return self._first(lambda stub: stub.Explain(request, timeout=timeout, metadata=self._metadata))

    def _first(self, ask: Callable[[CoordinatorServiceStub], Response]) -> Response:
        """The answer of the first coordinator that is there."""
        for place, channels in enumerate(self._channels):
            try:
                return ask(CoordinatorServiceStub(channels.current))
            except grpc.RpcError as error:
                ask_another(error, self._addresses, place)
        raise AssertionError("the last failure is raised")

    def _chunks(self, request: pb.GenerateRequest, timeout_seconds: float, answer: Answer) -> Generator[Chunk]:
        attempts = Attempts(self._addresses, request, timeout_seconds, answer)
        while answer.generation is None:
            stub, seconds = CoordinatorServiceStub(self._channels[attempts.place].current), attempts.seconds_left
            call = stub.Generate(attempts.request, timeout=seconds, metadata=(*self._metadata, *call_metadata()))
            try:
                for response in call:
                    yield answer.add(response)
                answer.finished()
            except (grpc.RpcError, OutOfStep) as error:
                time.sleep(attempts.failed(error, is_closed=self._is_closed))
            finally:
                call.cancel()


class AsyncClient:
    """`Client` for asyncio. Make it where the event loop runs."""

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, timeout_seconds: float = 600.0, **access: Unpack[Access]
    ) -> None:
        self._addresses, self._is_closed = _split(address), False
        self._timeout_seconds = _checked_timeout(timeout_seconds)
        self._metadata, tls = bearer(access.get("token")), tls_of(access)
        self._channels = [Channels(each, tls, open_channel) for each in self._addresses]

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls that still run are cancelled."""
        self._is_closed = True
        for channels in self._channels:
            for channel in channels.all:
                await channel.close()

    def with_token(self, token: str) -> AsyncClient:
        """The same connection for somebody with another token, "" for somebody without one. It is ours to close."""
        other = copy.copy(self)
        other._metadata = bearer(token)
        return other

    async def generate(
        self, prompt: Prompt, *, timeout_seconds: float | None = None, **options: Unpack[RequestOptions]
    ) -> Generation:
        """The whole answer; cancelling the task cancels the request.

        >>> (await client.generate("1, 2, 3,", max_tokens=8, temperature=0)).text
        ' 4, 5, 6'
        """
        request = build_request(prompt, options)
        answer = Answer()
        async for _ in self._chunks(request, _checked_timeout(timeout_seconds, self._timeout_seconds), answer):
            pass
        return answer.finished()

    def stream(
        self, prompt: Prompt, *, timeout_seconds: float | None = None, **options: Unpack[RequestOptions]
    ) -> AsyncGenerator[Chunk]:
        """The answer in pieces, as they are committed. Leaving the loop early cancels the request.

        >>> async for chunk in client.stream([Message("user", "Hello!")]):
        ...     print(chunk.text, end="", flush=True)
        """
        request = build_request(prompt, options)
        return self._chunks(request, _checked_timeout(timeout_seconds, self._timeout_seconds), Answer())

    async def describe_pair(self, *, timeout_seconds: float | None = None) -> pb.DescribePairResponse:
        """The pair of models that serves, its measured speed, and the tree plans in force."""
        timeout = _checked_timeout(timeout_seconds, self._timeout_seconds)
        return await self._first(
            lambda stub: stub.DescribePair(pb.DescribePairRequest(), timeout=timeout, metadata=self._metadata)
        )

    async def explain(
        self, *, temperature: float = 0.0, rule: str | None = None, timeout_seconds: float | None = None
    ) -> pb.ExplainResponse:
        """Why requests of that temperature and rule are decoded the way they are, and what was realised lately."""
        timeout = _checked_timeout(timeout_seconds, self._timeout_seconds)
        request = build_explain(temperature, rule)
        return await self._first(lambda stub: stub.Explain(request, timeout=timeout, metadata=self._metadata))

    async def _first(self, ask: Callable[[CoordinatorServiceStub], Awaitable[Response]]) -> Response:
        """As `Client` has it."""
        for place, channels in enumerate(self._channels):
            try:
                return await ask(CoordinatorServiceStub(channels.current))
            except grpc.RpcError as error:
                ask_another(error, self._addresses, place)
        raise AssertionError("the last failure is raised")

    async def _chunks(
        self, request: pb.GenerateRequest, timeout_seconds: float, answer: Answer
    ) -> AsyncGenerator[Chunk]:
        attempts = Attempts(self._addresses, request, timeout_seconds, answer)
        while answer.generation is None:
            stub, seconds = CoordinatorServiceStub(self._channels[attempts.place].current), attempts.seconds_left
            call = stub.Generate(attempts.request, timeout=seconds, metadata=(*self._metadata, *call_metadata()))
            try:
                async for response in call:
                    yield answer.add(response)
                answer.finished()
            except (grpc.RpcError, OutOfStep) as error:
                await asyncio.sleep(attempts.failed(error, is_closed=self._is_closed))
            finally:
                call.cancel()


def _split(addresses: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(filter(None, (each.strip() for each in addresses.split(",")))))
    if not found:
        raise InvalidArgument("none is given", "address")
    return found


def _checked_timeout(timeout_seconds: float | None, default: float | None = None) -> float:
    value = default if timeout_seconds is None else timeout_seconds
    if not isinstance(value, int | float) or not value > 0:
        raise InvalidArgument(f"{value!r} is not a positive number", "timeout_seconds")
    return value
