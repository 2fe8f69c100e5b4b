"""How a request opens its two streams, against workers that do what the test tells them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from tiny_models import build_tokenizer

from coordinator.session import Session
from coordinator.speculation import Choice
from coordinator.streams import DraftStream, Opening, VerifyStream
from coordinator.text import TextCodec, TextStream
from coordinator.transcript import Transcript
from coordinator.workers import WorkerLink
from sequoia.rpc import Context, Server
from sequoia.rules import GREEDY
from sequoia.sampling import Decoding, Sampling
from sequoia.topology import Topology
from sequoia.v1 import draft_pb2, draft_pb2_grpc, verify_pb2, verify_pb2_grpc
from sequoia.v1.worker_pb2 import TokenizerFiles

PROMPT = (5, 6, 7)


class Workers(draft_pb2_grpc.DraftServiceServicer, verify_pb2_grpc.VerifyServiceServicer):
    """The verifier answers its opening once the drafter has got its own; the drafter never answers."""

    def __init__(self) -> None:
        self.draft_opening: asyncio.Future[draft_pb2.DraftOpen] = asyncio.get_running_loop().create_future()

    async def Draft(
        self, requests: AsyncIterator[draft_pb2.DraftRequest], context: Context
    ) -> AsyncIterator[draft_pb2.DraftResponse]:
        self.draft_opening.set_result((await anext(requests)).open)
        await asyncio.Event().wait()
        yield draft_pb2.DraftResponse()

    async def Verify(
        self, requests: AsyncIterator[verify_pb2.VerifyRequest], context: Context
    ) -> AsyncIterator[verify_pb2.VerifyResponse]:
        await anext(requests)
        await self.draft_opening
        yield verify_pb2.VerifyResponse(verdict=verify_pb2.Verdict(bonus_token_id=40))
        await asyncio.Event().wait()


class AlwaysTree:
    """A request that always wants a tree."""

    def choose(self, num_tokens: int) -> Choice:
        return Choice(Topology.chain(3))


@pytest.fixture
async def workers() -> Workers:
    return Workers()


@pytest.fixture
async def address(workers: Workers) -> AsyncIterator[str]:
    server = Server("127.0.0.1:0")
    draft_pb2_grpc.add_DraftServiceServicer_to_server(workers, server.grpc_server)
    verify_pb2_grpc.add_VerifyServiceServicer_to_server(workers, server.grpc_server)
    yield await server.start(["sequoia.v1.DraftService", "sequoia.v1.VerifyService"])
    await server.stop(0)


@pytest.fixture
async def link(address: str) -> AsyncIterator[WorkerLink]:
    link = WorkerLink(address)
    yield link
    await link.channel.close()


def session(link: WorkerLink, *, has_own_device: bool) -> Session:
    codec = TextCodec.from_files(
        TokenizerFiles(tokenizer_json=build_tokenizer(400).backend_tokenizer.to_str().encode())
    )
    sampling = Sampling(temperature=0.0)
    opening = Opening(Decoding(GREEDY, sampling, len(PROMPT)), timeout_seconds=30.0)
    return Session(
        Transcript(PROMPT, 10, sampling, TextStream(codec, ())),
        VerifyStream(link, opening),
        DraftStream(link, opening, 5.0, has_own_device=has_own_device),
        AlwaysTree(),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("has_own_device", [True, False])
async def test_prefill_of_both_overlaps_and_the_drafts_is_not_awaited(
    workers: Workers, link: WorkerLink, has_own_device: bool
) -> None:
    """The first token comes although the drafter has not answered, and not before it has got the prompt."""
    running = session(link, has_own_device=has_own_device)
    async with asyncio.timeout(20), aclosing(running.run()) as steps:
        first = await anext(steps)
    running.close()
    assert first.token_ids == (40,)
    opening = workers.draft_opening.result()
    assert tuple(opening.token_ids) == PROMPT
    assert opening.has_own_device == has_own_device
