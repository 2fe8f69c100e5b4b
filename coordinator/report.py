"""What speculation did for one request: counts by rank and seconds by stage."""

from __future__ import annotations

import time
from collections.abc import MutableSequence

from sequoia.topology import Topology
from sequoia.v1 import coordinator_pb2, draft_pb2, verify_pb2


class Report:
    """Adds up a request's steps into the SpeculationReport that its client receives."""

    def __init__(self) -> None:
        self.message = coordinator_pb2.SpeculationReport()
        self._mark = self._started = time.monotonic()
        self.first_token_seconds = 0.0

    @property
    def total_seconds(self) -> float:
        """Since the request began."""
        return time.monotonic() - self._started

    def opened(self) -> None:
        """The first verdict has arrived."""
        self.message.stages.prefill = self._lap()
        self.first_token_seconds = self.total_seconds

    def host(self) -> None:
        """The coordinator's own work, and the client's reading, end here."""
        self.message.stages.host += self._lap()

    def drafted(self, response: draft_pb2.DraftResponse) -> None:
        """A tree has arrived."""
        seconds = self._lap()
        self.message.stages.draft += response.worker_seconds
        self.message.stages.network += max(0.0, seconds - response.worker_seconds)

    def fell_back(self, reason: str) -> None:
        """A tree was wanted and did not come: this step is decoded plainly."""
        self.message.stages.draft += self._lap()
        self.message.num_fallback_steps += 1
        self.message.fallback_reason = reason

    def verified(self, response: verify_pb2.VerifyResponse, draft: draft_pb2.DraftResponse | None) -> None:
        """A step's verdict has arrived."""
        seconds = self._lap()
        # A step that the worker ran on by itself may have been waiting for us.
        worker_seconds = min(seconds, response.worker_seconds)
        self.message.stages.verify += worker_seconds
        self.message.stages.network += seconds - worker_seconds
        self.message.num_steps += 1
        if draft is not None:
            self._count(Topology(tuple(draft.tree.topology.parents)), response.verdict)

    def _count(self, topology: Topology, verdict: verify_pb2.Verdict) -> None:
        message = self.message
        message.num_drafted_steps += 1
        message.num_drafted_tokens += topology.size - 1
        message.num_accepted_tokens += len(verdict.accepted_nodes)
        # Trees are cut towards the end of an answer, so the last one would say little.
        if topology.size > len(message.topology.parents):
            message.topology.parents[:] = topology.parents
        for node in (0, *verdict.accepted_nodes):
            for rank in range(len(topology.children[node])):
                _increment(message.num_offered_by_rank, rank)
        for node in verdict.accepted_nodes:
            _increment(message.num_accepted_by_rank, topology.ranks[node])

    def _lap(self) -> float:
        now = time.monotonic()
        seconds, self._mark = now - self._mark, now
        return seconds


def _increment(counts: MutableSequence[int], rank: int) -> None:
    counts.extend([0] * (rank + 1 - len(counts)))
    counts[rank] += 1
