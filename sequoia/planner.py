"""The plan: which tree, chain or nothing costs the fewest seconds per token for a pair on its hardware."""

from __future__ import annotations

import json
import math
import operator
from dataclasses import dataclass, fields
from typing import Any, Literal, NoReturn

import numpy as np

from sequoia.hardware import LatencyCurve
from sequoia.optimal_tree import Frontier, expected_tokens, frontiers, optimal_tree
from sequoia.topology import Topology

__all__ = [
    "PlanInputs",
    "PricedTree",
    "TreePlan",
    "choose",
    "draft_seconds",
    "expected_tokens",
    "optimal_tree",
    "price",
]

SCHEMA = "sequoia.tree_plan.v1"
MAX_LEVELS = 16
# A sum of rounded probabilities may exceed 1 by this much.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class PlanInputs:
    """What a plan follows from. Raises ValueError when a value cannot be right.

    `acceptance` by rank; `verify_curve` by tokens in the forward, `draft_curve` by width of a level, both from 1 up;
    round trips per step to each worker and the coordinator's own time per step in seconds.
    """

    acceptance: tuple[float, ...]
    verify_curve: LatencyCurve
    draft_curve: LatencyCurve
    draft_rtt_seconds: float = 0.0
    verify_rtt_seconds: float = 0.0
    host_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not all(0.0 <= each <= 1.0 for each in self.acceptance) or sum(self.acceptance) > 1.0 + _ROUNDING:
            raise ValueError(f"acceptance must be probabilities that sum to at most 1, not {self.acceptance}")
        if self.verify_curve.num_tokens[0] != 1 or self.draft_curve.num_tokens[0] != 1:
            raise ValueError("a latency curve must start at width 1: decoding without speculation is compared with it")
        if not all(math.isfinite(each) and each >= 0.0 for each in self._overheads):
            raise ValueError(f"round trips and host time must be seconds of 0 or more, not {self._overheads}")

    @property
    def _overheads(self) -> tuple[float, float, float]:
        return self.draft_rtt_seconds, self.verify_rtt_seconds, self.host_seconds

    @property
    def overhead_seconds(self) -> float:
        """What a drafted step takes beside the forwards."""
        return sum(self._overheads)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> PlanInputs:
        """From the JSON form. Raises KeyError, TypeError or ValueError when it is not of that form."""
        values = {each.name: data[each.name] for each in fields(PlanInputs)}
        for name in ("verify_curve", "draft_curve"):
            values[name] = LatencyCurve.from_dict(values[name])
        return PlanInputs(**{**values, "acceptance": tuple(values["acceptance"])})

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "acceptance": list(self.acceptance),
            "verify_curve": self.verify_curve.to_dict(),
            "draft_curve": self.draft_curve.to_dict(),
            "draft_rtt_seconds": self.draft_rtt_seconds,
            "verify_rtt_seconds": self.verify_rtt_seconds,
            "host_seconds": self.host_seconds,
        }


@dataclass(frozen=True, slots=True)
class PricedTree:
    """A tree, and what a step with it is predicted to bring and to cost.

    `speedup` is the seconds per token of plain decoding by those of this tree.
    """

    topology: Topology
    tokens_per_step: float
    seconds_per_token: float
    speedup: float

    @property
    def parents(self) -> tuple[int, ...]:
        """The topology's parents."""
        return self.topology.parents

    @property
    def kind(self) -> Literal["tree", "chain", "off"]:
        """What the tree amounts to."""
        if self.topology.size == 1:
            return "off"
        return "chain" if self.topology.levels == self.topology.size else "tree"


@dataclass(frozen=True, slots=True)
class TreePlan(PricedTree):
    """The tree to use: the one with the fewest predicted seconds per token.

    `best_tree` is the best one that speculates, even when the plan is not to; `runner_up` came second. Each is None
    when there was no other to choose.
    """

    best_tree: PricedTree | None
    runner_up: PricedTree | None
    inputs: PlanInputs

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "schema": SCHEMA,
            **_priced_to_dict(self),
            "best_tree": self.best_tree and _priced_to_dict(self.best_tree),
            "runner_up": self.runner_up and _priced_to_dict(self.runner_up),
            "inputs": self.inputs.to_dict(),
        }

    def to_json(self) -> str:
        """One JSON object, which `from_json` reads."""
        return json.dumps(self.to_dict())

    @staticmethod
    def from_json(document: str | bytes) -> TreePlan:
        """Reads a plan, trusting nothing: its figures must follow from its own inputs.

        Raises ValueError when the document is not a plan of this schema, or not a consistent one.
        """
        try:
            data = json.loads(document, parse_constant=_refuse_constant)
            inputs = PlanInputs.from_dict(data["inputs"])
            best_tree, runner_up = (data[key] and _reprice(data[key], inputs) for key in ("best_tree", "runner_up"))
            plan = _plan(_reprice(data, inputs), best_tree, runner_up, inputs)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"not a tree plan: {type(error).__name__}: {error}") from error
        if not _agree(plan.to_dict(), data):
            raise ValueError(f"not a tree plan of schema {SCHEMA}, or its figures do not follow from its inputs")
        return plan


