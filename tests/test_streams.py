"""How a request opens its two streams, against workers that do what the test tells them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from google.protobuf import json_format
from tiny_models import build_tokenizer

from coordinator.draft_stream import DraftStream
from coordinator.pool import Pool
from coordinator.session import Session
from coordinator.speculation import Choice
from coordinator.stream import Opening
from coordinator.text import TextCodec, TextStream
from coordinator.transcript import Transcript
from coordinator.verify_stream import VerifyStream
from sequoia.border import Context, error_border
from sequoia.errors import InvalidArgument
from sequoia.rpc import Server
from sequoia.rules import GREEDY
from sequoia.sampling import Decoding, Sampling
from sequoia.topology import Topology
from sequoia.v1 import draft_pb2, draft_pb2_grpc, tree_pb2, verify_pb2, verify_pb2_grpc, worker_pb2
from sequoia.v1.worker_pb2 import TokenizerFiles

PROMPT = (5, 6, 7)
ROOT = {"token_ids": [40], "topology": {"parents": [-1]}}


class Workers(draft_pb2_grpc.DraftServiceServicer, verify_pb2_grpc.VerifyServiceServicer):
    """The verifier answers its opening once the drafter has got its own; the drafter never answers."""

    def __init__(self) -> None:
        self.draft_opening: asyncio.Future[draft_pb2.DraftOpen] = asyncio.get_running_loop().create_future()
        self.overlaps, self.was_draft_asked = True, False

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
        if self.overlaps:
            await self.draft_opening
        self.was_draft_asked = self.draft_opening.done()
        yield verify_pb2.VerifyResponse(verdict=verify_pb2.Verdict(bonus_token_id=40))
        await asyncio.Event().wait()


class AlwaysTree:
    """A request that always wants a tree."""

    def choose(self, num_tokens: int, num_tokens_left: int) -> Choice:
        return Choice(Topology.chain(3))

    def drafted(self, ahead: int) -> None:
        """Nobody counts."""

    def opened(self, seconds: float, num_tokens: int) -> None:
        """Nobody counts that either."""

    def observe(self, *observed: object, **how: object) -> None:
        """Nobody learns."""


@pytest.fixture
async def workers() -> Workers:
    return Workers()


@asynccontextmanager
async def serving(workers: Any) -> AsyncIterator[str]:
    server = Server("127.0.0.1:0")
    draft_pb2_grpc.add_DraftServiceServicer_to_server(workers, server.grpc_server)
    verify_pb2_grpc.add_VerifyServiceServicer_to_server(workers, server.grpc_server)
    yield await server.start(["sequoia.v1.DraftService", "sequoia.v1.VerifyService"])
    await server.stop(0)


@asynccontextmanager
async def pool_of(address: str) -> AsyncIterator[Pool]:
    """Of the one worker, which plays both parts."""
    pool = Pool([address], worker_pb2.WORKER_ROLE_VERIFY, lambda found: None)
    [member] = pool.members
    member.found(worker_pb2.WorkerDescription(instance_id="a", num_slots=4, device_id="there", vocab_size=400))
    yield pool
    await member.link.channel.close()


@pytest.fixture
async def pool(workers: Workers) -> AsyncIterator[Pool]:
    async with serving(workers) as address, pool_of(address) as pool:
        yield pool


def session(pool: Pool, *, has_own_device: bool = True, has_draft: bool = True) -> Session:
    codec = TextCodec.from_files(
        TokenizerFiles(tokenizer_json=build_tokenizer(400).backend_tokenizer.to_str().encode())
    )
    sampling = Sampling(temperature=0.0)
    opening = Opening(Decoding(GREEDY, sampling, len(PROMPT)), 200, time.monotonic() + 30.0)
    return Session(
        Transcript(PROMPT, 10, sampling, TextStream(codec, ())),
        VerifyStream(pool, opening, 1.0),
        DraftStream(pool, opening, 5.0, verify_device_id="here" if has_own_device else "there") if has_draft else None,
        AlwaysTree(),  # type: ignore[arg-type]
    )


async def test_prefill_of_both_overlaps_and_the_drafts_is_not_awaited(workers: Workers, pool: Pool) -> None:
    """The first token comes although the drafter has not answered, and not before it has got the prompt."""
    running = session(pool)
    async with asyncio.timeout(20), aclosing(running.run()) as steps:
        first = await anext(steps)
    running.close()
    assert first.token_ids == (40,)
    opening = workers.draft_opening.result()
    assert tuple(opening.token_ids) == PROMPT
    assert opening.has_own_device


async def test_a_draft_on_the_targets_own_device_reads_when_the_first_token_is_out(
    workers: Workers, pool: Pool
) -> None:
    workers.overlaps = False
    running = session(pool, has_own_device=False)
    async with asyncio.timeout(20), aclosing(running.run()) as steps:
        first = await anext(steps)
        opening = await workers.draft_opening
    running.close()
    assert first.token_ids == (40,)
    assert not workers.was_draft_asked
    assert tuple(opening.token_ids) == PROMPT  # the first token comes with the step that asks for a tree
    assert not opening.has_own_device


class Nonsense(draft_pb2_grpc.DraftServiceServicer, verify_pb2_grpc.VerifyServiceServicer):
    """The drafter answers with what it is told to; the verifier refuses trees, as if they were none."""

    def __init__(self, answer: draft_pb2.DraftResponse) -> None:
        self._answer = answer
        self.openings: list[tuple[int, ...]] = []

    async def Draft(
        self, requests: AsyncIterator[draft_pb2.DraftRequest], context: Context
    ) -> AsyncIterator[draft_pb2.DraftResponse]:
        async for request in requests:
            if request.WhichOneof("kind") == "open":
                yield draft_pb2.DraftResponse(num_committed=len(request.open.token_ids))
            else:
                answer = draft_pb2.DraftResponse(step=request.step.step)
                answer.MergeFrom(self._answer)
                yield answer

    async def Verify(
        self, requests: AsyncIterator[verify_pb2.VerifyRequest], context: Context
    ) -> AsyncIterator[verify_pb2.VerifyResponse]:
        async with error_border(context):
            async for request in requests:
                if request.WhichOneof("kind") == "open":
                    self.openings.append(tuple(request.open.token_ids))
                elif request.step.HasField("tree"):
                    raise InvalidArgument("is no tree", "tree.parents")
                step, verdict = request.step.step, verify_pb2.Verdict(bonus_token_id=40)
                for left in range(request.step.num_plain_steps, -1, -1):
                    yield verify_pb2.VerifyResponse(step=step, verdict=verdict, num_plain_steps_left=left)
                    step += 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (
            {"num_committed": 4, "tree": {"token_ids": [40, 1], "topology": {"parents": [0, 9]}}},
            "its answer is no tree",
        ),
        ({"num_committed": 4, "tree": {"token_ids": [40], "topology": {"parents": [5]}}}, "its answer is no tree"),
        ({"num_committed": 4, "worker_seconds": "NaN", "tree": ROOT}, "took no time that there is"),
        ({"num_committed": 4, "tree": {"token_ids": [40, 1], "topology": {"parents": [-1, 0]}}}, "refused (tree"),
        ({"num_committed": 10**6, "tree": {"token_ids": [40]}}, "step 1 of 1000000 tokens instead of 1 of"),
        ({"step": 77, "num_committed": 4}, "answered step 77"),
    ],
    ids=["no tree", "no root", "no time", "a refused tree", "tokens that it was not told", "another step"],
)
async def test_a_draft_that_answers_nonsense_costs_no_text(answer: dict[str, Any], reason: str) -> None:
    workers = Nonsense(json_format.ParseDict(answer, draft_pb2.DraftResponse()))
    async with serving(workers) as address, pool_of(address) as pool:
        running = session(pool, has_own_device=True)
        async with asyncio.timeout(20), aclosing(running.run()) as steps:
            tokens = [token async for step in steps for token in step.token_ids]
        running.close()
    assert tokens == 10 * [40]
    assert reason in running.report.message.fallback_reason
    assert all(opening == PROMPT + (len(opening) - len(PROMPT)) * (40,) for opening in workers.openings)
    assert [each.num_sessions for each in pool.members] == [0]


class Lying(draft_pb2_grpc.DraftServiceServicer, verify_pb2_grpc.VerifyServiceServicer):
    """The verifier's second verdict is what it is told to say, once; afterwards it is honest."""

    def __init__(self, lie: dict[str, Any]) -> None:
        self._lies = [lie]
        self.openings: list[tuple[int, ...]] = []

    async def Verify(
        self, requests: AsyncIterator[verify_pb2.VerifyRequest], context: Context
    ) -> AsyncIterator[verify_pb2.VerifyResponse]:
        async for request in requests:
            if request.WhichOneof("kind") == "open":
                self.openings.append(tuple(request.open.token_ids))
            for left in range(request.step.num_plain_steps, -1, -1):
                step = request.step.step + request.step.num_plain_steps - left
                verdict = verify_pb2.Verdict(bonus_token_id=40)
                response = verify_pb2.VerifyResponse(step=step, verdict=verdict, num_plain_steps_left=left)
                if self._lies and request.WhichOneof("kind") == "step":
                    response.MergeFrom(json_format.ParseDict(self._lies.pop(), verify_pb2.VerifyResponse()))
                yield response


