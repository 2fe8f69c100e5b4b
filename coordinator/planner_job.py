"""The planner job: measure a running pair, choose its trees, put them where the coordinator finds them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import NamedTuple

from coordinator.measuring import (
    Calibration,
    ahead_hit_rate,
    calibrate,
    counts_of,
    dynamic_shapes,
    expected_in,
    inputs_for,
    measure,
    measured_dynamic,
)
from coordinator.planner_prompts import prompts_for
from coordinator.trees import max_tree_size, pair_name, plan_key
from sequoia.acceptance import AcceptanceCounts, tokens_factor
from sequoia.acceptance_counts import CountsKey, LiveAcceptance, LiveCounts
from sequoia.access import Access
from sequoia.client import AsyncClient, Prompt, SpeculationFigures
from sequoia.errors import FailedPrecondition, InvalidArgument
from sequoia.planner import MAX_LEVELS, PlanInputs, TreePlan, choose
from sequoia.rules import TRAVERSAL, ParameterError, Rule, choose_rule
from sequoia.situation import CONTEXTS, SESSIONS, TEMPERATURES, Situation
from sequoia.tree_cache import StoredPlan, TreeCache
from sequoia.v1.coordinator_pb2 import DescribePairResponse
from sequoia.wire import rule_from_wire

_log = logging.getLogger(__name__)

TTL_SECONDS = 7 * 24 * 3600
# Live counts of that age count half.
HALF_LIFE_SECONDS = 12 * 3600.0

Progress = Callable[[int, int], None]


async def plan_pair(
    address: str,
    redis_url: str,
    *,
    access: Access | None = None,
    temperatures: Sequence[float] = (0.0,),
    rule_name: str = "",
    prompts: Sequence[Prompt] | None = None,
    most_prompts: int | None = None,
    max_tokens: int = 48,
    max_levels: int = MAX_LEVELS,
    ttl_seconds: int = TTL_SECONDS,
    on_progress: Progress = lambda done, total: None,
) -> list[TreePlan]:
    """One plan per temperature, in that order, measured on the coordinator at `address` and stored in Redis.

    They are those for one session with a short context; Redis gets one for every number of sessions and every length of
    context besides. Above temperature 0 a plan is for the rule of that name, by default the coordinator's own.

    Acceptance is what was counted lately, and while the pair generates `max_tokens` tokens from each prompt (those of
    `prompts_for` by default; the first `most_prompts`). The latency curves are those that the workers measured, scaled
    to what forwards took in the loop. `on_progress` is called with (prompts done, prompts in all). Raises
    InvalidArgument for two temperatures of one bucket, FailedPrecondition for a pair that cannot be planned for (no
    draft worker, or another planner at work), Unavailable when a part cannot be reached.
    """
    check_buckets(temperatures)
    async with PlannerJob(address, redis_url, access=access, max_levels=max_levels, ttl_seconds=ttl_seconds) as job:
        pair = await job.describe()
        asked = [(temperature, rule_for(rule_name, temperature, pair)) for temperature in temperatures]
        key = plan_key(pair.verify, pair.draft, Situation.of(asked[0][1], asked[0][0]))
        async with job.cache.single_flight(key) as is_ours:
            if not is_ours:
                raise FailedPrecondition("another planner measures this pair now; its plans will serve", "plan")
            prompts = (prompts_for(pair) if prompts is None else prompts)[:most_prompts]
            progress = _Progress(on_progress, len(asked) * len(prompts))
            measured = [await job.measure(pair, *each, prompts, max_tokens, progress) for each in asked]
            # What forwards take does not depend on the temperature.
            calibration = calibrate(pair, [figures for each in measured for figures in each.figures])
            return [await job.plan(pair, each, calibration) for each in measured]


class Measured(NamedTuple):
    """What a pair was seen to do at one temperature: all counts, older ones too, and the answers it was seen in.

    `ahead_hit_rate` is of all steps, older ones too.
    """

    temperature: float
    rule: Rule
    counts: AcceptanceCounts
    figures: tuple[SpeculationFigures, ...]
    ahead_hit_rate: float | None


class PlannerJob:
    """The connections of a planner: an async context manager."""

    def __init__(
        self, address: str, redis_url: str, *, max_levels: int, ttl_seconds: int, access: Access | None = None
    ) -> None:
        self.client = AsyncClient(address, **(access or {}))
        self.cache, self._live = TreeCache(redis_url), LiveCounts(redis_url)
        self._max_levels, self._ttl_seconds = max_levels, ttl_seconds
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> PlannerJob:
        for each in (self.client, self.cache, self._live):
            await self._stack.enter_async_context(each)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def describe(self) -> DescribePairResponse:
        """The pair. Raises FailedPrecondition when it has no draft."""
        pair = await self.client.describe_pair()
        if not pair.HasField("draft"):
            raise FailedPrecondition("there is no draft worker at present; start one and plan again", "draft")
        return pair

    async def measure(
        self,
        pair: DescribePairResponse,
        temperature: float,
        rule: Rule,
        prompts: Sequence[Prompt],
        max_tokens: int,
        on_prompt: Callable[[], None],
    ) -> Measured:
        """Let the pair write. What coordinators counted is read first: what is counted now, they will count too."""
        before = await self.counted(pair, temperature, rule)
        figures = await measure(self.client, pair, temperature, rule, prompts, max_tokens, on_prompt)
        num_hits = before.num_ahead_hits + sum(each.num_ahead_hits for each in figures)
        num_attempts = before.num_ahead_attempts + sum(each.num_ahead_attempts for each in figures)
        num_steps = before.num_steps + sum(each.num_drafted_steps for each in figures)
        hit_rate = ahead_hit_rate(num_hits, num_attempts, num_steps)
        return Measured(temperature, rule, before.counts + counts_of(figures), tuple(figures), hit_rate)

    async def plan(self, pair: DescribePairResponse, measured: Measured, calibration: Calibration) -> TreePlan:
        """Plan for all situations, and store. Returns the plan of one session with a short context."""
        rule, estimate = measured.rule, measured.counts.estimate()
        factor = tokens_factor(*expected_in(measured.figures, estimate.rows)) if rule is TRAVERSAL else 1.0
        dynamic = measured_dynamic(measured.figures, dynamic_shapes(pair))
        plans: dict[Situation, TreePlan] = {}
        for sessions, context in _loads(pair):
            try:
                inputs = inputs_for(
                    pair,
                    calibration,
                    sessions,
                    context,
                    estimate.rows,
                    estimate.errors,
                    factor,
                    dynamic,
                    measured.ahead_hit_rate,
                )
            except ValueError as error:
                if not plans:
                    raise FailedPrecondition(f"the workers' measurements are of no use: {error}") from error
                continue  # a load that the workers never measured
            situation = Situation.of(rule, measured.temperature, sessions, context, round_trip_seconds(pair))
            plans[situation] = self.choose(pair, inputs)
        await self.store(pair, plans, measured_at=time.time())
        return next(iter(plans.values()))

    async def counted(self, pair: DescribePairResponse, temperature: float, rule: Rule) -> LiveAcceptance:
        """What coordinators counted lately."""
        key = CountsKey(pair_name(pair.verify, pair.draft), rule.name, TEMPERATURES.name(temperature))
        live = await self._live.read(key, now=time.time(), half_life_seconds=HALF_LIFE_SECONDS)
        for problem in live.rejected:
            _log.warning("acceptance counts in Redis left out: %s", problem)
        return live

    def choose(self, pair: DescribePairResponse, inputs: PlanInputs) -> TreePlan:
        """The plan within the workers' limits."""
        return choose(inputs, max_size=max_tree_size(pair.verify, pair.draft), max_levels=self._max_levels)

    async def store(self, pair: DescribePairResponse, plans: dict[Situation, TreePlan], measured_at: float) -> None:
        """All of them or none."""
        stored = {plan_key(pair.verify, pair.draft, at): StoredPlan(plan, measured_at) for at, plan in plans.items()}
        await self.cache.put_many(stored, self._ttl_seconds)


