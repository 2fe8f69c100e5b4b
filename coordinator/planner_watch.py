"""The planner job without end: plans are made when they are missing, made again when the world has moved."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from coordinator.measuring import ahead_hit_rate, calibrate
from coordinator.planner_job import TTL_SECONDS, PlannerJob, check_buckets, round_trip_seconds, rule_for
from coordinator.planner_prompts import prompts_for
from coordinator.trees import plan_key
from sequoia.acceptance_counts import LiveAcceptance
from sequoia.access import Access
from sequoia.client import Prompt
from sequoia.errors import SequoiaError
from sequoia.planner import MAX_LEVELS, PlanInputs, TreePlan, price
from sequoia.rules import Rule
from sequoia.situation import CONTEXTS, SESSIONS, Situation
from sequoia.tree_cache import StoredPlan
from sequoia.v1.coordinator_pb2 import DescribePairResponse

# A plan whose measurements are older is measured again; until then, and while that lasts, it serves.
REFRESH_SECONDS = 24 * 3600.0
# Live counts replace what was measured when they come from so many steps with a tree.
_LEAST_STEPS = 256.0
# A plan is replaced when the best tree of today is faster by that much.
_LEAST_GAIN = 0.02


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """What a look at one temperature came to. `plan` is that of one session with a short context, if there is one.

    measured: the pair was measured, from nothing or again; replanned: from what was measured, for today's acceptance
    and distance; kept; waiting: another planner is at work; failed: `reason` says why, and it is tried again.
    """

    kind: Literal["measured", "replanned", "kept", "waiting", "failed"]
    temperature: float
    plan: TreePlan | None
    reason: str


async def watch_pair(
    address: str,
    redis_url: str,
    *,
    access: Access | None = None,
    temperatures: Sequence[float] = (0.0,),
    rule_name: str = "",
    interval_seconds: float = 60.0,
    refresh_seconds: float = REFRESH_SECONDS,
    prompts: Sequence[Prompt] | None = None,
    max_tokens: int = 48,
    max_levels: int = MAX_LEVELS,
) -> AsyncGenerator[WatchEvent]:
    """One event a temperature, then again after `interval_seconds`, without end.

    What cannot be reached is an event, not an error. Raises InvalidArgument as `plan_pair` does.
    """
    check_buckets(temperatures)
    async with PlannerJob(address, redis_url, access=access, max_levels=max_levels, ttl_seconds=TTL_SECONDS) as job:
        watch = _Watch(job, rule_name, refresh_seconds, prompts, max_tokens)
        while True:
            for temperature in temperatures:
                yield await watch.look(temperature)
            await asyncio.sleep(interval_seconds)


class _Situated(NamedTuple):
    """The pair at this moment, and what is asked of it."""

    pair: DescribePairResponse
    temperature: float
    rule: Rule

    @property
    def situation(self) -> Situation:
        """Of one session with a short context."""
        return Situation.of(self.rule, self.temperature, round_trip_seconds=round_trip_seconds(self.pair))


class _Watch:
    def __init__(
        self,
        job: PlannerJob,
        rule_name: str,
        refresh_seconds: float,
        prompts: Sequence[Prompt] | None,
        max_tokens: int,
    ) -> None:
        self._job, self._rule_name, self._refresh_seconds = job, rule_name, refresh_seconds
        self._prompts, self._max_tokens = prompts, max_tokens

    async def look(self, temperature: float) -> WatchEvent:
        """One look, and what it asks for."""
        try:
            pair = await self._job.describe()
            at = _Situated(pair, temperature, rule_for(self._rule_name, temperature, pair))
            stored = await self._stored(at)
            return await self._act(at, stored)
        except SequoiaError as error:
            return WatchEvent("failed", temperature, None, str(error))

    async def _act(self, at: _Situated, stored: dict[Situation, StoredPlan]) -> WatchEvent:
        own = stored.get(at.situation)
        if not stored:
            return await self._alone(at, own, "there was no plan")
        age = time.time() - max(each.measured_at for each in stored.values())
        if age > self._refresh_seconds:
            return await self._alone(at, own, f"the plan was {age / 3600:.1f} h old")
        return await self._replan(at, stored)

    async def _alone(self, at: _Situated, own: StoredPlan | None, reason: str) -> WatchEvent:
        """Measure, unless another planner does."""
        async with self._job.cache.single_flight(plan_key(at.pair.verify, at.pair.draft, at.situation)) as is_ours:
            if not is_ours:
                return WatchEvent("waiting", at.temperature, own and own.plan, "another planner is at work")
            prompts = prompts_for(at.pair) if self._prompts is None else self._prompts
            measured = await self._job.measure(
                at.pair, at.temperature, at.rule, prompts, self._max_tokens, lambda: None
            )
            plan = await self._job.plan(at.pair, measured, calibrate(at.pair, measured.figures))
        return WatchEvent("measured", at.temperature, plan, reason)

    async def _replan(self, at: _Situated, stored: dict[Situation, StoredPlan]) -> WatchEvent:
        """For today's acceptance and distance, from what was measured then."""
        base = {load: _nearest(at.situation, load, stored) for load in {(s.sessions, s.context) for s in stored}}
        live = await self._job.counted(at.pair, at.temperature, at.rule)
        inputs = {load: _today(at.pair, live, each.plan.inputs) for load, each in base.items()}
        plans = {
            replace(at.situation, sessions=sessions, context=context): self._job.choose(at.pair, each)
            for (sessions, context), each in inputs.items()
        }
        own, new = stored.get(at.situation), plans[at.situation]
        if own is not None and not _pays(own.plan, new):
            return WatchEvent("kept", at.temperature, own.plan, "today's best tree is not faster by 2 %")
        await self._job.store(at.pair, plans, max(each.measured_at for each in base.values()))
        reason = "another distance" if own is None else "acceptance or distance changed"
        return WatchEvent("replanned", at.temperature, new, reason)

    async def _stored(self, at: _Situated) -> dict[Situation, StoredPlan]:
        """All plans of that rule and temperature, for whatever load and distance."""
        loads = [
            replace(at.situation, sessions=sessions, context=context)
            for sessions in SESSIONS.names
            for context in CONTEXTS.names
        ]
        keys = {plan_key(at.pair.verify, at.pair.draft, each) for load in loads for each in load.neighbours}
        found = await self._job.cache.get_many(list(keys))
        return {key.situation: plan for key, plan in found.plans.items()}


def _today(pair: DescribePairResponse, live: LiveAcceptance, inputs: PlanInputs) -> PlanInputs:
    if live.counts.num_steps >= _LEAST_STEPS:
        estimate = live.counts.estimate()
        hit_rate = ahead_hit_rate(live.num_ahead_hits, live.num_ahead_attempts, live.num_steps)
        inputs = replace(inputs, acceptance=estimate.rows, errors=estimate.errors, draft_ahead_hit_rate=hit_rate)
    return replace(inputs, draft_rtt_seconds=pair.draft_rtt_seconds, verify_rtt_seconds=pair.verify_rtt_seconds)


def _nearest(here: Situation, load: tuple[str, str], stored: dict[Situation, StoredPlan]) -> StoredPlan:
    """The plan for that load at the distance most like ours."""
    sessions, context = load
    wanted = replace(here, sessions=sessions, context=context)
    return next(stored[each] for each in wanted.neighbours if each in stored)


def _pays(old: TreePlan, new: TreePlan) -> bool:
    """Whether the new plan's tree is faster than the old one's, both by what is known today."""
    before = price(old.chosen.shape, new.inputs).seconds_per_token
    return new.chosen.seconds_per_token < (1.0 - _LEAST_GAIN) * before