@pytest.mark.parametrize(
    "lie",
    [
        {"verdict": {"accepted_nodes": [9]}},
        {"verdict": {"bonus_token_id": 400}},
        {"verdict": {"logprobs": [{"token_id": 1}]}},
        {"worker_seconds": "NaN"},
        {"times": {"work": -1.0}},
    ],
    ids=["a node that is not there", "a token that is not there", "logprobs unasked", "no time", "a negative time"],
)
async def test_a_verdict_that_cannot_be_one_costs_no_text(lie: dict[str, Any]) -> None:
    workers = Lying(lie)
    async with serving(workers) as address, pool_of(address) as pool:
        # The draft would be the same member, and its failures this one's.
        running = session(pool, has_draft=False)
        async with asyncio.timeout(20), aclosing(running.run()) as steps:
            tokens = [token async for step in steps for token in step.token_ids]
        running.close()
    assert tokens == 10 * [40]
    assert workers.openings == [PROMPT, (*PROMPT, 40)]


class Slow(draft_pb2_grpc.DraftServiceServicer, verify_pb2_grpc.VerifyServiceServicer):
    """The drafter takes 0.4 s a tree; the verifier accepts none, after 0.05 s."""

    async def Draft(
        self, requests: AsyncIterator[draft_pb2.DraftRequest], context: Context
    ) -> AsyncIterator[draft_pb2.DraftResponse]:
        num_committed = 0
        async for request in requests:
            step = request.step
            num_committed = step.base_len + len(step.token_ids) if step.step else len(request.open.token_ids)
            await asyncio.sleep(0.4 if step.step else 0.0)
            tree = tree_pb2.TokenTree(topology=tree_pb2.Topology(parents=[-1, 0]), token_ids=[40, 1])
            yield draft_pb2.DraftResponse(step=step.step, num_committed=num_committed, tree=tree)

    async def Verify(
        self, requests: AsyncIterator[verify_pb2.VerifyRequest], context: Context
    ) -> AsyncIterator[verify_pb2.VerifyResponse]:
        async for request in requests:
            for left in range(request.step.num_plain_steps, -1, -1):
                await asyncio.sleep(0.05)
                step = request.step.step + request.step.num_plain_steps - left
                verdict = verify_pb2.Verdict(bonus_token_id=40)
                yield verify_pb2.VerifyResponse(step=step, verdict=verdict, num_plain_steps_left=left)


async def test_a_draft_that_has_become_slower_is_waited_for_after_it_was_late_once() -> None:
    async with serving(Slow()) as address, pool_of(address) as pool:
        running = session(pool, has_own_device=True)
        [member] = pool.members
        for _ in range(32):
            member.replied(0.01)
        assert member.patience_seconds(5.0) < 0.4
        async with asyncio.timeout(20), aclosing(running.run()) as steps:
            assert len([step async for step in steps]) == 10
        running.close()
    report = running.report.message
    assert report.num_fallback_steps > 0
    assert report.num_drafted_steps > 0
