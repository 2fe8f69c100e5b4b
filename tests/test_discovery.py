"""Workers behind a name: who joins, who is drained, and what a failing lookup changes. The DNS is the test's."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority
from tiny_models import build_tokenizer

from coordinator.discovery import Name, parse_places, resolve
from coordinator.pool import Pool
from coordinator.session import Session
from coordinator.speculation import Choice
from coordinator.stream import Opening
from coordinator.text import TextCodec, TextStream
from coordinator.transcript import Transcript
from coordinator.verify_stream import VerifyStream
from coordinator.workers import Workers
from sequoia.border import Context
from sequoia.errors import Unavailable
from sequoia.rpc import Server, channel_options, open_channel
from sequoia.rules import GREEDY
from sequoia.sampling import Decoding, Sampling
from sequoia.tls import PLAIN, Tls
from sequoia.topology import Topology
from sequoia.v1 import verify_pb2, verify_pb2_grpc, worker_pb2, worker_pb2_grpc

PROMPT = (5, 6, 7)
TOKENIZER = worker_pb2.TokenizerFiles(tokenizer_json=build_tokenizer(400).backend_tokenizer.to_str().encode())


class Records:
    """A DNS with one name: what it answers, and whether it answers at all."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = frozenset(addresses)
        self.fails = False
        self.num_lookups = 0

    async def __call__(self, name: Name) -> frozenset[str]:
        self.num_lookups += 1
        if self.fails:
            raise socket.gaierror(socket.EAI_AGAIN, "temporary failure")
        return self.addresses


class VerifyWorker(worker_pb2_grpc.WorkerServiceServicer, verify_pb2_grpc.VerifyServiceServicer):
    """Gives its own token at every step; `may_go_on` lets it."""

    def __init__(self, token_id: int) -> None:
        self.token_id, self.may_go_on = token_id, asyncio.Event()
        self.may_go_on.set()

    async def Describe(self, request: worker_pb2.DescribeRequest, context: Any) -> worker_pb2.DescribeResponse:
        worker = worker_pb2.WorkerDescription(
            instance_id=str(self.token_id),
            role=worker_pb2.WORKER_ROLE_VERIFY,
            model="m",
            vocab_size=400,
            context_length=256,
            kv_tokens=1024,
            num_slots=4,
            max_tree_size=8,
        )
        return worker_pb2.DescribeResponse(worker=worker, tokenizer=TOKENIZER)

    async def GetStatus(self, request: worker_pb2.GetStatusRequest, context: Any) -> worker_pb2.GetStatusResponse:
        return worker_pb2.GetStatusResponse()

    async def Verify(
        self, requests: AsyncIterator[verify_pb2.VerifyRequest], context: Context
    ) -> AsyncIterator[verify_pb2.VerifyResponse]:
        async for request in requests:
            await self.may_go_on.wait()
            yield verify_pb2.VerifyResponse(
                step=request.step.step, verdict=verify_pb2.Verdict(bonus_token_id=self.token_id)
            )


class Plain:
    """A request that is decoded plainly."""

    def choose(self, num_tokens: int, num_tokens_left: int) -> Choice:
        return Choice(Topology.root_only(), 0)

    def observe(self, *observed: object, **how: object) -> None:
        """Nobody learns."""


@asynccontextmanager
async def serving(worker: VerifyWorker, host: str, port: int, tls: Tls = PLAIN) -> AsyncIterator[str]:
    server = Server(f"{host}:{port}", tls)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(worker, server.grpc_server)
    verify_pb2_grpc.add_VerifyServiceServicer_to_server(worker, server.grpc_server)
    yield await server.start(["sequoia.v1.VerifyService"])
    await server.stop(0)


@pytest.fixture
def port() -> int:
    """All records of a name share one, so that the workers differ by host: all of 127.0.0.0/8 is this machine."""
    while True:
        port = random.randrange(20_000, 32_000)
        with suppress(OSError), socket.create_server(("", port)):
            return port


@pytest.fixture
async def first() -> VerifyWorker:
    return VerifyWorker(41)


@pytest.fixture
async def second() -> VerifyWorker:
    return VerifyWorker(42)


@pytest.fixture
async def both(first: VerifyWorker, second: VerifyWorker, port: int) -> AsyncIterator[tuple[str, str]]:
    async with serving(first, "127.0.0.1", port) as one, serving(second, "127.0.0.2", port) as other:
        yield one, other


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def certified(authority: Authority, name: str, *hosts: str) -> Tls:
    """With a certificate for these hosts; whoever asks needs one too."""
    return Tls(*authority.issue(name, *hosts), ca=authority.path)


def following(records: Records, port: int, **how: Any) -> Workers:
    return Workers(f"dns:///verify.test:{port}", "", 5.0, 8, resolver=records, lookup_seconds=0.02, **how)


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while True:
            if holds():
                return
            await asyncio.sleep(0.01)


def there(pool: Pool) -> set[str]:
    return {each.link.address for each in pool.members if each.is_usable}


