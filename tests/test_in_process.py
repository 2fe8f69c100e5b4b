"""Calls without a connection are those of grpc.aio: every test runs on both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import grpc
import pytest

from sequoia.border import error_border, error_from
from sequoia.errors import InvalidArgument, ResourceExhausted
from sequoia.in_process import LocalServices
from sequoia.rpc import Server, open_channel
from sequoia.v1 import verify_pb2, verify_pb2_grpc, worker_pb2, worker_pb2_grpc

Handler = Callable[[AsyncIterator[verify_pb2.VerifyRequest], Any], Awaitable[None]]


class Servicer(verify_pb2_grpc.VerifyServiceServicer, worker_pb2_grpc.WorkerServiceServicer):
    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    async def Verify(self, request_iterator: AsyncIterator[verify_pb2.VerifyRequest], context: Any) -> None:
        await self._handler(request_iterator, context)

    async def Describe(self, request: worker_pb2.DescribeRequest, context: Any) -> worker_pb2.DescribeResponse:
        if request.include_tokenizer:
            async with error_border(context):
                raise InvalidArgument("there is none", "include_tokenizer")
        return worker_pb2.DescribeResponse(worker=worker_pb2.WorkerDescription(model="m"))


@pytest.fixture(params=["connected", "in process"])
def serving(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Handler], Any]:
    @asynccontextmanager
    async def start(handler: Handler) -> AsyncIterator[Any]:
        server, services = Server(f"unix:{tmp_path}/socket"), LocalServices()
        for each in (server.grpc_server, services):
            verify_pb2_grpc.add_VerifyServiceServicer_to_server(Servicer(handler), each)
            worker_pb2_grpc.add_WorkerServiceServicer_to_server(Servicer(handler), each)
        if request.param == "in process":
            yield services
            return
        address = await server.start(())
        async with open_channel(address) as channel:
            yield channel
        await server.stop(0)

    return start


def step(number: int) -> verify_pb2.VerifyRequest:
    return verify_pb2.VerifyRequest(step=verify_pb2.VerifyStep(step=number))


async def double(requests: AsyncIterator[verify_pb2.VerifyRequest], context: Any) -> None:
    async for request in requests:
        await context.write(verify_pb2.VerifyResponse(step=2 * request.step.step))


async def test_messages_come_in_order_and_with_their_metadata(serving: Any) -> None:
    seen: dict[str, str] = {}

    async def handler(requests: AsyncIterator[verify_pb2.VerifyRequest], context: Any) -> None:
        seen.update(context.invocation_metadata())
        await double(requests, context)

    async with serving(handler) as channel:
        call = verify_pb2_grpc.VerifyServiceStub(channel).Verify(timeout=30, metadata=(("x-request-id", "r"),))
        for number in (1, 2, 3):
            await call.write(step(number))
        assert [(await call.read()).step for _ in range(3)] == [2, 4, 6]
        assert seen["x-request-id"] == "r"
        call.cancel()


async def test_a_handler_that_ends_is_the_end(serving: Any) -> None:
    async def handler(requests: AsyncIterator[verify_pb2.VerifyRequest], context: Any) -> None:
        await context.write(verify_pb2.VerifyResponse(step=(await anext(requests)).step.step))

    async with serving(handler) as channel:
        call = verify_pb2_grpc.VerifyServiceStub(channel).Verify()
        await call.write(step(5))
        assert (await call.read()).step == 5
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK
        with pytest.raises(asyncio.InvalidStateError):
            await call.write(step(6))


async def test_an_error_of_ours_comes_whole(serving: Any) -> None:
    async def handler(_: AsyncIterator[verify_pb2.VerifyRequest], context: Any) -> None:
        async with error_border(context):
            raise ResourceExhausted("all slots are taken", "slots", retry_seconds=1.5)

    async with serving(handler) as channel:
        call = verify_pb2_grpc.VerifyServiceStub(channel).Verify()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "all slots are taken" in await call.details()
    error = error_from(caught.value)
    assert isinstance(error, ResourceExhausted)
    assert (error.field, error.retry_seconds) == ("slots", 1.5)


async def test_a_fault_of_a_handler_ends_the_call(serving: Any) -> None:
    async def handler(_: AsyncIterator[verify_pb2.VerifyRequest], context: Any) -> None:
        raise RuntimeError("boom")

    async with serving(handler) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="boom") as caught:
            await verify_pb2_grpc.VerifyServiceStub(channel).Verify().read()
    assert caught.value.code() is grpc.StatusCode.UNKNOWN


@pytest.mark.parametrize("how", ["cancel", "deadline", "cancelled reader"])
async def test_a_call_that_is_given_up_cancels_its_handler(serving: Any, how: str) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def handler(requests: AsyncIterator[verify_pb2.VerifyRequest], _: Any) -> None:
        begun.set()
        try:
            await anext(requests, None)
            await asyncio.sleep(60)
        finally:
            ended.set()

    async with serving(handler) as channel:
        call = verify_pb2_grpc.VerifyServiceStub(channel).Verify(timeout=0.5 if how == "deadline" else 30)
        await call.write(step(1))
        reading = asyncio.ensure_future(call.read())
        await asyncio.wait_for(begun.wait(), 10)
        if how == "cancel":
            call.cancel()
        elif how == "cancelled reader":
            await asyncio.sleep(0.05)
            reading.cancel()
        await asyncio.wait_for(ended.wait(), 10)
        is_late = how == "deadline"
        expected = grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
        assert await call.code() is expected
        with pytest.raises(grpc.aio.AioRpcError if is_late else asyncio.CancelledError):
            await reading
        with pytest.raises((asyncio.InvalidStateError, asyncio.CancelledError)):
            await call.write(step(2))


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_what_was_not_read_is_gone_with_a_call_that_is_given_up(serving: Any, how: str) -> None:
    async def handler(requests: AsyncIterator[verify_pb2.VerifyRequest], context: Any) -> None:
        for number in (1, 2, 3):
            await context.write(verify_pb2.VerifyResponse(step=number))
        await anext(requests)

    async with serving(handler) as channel:
        call = verify_pb2_grpc.VerifyServiceStub(channel).Verify(timeout=0.5 if how == "deadline" else 30)
        assert (await call.read()).step == 1
        if how == "cancel":
            call.cancel()
        await call.code()
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError if how == "deadline" else asyncio.CancelledError):
                await call.read()


async def test_what_a_handler_does_once_its_call_is_given_up_is_not_told(serving: Any) -> None:
    ended = asyncio.Event()

    async def handler(requests: AsyncIterator[verify_pb2.VerifyRequest], context: Any) -> None:
        try:
            await anext(requests)
        finally:
            ended.set()
            raise RuntimeError("boom")

    async with serving(handler) as channel:
        call = verify_pb2_grpc.VerifyServiceStub(channel).Verify(timeout=0.5)
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()
        await asyncio.wait_for(ended.wait(), 10)
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_call_that_has_ended_is_not_cancelled_any_more(serving: Any) -> None:
    async def handler(_: AsyncIterator[verify_pb2.VerifyRequest], context: Any) -> None:
        await context.abort(grpc.StatusCode.CANCELLED, "by the worker")

    async with serving(handler) as channel:
        call = verify_pb2_grpc.VerifyServiceStub(channel).Verify(timeout=30)
        await call.code()
        call.cancel()
        with pytest.raises(grpc.aio.AioRpcError, match="by the worker"):
            await call.read()
        assert await call.code() is grpc.StatusCode.CANCELLED


async def test_a_handler_knows_nothing_of_its_caller_s_context(serving: Any) -> None:
    variable = ContextVar("variable", default="nobody's")
    seen: list[str] = []

    async def handler(_: AsyncIterator[verify_pb2.VerifyRequest], __: Any) -> None:
        seen.append(variable.get())

    async with serving(handler) as channel:
        variable.set("the caller's")
        assert await verify_pb2_grpc.VerifyServiceStub(channel).Verify(timeout=30).read() is grpc.aio.EOF
    assert seen == ["nobody's"]


async def test_a_call_with_one_answer(serving: Any) -> None:
    async with serving(double) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        response = await stub.Describe(worker_pb2.DescribeRequest(), timeout=30, wait_for_ready=True)
        assert response.worker.model == "m"
        with pytest.raises(grpc.aio.AioRpcError, match="there is none") as caught:
            await stub.Describe(worker_pb2.DescribeRequest(include_tokenizer=True), timeout=30)
    assert error_from(caught.value).field == "include_tokenizer"


async def test_sessions_beside_each_other_do_not_mix(serving: Any) -> None:
    async with serving(double) as channel:

        async def session(first: int) -> list[int]:
            call = verify_pb2_grpc.VerifyServiceStub(channel).Verify(timeout=30)
            answers = []
            for number in range(first, first + 20):
                await call.write(step(number))
                answers.append((await call.read()).step)
            call.cancel()
            return answers

        found = await asyncio.gather(*map(session, range(0, 100, 10)))
    assert found == [[2 * number for number in range(first, first + 20)] for first in range(0, 100, 10)]
