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

import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from types import TracebackType
from typing import TypeVar, Unpack

import grpc

from sequoia.access import Access
from sequoia.async_client import AsyncClient
from sequoia.attempts import Attempts, ask_another
from sequoia.batch import DEFAULT_CONCURRENCY, Calls, build_requests, checked_concurrency
from sequoia.connection import DEFAULT_ADDRESS, Connection
from sequoia.errors import SequoiaError
from sequoia.generation import Answer, Chunk, Generation, OutOfStep, Usage
from sequoia.options import Message, Prompt, RequestOptions, Speculation, Stop, build_explain, build_request
from sequoia.rpc import open_sync_channel
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
        self._connection = Connection(address, timeout_seconds, access, open_sync_channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls that still run are cancelled."""
        for channel in self._connection.close():
            channel.close()

    def generate(
        self, prompt: Prompt, *, timeout_seconds: float | None = None, **options: Unpack[RequestOptions]
    ) -> Generation:
        """The whole answer.

        >>> client.generate("1, 2, 3,", max_tokens=8, temperature=0, stop=["10"]).text
        ' 4, 5, 6'
        """
        return self._whole(build_request(prompt, options), self._connection.timeout(timeout_seconds), Calls())

    def batch(
        self,
        prompts: Iterable[Prompt],
        *,
        max_concurrency: int = DEFAULT_CONCURRENCY,
        seeds: Iterable[int] | None = None,
        timeout_seconds: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[Generation | SequoiaError]:
        """An answer for each prompt, in their order, at most `max_concurrency` being asked for at a time.

        Each is what `generate` returns for that prompt with these options, retries included, or the error that it would
        raise: one that fails costs the others nothing. `seed` is every request's, so that the same prompt has the same
        text twice; `seeds` gives each its own. `timeout_seconds` is each request's, from when it is sent. A wrong
        argument is raised before anything is sent; Ctrl-C cancels what runs and leaves out the rest.

        >>> for answer in client.batch(["1, 2, 3,", "10, 20, 30,"], max_tokens=8, temperature=0):
        ...     print(answer if isinstance(answer, SequoiaError) else answer.text)
         4, 5, 6
         40, 50,
        """
        requests, timeout = build_requests(prompts, seeds, options), self._connection.timeout(timeout_seconds)
        calls = Calls()

        def outcome(request: pb.GenerateRequest) -> Generation | SequoiaError:
            try:
                return self._whole(request, timeout, calls)
            except SequoiaError as error:
                return error

        with ThreadPoolExecutor(checked_concurrency(max_concurrency)) as threads:
            try:
                # Each call is made for the request, and below the span, that this one is made for.
                answers = [threads.submit(copy_context().run, outcome, request) for request in requests]
                return [answer.result() for answer in answers]
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                calls.cancel()
                raise

    def stream(
        self, prompt: Prompt, *, timeout_seconds: float | None = None, **options: Unpack[RequestOptions]
    ) -> Generator[Chunk]:
        """The answer in pieces, as they are committed. Leaving the loop early cancels the request.

        >>> for chunk in client.stream([Message("user", "Hello!")]):
        ...     print(chunk.text, end="", flush=True)
        """
        request, timeout = build_request(prompt, options), self._connection.timeout(timeout_seconds)
        return self._chunks(request, timeout, Answer(), Calls())

    def describe_pair(self, *, timeout_seconds: float | None = None) -> pb.DescribePairResponse:
        """The pair of models that serves, its measured speed, and the tree plans in force."""
        timeout, metadata = self._connection.timeout(timeout_seconds), self._connection.metadata
        return self._first(lambda stub: stub.DescribePair(pb.DescribePairRequest(), timeout=timeout, metadata=metadata))

    def explain(
        self, *, temperature: float = 0.0, rule: str | None = None, timeout_seconds: float | None = None
    ) -> pb.ExplainResponse:
        """Why requests of that temperature and rule are decoded the way they are, and what was realised lately."""
        timeout, metadata = self._connection.timeout(timeout_seconds), self._connection.metadata
        request = build_explain(temperature, rule)
        return self._first(lambda stub: stub.Explain(request, timeout=timeout, metadata=metadata))

    def _first(self, ask: Callable[[CoordinatorServiceStub], Response]) -> Response:
        """The answer of the first coordinator that is there."""
        for place in range(len(self._connection.addresses)):
            try:
                return ask(self._connection.stub(place))
            except grpc.RpcError as error:
                ask_another(error, self._connection.addresses, place)
        raise AssertionError("the last failure is raised")

    def _whole(self, request: pb.GenerateRequest, timeout_seconds: float, calls: Calls) -> Generation:
        answer = Answer()
        for _ in self._chunks(request, timeout_seconds, answer, calls):
            pass
        return answer.finished()

    def _chunks(
        self, request: pb.GenerateRequest, timeout_seconds: float, answer: Answer, calls: Calls
    ) -> Generator[Chunk]:
        connection = self._connection
        attempts = Attempts(connection.addresses, request, timeout_seconds, answer)
        while answer.generation is None:
            stub, seconds = connection.stub(attempts.place), attempts.seconds_left
            call = stub.Generate(attempts.request, timeout=seconds, metadata=connection.call_metadata)
            try:
                with calls.running(call):
                    for response in call:
                        yield answer.add(response)
                answer.finished()
            except (grpc.RpcError, OutOfStep) as error:
                time.sleep(attempts.failed(error, is_closed=connection.is_closed or calls.is_cancelled))
