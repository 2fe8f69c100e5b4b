"""Errors over the border: ours come back as they were, gRPC's own as what they mean."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from sequoia.border import error_border, error_from
from sequoia.cli.delayed_link import DelayedLink
from sequoia.errors import DeadlineExceeded, Internal, InvalidArgument, ResourceExhausted, SequoiaError, Unavailable
from sequoia.rpc import Server, open_channel
from sequoia.v1 import worker_pb2, worker_pb2_grpc


class Failing(worker_pb2_grpc.WorkerServiceServicer):
    """Raises what it is told to."""

    def __init__(self) -> None:
        self.error: Exception = ValueError("nothing told")

    async def GetStatus(self, request: worker_pb2.GetStatusRequest, context: Any) -> worker_pb2.GetStatusResponse:
        async with error_border(context):
            raise self.error


@pytest.fixture
async def servicer() -> Failing:
    return Failing()


@pytest.fixture
async def address(servicer: Failing) -> AsyncIterator[str]:
    server = Server("127.0.0.1:0")
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, server.grpc_server)
    yield await server.start(["sequoia.v1.WorkerService"])
    await server.stop(0)


@pytest.fixture
async def failing(servicer: Failing, address: str) -> AsyncIterator[tuple[Failing, grpc.aio.Channel]]:
    async with open_channel(address) as channel:
        yield servicer, channel


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (InvalidArgument("is 3", "top_p"), InvalidArgument, "top_p: is 3"),
        (ResourceExhausted("all in use", "queue", retry_seconds=1.5), ResourceExhausted, "queue: all in use"),
        (Internal("broken logits"), Internal, "broken logits"),
        (KeyError("a bug"), Internal, "KeyError: 'a bug'"),
    ],
)
async def test_our_errors_come_back_as_they_were(
    failing: tuple[Failing, grpc.aio.Channel], raised: Exception, kind: type[SequoiaError], message: str
) -> None:
    servicer, channel = failing
    servicer.error = raised
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker_pb2_grpc.WorkerServiceStub(channel).GetStatus(worker_pb2.GetStatusRequest())
    found = error_from(caught.value)
    assert (type(found), str(found)) == (kind, message)
    if isinstance(raised, ResourceExhausted):
        assert isinstance(found, ResourceExhausted)
        assert found.retry_seconds == 1.5


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INTERNAL, Unavailable),
        (grpc.StatusCode.UNKNOWN, Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
        (grpc.StatusCode.UNIMPLEMENTED, SequoiaError),
    ],
)
def test_grpcs_own_errors_are_taken_for_what_they_mean(code: grpc.StatusCode, kind: type[SequoiaError]) -> None:
    """A connection that breaks in the middle of a frame is INTERNAL to gRPC, and lost to us."""
    error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "Internal error from Core")
    assert type(error_from(error)) is kind


async def test_a_request_that_cannot_be_read_is_refused_by_name(failing: tuple[Failing, grpc.aio.Channel]) -> None:
    _, channel = failing
    call = channel.unary_unary("/sequoia.v1.WorkerService/GetStatus", lambda raw: raw, lambda raw: raw)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(b"\xff\xff\xff")
    assert str(error_from(caught.value)).startswith("message: it cannot be read")


async def test_a_far_peer_is_reached(address: str) -> None:
    """A connection takes some round trips, each longer than the first pause between two attempts."""
    async with DelayedLink(address, 0.4) as link, open_channel(link.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await worker_pb2_grpc.WorkerServiceStub(channel).GetStatus(worker_pb2.GetStatusRequest(), timeout=10)
    assert caught.value.details() == "ValueError: nothing told"
