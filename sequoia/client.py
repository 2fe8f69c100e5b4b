"""The Python client: prompt in, text and figures out, with or without asyncio.

    from sequoia import Client

    with Client("127.0.0.1:50600") as client:
        print(client.generate("The capital of France is", max_tokens=16, temperature=0).text)
        for chunk in client.stream([Message("user", "Why is the sky blue?")]):
            print(chunk.text, end="")

`prompt` is text, a conversation (a list of `Message`), or token ids. The options are those of `RequestOptions`; what is
left out takes the server's default. Every failure is a class of `sequoia.errors`; a wrong argument is an
`InvalidArgument` whose `field` names it, whether it was found here or by the server.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from types import TracebackType
from typing import Unpack

import grpc

from sequoia.errors import InvalidArgument, SequoiaError, Unavailable
from sequoia.generation import Answer, Chunk, Generation, Usage
from sequoia.options import Message, Prompt, RequestOptions, Speculation, Stop, build_explain, build_request
from sequoia.rpc import error_from, open_channel, open_sync_channel
from sequoia.speculation_figures import SpeculationFigures, StageSeconds
from sequoia.topology import TokenLogprobs
from sequoia.v1 import coordinator_pb2 as pb
from sequoia.v1.coordinator_pb2_grpc import CoordinatorServiceStub

__all__ = [
    "DEFAULT_ADDRESS",
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


class Client:
    """A connection to a coordinator, for use from any thread. `timeout_seconds` is the default deadline of a call."""

    def __init__(self, address: str = DEFAULT_ADDRESS, *, timeout_seconds: float = 600.0) -> None:
        self._address = address
        self._timeout_seconds = _checked_timeout(timeout_seconds)
        self._channel = open_sync_channel(address)
        self._stub = CoordinatorServiceStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls that still run are cancelled."""
        self._channel.close()

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
        try:
            return self._stub.DescribePair(pb.DescribePairRequest(), timeout=timeout)
        except grpc.RpcError as error:
            raise _failure(error, self._address) from error

    def explain(
        self, *, temperature: float = 0.0, rule: str | None = None, timeout_seconds: float | None = None
    ) -> pb.ExplainResponse:
        """Why requests of that temperature and rule are decoded the way they are, and what was realised lately."""
        timeout = _checked_timeout(timeout_seconds, self._timeout_seconds)
        try:
            return self._stub.Explain(build_explain(temperature, rule), timeout=timeout)
        except grpc.RpcError as error:
            raise _failure(error, self._address) from error

    def _chunks(self, request: pb.GenerateRequest, timeout_seconds: float, answer: Answer) -> Generator[Chunk]:
        call = self._stub.Generate(request, timeout=timeout_seconds)
        try:
            for response in call:
                yield answer.add(response)
        except grpc.RpcError as error:
            raise _failure(error, self._address) from error
        finally:
            call.cancel()
        answer.finished()


class AsyncClient:
    """`Client` for asyncio. Make it where the event loop runs."""

    def __init__(self, address: str = DEFAULT_ADDRESS, *, timeout_seconds: float = 600.0) -> None:
        self._address = address
        self._timeout_seconds = _checked_timeout(timeout_seconds)
        self._channel = open_channel(address)
        self._stub = CoordinatorServiceStub(self._channel)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls that still run are cancelled."""
        await self._channel.close()

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
        try:
            return await self._stub.DescribePair(pb.DescribePairRequest(), timeout=timeout)
        except grpc.RpcError as error:
            raise _failure(error, self._address) from error

    async def explain(
        self, *, temperature: float = 0.0, rule: str | None = None, timeout_seconds: float | None = None
    ) -> pb.ExplainResponse:
        """Why requests of that temperature and rule are decoded the way they are, and what was realised lately."""
        timeout = _checked_timeout(timeout_seconds, self._timeout_seconds)
        try:
            return await self._stub.Explain(build_explain(temperature, rule), timeout=timeout)
        except grpc.RpcError as error:
            raise _failure(error, self._address) from error

    async def _chunks(
        self, request: pb.GenerateRequest, timeout_seconds: float, answer: Answer
    ) -> AsyncGenerator[Chunk]:
        call = self._stub.Generate(request, timeout=timeout_seconds)
        try:
            async for response in call:
                yield answer.add(response)
        except grpc.RpcError as error:
            raise _failure(error, self._address) from error
        finally:
            call.cancel()
        answer.finished()


def _failure(error: grpc.RpcError, address: str) -> SequoiaError:
    """The error as ours; one that never left this machine says where nobody answered."""
    failure = error_from(error)
    if isinstance(failure, Unavailable) and failure.message.startswith("failed to connect"):
        return Unavailable(f"no coordinator answers at {address}; is `sequoia up` running? ({failure.message})")
    return failure


def _checked_timeout(timeout_seconds: float | None, default: float | None = None) -> float:
    value = default if timeout_seconds is None else timeout_seconds
    if not isinstance(value, int | float) or not value > 0:
        raise InvalidArgument(f"{value!r} is not a positive number", "timeout_seconds")
    return value
