"""Real gRPC servers and clients with real certificates: who is believed, and what a change of files does."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority

from sequoia.channels import Channels
from sequoia.client import AsyncClient, Client
from sequoia.errors import InvalidArgument
from sequoia.rpc import Server, open_channel
from sequoia.tls import Tls
from sequoia.v1 import verify_pb2, verify_pb2_grpc, worker_pb2, worker_pb2_grpc


class Telling(worker_pb2_grpc.WorkerServiceServicer, verify_pb2_grpc.VerifyServiceServicer):
    """Remembers by which names its callers' certificates call them, and answers every message of a stream."""

    def __init__(self) -> None:
        self.callers: list[str] = []

    async def GetStatus(self, request: worker_pb2.GetStatusRequest, context: Any) -> worker_pb2.GetStatusResponse:
        self.callers += [name.decode() for name in context.auth_context().get("x509_subject_alternative_name", ())]
        return worker_pb2.GetStatusResponse()

    async def Verify(self, requests: AsyncIterator[verify_pb2.VerifyRequest], context: Any) -> Any:
        async for request in requests:
            yield verify_pb2.VerifyResponse(step=request.step.step)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def telling() -> Telling:
    return Telling()


@asynccontextmanager
async def serving(telling: Telling, tls: Tls, listen: str = "127.0.0.1:0") -> AsyncIterator[str]:
    server = Server(listen, tls)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(telling, server.grpc_server)
    verify_pb2_grpc.add_VerifyServiceServicer_to_server(telling, server.grpc_server)
    yield await server.start(["sequoia.v1.WorkerService"])
    await server.stop(0)


async def ask(channel: grpc.aio.Channel) -> grpc.StatusCode:
    """How a call over it ends."""
    try:
        await worker_pb2_grpc.WorkerServiceStub(channel).GetStatus(worker_pb2.GetStatusRequest(), timeout=10)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def answer(address: str, tls: Tls) -> grpc.StatusCode:
    """How a call over a new connection ends."""
    async with open_channel(address, tls) as channel:
        return await ask(channel)


async def test_a_server_is_believed_by_its_authority_alone(
    authority: Authority, telling: Telling, tmp_path: Path
) -> None:
    other = Authority(tmp_path, "other")
    async with serving(telling, Tls(*authority.server())) as address:
        assert await answer(address, Tls(ca=authority.path)) is grpc.StatusCode.OK
        assert await answer(address, Tls(ca=other.path)) is grpc.StatusCode.UNAVAILABLE
        assert await answer(address, Tls()) is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("pair", ["expired", "of another host"])
async def test_a_server_with_a_certificate_that_does_not_hold_is_not_believed(
    authority: Authority, telling: Telling, pair: str
) -> None:
    files = authority.server(is_expired=True) if pair == "expired" else authority.issue("server", "192.0.2.1")
    async with serving(telling, Tls(*files)) as address:
        assert await answer(address, Tls(ca=authority.path)) is grpc.StatusCode.UNAVAILABLE


async def test_with_an_authority_clients_need_a_certificate_of_it(
    authority: Authority, telling: Telling, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "other").issue("stranger", "eve")
    ann, old = authority.issue("ann", "ann.example"), authority.issue("old", "old.example", is_expired=True)
    async with serving(telling, Tls(*authority.server(), ca=authority.path)) as address:
        found = [await answer(address, Tls(*pair, ca=authority.path)) for pair in (ann, ("", ""), stranger, old)]
    assert found == [grpc.StatusCode.OK, *3 * [grpc.StatusCode.UNAVAILABLE]]
    assert telling.callers == ["ann.example"]


async def test_new_files_serve_new_connections_and_running_streams_go_on(
    authority: Authority, telling: Telling, tmp_path: Path
) -> None:
    files = Tls(*authority.server())
    before = Path(shutil.copy(authority.path, tmp_path / "before.pem"))
    async with serving(telling, files) as address, open_channel(address, Tls(ca=str(before))) as channel:
        call = verify_pb2_grpc.VerifyServiceStub(channel).Verify(timeout=30)
        assert await echoed(call, 1) == 1
        successor = Authority(tmp_path, "next")
        successor.server()
        assert await answer(address, Tls(ca=successor.path)) is grpc.StatusCode.OK
        assert await answer(address, Tls(ca=str(before))) is grpc.StatusCode.UNAVAILABLE
        assert await echoed(call, 2) == 2
        call.cancel()


async def echoed(call: Any, step: int) -> int:
    await call.write(verify_pb2.VerifyRequest(step=verify_pb2.VerifyStep(step=step)))
    return (await call.read()).step


