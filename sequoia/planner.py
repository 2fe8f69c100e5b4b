"""The plan: which tree, chain or nothing costs the fewest seconds per token for a pair on its hardware."""

from __future__ import annotations

import json
import math
import operator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from sequoia.hardware import LatencyCurve
from sequoia.optimal_tree import Frontier, Rows, expected_tokens, frontiers, optimal_tree
from sequoia.pricing import PlanInputs, PricedTree, draft_seconds, planned_like, price
from sequoia.topology import DynamicShape, Topology, TreeShape

__all__ = [
    "PlanInputs",
    "PricedTree",
    "TreePlan",
    "choose",
    "draft_seconds",
    "expected_tokens",
    "optimal_tree",
    "price",
    "width_limits",
]

Float = NDArray[np.float64]

SCHEMA = "sequoia.tree_plan.v4"
MAX_LEVELS = 32
# Limits on a level's width that are tried, of those the draft's curve has.
_MOST_WIDTHS = 6
_ALTERNATIVES = ("best_tree", "reduced", "runner_up")
# Figures that another machine computed may differ by this much.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class TreePlan:
    """The tree to use: the one with the fewest predicted seconds per token.

    `best_tree` is the best one that speculates, even when the plan is not to; `reduced` the best one that speculates
    with at most half as many drafted nodes as that, for when it does not keep its promise; `runner_up` came second.
    Each is None when there was no other to choose.
    """

    chosen: PricedTree
    best_tree: PricedTree | None
    reduced: PricedTree | None
    runner_up: PricedTree | None
    inputs: PlanInputs

    @property
    def alternatives(self) -> dict[str, PricedTree | None]:
        """The trees beside the chosen one, by name."""
        return {name: getattr(self, name) for name in _ALTERNATIVES}

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: the chosen tree's figures, those of the alternatives, and the inputs."""
        others = {name: tree and tree.to_dict() for name, tree in self.alternatives.items()}
        return {"schema": SCHEMA, **self.chosen.to_dict(), **others, "inputs": self.inputs.to_dict()}

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
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not a tree plan: {type(error).__name__}: {error}") from error
        return TreePlan.from_dict(data)

    @staticmethod
    def from_dict(data: Any) -> TreePlan:
        """As `from_json`, from what `to_dict` made. Raises ValueError."""
        try:
            inputs = PlanInputs.from_dict(data["inputs"])
            others = {name: data[name] and _reprice(data[name], inputs) for name in _ALTERNATIVES}
            plan = TreePlan(_reprice(data, inputs), **others, inputs=inputs)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a tree plan: {type(error).__name__}: {error}") from error
        if not _agree(plan.to_dict(), data):
            raise ValueError(f"not a tree plan of schema {SCHEMA}, or its figures do not follow from its inputs")
        return plan