def choose(inputs: PlanInputs, *, max_size: int | None = None, max_levels: int = MAX_LEVELS) -> TreePlan:
    """The plan with the fewest seconds per token among trees, chains and off.

    Trees have at most `max_size` nodes, never more than the verify curve's end, and at most `max_levels` levels; for
    every size and number of levels the tree with the most expected tokens per step is considered.
    """
    size = inputs.verify_curve.max_tokens if max_size is None else min(max_size, inputs.verify_curve.max_tokens)
    levels = min(max_levels, size)
    shapes = {Topology.root_only(), *(Topology.chain(each) for each in range(2, levels + 1))}
    if inputs.acceptance:
        shapes |= {_cheapest(frontier, inputs) for frontier in frontiers(inputs.acceptance, size, levels)}
    ranking = sorted((price(each, inputs) for each in shapes), key=_preference)
    best_tree = next((each for each in ranking if each.kind != "off"), None)
    return _plan(ranking[0], best_tree, ranking[1] if len(ranking) > 1 else None, inputs)


def price(topology: Topology, inputs: PlanInputs) -> PricedTree:
    """Seconds per token = (t(n) + one draft forward per level with internal nodes + overheads) / F; off costs t(1).

    Raises ValueError when a forward would be wider than the curves were measured.
    """
    off_seconds = inputs.verify_curve.at(1)
    if topology.size == 1:
        return PricedTree(topology, 1.0, off_seconds, 1.0)
    drafting = draft_seconds(topology, inputs.draft_curve)
    step_seconds = inputs.verify_curve.at(topology.size) + drafting + inputs.overhead_seconds
    tokens = expected_tokens(topology, inputs.acceptance)
    return PricedTree(topology, tokens, step_seconds / tokens, off_seconds / (step_seconds / tokens))


def draft_seconds(topology: Topology, curve: LatencyCurve) -> float:
    """Seconds to grow a tree: one forward per level with internal nodes, as wide as they are many."""
    widths = np.bincount([topology.depths[node] for node in topology.internal_nodes])
    return sum(curve.at(int(width)) for width in widths)


def _cheapest(frontier: Frontier, inputs: PlanInputs) -> Topology:
    """The size with the fewest seconds per token, of the sizes that have a tree."""
    max_size = len(frontier.tokens) - 1
    drafting = inputs.draft_curve.table(max_size)[frontier.internal].sum(axis=1)
    step_seconds = inputs.verify_curve.table(max_size) + drafting + inputs.overhead_seconds
    with np.errstate(invalid="ignore"):
        seconds = np.where(frontier.tokens > 0.0, step_seconds / frontier.tokens, np.inf)
    # Size 1 is off, and has no round trips.
    return frontier.tree(2 + int(seconds[2:].argmin())) if np.isfinite(seconds[2:]).any() else Topology.root_only()


def _preference(tree: PricedTree) -> tuple[float, int, tuple[int, ...]]:
    # Of two that are equal in time, the smaller.
    return tree.seconds_per_token, tree.topology.size, tree.parents


def _plan(
    chosen: PricedTree, best_tree: PricedTree | None, runner_up: PricedTree | None, inputs: PlanInputs
) -> TreePlan:
    return TreePlan(
        chosen.topology,
        chosen.tokens_per_step,
        chosen.seconds_per_token,
        chosen.speedup,
        best_tree=best_tree,
        runner_up=runner_up,
        inputs=inputs,
    )


def _priced_to_dict(tree: PricedTree) -> dict[str, Any]:
    return {
        "kind": tree.kind,
        "size": tree.topology.size,
        "levels": tree.topology.levels,
        "parents": list(tree.parents),
        "tokens_per_step": tree.tokens_per_step,
        "seconds_per_token": tree.seconds_per_token,
        "speedup": tree.speedup,
    }


def _reprice(data: dict[str, Any], inputs: PlanInputs) -> PricedTree:
    return price(Topology(tuple(map(operator.index, data["parents"]))), inputs)


def _agree(ours: Any, theirs: Any) -> bool:
    """Equal up to the rounding of another machine's arithmetic."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(_agree(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=_ROUNDING)
    return bool(ours == theirs)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
