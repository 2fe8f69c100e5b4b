"""The plans from Redis, kept in memory and refreshed in the background."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import replace
from itertools import product
from types import TracebackType
from typing import NamedTuple, Protocol

from coordinator.background import end
from sequoia.errors import Unavailable
from sequoia.planner import TreePlan, without_dynamic
from sequoia.rules import GREEDY, RULES, SAMPLED_RULES, Rule
from sequoia.situation import SESSIONS, TEMPERATURES, Situation
from sequoia.tree_cache import PlanKey, TreeCache
from sequoia.v1.worker_pb2 import WorkerDescription

_log = logging.getLogger(__name__)


class Pair(Protocol):
    """The workers at this moment."""

    @property
    def verify_description(self) -> WorkerDescription: ...

    @property
    def draft_description(self) -> WorkerDescription | None: ...


class FoundPlan(NamedTuple):
    """A plan, and the situation that it was made for."""

    plan: TreePlan
    situation: Situation


class TreePlans:
    """Holds the last good plans. An async context manager: while it is entered, new ones reach it at once.

    Asking it never waits. Redis may be down, slow or left out (an empty URL): the plans it had stay in force.
    """

    def __init__(self, redis_url: str, pair: Pair, refresh_seconds: float, default_rule: Rule) -> None:
        self._cache = TreeCache(redis_url) if redis_url else None
        self._pair = pair
        self._default_rule = default_rule
        self._refresh_seconds = refresh_seconds
        self._plans: dict[PlanKey, TreePlan] = {}
        greedy, *sampled = TEMPERATURES.names
        served = [(GREEDY, greedy), *product(SAMPLED_RULES, sampled)]
        # Grows by what is asked for, up to the number of situations there are.
        # All loads at once: while one had no plan yet, a single session's would serve it, which promises too much.
        self._wanted = {
            Situation(rule.name, temperature, load) for rule, temperature in served for load in SESSIONS.names
        }
        self._problem = ""
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> TreePlans:
        if self._cache is not None:
            self._tasks = [
                asyncio.create_task(self._refresh_forever()),
                asyncio.create_task(self._listen_forever(self._cache)),
            ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await end(*self._tasks)
        if self._cache is not None:
            await self._cache.__aexit__(kind, error, trace)

    def find(self, situation: Situation) -> FoundPlan | None:
        """The present pair's plan for a situation, or for the likest one that has a plan; None without any.

        The rules accept within some per cent of each other, so the default rule's tree serves one that has none;
        in a dynamic one's place a planned one, where the rule needs that.
        """
        verify, draft = self._pair.verify_description, self._pair.draft_description
        if draft is None:
            return None
        if situation not in self._wanted:
            self._wanted.add(situation)
            self._news.set()  # another load must not wait for the next look
        here = plan_key(verify, draft, situation)
        for each in self._serving(situation):
            plan = self._plans.get(here.at(each))
            if plan is not None:
                takes_any = RULES[situation.rule].takes_any_shape
                return FoundPlan(plan if takes_any else without_dynamic(plan), each)
        return None

    def in_force(self) -> list[FoundPlan]:
        """The present pair's plans, coolest first, and of those the ones for the fewest sessions."""
        verify, draft = self._pair.verify_description, self._pair.draft_description
        if draft is None:
            return []
        of_pair = [key for key in self._plans if plan_key(verify, draft, key.situation) == key]
        of_pair.sort(key=lambda key: _rank(key.situation))
        return [FoundPlan(self._plans[key], key.situation) for key in of_pair]

    async def refresh(self) -> None:
        """Look once for new plans. What is wrong is logged when it begins and when it ends, not at every look."""
        if self._cache is None:
            return
        try:
            plans, rejected = await self._cache.get_many(self._keys())
        except Unavailable as error:
            self._report(str(error))
            return
        self._report("; ".join(f"{key} in Redis is {problem}" for key, problem in rejected.items()))
        for key, stored in plans.items():
            if self._plans.get(key) != stored.plan:
                chosen = stored.plan.chosen
                _log.info("new tree plan", extra={"key": str(key), "kind": chosen.kind, "size": chosen.shape.size})
                self._plans[key] = stored.plan

    async def _refresh_forever(self) -> None:
        """Again and again, at once when there is news."""
        while True:
            self._news.clear()
            await self.refresh()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._refresh_seconds):
                    await self._news.wait()

    async def _listen_forever(self, cache: TreeCache) -> None:
        while True:
            with suppress(Unavailable):  # the next refresh reports it
                async for _ in cache.news():
                    self._news.set()
            await asyncio.sleep(self._refresh_seconds)

    def _keys(self) -> list[PlanKey]:
        verify, draft = self._pair.verify_description, self._pair.draft_description
        if draft is None:
            return []
        here = plan_key(verify, draft, next(iter(self._wanted)))
        return [here.at(each) for each in {each for situation in self._wanted for each in situation.neighbours}]

    def _serving(self, situation: Situation) -> list[Situation]:
        rules = dict.fromkeys((situation.rule, self._default_rule.name))
        return [each for rule in rules for each in replace(situation, rule=rule).neighbours]

    def _report(self, problem: str) -> None:
        if problem and problem != self._problem:
            _log.warning("tree plans not refreshed", extra={"reason": problem})
        elif self._problem and not problem:
            _log.info("tree plans refreshed again")
        self._problem = problem


def plan_key(verify: WorkerDescription, draft: WorkerDescription, situation: Situation) -> PlanKey:
    """Where the plan of two workers for a situation is kept."""
    return PlanKey(pair_name(verify, draft), draft.hardware_key, verify.hardware_key, situation)


def pair_name(verify: WorkerDescription, draft: WorkerDescription) -> str:
    """Both models, with revision, element type and quantisation."""
    return f"{_model(draft)} -> {_model(verify)}"


def max_tree_size(verify: WorkerDescription, draft: WorkerDescription | None) -> int:
    """The largest tree that both workers take, in nodes."""
    return verify.max_tree_size if draft is None else min(verify.max_tree_size, draft.max_tree_size)


def _model(worker: WorkerDescription) -> str:
    return f"{worker.model}@{worker.model_revision} {worker.dtype} {worker.quantization}"


def _rank(situation: Situation) -> tuple[int, int, str]:
    temperature, sessions = situation.temperature, situation.sessions
    return TEMPERATURES.names.index(temperature), SESSIONS.names.index(sessions), str(situation)
