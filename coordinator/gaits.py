"""How far a coordinator goes along with a plan: the plan's tree, a smaller one, plain decoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from sequoia.planner import PricedTree, TreePlan
from sequoia.topology import Topology, TreeShape

# What a plan must promise before it is followed at once; below, it is tried first.
LEAST_SPEEDUP = 1.05

PLAIN = Topology.root_only()


class Gait(Enum):
    """How far the coordinator goes along with the plan."""

    ON = "on"
    REDUCED = "reduced"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class Gaits:
    """The trees of a plan by gait, and the seconds per token that they were predicted to take.

    `reading_seconds` of the target's time per token of a prompt that the draft reads, for all sessions together.
    """

    trees: Mapping[Gait, TreeShape]
    predicted: Mapping[Gait, float]
    first: Gait
    promise: str
    cause: str = "plan"  # of the first gait, in a word
    reading_seconds: float = 0.0

    @staticmethod
    def of(plan: TreePlan) -> Gaits:
        """From a plan."""
        priced: dict[Gait, PricedTree] = {}
        if plan.best_tree is not None:
            priced[Gait.ON] = plan.best_tree
        if plan.reduced is not None:
            priced[Gait.REDUCED] = plan.reduced
        trees: dict[Gait, TreeShape] = {gait: each.shape for gait, each in priced.items()}
        predicted = {gait: each.seconds_per_token for gait, each in priced.items()}
        trees[Gait.OFF], predicted[Gait.OFF] = PLAIN, plan.inputs.verify_curve.at(1)
        speedup = plan.best_tree.speedup if plan.best_tree else 0.0
        first = Gait.ON if speedup >= LEAST_SPEEDUP else Gait.OFF
        promise = f"the plan promises {speedup:.2f} of plain decoding's speed"
        curve = plan.inputs.draft_curve
        reading = curve.seconds[-1] / curve.max_tokens if plan.inputs.shares_device else 0.0
        return Gaits(trees, predicted, first, promise, reading_seconds=reading)

    @staticmethod
    def unplanned(tree: Topology, chain: Topology) -> Gaits:
        """Of a pair without a plan: a built-in tree, tried before anything is known."""
        trees: dict[Gait, TreeShape] = {Gait.ON: tree, Gait.REDUCED: chain, Gait.OFF: PLAIN}
        return Gaits(trees, dict.fromkeys(trees, 1.0), Gait.ON, "there is no plan yet", "no_plan")
