"""The workers behind the coordinator: who they are, whether they fit, which of them are there and how busy."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from statistics import median
from types import TracebackType

import grpc

from coordinator.background import end
from sequoia.errors import FailedPrecondition, ResourceExhausted, SequoiaError, Unavailable
from sequoia.rpc import error_from, open_channel
from sequoia.v1 import worker_pb2, worker_pb2_grpc

_log = logging.getLogger(__name__)

_CALL_TIMEOUT_SECONDS = 10.0
_RTT_PROBES = 5
_POLL_SECONDS = 2.0
# Round trips that the usual one is the median of.
_REMEMBERED = 5
# A worker that failed is left alone for that long, twice as long after each further failure.
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.25, 8.0
# A reply may take this many times the longest of the last ones.
_PATIENCE, _LEAST_PATIENCE_SECONDS, _NUM_REPLIES = 4.0, 0.25, 32
_RETRY_SECONDS = 1.0


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


class Member:
    """A worker of a pool.

    Its circuit breaker: a failure closes it to new sessions for a while, then one session at a time may try, and a
    reply opens it again.
    """

    def __init__(self, address: str) -> None:
        self.link = WorkerLink(address)
        self.description: worker_pb2.WorkerDescription | None = None  # None: it is not there, or does not fit
        self.num_sessions = 0  # of this coordinator
        self.problem = ""  # what keeps it from being used
        self._instance_id = ""
        self._pause = self._paused_until = 0.0  # how long it is left alone, 0 when it answered last, and until when
        self._reply_seconds: deque[float] = deque(maxlen=_NUM_REPLIES)

    @property
    def is_usable(self) -> bool:
        """Whether a session may be opened on it."""
        is_probing = self._pause > 0.0 and self.num_sessions > 0
        return self.description is not None and time.monotonic() >= self._paused_until and not is_probing

    @property
    def load(self) -> tuple[float, float]:
        """By which the next session's worker is chosen: the share of its slots in use, then how far it is."""
        assert self.description is not None
        return self.num_sessions / max(1, self.description.num_slots), self.link.usual_round_trip_seconds

    def found(self, description: worker_pb2.WorkerDescription) -> None:
        """It is there and belongs here. Another process than before begins without failures."""
        if description.instance_id != self._instance_id:
            self._instance_id, self._pause, self._paused_until = description.instance_id, 0.0, 0.0
            _log.info("worker found", extra={"address": self.link.address, "model": description.model})
        elif self.problem:
            _log.info("worker is back", extra={"address": self.link.address})
        self.description, self.problem = description, ""

    def missing(self, problem: str) -> None:
        """It is not there, or does not belong here."""
        if problem != self.problem:
            _log.warning("worker not usable", extra={"address": self.link.address, "reason": problem})
        self.description, self.problem = None, problem

    def failed(self, reason: str) -> None:
        """It was lost, or answered nonsense."""
        pause = self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS) if self._pause else _FIRST_PAUSE_SECONDS
        self._paused_until = time.monotonic() + pause
        _log.warning("worker failed", extra={"address": self.link.address, "reason": reason, "pause_seconds": pause})

    def replied(self, seconds: float) -> None:
        """It answered a step, after so many seconds."""
        self._pause = 0.0
        self._reply_seconds.append(seconds)

    def patience_seconds(self, most: float) -> float:
        """How long to wait for its reply: by its own history, at most `most`."""
        if len(self._reply_seconds) < _NUM_REPLIES // 4:
            return most
        return min(most, max(_LEAST_PATIENCE_SECONDS, _PATIENCE * max(self._reply_seconds)))


