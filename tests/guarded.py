"""A coordinator that lets in whom it knows and answers by itself, for the tests of clients and of the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from coordinator.clients import Clients
from coordinator.clients_file import digest_of
from sequoia.border import error_border
from sequoia.rpc import Server
from sequoia.tls import PLAIN, Tls
from sequoia.v1 import coordinator_pb2 as pb
from sequoia.v1 import coordinator_pb2_grpc, worker_pb2

TOKEN, OTHER = "sq-of-ann", "sq-of-ben"
FINISH = pb.Finish(reason=pb.FINISH_REASON_STOP, num_completion_tokens=40)


def entry(name: str, token: str, **limits: int) -> str:
    lines = [f"[clients.{name}]", f'token_sha256 = "{digest_of(token)}"', *(f"{k} = {v}" for k, v in limits.items())]
    return "\n".join(lines) + "\n"


class Guarded(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """Answers whom it knows, with 40 tokens, when it may; remembers their names."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self.callers: asyncio.Queue[str] = asyncio.Queue()
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def DescribePair(self, request: pb.DescribePairRequest, context: Any) -> pb.DescribePairResponse:
        async with error_border(context):
            self._clients.client(context)
            return pb.DescribePairResponse(verify=worker_pb2.WorkerDescription(model="big", context_length=99))

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        async with error_border(context):
            with self._clients.request(context) as use:
                use.max_tokens(request.max_tokens, 16)
                self.callers.put_nowait(use.client.name)
                await self.may_answer.wait()
                use.add_tokens(40)
                yield pb.GenerateResponse(text=use.client.name, token_ids=40 * [1], finish=FINISH)


class Clock:
    """A time that stands until it is put forward."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class ClientsFile:
    """As an operator writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, text: str) -> None:
        self.path.write_text(text)


@asynccontextmanager
async def guarded(
    file: ClientsFile | None, clock: Clock, tls: Tls = PLAIN, **options: Any
) -> AsyncIterator[tuple[str, Guarded]]:
    servicer = Guarded(Clients(str(file.path) if file else "", clock))
    server = Server("127.0.0.1:0", tls, **options)
    coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(servicer, server.grpc_server)
    yield await server.start(["sequoia.v1.CoordinatorService"]), servicer
    await server.stop(0)
