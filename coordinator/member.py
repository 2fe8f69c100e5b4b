"""One worker: how to reach it, what it is, whether a session may be opened on it, how long its replies take."""

from __future__ import annotations

import logging
import time
from collections import deque
from functools import partial
from statistics import median

import grpc

from coordinator.admission import Room
from sequoia.border import error_from
from sequoia.channels import Channels
from sequoia.errors import Unavailable
from sequoia.rpc import Dial, StubChannel, open_channel
from sequoia.tls import PLAIN, Tls
from sequoia.v1 import worker_pb2, worker_pb2_grpc

_log = logging.getLogger(__name__)

_CALL_TIMEOUT_SECONDS = 10.0
_RTT_PROBES = 5
# Round trips that the usual one is the median of.
_REMEMBERED = 5
# A worker that failed is left alone for that long, twice as long after each further failure.
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.25, 8.0
# A reply may take this many times the longest of the last ones.
_PATIENCE, _LEAST_PATIENCE_SECONDS, _NUM_REPLIES = 4.0, 0.25, 32
# One that must answer is left when it takes that many times the longest, and where another can take its place.
_HANGS, _LEAST_HANG_SECONDS = 10.0, 5.0


class WorkerLink:
    """A channel to one worker, as `dial` opens it. Raises InvalidArgument for one on another host without TLS."""

    def __init__(self, address: str, tls: Tls = PLAIN, server_name: str = "", dial: Dial = open_channel) -> None:
        self.address = address
        self._channels = Channels(address, tls, partial(dial, server_name=server_name))
        self._recent: deque[float] = deque(maxlen=_REMEMBERED)

    @property
    def channel(self) -> StubChannel:
        """For the next session."""
        return self._channels.current

    async def close(self) -> None:
        """End all that runs over it."""
        for channel in self._channels.all:
            await channel.close()

    async def describe(self, *, include_tokenizer: bool, timeout_seconds: float) -> worker_pb2.DescribeResponse:
        """The worker's description; waits for it to come up. Raises Unavailable when it does not."""
        request = worker_pb2.DescribeRequest(include_tokenizer=include_tokenizer)
        try:
            return await self._stub.Describe(request, timeout=timeout_seconds, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"no worker answers at {self.address}: {error_from(error)}") from error

    @property
    def _stub(self) -> worker_pb2_grpc.WorkerServiceStub:
        return worker_pb2_grpc.WorkerServiceStub(self.channel)

    @property
    def usual_round_trip_seconds(self) -> float:
        """The median of the last measurements; 0 before the first."""
        return median(self._recent) if self._recent else 0.0

    async def round_trip_seconds(self) -> float:
        """The least of some unary round trips: noise only adds. Raises SequoiaError when the worker does not answer."""
        seconds, stub = [], self._stub
        for _ in range(_RTT_PROBES):
            started = time.perf_counter()
            try:
                await stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=_CALL_TIMEOUT_SECONDS)
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

    def __init__(self, address: str, tls: Tls = PLAIN, server_name: str = "", dial: Dial = open_channel) -> None:
        self.link = WorkerLink(address, tls, server_name, dial)
        self.description: worker_pb2.WorkerDescription | None = None  # None: it is not there, or does not fit
        self.num_sessions = self.num_tokens = 0  # of this coordinator, and what its sessions may become
        self.problem = ""  # what keeps it from being used
        self.is_leaving = False  # it is not among the addresses any more: what runs on it may end there
        self._instance_id = ""
        self._pause = self._paused_until = 0.0  # how long it is left alone, 0 when it answered last, and until when
        self._reply_seconds: deque[float] = deque(maxlen=_NUM_REPLIES)

    @property
    def is_usable(self) -> bool:
        """Whether a session may be opened on it."""
        is_there = self.description is not None and not self.is_leaving
        return is_there and not self.is_paused

    @property
    def is_paused(self) -> bool:
        """Whether it is left alone, as it failed: for a while, and then but for the session that tries it."""
        is_probing = self._pause > 0.0 and self.num_sessions > 0
        return time.monotonic() < self._paused_until or is_probing

    @property
    def room(self) -> Room:
        """For sessions. One that leaves has as much as it needs for those it has, or they would take others' room."""
        if self.description is None:
            return Room(0, 0)
        if self.is_leaving:
            trees = self.num_sessions * self.description.max_tree_size
            return Room(self.num_sessions, self.num_tokens + trees)
        return Room(self.description.num_slots, self.description.kv_tokens)

    @property
    def load(self) -> tuple[float, float]:
        """By which the next session's worker is chosen: the share in use of its slots or its KV memory, the larger of
        them, then how far it is.
        """
        assert self.description is not None
        slots, memory = self.description.num_slots, self.description.kv_tokens
        in_use = max(self.num_sessions / max(1, slots), self.num_tokens / memory if memory else 0.0)
        return in_use, self.link.usual_round_trip_seconds

    def enter(self, max_num_tokens: int) -> None:
        """A session begins on it that may have so many tokens."""
        self.num_sessions += 1
        self.num_tokens += max_num_tokens

    def leave(self, max_num_tokens: int) -> None:
        """It has ended."""
        self.num_sessions -= 1
        self.num_tokens -= max_num_tokens

    def stays(self, is_there: bool) -> None:
        """Whether it is among the addresses."""
        if is_there == self.is_leaving:
            event = "worker stays" if is_there else "worker leaves"
            _log.info(event, extra={"address": self.link.address, "num_sessions": self.num_sessions})
        self.is_leaving = not is_there

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

    @property
    def hang_seconds(self) -> float:
        """After which a reply to a step is so late that the worker must be hanging; by its own history."""
        return max(_LEAST_HANG_SECONDS, _HANGS * max(self._reply_seconds, default=_LEAST_HANG_SECONDS))
