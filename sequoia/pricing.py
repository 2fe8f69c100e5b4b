"""What a token tree brings and costs on some hardware: tokens per step, seconds per token."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sequoia.hardware import LatencyCurve
from sequoia.optimal_tree import Rows, derivatives, expected_tokens, frontiers, rows_of
from sequoia.topology import DynamicShape, Topology, TreeShape

# Seconds or tokens, one or as many as there are trees.
Float = np.float64 | NDArray[np.float64]

# A sum of rounded probabilities may exceed 1 by this much.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class MeasuredTree:
    """A dynamic tree that was tried: what its steps brought, and how large it became, in the mean.

    Raises ValueError when a value cannot be right.
    """

    shape: DynamicShape
    tokens_per_step: float
    tokens_error: float  # standard error
    num_nodes: float
    num_levels: float

    def __post_init__(self) -> None:
        if not 1.0 <= self.num_levels <= self.shape.levels or not self.num_levels <= self.num_nodes <= self.shape.size:
            raise ValueError(f"no {self.shape} has {self.num_nodes} nodes and {self.num_levels} levels in the mean")
        if not 1.0 <= self.tokens_per_step <= self.num_levels or not 0.0 <= self.tokens_error < math.inf:
            raise ValueError(f"{self.tokens_per_step} tokens a step, +- {self.tokens_error}, are none of {self.shape}")

    @staticmethod
    def from_dict(data: dict[str, Any]) -> MeasuredTree:
        """From the JSON form. Raises KeyError, TypeError or ValueError when it is not of that form."""
        values = {each.name: data[each.name] for each in fields(MeasuredTree)}
        return MeasuredTree(**{**values, "shape": DynamicShape.from_dict(values["shape"])})

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)

    def seconds(self, verify: LatencyCurve, draft: LatencyCurve) -> tuple[float, float]:
        """Of the forwards of a step: the target's, and the draft's, one a level but the last and as wide as allowed."""
        num_forwards = max(0.0, self.num_levels - 1.0)
        drafting = min(1.0, num_forwards) * draft.at(1) + max(0.0, num_forwards - 1.0) * draft.at(self.shape.width)
        return verify.at(math.ceil(self.num_nodes)), drafting


@dataclass(frozen=True, slots=True)
class PlanInputs:
    """What a plan follows from. Raises ValueError when a value cannot be right.

    `acceptance[depth][rank]`, the last row serving all deeper (a vector is taken as one row), and `errors` of that
    shape: its standard errors, none when it is taken as known. `verify_curve` by the tokens of a session in the
    forward, `draft_curve` by the width of a level, both from 1 up, both with as many sessions as the plan is for. Round
    trips per step to each worker and all else that a drafted step takes beside the forwards in seconds.

    `tokens_factor`: tokens beyond the first that a step brings, by those that follow from `acceptance`: 1 for a rule
    that decides node by node, measured for one that does not. `dynamic`: the dynamic trees that were tried; none but
    these are chosen. `draft_ahead_hit_rate`:
    the share of steps whose tree the drafter had begun while the step before was verified; None when it never does. A
    shared device hides nothing.
    """

    acceptance: Rows
    verify_curve: LatencyCurve
    draft_curve: LatencyCurve
    draft_rtt_seconds: float = 0.0
    verify_rtt_seconds: float = 0.0
    host_seconds: float = 0.0
    errors: Rows = ()
    tokens_factor: float = 1.0
    dynamic: tuple[MeasuredTree, ...] = ()
    draft_ahead_hit_rate: float | None = None
    shares_device: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "acceptance", rows_of(self.acceptance))
        for row in self.acceptance:
            if not all(0.0 <= each <= 1.0 for each in row) or sum(row) > 1.0 + _ROUNDING:
                raise ValueError(f"acceptance must be probabilities that sum to at most 1, not {row}")
        if self.errors and list(map(len, self.errors)) != list(map(len, self.acceptance)):
            raise ValueError("errors must have the shape of acceptance")
        if self.verify_curve.num_tokens[0] != 1 or self.draft_curve.num_tokens[0] != 1:
            raise ValueError("a latency curve must start at width 1: decoding without speculation is compared with it")
        if not all(math.isfinite(each) and each >= 0.0 for each in self._overheads):
            raise ValueError(f"round trips and host time must be seconds of 0 or more, not {self._overheads}")
        if not 0.0 <= self.tokens_factor < math.inf:
            raise ValueError(f"tokens_factor must be 0 or more, not {self.tokens_factor}")
        if self.draft_ahead_hit_rate is not None and not 0.0 <= self.draft_ahead_hit_rate <= 1.0:
            raise ValueError(f"draft_ahead_hit_rate must be in 0..1, not {self.draft_ahead_hit_rate}")

    @property
    def _overheads(self) -> tuple[float, float, float]:
        return self.draft_rtt_seconds, self.verify_rtt_seconds, self.host_seconds

    @staticmethod
    def from_dict(data: dict[str, Any]) -> PlanInputs:
        """From the JSON form. Raises KeyError, TypeError or ValueError when it is not of that form."""
        values = {each.name: data[each.name] for each in fields(PlanInputs)}
        for name in ("verify_curve", "draft_curve"):
            values[name] = LatencyCurve.from_dict(values[name])
        for name in ("acceptance", "errors"):
            values[name] = tuple(tuple(row) for row in values[name])
        values["dynamic"] = tuple(map(MeasuredTree.from_dict, values["dynamic"]))
        return PlanInputs(**values)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        values = {each.name: getattr(self, each.name) for each in fields(PlanInputs)}
        for name in ("verify_curve", "draft_curve"):
            values[name] = values[name].to_dict()
        for name in ("acceptance", "errors"):
            values[name] = [list(row) for row in values[name]]
        values["dynamic"] = [each.to_dict() for each in self.dynamic]
        return values

    def step_seconds(self, verify_seconds: Float, draft_seconds: Float) -> Float:
        """A drafted step from its forwards, of any shape: those, round trips and host, less what drafting ahead hides.

        When the guess was right, the draft's forwards are hidden as far as they fit between its answer and the next
        message to it, round trips included; when it was wrong, the forward that runs cannot be interrupted: half of
        one, on average, is lost.
        """
        between = verify_seconds + self.verify_rtt_seconds + self.draft_rtt_seconds
        whole = between + draft_seconds + self.host_seconds
        if self.draft_ahead_hit_rate is None or self.shares_device:
            return whole
        hidden = self.draft_ahead_hit_rate * np.minimum(between, draft_seconds)
        return whole - hidden + (1.0 - self.draft_ahead_hit_rate) * self.draft_curve.at(1) / 2.0

    def tokens_per_step(self, expected: Float) -> Float:
        """What a step brings where the acceptance alone makes us expect so many tokens."""
        return 1.0 + self.tokens_factor * (expected - 1.0)

    def measured(self, shape: DynamicShape) -> MeasuredTree:
        """What was measured of a dynamic tree. Raises ValueError for one that was not tried."""
        found = next((each for each in self.dynamic if each.shape == shape), None)
        if found is None:
            raise ValueError(f"{shape} was not measured")
        return found


@dataclass(frozen=True, slots=True)
class PricedTree:
    """A tree, and what a step with it is predicted to bring and to cost.

    `tokens_error`: the standard error of `tokens_per_step`, from that of the acceptance. `speedup` is the seconds per
    token of plain decoding by those of this tree.
    """

    shape: TreeShape
    tokens_per_step: float
    tokens_error: float
    seconds_per_token: float
    speedup: float

    @property
    def kind(self) -> Literal["tree", "dynamic", "chain", "off"]:
        """What the tree amounts to."""
        if isinstance(self.shape, DynamicShape):
            return "dynamic"
        if self.shape.size == 1:
            return "off"
        return "chain" if self.shape.levels == self.shape.size else "tree"

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "kind": self.kind,
            "size": self.shape.size,
            "levels": self.shape.levels,
            **self.shape.to_dict(),
            "tokens_per_step": self.tokens_per_step,
            "tokens_error": self.tokens_error,
            "seconds_per_token": self.seconds_per_token,
            "speedup": self.speedup,
        }


def price(shape: TreeShape, inputs: PlanInputs) -> PricedTree:
    """Seconds per token = (t(n) + one draft forward per level with internal nodes + overheads) / F; off costs t(1).

    Of a dynamic tree all that was measured counts. Raises ValueError when a forward would be wider than the curves were
    measured, and for a dynamic tree that was not tried.
    """
    off_seconds = inputs.verify_curve.at(1)
    if shape.size == 1:
        return PricedTree(shape, 1.0, 0.0, off_seconds, 1.0)
    if isinstance(shape, DynamicShape):
        measured = inputs.measured(shape)
        forwards = measured.seconds(inputs.verify_curve, inputs.draft_curve)
        tokens, error = measured.tokens_per_step, measured.tokens_error
    else:
        forwards = inputs.verify_curve.at(shape.size), draft_seconds(shape, inputs.draft_curve)
        tokens = float(inputs.tokens_per_step(np.float64(expected_tokens(shape, inputs.acceptance))))
        error = _tokens_error(shape, inputs)
    seconds = float(inputs.step_seconds(*map(np.float64, forwards))) / tokens
    return PricedTree(shape, tokens, error, seconds, off_seconds / seconds)


def planned_like(shape: TreeShape, inputs: PlanInputs) -> Topology:
    """The tree itself; of a dynamic one the best tree of as many nodes as it had in the mean, and no more levels.

    Raises ValueError for one that was not tried.
    """
    if isinstance(shape, Topology):
        return shape
    measured = inputs.measured(shape)
    levels = max(2, round(measured.num_levels))
    return _best_of(inputs.acceptance, max(levels, round(measured.num_nodes)), levels)


@lru_cache(maxsize=128)
def _best_of(acceptance: Rows, size: int, levels: int) -> Topology:
    """The tree of most expected tokens; a chain where the known ranks are too few for one of that size."""
    [frontier] = frontiers(acceptance, size, levels, min_levels=levels)
    return frontier.tree(size) if math.isfinite(frontier.tokens[size]) else Topology.chain(levels)


def draft_seconds(shape: Topology, curve: LatencyCurve) -> float:
    """Seconds to grow a tree: one forward per level with internal nodes, as wide as they are many."""
    widths = np.bincount([shape.depths[node] for node in shape.internal_nodes])
    return sum(curve.at(int(width)) for width in widths)


def _tokens_error(topology: Topology, inputs: PlanInputs) -> float:
    """To first order, the entries of the acceptance taken as independent."""
    if not inputs.errors:
        return 0.0
    slopes = derivatives(topology, inputs.acceptance)
    spread = [slopes[depth][rank] * error for depth, row in enumerate(inputs.errors) for rank, error in enumerate(row)]
    return inputs.tokens_factor * math.hypot(*spread)