def session(pool: Pool) -> Session:
    sampling = Sampling(temperature=0.0)
    opening = Opening(Decoding(GREEDY, sampling, len(PROMPT)), 200, time.monotonic() + 30.0)
    text = TextStream(TextCodec.from_files(TOKENIZER), ())
    transcript = Transcript(PROMPT, 8, sampling, text)
    return Session(transcript, VerifyStream(pool, opening, 5.0), None, Plain())  # type: ignore[arg-type]


def test_a_list_of_addresses_is_read_as_it_was() -> None:
    found = parse_places(" a:1 ,unix:/tmp/x, b:2,,a:1")
    assert found == (("a:1", "unix:/tmp/x", "b:2"), ())
    assert parse_places("") == ((), ())


def test_names_may_stand_among_addresses() -> None:
    assert parse_places("a:1,dns:///verify.ns:50601") == (("a:1",), (Name("verify.ns", 50601),))


@pytest.mark.parametrize(
    "text",
    [
        "dns:///verify",
        "dns:///:1",
        "dns:verify:1",
        "dns://8.8.8.8/verify:1",
        "dns:///v:0",
        "dns:///v:x",
        "dns:///a..b:1",
    ],
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no name to look up|label"):
        parse_places(text)


async def test_this_machines_own_names_are_found() -> None:
    found = await resolve(Name("localhost", 50601))
    assert found <= {"127.0.0.1:50601", "[::1]:50601"}
    assert found
    with pytest.raises(OSError, match=r"known|failure|address"):
        await resolve(Name("nowhere.invalid", 1))


async def test_an_ipv6_record_becomes_an_address_that_grpc_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, family = asyncio.get_running_loop(), socket.AF_INET6

    async def answer(*_: object, **__: object) -> list[tuple[Any, ...]]:
        return [(family, socket.SOCK_STREAM, 6, "", ("fd00::7", 5, 0, 0))]

    monkeypatch.setattr(loop, "getaddrinfo", answer)
    assert await resolve(Name("verify", 5)) == {"[fd00::7]:5"}


async def test_there_is_a_member_for_each_record(both: tuple[str, str], port: int) -> None:
    async with following(Records(*both), port) as workers:
        await eventually(lambda: there(workers.verify) == set(both))
        assert workers.verify.room == (8, 2048)


async def test_one_that_appears_later_joins(both: tuple[str, str], port: int) -> None:
    records = Records(both[0])
    async with following(records, port) as workers:
        assert there(workers.verify) == {both[0]}
        records.addresses = frozenset(both)
        await eventually(lambda: there(workers.verify) == set(both))


async def test_one_whose_record_vanished_is_drained_and_not_cut(
    first: VerifyWorker, both: tuple[str, str], port: int
) -> None:
    records = Records(both[0])
    async with following(records, port) as workers:
        pool = workers.verify
        running = session(pool)
        async with aclosing(running.run()) as steps:
            first.may_go_on.clear()
            begun = asyncio.create_task(anext(steps))
            await eventually(lambda: pool.members[0].num_sessions == 1)
            records.addresses = frozenset(both[1:])
            await eventually(lambda: there(pool) == {both[1]})
            asked = records.num_lookups
            await eventually(lambda: records.num_lookups > asked + 3)
            assert [each.link.address for each in pool.members] == list(both), "its session is still there"
            assert pool.room == (1 + 4, 200 + 8 + 1024), "what it has and nobody else can have"
            later = session(pool)
            async with aclosing(later.run()) as others:
                assert (await anext(others)).token_ids == (42,), "new ones go elsewhere"
            later.close()
            first.may_go_on.set()
            token_ids = [
                *(await begun).token_ids,
                *[token for step in [s async for s in steps] for token in step.token_ids],
            ]
        running.close()
        assert token_ids == [41] * 8, "all of the answer came from the one that was leaving"
        await eventually(lambda: [each.link.address for each in pool.members] == [both[1]])


async def test_one_that_leaves_and_comes_back_goes_on(both: tuple[str, str], port: int) -> None:
    records = Records(*both)
    async with following(records, port) as workers:
        await eventually(lambda: there(workers.verify) == set(both))
        workers.verify.members[0].enter(10)
        [leaving] = [each for each in workers.verify.members if each.num_sessions]
        records.addresses = frozenset(both) - {leaving.link.address}
        await eventually(lambda: leaving.is_leaving)
        records.addresses = frozenset(both)
        await eventually(lambda: there(workers.verify) == set(both))
        assert leaving in workers.verify.members


async def test_a_lookup_that_fails_changes_nothing(both: tuple[str, str], port: int) -> None:
    records = Records(*both)
    async with following(records, port) as workers:
        await eventually(lambda: there(workers.verify) == set(both))
        records.fails, asked = True, records.num_lookups
        await eventually(lambda: records.num_lookups > asked + 3)
        assert there(workers.verify) == set(both)
        assert "verify.test cannot be looked up" in str(workers.verify.nobody())
        records.fails, records.addresses = False, frozenset(both[:1])
        await eventually(lambda: there(workers.verify) == {both[0]})
        assert "looked up" not in str(workers.verify.nobody())


async def test_the_start_waits_for_a_first_record(both: tuple[str, str], port: int) -> None:
    records = Records()
    async with AsyncExitStack() as stack:
        entering = asyncio.create_task(stack.enter_async_context(following(records, port)))
        await eventually(lambda: records.num_lookups > 2)
        assert not entering.done()
        records.addresses = frozenset(both[:1])
        workers = await asyncio.wait_for(entering, 10)
        assert there(workers.verify) == {both[0]}


async def test_without_any_record_the_start_fails_and_says_why(port: int) -> None:
    records = Records()
    records.fails = True
    workers = Workers(f"dns:///verify.test:{port}", "", 0.1, resolver=records, lookup_seconds=0.02)
    with pytest.raises(Unavailable, match=r"verify: verify\.test cannot be looked up: .*temporary failure"):
        await workers.__aenter__()


async def test_drafts_behind_a_name_may_be_missing(both: tuple[str, str]) -> None:
    async with Workers(both[0], "dns:///draft.test:1", 5.0, resolver=Records(), lookup_seconds=0.02) as workers:
        assert workers.draft_description is None
        assert workers.is_speculation_configured


async def test_a_client_may_name_its_coordinators_so(authority: Authority, first: VerifyWorker, port: int) -> None:
    """gRPC looks such names up by itself, and goes on at another address where one is lost; a name is another host."""
    tls = certified(authority, "both", "localhost")
    async with serving(first, "127.0.0.1", port, tls), open_channel(f"dns:///localhost:{port}", tls) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        assert await stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=10) == worker_pb2.GetStatusResponse()


