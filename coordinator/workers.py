"""The pair of workers behind the coordinator: who they are, whether they fit, and the draft that comes and goes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from contextlib import suppress
from statistics import median
from types import TracebackType

import grpc

from sequoia.errors import FailedPrecondition, SequoiaError, Unavailable
from sequoia.rpc import error_from, open_channel
from sequoia.v1 import worker_pb2, worker_pb2_grpc

_log = logging.getLogger(__name__)

_CALL_TIMEOUT_SECONDS = 10.0
_RTT_PROBES = 5
_POLL_SECONDS = 2.0
# Round trips that the usual one is the median of.
_REMEMBERED = 5


class WorkerLink:
    """A channel to one worker."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.channel = open_channel(address)
        self._stub = worker_pb2_grpc.WorkerServiceStub(self.channel)
        self._recent: deque[float] = deque(maxlen=_REMEMBERED)

    async def describe(self, *, include_tokenizer: bool, timeout_seconds: float) -> worker_pb2.DescribeResponse:
        """The worker's description; waits for it to come up. Raises Unavailable when it does not."""
        request = worker_pb2.DescribeRequest(include_tokenizer=include_tokenizer)
        try:
            return await self._stub.Describe(request, timeout=timeout_seconds, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"no worker answers at {self.address}: {error_from(error)}") from error

    @property
    def usual_round_trip_seconds(self) -> float:
        """The median of the last measurements; 0 before the first."""
        return median(self._recent) if self._recent else 0.0

    async def round_trip_seconds(self) -> float:
        """The least of some unary round trips: noise only adds. Raises SequoiaError when the worker does not answer."""
        seconds = []
        for _ in range(_RTT_PROBES):
            started = time.perf_counter()
            try:
                await self._stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=_CALL_TIMEOUT_SECONDS)
            except grpc.aio.AioRpcError as error:
                raise error_from(error) from error
            seconds.append(time.perf_counter() - started)
        self._recent.append(min(seconds))
        return min(seconds)


class Workers:
    """The verify worker, without which nothing starts, and the draft worker, which may be missing at any time.

    An async context manager: entering waits for the verify worker, watches for the draft, measures how far both are.
    """

    def __init__(self, verify_address: str, draft_address: str, start_timeout_seconds: float) -> None:
        self.verify = WorkerLink(verify_address)
        self.draft = WorkerLink(draft_address) if draft_address else None
        self._start_timeout_seconds = start_timeout_seconds
        self._watchers: list[asyncio.Task[None]] = []
        self.verify_description = worker_pb2.WorkerDescription()
        self.draft_description: worker_pb2.WorkerDescription | None = None
        self.tokenizer = worker_pb2.TokenizerFiles()

    async def __aenter__(self) -> Workers:
        timeout = self._start_timeout_seconds
        response = await self.verify.describe(include_tokenizer=True, timeout_seconds=timeout)
        self.verify_description, self.tokenizer = response.worker, response.tokenizer
        _check_role(response.worker, worker_pb2.WORKER_ROLE_VERIFY, self.verify.address)
        if self.draft is not None:
            await self._meet_draft_at_start(self.draft)
            self._watchers.append(asyncio.create_task(self._watch(self.draft)))
        self._watchers.append(asyncio.create_task(self._measure_distances()))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for watcher in self._watchers:
            watcher.cancel()
        for link in (self.verify, self.draft):
            if link is not None:
                await link.channel.close()

    @property
    def round_trip_seconds(self) -> float:
        """To the one and then to the other, as a drafted step goes."""
        return sum(link.usual_round_trip_seconds for link in (self.verify, self.draft) if link is not None)

    @property
    def draft_has_own_device(self) -> bool:
        """Whether there is a draft worker that does not take turns with the verify worker."""
        draft = self.draft_description
        return draft is not None and draft.device_id != self.verify_description.device_id

    async def _measure_distances(self) -> None:
        while True:
            for link in (self.verify, self.draft):
                if link is not None:
                    with suppress(SequoiaError):  # whoever needs the worker will hear of it
                        await link.round_trip_seconds()
            await asyncio.sleep(_POLL_SECONDS)

    async def _meet_draft_at_start(self, draft: WorkerLink) -> None:
        """A draft that is there and does not fit stops the start; one that is not there yet does not."""
        try:
            await self._meet(draft)
        except Unavailable as error:
            _log.warning("starting without a draft", extra={"reason": str(error)})

    async def _meet(self, draft: WorkerLink) -> None:
        response = await draft.describe(include_tokenizer=False, timeout_seconds=_POLL_SECONDS)
        _check_role(response.worker, worker_pb2.WORKER_ROLE_DRAFT, draft.address)
        check_pair(self.verify_description, response.worker)
        if self.draft_description is None or self.draft_description.instance_id != response.worker.instance_id:
            _log.info("draft worker found", extra={"address": draft.address, "model": response.worker.model})
        self.draft_description = response.worker

    async def _watch(self, draft: WorkerLink) -> None:
        """Notice a draft that appears, goes away, or comes back as another process."""
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            try:
                await self._meet(draft)
            except SequoiaError as error:
                if self.draft_description is not None:
                    _log.warning("draft worker lost", extra={"address": draft.address, "reason": str(error)})
                self.draft_description = None


def check_pair(verify: worker_pb2.WorkerDescription, draft: worker_pb2.WorkerDescription) -> None:
    """Raises FailedPrecondition, naming both models, when the two do not speak of the same tokens.

    A draft without a tokenizer speaks of any.
    """
    if draft.tokenizer_hash not in ("", verify.tokenizer_hash):
        raise FailedPrecondition(
            f"draft {draft.model} ({draft.vocab_size} tokens) and target {verify.model} ({verify.vocab_size} tokens) "
            "have different tokenizers; choose a draft from the target's own model family",
            "draft",
        )


def _check_role(worker: worker_pb2.WorkerDescription, role: worker_pb2.WorkerRole, address: str) -> None:
    if worker.role != role:
        found, wanted = worker_pb2.WorkerRole.Name(worker.role), worker_pb2.WorkerRole.Name(role)
        raise FailedPrecondition(f"{address} is a {found}, not a {wanted}; check --verify and --draft", "worker")
