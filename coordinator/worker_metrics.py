"""What a Prometheus server can ask about the workers: who is there, how full they are, whether more are needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from coordinator.admission import Room
from coordinator.member import Member
from coordinator.pool import Pool
from coordinator.workers import Workers

WORKER_STATES = ("usable", "paused", "leaving", "missing")


class WorkersCollector(Collector):
    """Reads the pools when asked. What is in use is this coordinator's; what there is, is all coordinators'."""

    def __init__(self, workers: Workers) -> None:
        self._pools = {"verify": workers.verify, "draft": workers.draft}
        self._queue = workers.verify.admission

    def collect(self) -> Iterator[Metric]:
        """The queue, then slots and KV memory of both roles, then who is there."""
        sessions = _gauge("sessions", "requests of this coordinator, by state", "state")
        sessions.add_metric(["running"], self._queue.taken.num_slots)
        sessions.add_metric(["waiting"], self._queue.num_waiting)
        yield sessions
        yield GaugeMetricFamily("sequoia_queue_limit", "requests that may wait at a time", self._queue.most_waiting)
        slots, taken = _gauge("session_slots", "of all workers", "role"), _gauge("session_slots_taken", "here", "role")
        memory, reserved = _gauge("kv_tokens", "of all workers", "role"), _gauge("kv_tokens_reserved", "here", "role")
        load = _gauge("session_load", "sessions that run and wait here, as a share of all slots", "role")
        fullness = _gauge("kv_memory_load", "KV memory reserved and waited for here, as a share of all", "role")
        for role, pool in self._pools.items():
            there, used, wanted = pool.capacity, self._used(role), self._wanted(role)
            for family, value in ((slots, there.num_slots), (taken, used.num_slots)):
                family.add_metric([role], value)
            for family, value in ((memory, there.kv_tokens), (reserved, used.kv_tokens)):
                family.add_metric([role], value)
            # Without workers there is no share; whoever scales by it must not take that for an idle system.
            if there.num_slots:
                load.add_metric([role], wanted.num_slots / there.num_slots)
            if there.kv_tokens:
                fullness.add_metric([role], wanted.kv_tokens / there.kv_tokens)
        yield from (slots, taken, memory, reserved, load, fullness, *self._members())

    def _used(self, role: str) -> Room:
        """By sessions that run. Verify workers' are counted as they are let in, before one is opened."""
        if role == "verify":
            return self._queue.taken
        members = list(self._pools[role].members)
        return Room(sum(each.num_sessions for each in members), sum(each.num_tokens for each in members))

    def _wanted(self, role: str) -> Room:
        used = self._used(role)
        if role != "verify":
            return used
        return Room(used.num_slots + self._queue.num_waiting, used.kv_tokens + self._queue.num_tokens_waiting)

    def _members(self) -> Iterator[Metric]:
        counts = _gauge("workers", "by what can be done with them", "role", "state")
        distance = _gauge("round_trip_seconds", "to the nearest worker", "role")
        for role, pool in self._pools.items():
            found = Counter(map(_state, list(pool.members)))
            for state in WORKER_STATES:
                counts.add_metric([role, state], found[state])
            distance.add_metric([role], pool.round_trip_seconds)
        yield from (counts, distance)


def has_draft(pool: Pool) -> bool:
    """Whether one is there that drafts may be asked of, be it in a moment."""
    return any(_state(each) in ("usable", "paused") for each in list(pool.members))


def _state(member: Member) -> str:
    if member.is_leaving:
        return "leaving"
    if member.description is None:
        return "missing"
    return "paused" if member.is_paused else "usable"


def _gauge(name: str, text: str, *labels: str) -> Any:
    return GaugeMetricFamily(f"sequoia_{name}", text, labels=labels)
