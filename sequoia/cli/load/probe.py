"""What a system holds between the runs of a load test: memory of its processes, sessions and KV rows of its workers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from types import TracebackType

from sequoia.cli.load.load_figures import Footprint
from sequoia.process_memory import resident_bytes
from sequoia.rpc import open_channel
from sequoia.tls import Tls
from sequoia.v1 import worker_pb2, worker_pb2_grpc

_CALL_TIMEOUT_SECONDS = 5.0
# How long the sessions of a run may take to be gone after its last answer.
_SETTLE_SECONDS, _POLL_SECONDS = 5.0, 0.1


class Probe:
    """Asks the workers at `worker_addresses`, and the machine about the processes; of a system elsewhere: neither.

    An async context manager.
    """

    def __init__(self, process_ids: Iterable[int], worker_addresses: Iterable[str], tls: Tls) -> None:
        self._process_ids = tuple(process_ids)
        self._channels = [open_channel(each, tls) for each in worker_addresses]
        self._stubs = [worker_pb2_grpc.WorkerServiceStub(each) for each in self._channels]

    async def __aenter__(self) -> Probe:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for channel in self._channels:
            await channel.close()

    async def footprint(self, num_requests_before: int) -> Footprint:
        """Once no session is left, or after five seconds with those that are."""
        statuses = await self._statuses()
        for _ in range(round(_SETTLE_SECONDS / _POLL_SECONDS)):
            if not any(each.num_slots_used for each in statuses):
                break
            await asyncio.sleep(_POLL_SECONDS)
            statuses = await self._statuses()
        return Footprint(
            num_requests_before,
            resident_bytes(self._process_ids),
            sum(each.num_slots_used for each in statuses) if statuses else None,
            sum(each.kv_tokens_used for each in statuses) if statuses else None,
        )

    async def _statuses(self) -> list[worker_pb2.GetStatusResponse]:
        request = worker_pb2.GetStatusRequest()
        calls = (stub.GetStatus(request, timeout=_CALL_TIMEOUT_SECONDS) for stub in self._stubs)
        return list(await asyncio.gather(*calls))