@pytest.mark.parametrize("half", ["the key is cut off", "another key", "no key"])
async def test_files_that_do_not_fit_together_change_nothing_until_they_do(
    authority: Authority, telling: Telling, tmp_path: Path, caplog: pytest.LogCaptureFixture, half: str
) -> None:
    caplog.set_level(logging.INFO)
    pair = authority.server()
    successor, believed = Authority(tmp_path, "next"), Tls(ca=authority.path)
    key, cert = pair.read()
    async with serving(telling, Tls(*pair)) as address:
        successor.server()
        fresh = pair.read()
        pair.write(
            *{"the key is cut off": (key[:60], cert), "another key": (key, fresh[1]), "no key": (None, cert)}[half]
        )
        assert [await answer(address, believed) for _ in range(2)] == 2 * [grpc.StatusCode.OK]
        pair.write(*fresh)
        assert await answer(address, Tls(ca=successor.path)) is grpc.StatusCode.OK
    told = [each.message for each in caplog.records if each.name == "sequoia.credentials"]
    assert told == ["changed files not used", "files read again"]


async def test_a_clients_new_certificate_is_shown_from_the_next_call_on(authority: Authority, telling: Telling) -> None:
    tls = Tls(*authority.issue("client", "ann.january"), ca=authority.path)
    async with serving(telling, Tls(*authority.server(), ca=authority.path)) as address:
        channels: Channels[grpc.aio.Channel] = Channels(address, tls, open_channel)
        call = verify_pb2_grpc.VerifyServiceStub(channels.current).Verify(timeout=30)
        assert await echoed(call, 1) == 1
        await ask(channels.current)
        authority.issue("client", "ann.february")
        await ask(channels.current)
        await ask(channels.current)
        assert await echoed(call, 2) == 2
        await asyncio.gather(*(each.close() for each in channels.all))
    assert telling.callers == ["ann.january", "ann.february", "ann.february"]
    assert len(channels.all) == 2


@pytest.mark.parametrize("address", ["192.0.2.1:5", "worker.example:5", "[2001:db8::1]:5", ":5", "dns:///localhost:5"])
def test_plain_text_to_another_host_is_refused(address: str) -> None:
    with pytest.raises(InvalidArgument, match=r"is another host.*--tls-ca FILE, or --insecure"):
        Client(address)


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.0.2.1:5", "host.example:5"])
async def test_serving_plain_text_to_other_hosts_is_refused(listen: str) -> None:
    with pytest.raises(InvalidArgument, match=r"is open to other hosts.*--tls-cert FILE --tls-key FILE, or --insecure"):
        Server(listen)


@pytest.mark.parametrize("address", ["127.0.0.1:5", "127.8.8.8:5", "[::1]:5", "localhost:5", "unix:/tmp/socket"])
def test_what_stays_on_this_machine_may_be_plain(address: str) -> None:
    Client(address).close()


async def test_what_is_insecure_says_so_once(telling: Telling, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(telling, Tls(insecure=True), "0.0.0.0:0") as address:
        for _ in range(2):
            assert await answer(address, Tls(insecure=True)) is grpc.StatusCode.OK
    told = [each.message for each in caplog.records if each.message.startswith("insecure: ")]
    assert len(told) == 2
    assert all(each.endswith("as --insecure allows") for each in told)


async def test_a_unix_socket_is_plain_whatever_files_there_are(
    authority: Authority, telling: Telling, tmp_path: Path
) -> None:
    tls = Tls(*authority.server(), ca=authority.path)
    async with serving(telling, tls, f"unix:{tmp_path}/socket") as address:
        assert await answer(address, tls) is grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("access", "field"),
    [
        ({"tls_ca": "/nowhere"}, "tls_ca"),
        ({"tls_ca": __file__}, "tls_ca"),
        ({"tls_cert": "cert.pem"}, "tls_cert"),
        ({"token": "half a token"}, "token"),
        ({"token": 600 * "a"}, "token"),
    ],
)
async def test_what_cannot_be_used_is_refused_by_name(access: Any, field: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(InvalidArgument) as caught:
            kind("127.0.0.1:5", **access)
        assert caught.value.field == field
        assert "half a token" not in str(caught.value)


async def test_an_encrypted_key_is_refused_and_no_password_asked_for(authority: Authority, tmp_path: Path) -> None:
    pair = authority.server()
    key, cert = pair.read()
    pair.write(key.replace(b"PRIVATE KEY", b"ENCRYPTED PRIVATE KEY"), cert)
    with pytest.raises(InvalidArgument, match="no certificate and key that fit"):
        Server("127.0.0.1:0", Tls(*pair))


async def test_a_message_that_is_compressed_is_refused_before_it_is_unpacked(telling: Telling) -> None:
    """Some kilobytes would become gigabytes before anybody could count them."""
    async with serving(telling, Tls()) as address, grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_unary("/sequoia.v1.WorkerService/GetStatus", lambda raw: raw, lambda raw: raw)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(bytes(2**20), compression=grpc.Compression.Gzip)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert not telling.callers


async def test_metadata_without_end_is_refused(telling: Telling) -> None:
    async with serving(telling, Tls()) as address, open_channel(address) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetStatus(worker_pb2.GetStatusRequest(), metadata=(("x-long", 40_000 * "a"),), timeout=10)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
