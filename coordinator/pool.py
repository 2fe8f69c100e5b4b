"""Workers of one role: which of them are there and fit, and which one the next session is opened on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from coordinator.admission import Admission, Room
from coordinator.background import end
from coordinator.descriptions import check_description
from coordinator.member import Member
from sequoia.errors import FailedPrecondition, SequoiaError, Unavailable
from sequoia.rpc import Dial, open_channel
from sequoia.tls import PLAIN, Tls
from sequoia.v1 import worker_pb2

_log = logging.getLogger(__name__)

POLL_SECONDS = 2.0


class Pool:
    """Workers of one role that serve the same model.

    `check` raises FailedPrecondition for a description that does not belong here. At most `most_waiting` sessions wait
    for room when they are let in by `admission`. `problem` says why none may be known.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        role: worker_pb2.WorkerRole,
        check: Callable[[worker_pb2.WorkerDescription], None],
        most_waiting: int = 0,
        tls: Tls = PLAIN,
        dial: Dial = open_channel,
    ) -> None:
        self.members = [Member(address, tls, dial=dial) for address in addresses]
        self._role, self._check, self._tls, self._dial = role, check, tls, dial
        self._watchers: dict[Member, asyncio.Task[None]] = {}
        self._is_watching = False
        self.problem = ""
        self.admission = Admission(lambda: self.room, most_waiting)

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
        problems = "; ".join(filter(None, (self.problem, *(each.problem for each in self.members))))
        return Unavailable(f"no {role} worker is there ({problems or 'all have failed a moment ago'}); try again")

    async def measure_round_trip(self) -> float:
        """To the first that is there, in seconds. Raises SequoiaError where there is none."""
        found = (each for each in self.members if each.description is not None and not each.is_leaving)
        there = next(found, None)
        if there is None:
            raise self.nobody()
        return await there.link.round_trip_seconds()

    def best(self) -> Member | None:
        """The one with the most room; None while there is none."""
        return min((each for each in self.members if each.is_usable), key=lambda each: each.load, default=None)

    def has_other(self, member: Member) -> bool:
        """Whether a session on it could go on elsewhere."""
        return any(each.is_usable for each in self.members if each is not member)

    async def meet(
        self, member: Member, timeout_seconds: float, *, include_tokenizer: bool = False
    ) -> worker_pb2.DescribeResponse:
        """Learn what a worker is, and that it is there.

        Raises Unavailable, or FailedPrecondition for one that does not belong here; it has no `description` then.
        """
        try:
            response = await member.link.describe(include_tokenizer=include_tokenizer, timeout_seconds=timeout_seconds)
            check_description(response)
            found = response.worker
            _check_role(found, self._role, member.link.address)
            self._check(found)
            for other in self.members:
                if other is not member and other.description is not None:
                    check_same(found, other.description)
        except SequoiaError as error:
            member.missing(str(error))
            raise
        else:
            member.found(found)
        finally:
            self.admission.admit()
        return response

    def begin_watching(self) -> None:
        """Watch all members, and those that come later."""
        self._is_watching = True
        for member in self.members:
            self._watchers[member] = asyncio.create_task(self.watch(member))

    async def close(self) -> None:
        """Let go of all members."""
        await end(*self._watchers.values())
        for member in self.members:
            await member.link.close()

    async def follow(self, places: Mapping[str, str]) -> None:
        """From now on the members are at these addresses; with each the name in its certificate, empty: the address's.

        A member that is at none of them gets no new session. When the last of its sessions has ended, the next call
        closes its connection.
        """
        idle = [each for each in self.members if each.is_leaving and not each.num_sessions]
        for member in idle:
            if member.link.address not in places:
                await self._part_from(member)
        for member in self.members:
            member.stays(member.link.address in places)
        known = {each.link.address for each in self.members}
        for address in sorted(places.keys() - known):
            self._join(Member(address, self._tls, places[address], self._dial))
        self.admission.admit()

    def _join(self, member: Member) -> None:
        _log.info("worker joins", extra={"address": member.link.address})
        self.members.append(member)
        if self._is_watching:
            self._watchers[member] = asyncio.create_task(self.watch(member))

    async def _part_from(self, member: Member) -> None:
        _log.info("worker has left", extra={"address": member.link.address})
        # First, so that no session finds it while its connection closes.
        self.members.remove(member)
        if (watcher := self._watchers.pop(member, None)) is not None:
            await end(watcher)
        await member.link.close()

    async def watch(self, member: Member) -> None:
        """Notice a worker that appears, goes away, or comes back as another process; measure how far it is."""
        while True:
            with suppress(SequoiaError):  # which is logged, and whoever needs the worker will hear of it
                await self.meet(member, POLL_SECONDS)
                await member.link.round_trip_seconds()
            await asyncio.sleep(POLL_SECONDS)

    @property
    def capacity(self) -> Room:
        """Of all that are there and stay."""
        there = [each.description for each in list(self.members) if each.description and not each.is_leaving]
        return Room(sum(each.num_slots for each in there), sum(each.kv_tokens for each in there))

    @property
    def room(self) -> Room:
        """Of all that are there; of one that leaves, what its sessions have."""
        rooms = [each.room for each in self.members]
        return Room(sum(each.num_slots for each in rooms), sum(each.kv_tokens for each in rooms))


def check_same(found: worker_pb2.WorkerDescription, known: worker_pb2.WorkerDescription) -> None:
    """A session may move between workers only where they compute the same."""
    ours, theirs = _identity(known), _identity(found)
    if ours != theirs:
        problem = f"{found.model} ({', '.join(theirs)}) is not what the pool serves: {known.model} ({', '.join(ours)})"
        raise FailedPrecondition(f"{problem}; start the coordinator anew for another model", "worker")


def _identity(worker: worker_pb2.WorkerDescription) -> tuple[str, ...]:
    """What a session relies on: the numbers, and how long it and its trees may become."""
    limits = f"contexts of {worker.context_length}", f"trees of {worker.max_tree_size}"
    return worker.model_revision, worker.dtype, worker.quantization, *limits


def _check_role(worker: worker_pb2.WorkerDescription, role: worker_pb2.WorkerRole, address: str) -> None:
    if worker.role != role:
        found, wanted = worker_pb2.WorkerRole.Name(worker.role), worker_pb2.WorkerRole.Name(role)
        raise FailedPrecondition(f"{address} is a {found}, not a {wanted}; check --verify and --draft", "worker")
