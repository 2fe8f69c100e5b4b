"""How a request's next step is decoded: as it was asked for, or as plan and governor say."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Protocol

from coordinator.gaits import PLAIN, Gait, Gaits
from coordinator.governor import Governor
from coordinator.load import Load
from coordinator.request import Request
from coordinator.trees import FoundPlan, Pair, TreePlans, max_tree_size
from sequoia.acceptance import PRIOR
from sequoia.optimal_tree import Acceptance
from sequoia.situation import SESSIONS, Situation
from sequoia.topology import DynamicShape, Topology, TreeShape
from sequoia.v1 import coordinator_pb2, draft_pb2

_log = logging.getLogger(__name__)

# Serve until a plan is measured: the best tree of 8 nodes and 4 levels for the paper's acceptance (acceptance.PRIOR).
BUILT_IN_TREE = Topology((-1, 0, 0, 1, 1, 2, 3, 5))
BUILT_IN_CHAIN = Topology.chain(3)

# Plain steps that the verify worker runs by itself where there is nothing to ask.
_PLAIN_STEPS = 64
# One drafted step in so many offers the root's children of ranks that the tree has not, to learn about them.
_EXPLORE_EVERY, _EXPLORED_RANKS = 64, 8


@dataclass(frozen=True, slots=True)
class Choice:
    """A step's tree; without one (root-only) how many plain steps the verify worker may run on by itself."""

    shape: TreeShape
    num_plain_steps: int = _PLAIN_STEPS
    is_tried: bool = False  # for some steps, to see what they take


class Distances(Pair, Protocol):
    """The workers, and how far they are."""

    @property
    def round_trip_seconds(self) -> float:
        """To both, one after the other."""


class Speculator:
    """What all requests of a coordinator share: plans, what was realised, how many run.

    `num_ahead_hits` steps had a tree that was begun while the step before was verified; `num_ahead_misses` had one that
    was grown from its root, though others had been begun.
    """

    def __init__(self, plans: TreePlans, workers: Distances) -> None:
        self.plans = plans
        self._workers = workers
        self._governors: dict[Situation, Governor] = {}
        self._load = Load()
        self._num_drafted = 0
        self.num_ahead_hits = self.num_ahead_misses = 0

    def __enter__(self) -> Speculator:
        """Around each request, so that they are counted."""
        self._load.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self._load.end()

    @property
    def governors(self) -> dict[Situation, Governor]:
        """Of every kind of request that was served, at whatever distance: a copy, as another thread may ask."""
        return dict(self._governors)

    @property
    def round_trip_seconds(self) -> float:
        """To both workers, one after the other."""
        return self._workers.round_trip_seconds

    def situation(self, request: Request, num_tokens: int) -> Situation:
        """Where a request stands with so many committed tokens."""
        rule, temperature = request.decoding.rule, request.decoding.sampling.temperature
        return Situation.of(rule, temperature, self._load.count, num_tokens, self.round_trip_seconds)

    def governor(self, situation: Situation) -> Governor:
        """That of all requests in a situation, at whatever distance, following the plan in force."""
        found = self.plans.find(situation)
        gaits = self._gaits(found)
        anywhere = replace(situation, round_trip="")
        governor = self._governors.get(anywhere)
        if governor is None:
            num_sessions = round(SESSIONS.planned_at[SESSIONS.names.index(situation.sessions)])
            governor = self._governors[anywhere] = Governor(gaits, num_sessions)
        governor.follow(gaits)
        return governor

    def acceptance(self, request: Request) -> Acceptance:
        """What the plan in force for a request takes acceptance for."""
        found = self.plans.find(self.situation(request, len(request.prompt)))
        return found.plan.inputs.acceptance if found else PRIOR

    def best_tree(self, situation: Situation) -> TreeShape:
        """For requests that speculate whether or not it pays."""
        found = self.plans.find(situation)
        best = found.plan.best_tree if found else None
        return self._fitting(best.shape if best else BUILT_IN_TREE)

    def explored(self, shape: TreeShape) -> TreeShape:
        """The tree, now and then with more children at its root; a dynamic one teaches nothing about ranks."""
        self._num_drafted += 1
        room = self._limit - shape.size
        if self._num_drafted % _EXPLORE_EVERY or room <= 0 or isinstance(shape, DynamicShape):
            return shape
        return shape.with_more_children(min(room, _EXPLORED_RANKS))

    def _gaits(self, found: FoundPlan | None) -> Gaits:
        gaits = Gaits.of(found.plan) if found else Gaits.unplanned(BUILT_IN_TREE, BUILT_IN_CHAIN)
        return replace(gaits, trees={gait: self._fitting(tree) for gait, tree in gaits.trees.items()})

    @property
    def _limit(self) -> int:
        return max_tree_size(self._workers.verify_description, self._workers.draft_description)

    def _fitting(self, shape: TreeShape) -> TreeShape:
        """Cut where the workers were started with a lower limit than the plan was made for."""
        return shape.cut_to(self._limit)


