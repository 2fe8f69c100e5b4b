"""Who is let in, by token or certificate, and how much they may use: over real gRPC, times told."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority
from guarded import OTHER, TOKEN, ClientsFile, Clock, entry, guarded

from coordinator.allowance import ALL_THERE_IS_ROOM_FOR, Allowance, limited_tokens
from coordinator.clients import Clients
from coordinator.clients_file import Limits, digest_of, read_clients
from coordinator.request_metrics import RequestMetrics
from coordinator.servicer import CoordinatorServicer
from sequoia.border import error_from
from sequoia.client import AsyncClient
from sequoia.errors import InvalidArgument, PermissionDenied, ResourceExhausted, SequoiaError, Unauthenticated
from sequoia.rpc import Server, open_channel
from sequoia.tls import Tls
from sequoia.v1 import coordinator_pb2 as pb
from sequoia.v1 import coordinator_pb2_grpc


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file(tmp_path: Path) -> ClientsFile:
    return ClientsFile(tmp_path / "clients.toml")


async def outcome(address: str, **access: Any) -> str | SequoiaError:
    """The text, or the error."""
    async with AsyncClient(address, timeout_seconds=20, **access) as client:
        try:
            return (await client.generate("Hello")).text
        except SequoiaError as error:
            return error


async def test_a_token_tells_who_asks(file: ClientsFile, clock: Clock) -> None:
    file.write(entry("ann", TOKEN) + entry("ben", OTHER))
    async with guarded(file, clock) as (address, _):
        assert [await outcome(address, token=each) for each in (TOKEN, OTHER)] == ["ann", "ben"]
        for wrong in ({"token": TOKEN.upper()}, {"token": ""}, {}, {"token": digest_of(TOKEN)}):
            found = await outcome(address, **wrong)
            assert isinstance(found, Unauthenticated)
            assert found.field == "token"


@pytest.mark.parametrize(
    "header", [f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN} {TOKEN}", "Bearer", f"Bearer  {600 * 'a'}"]
)
async def test_a_header_that_is_no_bearer_token_is_one_without(file: ClientsFile, clock: Clock, header: str) -> None:
    file.write(entry("ann", TOKEN))
    async with guarded(file, clock) as (address, _), open_channel(address) as channel:
        call = coordinator_pb2_grpc.CoordinatorServiceStub(channel).Generate(
            pb.GenerateRequest(text="Hello"), metadata=(("authorization", header),)
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert type(error_from(caught.value)) is Unauthenticated


async def test_a_certificate_tells_who_asks_and_a_token_that_is_sent_decides(
    file: ClientsFile, clock: Clock, tmp_path: Path
) -> None:
    file.write(entry("ann", TOKEN) + '[clients.host]\nidentity = ["host.example", "Old Name"]\n')
    authority = Authority(tmp_path)
    host, old = authority.issue("host", "host.example"), authority.issue("old", "x", common_name="Old Name")
    stranger = authority.issue("stranger", "eve.example")
    async with guarded(file, clock, Tls(*authority.server(), ca=authority.path)) as (address, _):
        shown = [
            {"tls_ca": authority.path, "tls_cert": each.cert, "tls_key": each.key} for each in (host, old, stranger)
        ]
        assert await outcome(address, **shown[0]) == await outcome(address, **shown[1]) == "host"
        refused = await outcome(address, **shown[2])
        assert isinstance(refused, PermissionDenied)
        assert "eve.example" in str(refused)
        assert await outcome(address, **shown[2], token=TOKEN) == "ann"
        assert isinstance(await outcome(address, **shown[0], token="wrong"), Unauthenticated)


async def test_where_no_certificate_is_asked_for_a_token_is_enough(
    file: ClientsFile, clock: Clock, tmp_path: Path
) -> None:
    file.write(entry("ann", TOKEN))
    authority = Authority(tmp_path)
    tls = {"tls_ca": authority.path}
    files = Tls(*authority.server(), ca=authority.path)
    async with guarded(file, clock, files, asks_certificate=False) as (address, _):
        assert await outcome(address, **tls, token=TOKEN) == "ann"
        assert isinstance(await outcome(address, **tls), Unauthenticated)


async def test_without_a_file_everybody_is_let_in(clock: Clock) -> None:
    async with guarded(None, clock) as (address, _):
        assert await outcome(address) == await outcome(address, token="whatever") == ""


async def test_the_file_is_read_again_and_one_that_is_broken_changes_nothing(
    file: ClientsFile, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    file.write(entry("ann", TOKEN))
    async with guarded(file, clock) as (address, _):
        file.write(entry("ann", TOKEN)[:-20])
        assert await outcome(address, token=TOKEN) == "ann"
        file.write(entry("ben", OTHER))
        assert isinstance(await outcome(address, token=TOKEN), Unauthenticated)
        assert await outcome(address, token=OTHER) == "ben"
    assert [each.message for each in caplog.records].count("changed files not used") == 1
    assert digest_of(TOKEN)[:20] not in caplog.text


async def test_so_many_sessions_at_a_time_and_the_next_is_told_when_to_come(file: ClientsFile, clock: Clock) -> None:
    file.write(entry("ann", TOKEN, max_sessions=2) + entry("ben", OTHER))
    async with guarded(file, clock) as (address, servicer):
        servicer.may_answer.clear()
        running = [asyncio.create_task(outcome(address, token=TOKEN)) for _ in range(2)]
        assert [await servicer.callers.get() for _ in range(2)] == ["ann", "ann"]
        refused = await outcome(address, token=TOKEN)
        servicer.may_answer.set()
        assert await asyncio.gather(*running) == ["ann", "ann"]
        assert await outcome(address, token=TOKEN) == "ann"
        assert await outcome(address, token=OTHER) == "ben"
    assert isinstance(refused, ResourceExhausted)
    assert (refused.field, refused.retry_seconds) == ("max_sessions", 1.0)


async def test_a_session_that_its_client_leaves_is_no_session(file: ClientsFile, clock: Clock) -> None:
    file.write(entry("ann", TOKEN, max_sessions=1))
    async with guarded(file, clock) as (address, servicer):
        servicer.may_answer.clear()
        running = asyncio.create_task(outcome(address, token=TOKEN))
        await servicer.callers.get()
        running.cancel()
        servicer.may_answer.set()
        async with asyncio.timeout(10):
            while await outcome(address, token=TOKEN) != "ann":
                pass


async def test_requests_per_minute_come_back_with_time(file: ClientsFile, clock: Clock) -> None:
    file.write(entry("ann", TOKEN, requests_per_minute=2))
    async with guarded(file, clock) as (address, _):
        found = [await outcome(address, token=TOKEN) for _ in range(3)]
        clock.now += 30.0
        found.append(await outcome(address, token=TOKEN))
    assert [found[0], found[1], found[3]] == 3 * ["ann"]
    assert isinstance(found[2], ResourceExhausted)
    assert (found[2].field, found[2].retry_seconds) == ("requests_per_minute", 30.0)


async def test_tokens_per_minute_may_be_overdrawn_once_and_have_to_come_back(file: ClientsFile, clock: Clock) -> None:
    file.write(entry("ann", TOKEN, tokens_per_minute=60))
    async with guarded(file, clock) as (address, _):
        found = [await outcome(address, token=TOKEN) for _ in range(3)]
        clock.now += 21.0
        found.append(await outcome(address, token=TOKEN))
    assert [found[0], found[1], found[3]] == 3 * ["ann"]
    # 80 of 60 were used: after 21 s there is one again.
    assert isinstance(found[2], ResourceExhausted)
    assert (found[2].field, found[2].retry_seconds) == ("tokens_per_minute", 21.0)


def test_who_was_idle_for_long_has_a_minutes_worth_and_no_more() -> None:
    allowance, limits = Allowance(now=0.0), Limits(requests_per_minute=3)
    allowed = 0
    for _ in range(5):
        try:
            allowance.begin(limits, now=10_000.0)
            allowed += 1
        except ResourceExhausted:
            pass
    assert allowed == 3


@pytest.mark.parametrize(
    ("asked", "limit", "given"),
    [(None, 0, 256), (None, 100, 100), (None, 1000, 256), (70, 100, 70), (ALL_THERE_IS_ROOM_FOR, 100, 100)],
)
def test_who_names_no_number_of_tokens_gets_what_it_may_have(asked: int | None, limit: int, given: int) -> None:
    assert limited_tokens(asked, 256, Limits(max_tokens=limit)) == given


def test_who_names_more_tokens_than_it_may_have_is_refused() -> None:
    with pytest.raises(PermissionDenied, match="max_tokens: is 101; you may ask for 100"):
        limited_tokens(101, 256, Limits(max_tokens=100))


@pytest.mark.parametrize("method", [each.name for each in pb.DESCRIPTOR.services_by_name["CoordinatorService"].methods])
async def test_no_method_of_the_coordinator_answers_strangers(file: ClientsFile, clock: Clock, method: str) -> None:
    file.write(entry("ann", TOKEN))
    servicer = object.__new__(CoordinatorServicer)  # nothing else of it may be reached
    servicer._clients, servicer._metrics = Clients(str(file.path), clock), RequestMetrics()
    server = Server("127.0.0.1:0")
    coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(servicer, server.grpc_server)
    address = await server.start(["sequoia.v1.CoordinatorService"])
    async with open_channel(address) as channel:
        path = f"/sequoia.v1.CoordinatorService/{method}"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_stream(path, bytes, bytes)(b"").read()
    await server.stop(0)
    assert type(error_from(caught.value)) is Unauthenticated


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", r"must have a table \[clients.NAME\]"),
        ("[clients]", r"must have a table \[clients.NAME\]"),
        (entry("ann", TOKEN) + "[other]", "and nothing else"),
        ("[clients.ann]", "ann has neither token_sha256 nor identity"),
        ("clients = 3", "must have a table"),
        ("[clients]\nann = 3", "ann is no table"),
        (f'[clients.ann]\ntoken_sha256 = "{TOKEN}"', "ann.token_sha256 must be 64 hexadecimal digits"),
        ("[clients.ann]\ntoken_sha256 = 5", "must be a string, or a list of strings"),
        (entry("ann", TOKEN, max_tokens=-1), "ann.max_tokens must be a whole number"),
        (entry("ann", TOKEN, tokens=1), "ann.tokens is not known"),
        (entry("ann", TOKEN) + entry("ben", TOKEN), "ann and ben have the same token"),
        ("[clients.ann", "cannot be read"),
        ("\ufeff[", "cannot be read"),
    ],
)
def test_a_file_that_is_none_is_refused_by_name_and_tells_no_token(file: ClientsFile, text: str, problem: str) -> None:
    file.write(text)
    with pytest.raises(InvalidArgument, match=problem) as caught:
        read_clients(file.path)
    assert TOKEN not in str(caught.value)
