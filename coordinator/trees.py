"""Which tree a step uses: the plans from Redis, kept in memory and refreshed in the background, or a built-in tree."""

from __future__ import annotations

import asyncio
import logging
from itertools import product
from types import TracebackType
from typing import Protocol

from coordinator.request import Request
from sequoia.errors import Unavailable
from sequoia.planner import TreePlan
from sequoia.rules import GREEDY, SAMPLED_RULES, Rule
from sequoia.sampling import Decoding
from sequoia.topology import Topology
from sequoia.tree_cache import TEMPERATURE_BUCKETS, PlanKey, TreeCache, temperature_bucket
from sequoia.v1 import coordinator_pb2
from sequoia.v1.worker_pb2 import WorkerDescription

_log = logging.getLogger(__name__)

# Serves until a plan is measured: the best tree of 8 nodes and 4 levels for the paper's acceptance (acceptance.PRIOR).
BUILT_IN_TREE = Topology((-1, 0, 0, 1, 1, 2, 3, 5))

# What a plan must promise before `auto` speculates: short measurements on a shared machine are off by some per cent.
LEAST_SPEEDUP = 1.1


class Pair(Protocol):
    """The workers at this moment."""

    verify_description: WorkerDescription
    draft_description: WorkerDescription | None


class TreePlans:
    """Holds the last good plans. An async context manager: while it is entered, it looks for new ones.

    Asking it never waits. Redis may be down, slow or left out (an empty URL): the plans it had stay in force.
    """

    def __init__(self, redis_url: str, pair: Pair, refresh_seconds: float, default_rule: Rule) -> None:
        self._cache = TreeCache(redis_url) if redis_url else None
        self._pair = pair
        self._default_rule = default_rule
        self._refresh_seconds = refresh_seconds
        self._plans: dict[PlanKey, TreePlan] = {}
        self._problem = ""
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> TreePlans:
        self._task = asyncio.create_task(self._refresh_forever())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._cache is not None:
            await self._cache.__aexit__(kind, error, trace)

    def topology(self, request: Request) -> Topology:
        """The tree for the request's next step; root-only means plain decoding."""
        if request.mode == coordinator_pb2.SPECULATION_MODE_OFF:
            return Topology.root_only()
        if request.topology is not None:
            return request.topology
        plan = self.plan_for(request.decoding)
        if plan is None:
            return self._fitting(BUILT_IN_TREE)
        if request.mode == coordinator_pb2.SPECULATION_MODE_TREE:
            return self._fitting(plan.best_tree.topology if plan.best_tree else BUILT_IN_TREE)
        # Off is certain, a prediction is not.
        return self._fitting(plan.topology) if plan.speedup >= LEAST_SPEEDUP else Topology.root_only()

    def plan_for(self, decoding: Decoding) -> TreePlan | None:
        """The present pair's plan at that temperature, or None: made for the rule, or else for the default rule.

        The rules accept within some per cent of each other, so another rule's tree is far better than a built-in one.
        """
        draft = self._pair.draft_description
        if draft is None:
            return None
        bucket = temperature_bucket(decoding.sampling.temperature)
        rules = (decoding.rule, self._default_rule)
        keys = (plan_key(self._pair.verify_description, draft, bucket, rule) for rule in rules)
        return next((self._plans[key] for key in keys if key in self._plans), None)

    def in_force(self) -> list[TreePlan]:
        """The present pair's plans, coolest first."""
        return [self._plans[key] for key in self._keys() if key in self._plans]

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
        for key, plan in plans.items():
            if self._plans.get(key) != plan:
                _log.info("new tree plan", extra={"key": str(key), "kind": plan.kind, "size": plan.topology.size})
        self._plans |= plans

    async def _refresh_forever(self) -> None:
        while True:
            await self.refresh()
            await asyncio.sleep(self._refresh_seconds)

    def _keys(self) -> list[PlanKey]:
        verify, draft = self._pair.verify_description, self._pair.draft_description
        if draft is None:
            return []
        greedy, *sampled = TEMPERATURE_BUCKETS
        served = [(greedy, GREEDY), *product(sampled, SAMPLED_RULES)]
        return [plan_key(verify, draft, bucket, rule) for bucket, rule in served]

    def _fitting(self, topology: Topology) -> Topology:
        """Without the last nodes, when the workers were started with a lower limit than the plan was made for."""
        limit = max_tree_size(self._pair.verify_description, self._pair.draft_description)
        return topology if topology.size <= limit else Topology(topology.parents[:limit])

    def _report(self, problem: str) -> None:
        if problem and problem != self._problem:
            _log.warning("tree plans not refreshed", extra={"reason": problem})
        elif self._problem and not problem:
            _log.info("tree plans refreshed again")
        self._problem = problem


def plan_key(verify: WorkerDescription, draft: WorkerDescription, bucket: str, rule: Rule) -> PlanKey:
    """Where the plan of two workers for a temperature bucket and a rule is kept."""
    return PlanKey(
        pair=f"{_model(draft)} -> {_model(verify)}",
        draft_hardware=draft.hardware_key,
        verify_hardware=verify.hardware_key,
        rule=rule.name,
        temperature_bucket=bucket,
    )


def max_tree_size(verify: WorkerDescription, draft: WorkerDescription | None) -> int:
    """The largest tree that both workers take, in nodes."""
    return verify.max_tree_size if draft is None else min(verify.max_tree_size, draft.max_tree_size)


def _model(worker: WorkerDescription) -> str:
    return f"{worker.model}@{worker.model_revision} {worker.dtype} {worker.quantization}"