def rule_for(name: str, temperature: float, pair: DescribePairResponse) -> Rule:
    """The rule to plan for at that temperature. Raises InvalidArgument naming `rule`."""
    default = rule_from_wire(pair.default_rule, "default_rule")
    try:
        return choose_rule("" if temperature == 0.0 else name, greedy=temperature == 0.0, seeded=False, default=default)
    except ParameterError as error:
        raise InvalidArgument(error.message, error.field) from error


def round_trip_seconds(pair: DescribePairResponse) -> float:
    """To both workers, one after the other."""
    return pair.draft_rtt_seconds + pair.verify_rtt_seconds


def check_buckets(temperatures: Sequence[float]) -> None:
    """Raises InvalidArgument for two temperatures whose plans would be kept in the same place."""
    buckets = [TEMPERATURES.name(each) for each in temperatures]
    for bucket in set(buckets):
        if buckets.count(bucket) > 1:
            raise InvalidArgument(f"two of {tuple(temperatures)} share the plan for {bucket}; name one", "temperature")


class _Progress:
    """Counts prompts."""

    def __init__(self, report: Progress, total: int) -> None:
        self._report, self._done, self._total = report, 0, total
        report(0, total)

    def __call__(self) -> None:
        self._done += 1
        self._report(self._done, self._total)


def _loads(pair: DescribePairResponse) -> list[tuple[int, int]]:
    """Numbers of sessions and lengths of context to plan for; a single session with a short context first."""
    num_slots = min(pair.verify.num_slots, pair.draft.num_slots)
    context_length = min(pair.verify.context_length, pair.draft.context_length)
    sessions = [int(each) for each in SESSIONS.planned_at if each == 1 or each <= num_slots]
    contexts = [int(each) for each in CONTEXTS.planned_at if each == CONTEXTS.planned_at[0] or each <= context_length]
    return [(each, context) for each in sessions for context in contexts]
