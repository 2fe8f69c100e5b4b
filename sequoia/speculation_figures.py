"""What speculation did for a request, in all and by tree, from its wire form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from typing import Any, Literal

from sequoia.topology import Topology, TreeShape
from sequoia.v1 import coordinator_pb2 as pb
from sequoia.wire import known_shape


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Wall time of all steps of a request by where it went; prefill is the opening, apart from the steps.

    Of draft and verify `forwards` are the models', and `work` what the workers do with logits, trees and KV rows;
    `draft_forwards` and `draft_work` are the draft's part of them.
    """

    draft: float
    verify: float
    network: float
    host: float
    prefill: float
    forwards: float = 0.0
    work: float = 0.0
    draft_forwards: float = 0.0
    draft_work: float = 0.0

    @property
    def total(self) -> float:
        """Of the steps."""
        return self.draft + self.verify + self.network + self.host

    @property
    def verify_forwards(self) -> float:
        """The target's part of `forwards`."""
        return self.forwards - self.draft_forwards

    @property
    def verify_work(self) -> float:
        """The verify worker's part of `work`."""
        return self.work - self.draft_work

    @property
    def overhead(self) -> float:
        """Of the steps, what is neither a forward nor work on logits: round trips, messages, scheduling, the loop."""
        return self.total - self.forwards - self.work


@dataclass(frozen=True, slots=True)
class TreeUsage:
    """The steps of a request for which a tree of that shape was asked for, and came; root-only: plain decoding.

    `num_ahead_hits` of them had a tree that was begun while the step before was verified, and spent `hit_draft_seconds`
    of the draft's time; before `num_ahead_misses` trees had been begun that were of no use. The trees that came had
    `num_nodes` nodes and `num_levels` levels in all.
    """

    shape: TreeShape
    num_steps: int
    num_tokens: int
    stage_seconds: StageSeconds
    num_ahead_hits: int = 0
    num_ahead_misses: int = 0
    hit_draft_seconds: float = 0.0
    num_nodes: int = 0
    num_levels: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            **self.shape.to_dict(),
            "steps": self.num_steps,
            "tokens": self.num_tokens,
            "seconds": asdict(self.stage_seconds),
            "ahead_hits": self.num_ahead_hits,
            "ahead_misses": self.num_ahead_misses,
            "hit_draft_seconds": self.hit_draft_seconds,
            "nodes": self.num_nodes,
            "levels_grown": self.num_levels,
        }


@dataclass(frozen=True, slots=True)
class SpeculationFigures:
    """What speculation did for a request, in all and by tree.

    `offered[depth][rank]`: how often a child of that rank stood under a reached node of that depth (the root's is 0);
    `accepted`, of the same shape: how often it was the accepted one. `state` tells whether the coordinator went along
    with the plan, and `state_reason` why; "" when the request said how to speculate. Bytes count messages to and from
    a worker.
    """

    num_steps: int
    num_drafted_steps: int
    num_drafted_tokens: int
    num_accepted_tokens: int
    stage_seconds: StageSeconds
    trees: tuple[TreeUsage, ...]
    offered: tuple[tuple[int, ...], ...]
    accepted: tuple[tuple[int, ...], ...]
    num_fallback_steps: int
    fallback_reason: str
    num_draft_bytes: int
    num_verify_bytes: int
    state: Literal["on", "reduced", "off", ""]
    state_reason: str
    num_ngram_tokens: int = 0  # drafted ones that go on as the text did before
    num_accepted_ngram_tokens: int = 0

    @property
    def tree(self) -> TreeShape:
        """The largest that was used (they are cut towards the end of an answer); root-only for plain decoding."""
        return max((each.shape for each in self.trees), key=lambda tree: tree.size, default=Topology.root_only())

    @property
    def num_ahead_hits(self) -> int:
        """Steps whose tree had been begun while the step before was verified."""
        return sum(each.num_ahead_hits for each in self.trees)

    @property
    def num_ahead_attempts(self) -> int:
        """Steps before which trees had been begun, of use or not."""
        return self.num_ahead_hits + sum(each.num_ahead_misses for each in self.trees)

    @property
    def offered_by_rank(self) -> tuple[int, ...]:
        """Over all depths."""
        return _summed(self.offered)

    @property
    def accepted_by_rank(self) -> tuple[int, ...]:
        """Over all depths."""
        return _summed(self.accepted)

    @property
    def mean_tokens_per_step(self) -> float:
        """Accepted tokens plus the bonus token, by step; 0 without a step."""
        return (self.num_accepted_tokens + self.num_steps) / self.num_steps if self.num_steps else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: the fields, and what follows from them."""
        found = asdict(self)
        return {
            "steps": found.pop("num_steps"),
            "mean_tokens_per_step": self.mean_tokens_per_step,
            "tree": {"size": self.tree.size, "levels": self.tree.levels},
            "seconds": found.pop("stage_seconds"),
            "offered_by_rank": self.offered_by_rank,
            "accepted_by_rank": self.accepted_by_rank,
            "draft_ahead": {"attempts": self.num_ahead_attempts, "hits": self.num_ahead_hits},
            **found,
            "trees": [each.to_dict() for each in self.trees],
        }


def figures_from_wire(report: pb.SpeculationReport) -> SpeculationFigures:
    """The figures of a finished request."""
    return SpeculationFigures(
        num_steps=report.num_steps,
        num_drafted_steps=report.num_drafted_steps,
        num_drafted_tokens=report.num_drafted_tokens,
        num_accepted_tokens=report.num_accepted_tokens,
        stage_seconds=_stage_seconds(report.stages),
        trees=tuple(map(_tree_usage, report.trees)),
        offered=tuple(tuple(each.num_offered) for each in report.counts_by_depth),
        accepted=tuple(_padded(each.num_accepted, len(each.num_offered)) for each in report.counts_by_depth),
        num_fallback_steps=report.num_fallback_steps,
        fallback_reason=report.fallback_reason,
        num_draft_bytes=report.num_draft_bytes,
        num_verify_bytes=report.num_verify_bytes,
        state=state_name(report.state),
        state_reason=report.state_reason,
        num_ngram_tokens=report.num_ngram_tokens,
        num_accepted_ngram_tokens=report.num_accepted_ngram_tokens,
    )


def state_name(state: pb.SpeculationState) -> Literal["on", "reduced", "off", ""]:
    """ "" when it is not set."""
    return _STATES.get(state, "")


_STATES: dict[int, Literal["on", "reduced", "off"]] = {
    pb.SPECULATION_STATE_ON: "on",
    pb.SPECULATION_STATE_REDUCED: "reduced",
    pb.SPECULATION_STATE_OFF: "off",
}


def _stage_seconds(stages: pb.StageSeconds) -> StageSeconds:
    return StageSeconds(**{each.name: getattr(stages, each.name) for each in fields(StageSeconds)})


def _tree_usage(usage: pb.TreeUsage) -> TreeUsage:
    return TreeUsage(
        known_shape(usage),
        usage.num_steps,
        usage.num_tokens,
        _stage_seconds(usage.stages),
        usage.num_ahead_hits,
        usage.num_ahead_misses,
        usage.hit_draft_seconds,
        usage.num_nodes,
        usage.num_levels,
    )


def _padded(values: Sequence[int], length: int) -> tuple[int, ...]:
    return (*values, *[0] * (length - len(values)))


def _summed(rows: Iterable[Sequence[int]]) -> tuple[int, ...]:
    return tuple(map(sum, zip_longest(*rows, fillvalue=0)))