def choose(inputs: PlanInputs, *, max_size: int | None = None, max_levels: int = MAX_LEVELS) -> TreePlan:
    """The plan with the fewest seconds per token among trees, chains, dynamic trees that were tried, and off.

    Trees have at most `max_size` nodes, never more than the verify curve's end, and at most `max_levels` levels; for
    every size, number of levels and width of a level the tree with the most expected tokens per step is considered.
    """
    size = inputs.verify_curve.max_tokens if max_size is None else min(max_size, inputs.verify_curve.max_tokens)
    shelf = _Shelf(inputs, size, min(max_levels, size))
    trees = shelf.cheapest(size)
    best_tree = trees[0] if trees else None
    smaller = shelf.cheapest(1 + (best_tree.shape.size - 1) // 2) if best_tree else []
    ranking = sorted([*trees, price(Topology.root_only(), inputs)], key=_preference)
    return TreePlan(
        chosen=ranking[0],
        best_tree=best_tree,
        reduced=smaller[0] if smaller else None,
        runner_up=ranking[1] if len(ranking) > 1 else None,
        inputs=inputs,
    )


def without_dynamic(plan: TreePlan) -> TreePlan:
    """For rules that are not exact with dynamic trees: in each one's place a planned one of about its mean size."""
    priced = (plan.chosen, *plan.alternatives.values())
    return _planned(plan) if any(each and each.kind == "dynamic" for each in priced) else plan


@lru_cache(maxsize=32)
def _planned(plan: TreePlan) -> TreePlan:
    inputs = replace(plan.inputs, dynamic=())

    def planned(tree: PricedTree) -> PricedTree:
        return price(planned_like(tree.shape, plan.inputs), inputs)

    others = {name: tree and planned(tree) for name, tree in plan.alternatives.items()}
    return TreePlan(planned(plan.chosen), **others, inputs=inputs)


class _Shelf:
    """The trees of most expected tokens, and the chains, with their seconds per token; built only when taken."""

    def __init__(self, inputs: PlanInputs, size: int, levels: int) -> None:
        self._inputs = inputs
        self._chains = [price(Topology.chain(each), inputs) for each in range(2, levels + 1)]
        widths = width_limits(inputs.draft_curve, size)
        self._frontiers = [
            each for width in widths for each in cached_frontiers(inputs.acceptance, size, levels, width)
        ]
        verifying, drafting = inputs.verify_curve.table(size), inputs.draft_curve.table(size)
        self._seconds = [self._per_token(each, verifying, drafting) for each in self._frontiers]
        self._dynamic = [price(each.shape, inputs) for each in inputs.dynamic if each.shape.size <= size]

    def cheapest(self, most: int) -> list[PricedTree]:
        """The two cheapest trees of 2 to `most` nodes, the cheapest first; fewer where there are no more."""
        sizes = [int(each[: most + 1].argmin()) for each in self._seconds]
        best = sorted((self._seconds[index][size], size, index) for index, size in enumerate(sizes))
        shapes: dict[TreeShape, None] = {}
        for seconds, size, index in best:
            if np.isfinite(seconds) and len(shapes) < 2:
                shapes[self._frontiers[index].tree(size)] = None
        priced = {price(each, self._inputs) for each in shapes}
        priced |= {each for each in (*self._chains, *self._dynamic) if each.shape.size <= most}
        return sorted(priced, key=_preference)[:2]

    def _per_token(self, frontier: Frontier, verifying: Float, drafting: Float) -> Float:
        """(size + 1,) infinite where there is no tree, or one with a forward wider than a curve; and for off."""
        with np.errstate(invalid="ignore"):
            seconds = self._inputs.step_seconds(verifying, drafting[frontier.internal].sum(axis=1))
            seconds = seconds / self._inputs.tokens_per_step(frontier.tokens)
        seconds = np.where(np.isfinite(frontier.tokens), seconds, np.inf)
        seconds[:2] = np.inf
        return seconds


def width_limits(curve: LatencyCurve, size: int) -> list[int | None]:
    """Limits on the nodes with children in a level: none, and measured widths that a tree of that size may exceed.

    Beyond the curve's end a tree cannot be grown, and before a rise of it the narrower tree may be the faster one.
    """
    narrower = [width for width in curve.num_tokens if width < size // 2]
    return [None, *narrower[:: -(-len(narrower) // _MOST_WIDTHS) or 1]]


@lru_cache(maxsize=32)
def cached_frontiers(acceptance: Rows, size: int, levels: int, width: int | None) -> list[Frontier]:
    """The same acceptance is planned for under many loads and at many distances."""
    return frontiers(acceptance, size, levels, max_width=width)


def _preference(tree: PricedTree) -> tuple[float, int, bool, tuple[int, ...]]:
    # Of two that are equal in time, the smaller, and the one that is planned.
    rest = tree.shape.parents if isinstance(tree.shape, Topology) else (tree.shape.width,)
    return tree.seconds_per_token, tree.shape.size, tree.kind == "dynamic", rest


def _reprice(data: dict[str, Any], inputs: PlanInputs) -> PricedTree:
    return price(_shape(data), inputs)


def _shape(data: dict[str, Any]) -> TreeShape:
    if "parents" in data:
        return Topology(tuple(map(operator.index, data["parents"])))
    return DynamicShape.from_dict(data)


def _agree(ours: Any, theirs: Any) -> bool:
    """Equal up to the rounding of another machine's arithmetic."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(_agree(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=_ROUNDING)
    return bool(ours == theirs)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