async def test_calls_are_spread_over_the_addresses_of_a_name(both: tuple[str, str]) -> None:
    """The only name with two addresses that needs no DNS is a list of them, which has the same options."""
    async with grpc.aio.insecure_channel(f"ipv4:{','.join(both)}", options=channel_options("dns:///x:1")) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        request = worker_pb2.DescribeRequest()

        async def asked() -> str:
            return (await stub.Describe(request, timeout=10, wait_for_ready=True)).worker.instance_id

        async with asyncio.timeout(10):
            while {await asked() for _ in range(4)} != {"41", "42"}:
                pass


async def test_workers_behind_a_name_are_believed_by_a_certificate_for_the_name(
    authority: Authority, first: VerifyWorker, second: VerifyWorker, port: int
) -> None:
    workers_tls = certified(authority, "workers", "verify.test")
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        both = [
            await enter(serving(each, host, port, workers_tls))
            for each, host in ((first, "127.0.0.1"), (second, "127.0.0.2"))
        ]
        records = Records(both[0])
        workers = await enter(following(records, port, tls=certified(authority, "coordinator", "coordinator.test")))
        assert there(workers.verify) == {both[0]}
        records.addresses = frozenset(both)
        await eventually(lambda: there(workers.verify) == set(both))
        running = session(workers.verify)
        answer = [step.token_ids async for step in running.run()]
        assert answer in (8 * [(41,)], 8 * [(42,)])
        running.close()


async def test_a_certificate_for_another_name_is_not_believed_nor_one_for_the_address(
    authority: Authority, first: VerifyWorker, second: VerifyWorker, port: int
) -> None:
    impostors = {"127.0.0.2": "draft.test", "127.0.0.3": "127.0.0.3"}
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        right = await enter(serving(first, "127.0.0.1", port, certified(authority, "right", "verify.test")))
        wrong = {
            await enter(serving(second, host, port, certified(authority, host, name)))
            for host, name in impostors.items()
        }
        records, tls = Records(right, *wrong), certified(authority, "coordinator", "coordinator.test")
        workers = await enter(following(records, port, tls=tls))
        await eventually(lambda: {each.link.address for each in workers.verify.members if each.problem} == wrong)
        assert there(workers.verify) == {right}
        for host in impostors:
            authority.issue(host, "verify.test")
        await eventually(lambda: there(workers.verify) == {right, *wrong})


async def test_an_address_is_believed_by_a_certificate_for_itself_also_beside_a_name(
    authority: Authority, first: VerifyWorker, second: VerifyWorker, port: int
) -> None:
    tls = certified(authority, "coordinator", "coordinator.test")
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        named = await enter(serving(first, "127.0.0.1", port, certified(authority, "named", "verify.test")))
        fixed = await enter(serving(second, "127.0.0.2", port, certified(authority, "fixed", "127.0.0.2")))
        places = f"dns:///verify.test:{port},{fixed}"
        workers = await enter(Workers(places, "", 5.0, tls=tls, resolver=Records(named), lookup_seconds=0.02))
        await eventually(lambda: there(workers.verify) == {named, fixed})


async def test_the_name_counts_for_the_connections_of_a_renewed_certificate_too(
    authority: Authority, first: VerifyWorker, port: int
) -> None:
    ours = certified(authority, "coordinator", "january.test")
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        address = await enter(serving(first, "127.0.0.1", port, certified(authority, "worker", "verify.test")))
        workers = await enter(following(Records(address), port, tls=ours))
        [member] = workers.verify.members
        before = member.link.channel
        authority.issue("coordinator", "february.test")
        await member.link.round_trip_seconds()
        assert member.link.channel is not before
