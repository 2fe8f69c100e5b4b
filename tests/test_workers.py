"""A pool of workers: who gets the next session, who is left alone, who waits. Time is the test's."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest

from coordinator.member import Member
from coordinator.pool import Pool, check_same
from coordinator.workers import Workers
from sequoia.errors import FailedPrecondition, ResourceExhausted, Unavailable
from sequoia.v1 import worker_pb2


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("coordinator.member.time.monotonic", clock.monotonic)
    return clock


@pytest.fixture
async def pool() -> Pool:
    return Pool(["127.0.0.1:1", "127.0.0.2:1"], worker_pb2.WORKER_ROLE_VERIFY, lambda found: None, most_waiting=2)


def worker(instance_id: str, num_slots: int = 2) -> worker_pb2.WorkerDescription:
    return worker_pb2.WorkerDescription(instance_id=instance_id, num_slots=num_slots)


async def test_a_verify_worker_that_has_no_room_for_a_whole_session_is_refused_by_name() -> None:
    workers = Workers("127.0.0.1:1", "", 1.0)
    roomy = worker_pb2.WorkerDescription(model="m", context_length=512, kv_tokens=600)
    workers._check_target(roomy)
    # One of an older version says nothing of it.
    silent = worker_pb2.WorkerDescription(model="m", context_length=512)
    with pytest.raises(
        FailedPrecondition, match=r"verify: .* m has KV memory for 0 tokens, and a session may have 512"
    ):
        workers._check_target(silent)


async def test_the_next_session_goes_where_most_is_free(pool: Pool) -> None:
    assert pool.best() is None
    assert isinstance(pool.nobody(), Unavailable)
    small, large = pool.members
    small.found(worker("s", 1))
    assert pool.best() is small
    large.found(worker("l", 4))
    large.num_sessions = 3
    assert pool.best() is small
    small.num_sessions = 1
    assert pool.best() is large


async def test_one_that_failed_is_left_alone_longer_and_longer_until_it_answers(pool: Pool, clock: Clock) -> None:
    member = pool.members[0]
    member.found(worker("s"))
    for pause in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, *2000 * [8.0]):
        member.failed("lost")
        clock.now += pause - 0.01
        assert not member.is_usable
        clock.now += 0.02
        assert member.is_usable
    member.num_sessions = 1
    assert not member.is_usable, "one session tries"
    member.replied(0.1)
    assert member.is_usable
    member.failed("lost")
    member.found(worker("s"))
    assert not member.is_usable, "the same process"
    member.found(worker("t"))
    assert member.is_usable, "another one begins afresh"


async def test_patience_follows_from_the_last_replies(pool: Pool) -> None:
    member: Member = pool.members[0]
    assert member.patience_seconds(5.0) == 5.0
    for _ in range(20):
        member.replied(0.2)
    assert member.patience_seconds(5.0) == pytest.approx(0.8)
    member.replied(3.0)
    assert member.patience_seconds(5.0) == 5.0
    for _ in range(40):
        member.replied(0.001)
    assert member.patience_seconds(5.0) == 0.25


async def test_sessions_wait_in_order_and_too_many_are_refused(pool: Pool) -> None:
    pool.members[0].found(worker("s", 1))
    order: list[int] = []

    async def session(number: int) -> None:
        async with pool.admission(0):
            order.append(number)
            await asyncio.sleep(0)

    async with AsyncExitStack() as first:
        await first.enter_async_context(pool.admission(0))
        waiting = [asyncio.create_task(session(number)) for number in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(ResourceExhausted, match="queue: 1 requests run and 2 wait"):
            await session(7)
        assert order == []
    await asyncio.gather(*waiting)
    assert order == [0, 1]


@pytest.mark.parametrize("is_admitted", [False, True], ids=["waiting", "just admitted"])
async def test_one_that_gives_up_waiting_leaves_its_place(pool: Pool, is_admitted: bool) -> None:
    pool.members[0].found(worker("s", 1))

    async def session() -> None:
        async with pool.admission(0):
            pass

    async with AsyncExitStack() as first:
        await first.enter_async_context(pool.admission(0))
        gives_up, stays = asyncio.create_task(session()), asyncio.create_task(session())
        await asyncio.sleep(0)
        if is_admitted:
            await first.aclose()
        gives_up.cancel()
    async with asyncio.timeout(1):
        await stays
        async with pool.admission(0):
            pass


async def test_a_worker_that_appears_lets_the_next_one_in(pool: Pool) -> None:
    pool.members[0].found(worker("s", 1))
    async with pool.admission(0):
        waiting = asyncio.create_task(pool.admission(0).__aenter__())
        await asyncio.sleep(0)
        assert not waiting.done()
        pool.members[1].found(worker("t", 1))
        pool.admission.admit()
        await asyncio.wait_for(waiting, 1)


async def test_while_nobody_is_there_all_wait_for_a_worker_and_not_for_each_other(pool: Pool) -> None:
    [member, _] = pool.members
    member.found(worker("s", 1))
    async with AsyncExitStack() as sessions:
        await sessions.enter_async_context(pool.admission(0))
        queued = asyncio.create_task(sessions.enter_async_context(pool.admission(0)))
        await asyncio.sleep(0)
        assert not queued.done()
        with pytest.raises(Unavailable):
            # Nobody listens at that address.
            await pool.meet(member, 0.05)
        await asyncio.wait_for(queued, 1)
        for _ in range(20):
            await asyncio.wait_for(sessions.enter_async_context(pool.admission(0)), 1)


@pytest.mark.parametrize(
    "other",
    [{"model_revision": "x"}, {"dtype": "x"}, {"quantization": "x"}, {"context_length": 9}, {"max_tree_size": 9}],
)
def test_what_a_session_relies_on_is_the_same_everywhere(other: dict[str, Any]) -> None:
    known = worker_pb2.WorkerDescription(model_revision="r", dtype="d", context_length=100, max_tree_size=64)
    same = worker_pb2.WorkerDescription(instance_id="b", hardware_key="h", num_slots=9)
    same.MergeFrom(known)
    check_same(same, known)
    found = worker_pb2.WorkerDescription()
    found.MergeFrom(known)
    for name, value in other.items():
        setattr(found, name, value)
    with pytest.raises(FailedPrecondition, match="not what the pool serves"):
        check_same(found, known)