class RequestSpeculation:
    """One request's choices. `state` and `reason` tell how far it goes along with the plan, and why."""

    def __init__(self, speculator: Speculator, request: Request, *, has_draft: bool) -> None:
        self._speculator, self._request, self._has_draft = speculator, request, has_draft
        self._governor: Governor | None = None
        self._has_begun = False  # a draft was asked for, and has read the text
        self.state = coordinator_pb2.SPECULATION_STATE_UNSPECIFIED
        self.reason = ""

    def choose(self, num_tokens: int, num_tokens_left: int) -> Choice:
        """Of the next step, behind so many committed tokens, and so many before the answer's end at the latest."""
        if self._request.mode == coordinator_pb2.SPECULATION_MODE_OFF:
            return Choice(PLAIN)
        if not self._has_draft:
            self.state, self.reason = coordinator_pb2.SPECULATION_STATE_OFF, "there is no draft worker"
            return Choice(PLAIN)
        if self._request.shape is not None:
            return Choice(self._request.shape)
        situation = self._speculator.situation(self._request, num_tokens)
        if self._request.mode == coordinator_pb2.SPECULATION_MODE_TREE:
            return Choice(self._speculator.best_tree(situation))
        self._governor = self._speculator.governor(situation)
        self._tell(self._governor)
        return self._governed(self._governor, num_tokens, num_tokens_left)

    def drafted(self, ahead: draft_pb2.DraftAhead) -> None:
        """A tree came for the step."""
        self._speculator.num_ahead_hits += ahead == draft_pb2.DRAFT_AHEAD_HIT
        self._speculator.num_ahead_misses += ahead == draft_pb2.DRAFT_AHEAD_MISS

    def opened(self, seconds: float, num_tokens: int) -> None:
        """The draft has read so many tokens, on the target's own device, in so many seconds."""
        if self._governor is not None:
            self._governor.charge(seconds, num_tokens)

    def observe(self, choice: Choice, seconds: float, num_tokens: int, *, usual: bool) -> None:
        """What the step took. `usual`: it went as chosen, right after one that did."""
        if self._governor is not None:
            self._governor.observe(choice.shape, seconds, num_tokens, usual=usual)

    def _governed(self, governor: Governor, num_tokens: int, num_tokens_left: int) -> Choice:
        tree = governor.tree()
        if tree == PLAIN:
            return Choice(PLAIN, governor.num_plain_steps)
        if not self._has_begun and not governor.pays_to_begin(num_tokens, num_tokens_left):
            return Choice(PLAIN)
        self._has_begun = True
        return Choice(self._speculator.explored(tree), is_tried=governor.is_trying)

    def _tell(self, governor: Governor) -> None:
        state = STATES[governor.gait]
        if self.state and state != self.state:
            _log.info("speculation", extra={"state": governor.gait.value, "reason": governor.reason})
        self.state, self.reason = state, governor.reason


STATES = {
    Gait.ON: coordinator_pb2.SPECULATION_STATE_ON,
    Gait.REDUCED: coordinator_pb2.SPECULATION_STATE_REDUCED,
    Gait.OFF: coordinator_pb2.SPECULATION_STATE_OFF,
}
