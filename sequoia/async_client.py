"""The client for asyncio."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from types import TracebackType
from typing import TypeVar, Unpack

import grpc

from sequoia.access import Access
from sequoia.attempts import Attempts, ask_another
from sequoia.batch import DEFAULT_CONCURRENCY, build_requests, checked_concurrency
from sequoia.connection import DEFAULT_ADDRESS, Connection
from sequoia.errors import SequoiaError
from sequoia.generation import Answer, Chunk, Generation, OutOfStep
from sequoia.options import Prompt, RequestOptions, build_explain, build_request
from sequoia.rpc import open_channel
from sequoia.v1 import coordinator_pb2 as pb
from sequoia.v1.coordinator_pb2_grpc import CoordinatorServiceStub

Response = TypeVar("Response")


class AsyncClient:
    """`Client` for asyncio. Make it where the event loop runs."""

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, timeout_seconds: float = 600.0, **access: Unpack[Access]
    ) -> None:
        self._connection = Connection(address, timeout_seconds, access, open_channel)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls that still run are cancelled."""
        for channel in self._connection.close():
            await channel.close()

    def with_token(self, token: str) -> AsyncClient:
        """The same connection for somebody with another token, "" for somebody without one. It is ours to close."""
        other = copy.copy(self)
        other._connection = self._connection.with_token(token)
        return other

    async def generate(
        self, prompt: Prompt, *, timeout_seconds: float | None = None, **options: Unpack[RequestOptions]
    ) -> Generation:
        """The whole answer; cancelling the task cancels the request.

        >>> (await client.generate("1, 2, 3,", max_tokens=8, temperature=0)).text
        ' 4, 5, 6'
        """
        return await self._whole(build_request(prompt, options), self._connection.timeout(timeout_seconds))

    async def batch(
        self,
        prompts: Iterable[Prompt],
        *,
        max_concurrency: int = DEFAULT_CONCURRENCY,
        seeds: Iterable[int] | None = None,
        timeout_seconds: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[Generation | SequoiaError]:
        """As `Client.batch`; cancelling the task cancels all of its requests.

        >>> answers = await client.batch(["1, 2, 3,", "10, 20, 30,"], max_tokens=8, temperature=0)
        """
        requests, timeout = build_requests(prompts, seeds, options), self._connection.timeout(timeout_seconds)
        gate = asyncio.Semaphore(checked_concurrency(max_concurrency))

        async def outcome(request: pb.GenerateRequest) -> Generation | SequoiaError:
            async with gate:
                try:
                    return await self._whole(request, timeout)
                except SequoiaError as error:
                    return error

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(outcome(request)) for request in requests]
        return [task.result() for task in tasks]

    def stream(
        self, prompt: Prompt, *, timeout_seconds: float | None = None, **options: Unpack[RequestOptions]
    ) -> AsyncGenerator[Chunk]:
        """The answer in pieces, as they are committed. Leaving the loop early cancels the request.

        >>> async for chunk in client.stream([Message("user", "Hello!")]):
        ...     print(chunk.text, end="", flush=True)
        """
        return self._chunks(build_request(prompt, options), self._connection.timeout(timeout_seconds), Answer())

    async def describe_pair(self, *, timeout_seconds: float | None = None) -> pb.DescribePairResponse:
        """The pair of models that serves, its measured speed, and the tree plans in force."""
        timeout, metadata = self._connection.timeout(timeout_seconds), self._connection.metadata
        return await self._first(
            lambda stub: stub.DescribePair(pb.DescribePairRequest(), timeout=timeout, metadata=metadata)
        )

    async def explain(
        self, *, temperature: float = 0.0, rule: str | None = None, timeout_seconds: float | None = None
    ) -> pb.ExplainResponse:
        """Why requests of that temperature and rule are decoded the way they are, and what was realised lately."""
        timeout, metadata = self._connection.timeout(timeout_seconds), self._connection.metadata
        request = build_explain(temperature, rule)
        return await self._first(lambda stub: stub.Explain(request, timeout=timeout, metadata=metadata))

    async def _first(self, ask: Callable[[CoordinatorServiceStub], Awaitable[Response]]) -> Response:
        """The answer of the first coordinator that is there."""
        for place in range(len(self._connection.addresses)):
            try:
                return await ask(self._connection.stub(place))
            except grpc.RpcError as error:
                ask_another(error, self._connection.addresses, place)
        raise AssertionError("the last failure is raised")

    async def _whole(self, request: pb.GenerateRequest, timeout_seconds: float) -> Generation:
        answer = Answer()
        async for _ in self._chunks(request, timeout_seconds, answer):
            pass
        return answer.finished()

    async def _chunks(
        self, request: pb.GenerateRequest, timeout_seconds: float, answer: Answer
    ) -> AsyncGenerator[Chunk]:
        connection = self._connection
        attempts = Attempts(connection.addresses, request, timeout_seconds, answer)
        while answer.generation is None:
            stub, seconds = connection.stub(attempts.place), attempts.seconds_left
            call = stub.Generate(attempts.request, timeout=seconds, metadata=connection.call_metadata)
            try:
                async for response in call:
                    yield answer.add(response)
                answer.finished()
            except (grpc.RpcError, OutOfStep) as error:
                await asyncio.sleep(attempts.failed(error, is_closed=connection.is_closed))
            finally:
                call.cancel()
