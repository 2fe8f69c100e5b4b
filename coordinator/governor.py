"""Never slower: compares what speculation realises with what plain decoding takes, and goes the faster way.

Three gaits: the plan's tree, a smaller one, plain decoding. Each has a pace, measured on the steps that really ran. The
others are tried again now and then; what the trials lose is at most a small share of the time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from coordinator.pace import Pace
from sequoia.planner import PricedTree, TreePlan
from sequoia.topology import Topology, TreeShape

# What a plan must promise before it is followed at once; below, it is tried first.
LEAST_SPEEDUP = 1.05
# A gait is left for one that is faster by this much at least, and by so many standard errors of the difference.
_LEAST_GAIN, _STANDARD_ERRORS = 0.02, 2.5
# A trial's length in steps of a session. Plain steps vary less, so that fewer of them will do.
_TRIAL_STEPS, _PLAIN_TRIAL_STEPS = 8, 4
# First steps of a trial that are left out of it, for each other session: until the last of them has changed over.
_SETTLING_STEPS = 2
# Plain steps that a session runs on by itself before it asks again: of all sessions together, of one at least.
_PLAIN_STEPS, _LEAST_PLAIN_STEPS = 64, 4
# Steps of a session between the end of a trial and the next one, at least; fewer as long as plain decoding's pace is not known.
_BETWEEN_TRIALS, _BETWEEN_FIRST_TRIALS = 24, 8
# The share of the time that trials may lose.
_TRIAL_SHARE = 0.01
# A trial that is still waiting for its first tree after so many steps is given up: the draft is not there.
_PATIENCE_STEPS = 64
# Tokens that a step is taken to bring before one was seen.
_USUAL_TOKENS = 3.0

PLAIN = Topology.root_only()


class Gait(Enum):
    """How far the coordinator goes along with the plan."""

    ON = "on"
    REDUCED = "reduced"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class Gaits:
    """The trees of a plan by gait, and the seconds per token that they were predicted to take."""

    trees: Mapping[Gait, TreeShape]
    predicted: Mapping[Gait, float]
    first: Gait
    promise: str

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
        return Gaits(trees, predicted, first, f"the plan promises {speedup:.2f} of plain decoding's speed")

    @staticmethod
    def unplanned(tree: Topology, chain: Topology) -> Gaits:
        """Of a pair without a plan: a built-in tree, tried before anything is known."""
        trees: dict[Gait, TreeShape] = {Gait.ON: tree, Gait.REDUCED: chain, Gait.OFF: PLAIN}
        return Gaits(trees, dict.fromkeys(trees, 1.0), Gait.ON, "there is no plan yet")


class Governor:
    """Decides on the gait of requests of one kind, for all of them together, by what it is told their steps took.

    Of `num_sessions` that run at a time, about, all change at once, and a trial lasts until all have: among sessions that
    draft, plain decoding is slow, and by what it takes there trees would seem to pay that cost all sessions time.
    """

    def __init__(self, gaits: Gaits, num_sessions: int = 1) -> None:
        self._gaits, self._num_sessions = gaits, num_sessions
        self.gait = gaits.first
        self.reason = gaits.promise
        self._paces: dict[TreeShape, Pace] = {}
        self._trial: Gait | None = None
        self._trial_steps_left = self._trial_waits = self._num_unsettled = 0
        self._steps_since_trial = 0
        self._credit_seconds = 0.0

    @property
    def paces(self) -> Mapping[TreeShape, Pace]:
        """By shape; plain decoding is the root-only one. A copy."""
        return dict(self._paces)

    def follow(self, gaits: Gaits) -> None:
        """Go on with another plan's trees. What is known of a tree that both have stays known."""
        if gaits.trees != self._gaits.trees or gaits.first != self._gaits.first:
            self.gait, self.reason, self._trial = gaits.first, gaits.promise, None
        self._gaits = gaits
        self._paces = {tree: pace for tree, pace in self._paces.items() if tree in gaits.trees.values()}

    def tree(self) -> TreeShape:
        """Of the next step."""
        return self._gaits.trees[self._trial or self.gait]

    @property
    def num_plain_steps(self) -> int:
        """That a session without a tree may run on by itself before it asks again."""
        if self._trial:
            return math.ceil((self._num_unsettled + self._trial_steps_left) / self._num_sessions) - 1
        return max(_LEAST_PLAIN_STEPS, _PLAIN_STEPS // self._num_sessions)

    def observe(self, shape: TreeShape, seconds: float, num_tokens: int, *, usual: bool = True) -> None:
        """What one step took for which `shape` was chosen.

        Not `usual` is one that waited for the draft, or came right after a step of the other kind, as at the beginning
        of every answer. That belongs to the pace of a gait that is gone in, and not to that of one which is only tried.
        """
        gait = self._gait_of(shape)
        is_trial = gait is self._trial
        if not is_trial or (usual and not self._num_unsettled):
            pace = self._paces.setdefault(self._gaits.trees[gait], Pace(self._num_sessions))
            pace.add(seconds, num_tokens)
        if is_trial:
            self._charge(seconds, num_tokens, usual)
        elif self._trial is None:
            self._credit_seconds += _TRIAL_SHARE * seconds
            self._steps_since_trial += 1
        if self._trial is None:
            self._decide()
            self._try_another()

    def _gait_of(self, shape: TreeShape) -> Gait:
        """Trees that were cut at the end of an answer, or explored, belong to the gait that is gone in."""
        known = (gait for gait, tree in self._gaits.trees.items() if tree == shape)
        return next(known, self._trial or self.gait)

    def _charge(self, seconds: float, num_tokens: int, usual: bool) -> None:
        """A trial pays for what it takes longer than the gait that it interrupts."""
        self._credit_seconds -= max(0.0, seconds - num_tokens * self._expected(self.gait))
        if self._num_unsettled:
            self._num_unsettled -= 1
        elif usual:
            self._trial_steps_left -= 1
        else:
            self._trial_waits += 1
        if self._trial_steps_left == 0 or self._trial_waits >= _PATIENCE_STEPS * self._num_sessions:
            self._trial, self._steps_since_trial = None, 0

    def _decide(self) -> None:
        known = {gait: pace for gait in self._gaits.trees if (pace := self._pace(gait)) is not None}
        if self.gait not in known:
            return
        now = known[self.gait]
        better = {gait: pace for gait, pace in known.items() if gait is not self.gait and _gains(pace, now)}
        if better:
            self._change(min(better, key=lambda gait: better[gait].seconds_per_token), known)

    def _change(self, gait: Gait, known: Mapping[Gait, Pace]) -> None:
        # Down by one step first, when the smaller tree is not known and may still pay.
        if self.gait is Gait.ON and gait is Gait.OFF and self._may_pay(Gait.REDUCED, known):
            gait = Gait.REDUCED
        self.gait = gait
        paces = ", ".join(f"{each.value} {pace.seconds_per_token * 1e3:.1f}" for each, pace in known.items())
        self.reason = f"measured, in ms a token: {paces}"

    def _may_pay(self, gait: Gait, known: Mapping[Gait, Pace]) -> bool:
        is_open = gait in self._gaits.trees and gait not in known
        return is_open and self._expected(gait) < known[Gait.OFF].seconds_per_token

    def _try_another(self) -> None:
        """Begin the trial of the gait that was observed least, when what it is expected to lose is paid for."""
        others = [gait for gait in self._gaits.trees if gait is not self.gait]
        if self._is_open(Gait.OFF):
            # Nothing can be said before plain decoding was measured: that trial is on credit.
            if self._steps_since_trial >= _BETWEEN_FIRST_TRIALS * self._num_sessions:
                self._try(Gait.OFF)
        elif others and self._steps_since_trial >= _BETWEEN_TRIALS * self._num_sessions:
            gait = min(others, key=self._evidence)
            if self._credit_seconds >= self._expected_loss(gait):
                self._try(gait)

    def _is_open(self, gait: Gait) -> bool:
        return gait is not self.gait and self._pace(gait) is None

    def _try(self, gait: Gait) -> None:
        self._trial, self._trial_waits = gait, 0
        self._trial_steps_left = _num_trial_steps(gait) * self._num_sessions
        self._num_unsettled = _SETTLING_STEPS * (self._num_sessions - 1)

    def _expected_loss(self, gait: Gait) -> float:
        pace = self._paces.get(self._gaits.trees[gait])
        num_steps = _num_trial_steps(gait) * self._num_sessions + _SETTLING_STEPS * (self._num_sessions - 1)
        num_tokens = num_steps * (pace.num_tokens / pace.num_steps if pace else _USUAL_TOKENS)
        return max(0.0, num_tokens * (self._expected(gait) - self._expected(self.gait)))

    def _evidence(self, gait: Gait) -> int:
        pace = self._paces.get(self._gaits.trees[gait])
        return pace.observed if pace else 0

    def _pace(self, gait: Gait) -> Pace | None:
        """When it is known."""
        pace = self._paces.get(self._gaits.trees[gait])
        return pace if pace is not None and pace.is_known else None

    def _expected(self, gait: Gait) -> float:
        """Seconds per token: as observed, or else as predicted, by the scale of the gait that is observed best."""
        if (pace := self._pace(gait)) is not None:
            return pace.seconds_per_token
        known = [each for each in self._gaits.trees if self._pace(each) is not None]
        if not known:
            return self._gaits.predicted[gait]
        best = max(known, key=self._evidence)
        known_pace = self._paces[self._gaits.trees[best]].seconds_per_token
        return known_pace * self._gaits.predicted[gait] / self._gaits.predicted[best]


def _num_trial_steps(gait: Gait) -> int:
    return _PLAIN_TRIAL_STEPS if gait is Gait.OFF else _TRIAL_STEPS


def _gains(pace: Pace, now: Pace) -> bool:
    gain = now.seconds_per_token - pace.seconds_per_token
    error = math.hypot(now.standard_error, pace.standard_error)
    return gain > max(_LEAST_GAIN * now.seconds_per_token, _STANDARD_ERRORS * error)