class Pool:
    """Workers of one role that serve the same model.

    `check` raises FailedPrecondition for a description that does not belong here. At most `most_waiting` sessions wait
    for a slot.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        role: worker_pb2.WorkerRole,
        check: Callable[[worker_pb2.WorkerDescription], None],
        most_waiting: int = 0,
    ) -> None:
        self.members = [Member(address) for address in addresses]
        self._role, self._check, self._most_waiting = role, check, most_waiting
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._num_admitted = 0

    @property
    def description(self) -> worker_pb2.WorkerDescription | None:
        """Of the first that is there."""
        return next((each.description for each in self.members if each.description is not None), None)

    @property
    def round_trip_seconds(self) -> float:
        """To the nearest that is there; 0 where none is."""
        there = [each.link.usual_round_trip_seconds for each in self.members if each.description is not None]
        return min(there, default=0.0)

    def nobody(self) -> Unavailable:
        """The error of who finds no worker here."""
        role = worker_pb2.WorkerRole.Name(self._role).rpartition("_")[2].lower()
        problems = "; ".join(filter(None, (each.problem for each in self.members)))
        return Unavailable(f"no {role} worker is there ({problems or 'all have failed a moment ago'}); try again")

    async def measure_round_trip(self) -> float:
        """To the one that the next session would be on, in seconds. Raises SequoiaError where there is none."""
        if (member := self.best()) is None:
            raise self.nobody()
        return await member.link.round_trip_seconds()

    def best(self) -> Member | None:
        """The one with the most room; None while there is none."""
        return min((each for each in self.members if each.is_usable), key=lambda each: each.load, default=None)

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Around a session: waits in order of arrival while all slots are in use.

        Raises ResourceExhausted naming `queue` when too many wait already.
        """
        if self._waiting or self._num_admitted >= self._num_slots:
            await self._wait()
        else:
            self._num_admitted += 1
        try:
            yield
        finally:
            self._num_admitted -= 1
            self._admit()

    async def meet(
        self, member: Member, timeout_seconds: float, *, include_tokenizer: bool = False
    ) -> worker_pb2.DescribeResponse:
        """Learn what a worker is, and that it is there.

        Raises Unavailable, or FailedPrecondition for one that does not belong here; it has no `description` then.
        """
        try:
            response = await member.link.describe(include_tokenizer=include_tokenizer, timeout_seconds=timeout_seconds)
            found = response.worker
            _check_role(found, self._role, member.link.address)
            self._check(found)
            for other in self.members:
                if other is not member and other.description is not None:
                    _check_same(found, other.description)
        except SequoiaError as error:
            member.missing(str(error))
            raise
        member.found(found)
        self._admit()
        return response

    async def watch(self, member: Member) -> None:
        """Notice a worker that appears, goes away, or comes back as another process; measure how far it is."""
        while True:
            with suppress(SequoiaError):  # which is logged, and whoever needs the worker will hear of it
                await self.meet(member, _POLL_SECONDS)
                await member.link.round_trip_seconds()
            await asyncio.sleep(_POLL_SECONDS)

    @property
    def _num_slots(self) -> int:
        """Of all that are there; while none is, sessions wait for one and not for a slot."""
        return sum(each.description.num_slots for each in self.members if each.description) or len(self.members)

    async def _wait(self) -> None:
        if len(self._waiting) >= self._most_waiting:
            problem = f"all {self._num_slots} slots are in use and {len(self._waiting)} requests wait; try again"
            raise ResourceExhausted(f"{problem} in {_RETRY_SECONDS:g} s", "queue", retry_seconds=_RETRY_SECONDS)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._num_admitted -= 1
                self._admit()
            with suppress(ValueError):
                self._waiting.remove(turn)
            raise

    def _admit(self) -> None:
        while self._waiting and self._num_admitted < self._num_slots:
            turn = self._waiting.popleft()
            if not turn.done():
                self._num_admitted += 1
                turn.set_result(None)


