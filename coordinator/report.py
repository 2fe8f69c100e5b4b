"""What speculation did for one request: counts by depth and rank, seconds by stage and by tree."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, MutableSequence

from coordinator.fallback import Fallback
from coordinator.request_metrics import STAGES, RequestMetrics
from sequoia.topology import Topology, TreeShape
from sequoia.v1 import coordinator_pb2, draft_pb2, tree_pb2, verify_pb2
from sequoia.wire import shape_to_wire

_PARTS = ("forwards", "work", "draft_forwards", "draft_work")


class Report:
    """Adds up a request's steps into the SpeculationReport that its client receives, and tells `metrics` of them."""

    def __init__(self, metrics: RequestMetrics | None = None) -> None:
        self._metrics = metrics or RequestMetrics()
        self.message = coordinator_pb2.SpeculationReport()
        self._usages: dict[TreeShape, coordinator_pb2.TreeUsage] = {}
        self.step_seconds = coordinator_pb2.StageSeconds()  # of the last step
        self.fallback: Fallback | None = None  # why that one has no tree, though one was wanted
        self._mark = self._started = time.monotonic()
        self.first_token_seconds = 0.0

    @property
    def total_seconds(self) -> float:
        """Since the request began."""
        return time.monotonic() - self._started

    @property
    def total_step_seconds(self) -> float:
        """That the last step took."""
        return sum(getattr(self.step_seconds, name) for name in STAGES)

    def opened(self) -> None:
        """The first verdict has arrived."""
        self.message.stages.prefill = self._lap()
        self.first_token_seconds = self.total_seconds
        self._metrics.opened(self.first_token_seconds)

    def host(self) -> None:
        """The coordinator's own work, and the client's reading, end here: a step begins."""
        self.step_seconds, self.fallback = coordinator_pb2.StageSeconds(host=self._lap()), None

    def drafted(self, response: draft_pb2.DraftResponse, reading_seconds: float = 0.0) -> None:
        """A tree has arrived; before, the step may have waited for the draft to read the text, which is prefill."""
        waited = max(0.0, self._lap() - response.worker_seconds)
        reading = min(waited, reading_seconds)
        self.message.stages.prefill += reading
        self.step_seconds.draft += response.worker_seconds
        self.step_seconds.network += waited - reading
        self.step_seconds.draft_forwards += response.times.forwards
        self.step_seconds.draft_work += response.times.work
        self._split(response.times)

    def fell_back(self, reason: str, cause: Fallback) -> None:
        """A tree was wanted and did not come: this step is decoded plainly."""
        self.step_seconds.draft += self._lap()
        self.message.num_fallback_steps += 1
        self.fallback = cause
        self.message.fallback_reason = reason
        self._metrics.fell_back(cause)

    def verified(
        self, response: verify_pb2.VerifyResponse, draft: draft_pb2.DraftResponse | None, asked: TreeShape
    ) -> float:
        """A step's verdict has arrived; a tree of shape `asked` was wanted. Returns the seconds that the step took.

        Trees are told apart as they were asked for: where q has few tokens, hardly two are grown alike.
        """
        seconds = self._lap()
        # A step that the worker ran on by itself may have been waiting for us.
        worker_seconds = min(seconds, response.worker_seconds)
        self.step_seconds.verify += worker_seconds
        self.step_seconds.network += seconds - worker_seconds
        self._split(response.times)
        _add(self.message.stages, self.step_seconds)
        self._metrics.stepped(self.step_seconds)
        self.message.num_steps += 1
        came = Topology.of(tuple(draft.tree.topology.parents)) if draft is not None else Topology.root_only()
        if draft is not None or asked.size == 1:
            self._use(asked, came, response.verdict, draft.ahead if draft else draft_pb2.DRAFT_AHEAD_UNSPECIFIED)
        if draft is not None:
            self._count(came, response.verdict)
            self._count_ngrams(draft.ngram_nodes, response.verdict)
            if isinstance(asked, Topology):
                self._count_ranks(came, asked, response.verdict)
        return self.total_step_seconds

    def _split(self, times: tree_pb2.WorkerTimes) -> None:
        self.step_seconds.forwards += times.forwards
        self.step_seconds.work += times.work

    def _use(self, shape: TreeShape, came: Topology, verdict: verify_pb2.Verdict, ahead: draft_pb2.DraftAhead) -> None:
        usage = self._usages.get(shape)
        if usage is None:
            usage = self._usages[shape] = self.message.trees.add(**shape_to_wire(shape))
        usage.num_steps += 1
        usage.num_tokens += len(verdict.accepted_nodes) + 1
        usage.num_nodes += came.size
        usage.num_levels += came.levels
        _add(usage.stages, self.step_seconds)
        usage.num_ahead_misses += ahead == draft_pb2.DRAFT_AHEAD_MISS
        if ahead == draft_pb2.DRAFT_AHEAD_HIT:
            usage.num_ahead_hits += 1
            usage.hit_draft_seconds += self.step_seconds.draft

    def _count(self, topology: Topology, verdict: verify_pb2.Verdict) -> None:
        message = self.message
        if topology.size > 1:
            self._metrics.drafted(topology, len(verdict.accepted_nodes))
        message.num_drafted_steps += topology.size > 1
        message.num_drafted_tokens += topology.size - 1
        message.num_accepted_tokens += len(verdict.accepted_nodes)

    def _count_ngrams(self, ngram_nodes: Iterable[int], verdict: verify_pb2.Verdict) -> None:
        nodes = set(ngram_nodes)
        self.message.num_ngram_tokens += len(nodes)
        self.message.num_accepted_ngram_tokens += len(nodes.intersection(verdict.accepted_nodes))

    def _count_ranks(self, topology: Topology, asked: Topology, verdict: verify_pb2.Verdict) -> None:
        """What a dynamic tree offers was chosen by its chances: counted by rank, it would pass for any child."""
        for depth, num_children in enumerate(_num_asked(topology, asked, verdict.accepted_nodes)):
            for rank in range(num_children):
                _increment(self._counts(depth).num_offered, rank)
        for node in verdict.accepted_nodes:
            _increment(self._counts(topology.depths[node] - 1).num_accepted, topology.ranks[node])

    def _counts(self, depth: int) -> coordinator_pb2.RankCounts:
        counts = self.message.counts_by_depth
        while len(counts) <= depth:
            counts.add()
        return counts[depth]

    def _lap(self) -> float:
        now = time.monotonic()
        seconds, self._mark = now - self._mark, now
        return seconds


def _num_asked(topology: Topology, asked: Topology, accepted_nodes: Iterable[int]) -> Iterator[int]:
    """Children that the root and the accepted nodes were asked to have: one that did not come was not accepted either.

    The tree has the first children of a node that it was asked for; one that has others is not followed.
    """
    behind = 0
    yield len(asked.children[0])
    for node in accepted_nodes:
        children = asked.children[behind]
        if topology.ranks[node] >= len(children):
            return
        behind = children[topology.ranks[node]]
        yield len(asked.children[behind])


def _add(total: coordinator_pb2.StageSeconds, step: coordinator_pb2.StageSeconds) -> None:
    for name in (*STAGES, *_PARTS):
        setattr(total, name, getattr(total, name) + getattr(step, name))


def _increment(counts: MutableSequence[int], rank: int) -> None:
    counts.extend([0] * (rank + 1 - len(counts)))
    counts[rank] += 1