class Workers:
    """The verify workers, without which nothing starts, and the draft workers, which may be missing at any time.

    Addresses are lists with commas. An async context manager: entering waits for a verify worker, and watches all.
    """

    def __init__(
        self, verify_addresses: str, draft_addresses: str, start_timeout_seconds: float, most_waiting: int = 0
    ) -> None:
        self.verify = Pool(
            _split(verify_addresses), worker_pb2.WORKER_ROLE_VERIFY, self._check_target, most_waiting=most_waiting
        )
        self.draft = Pool(_split(draft_addresses), worker_pb2.WORKER_ROLE_DRAFT, self._check_draft)
        self._start_timeout_seconds = start_timeout_seconds
        self._watchers: list[asyncio.Task[None]] = []
        self._target: worker_pb2.WorkerDescription | None = None
        self.tokenizer = worker_pb2.TokenizerFiles()

    async def __aenter__(self) -> Workers:
        response = await self._first_target()
        self._target, self.tokenizer = response.worker, response.tokenizer
        await asyncio.gather(*map(self._meet_draft_at_start, self.draft.members))
        for pool in (self.verify, self.draft):
            self._watchers += [asyncio.create_task(pool.watch(member)) for member in pool.members]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await end(*self._watchers)
        for member in (*self.verify.members, *self.draft.members):
            await member.link.channel.close()

    @property
    def verify_description(self) -> worker_pb2.WorkerDescription:
        """Of a verify worker that is there, or was."""
        assert self._target is not None, "entered first"
        return self.verify.description or self._target

    @property
    def draft_description(self) -> worker_pb2.WorkerDescription | None:
        """Of a draft worker that is there."""
        return self.draft.description

    @property
    def round_trip_seconds(self) -> float:
        """To the one and then to the other, as a drafted step goes."""
        return self.verify.round_trip_seconds + self.draft.round_trip_seconds

    async def _first_target(self) -> worker_pb2.DescribeResponse:
        """Of the verify worker that is there first. Raises what the last of them has raised."""
        timeout, pool = self._start_timeout_seconds, self.verify
        tasks = [asyncio.create_task(pool.meet(each, timeout, include_tokenizer=True)) for each in pool.members]
        problem: SequoiaError = Unavailable("no address of a verify worker is given", "verify")
        try:
            for first in asyncio.as_completed(tasks):
                try:
                    return await first
                except SequoiaError as error:
                    problem = error
        finally:
            await asyncio.gather(*(_ended(each) for each in tasks))
        raise problem

    async def _meet_draft_at_start(self, draft: Member) -> None:
        """A draft that is there and does not fit stops the start; one that is not there yet does not."""
        with suppress(Unavailable):
            await self.draft.meet(draft, _POLL_SECONDS)

    def _check_target(self, found: worker_pb2.WorkerDescription) -> None:
        """The model stays what it was when this coordinator started: requests go on on any worker."""
        if self._target is not None:
            _check_same(found, self._target)

    def _check_draft(self, found: worker_pb2.WorkerDescription) -> None:
        check_pair(self.verify_description, found)


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


def _check_same(found: worker_pb2.WorkerDescription, known: worker_pb2.WorkerDescription) -> None:
    """A session may move between workers only where they compute the same."""
    ours, theirs = _identity(known), _identity(found)
    if ours != theirs:
        problem = f"{found.model} ({', '.join(theirs)}) is not what the pool serves: {known.model} ({', '.join(ours)})"
        raise FailedPrecondition(f"{problem}; start the coordinator anew for another model", "worker")


def _identity(worker: worker_pb2.WorkerDescription) -> tuple[str, ...]:
    return worker.model_revision, worker.dtype, worker.quantization


def _check_role(worker: worker_pb2.WorkerDescription, role: worker_pb2.WorkerRole, address: str) -> None:
    if worker.role != role:
        found, wanted = worker_pb2.WorkerRole.Name(worker.role), worker_pb2.WorkerRole.Name(role)
        raise FailedPrecondition(f"{address} is a {found}, not a {wanted}; check --verify and --draft", "worker")


def _split(addresses: str) -> list[str]:
    return list(dict.fromkeys(filter(None, (each.strip() for each in addresses.split(",")))))


async def _ended(task: asyncio.Task[worker_pb2.DescribeResponse]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError, SequoiaError):
        await task
