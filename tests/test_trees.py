import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, replace

import pytest
from redis import Redis

from coordinator.gaits import LEAST_SPEEDUP
from coordinator.request import Request
from coordinator.speculation import BUILT_IN_TREE, Choice, RequestSpeculation, Speculator
from coordinator.trees import FoundPlan, TreePlans, plan_key
from sequoia.acceptance import PRIOR
from sequoia.cli.redis import EmbeddedRedis
from sequoia.hardware import LatencyCurve
from sequoia.planner import PlanInputs, TreePlan, choose, optimal_tree
from sequoia.pricing import MeasuredTree
from sequoia.rules import COUPLED, GREEDY, SEQUOIA, Rule
from sequoia.sampling import Decoding, Sampling
from sequoia.situation import SESSIONS, Situation
from sequoia.topology import DynamicShape, Topology
from sequoia.tree_cache import StoredPlan, TreeCache
from sequoia.v1.coordinator_pb2 import (
    SPECULATION_MODE_AUTO,
    SPECULATION_MODE_OFF,
    SPECULATION_MODE_TREE,
    SPECULATION_STATE_OFF,
    SPECULATION_STATE_ON,
    SpeculationMode,
)
from sequoia.v1.worker_pb2 import WorkerDescription

FAST, SLOW = LatencyCurve((1, 16), (0.01, 0.01)), LatencyCurve((1, 16), (0.1, 0.12))
SPECULATE = choose(PlanInputs(((0.6, 0.2),), verify_curve=SLOW, draft_curve=FAST))
DO_NOT = choose(PlanInputs(((0.6, 0.2),), verify_curve=SLOW, draft_curve=SLOW))
NOWHERE = "redis://127.0.0.1:1/0"
PLAIN = Topology.root_only()


@dataclass
class Pair:
    verify_description: WorkerDescription
    draft_description: WorkerDescription | None
    round_trip_seconds: float = 0.0


def pair(draft: str = "draft", limit: int = 64) -> Pair:
    return Pair(
        WorkerDescription(model="target", hardware_key="gpu", max_tree_size=limit),
        WorkerDescription(model=draft, hardware_key="cpu", max_tree_size=limit),
    )


def request(mode: SpeculationMode, temperature: float = 0.0, topology: Topology | None = None) -> Request:
    decoding = Decoding(SEQUOIA if temperature else GREEDY, Sampling(temperature=temperature), 1)
    return Request((1,), 8, (), decoding, mode, topology)


def situation(temperature: float, rule: Rule = SEQUOIA) -> Situation:
    return Situation.of(rule if temperature else GREEDY, temperature)


def chosen(plans: TreePlans, of: Pair, mode: SpeculationMode, **kind: object) -> Topology:
    return RequestSpeculation(Speculator(plans, of), request(mode, **kind), has_draft=True).choose(1, 100).shape  # type: ignore[arg-type]


def put(url: str, of: Pair, at: Situation, document: TreePlan | str) -> None:
    key = plan_key(of.verify_description, of.draft_description or WorkerDescription(), at)
    with Redis.from_url(url) as redis:
        redis.set(str(key), document if isinstance(document, str) else StoredPlan(document, 0.0).to_json())


class Idle:
    """Makes plans that look for new ones only when told to, and closes them."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack

    def plans(self, url: str, of: Pair) -> TreePlans:
        plans = TreePlans(url, of, refresh_seconds=60, default_rule=SEQUOIA)
        self._stack.push_async_exit(plans)
        return plans

    async def plans_with(self, of: Pair, plan: TreePlan) -> TreePlans:
        """Plans that were read from a Redis that is gone by now."""
        with EmbeddedRedis() as redis:
            put(redis.url, of, situation(0.0), plan)
            plans = self.plans(redis.url, of)
            await plans.refresh()
        return plans


@pytest.fixture
async def idle() -> AsyncIterator[Idle]:
    async with AsyncExitStack() as stack:
        yield Idle(stack)


def test_the_built_in_tree_is_the_best_of_its_size_for_the_prior() -> None:
    assert optimal_tree(PRIOR, 8, 4) == BUILT_IN_TREE


async def test_a_dynamic_plan_serves_a_rule_that_needs_planned_trees_with_one_of_its_size(idle: Idle) -> None:
    measured = MeasuredTree(
        DynamicShape(16, 8, 2), tokens_per_step=6.0, tokens_error=0.1, num_nodes=9.0, num_levels=7.0
    )
    plan = choose(replace(SPECULATE.inputs, dynamic=(measured,)))
    of, shapes = pair(), {}
    with EmbeddedRedis() as redis:
        put(redis.url, of, Situation.of(COUPLED, 0.6), plan)
        plans = TreePlans(redis.url, of, refresh_seconds=60, default_rule=COUPLED)
        async with AsyncExitStack() as stack:
            stack.push_async_exit(plans)
            await plans.refresh()
            for rule in (COUPLED, SEQUOIA):
                found = plans.find(Situation.of(rule, 0.6))
                assert found is not None
                shapes[rule] = found.plan.chosen.shape
    assert shapes[COUPLED] == plan.chosen.shape
    assert (plan.chosen.kind, shapes[SEQUOIA].size) == ("dynamic", 9)
    assert shapes[SEQUOIA].levels <= 7
    assert isinstance(shapes[SEQUOIA], Topology)


@pytest.mark.parametrize("url", ["", NOWHERE])
async def test_without_redis_the_built_in_tree_serves(idle: Idle, url: str) -> None:
    plans = idle.plans(url, pair())
    await plans.refresh()
    assert chosen(plans, pair(), SPECULATION_MODE_AUTO) == BUILT_IN_TREE
    assert chosen(plans, pair(), SPECULATION_MODE_TREE) == BUILT_IN_TREE
    assert chosen(plans, pair(), SPECULATION_MODE_OFF) == PLAIN
    assert plans.in_force() == []


async def test_the_plan_decides_in_mode_auto_and_its_best_tree_serves_mode_tree(idle: Idle) -> None:
    plans = await idle.plans_with(pair(), DO_NOT)
    assert plans.in_force() == [FoundPlan(DO_NOT, situation(0.0))]
    assert chosen(plans, pair(), SPECULATION_MODE_AUTO) == PLAIN
    assert DO_NOT.best_tree is not None
    assert chosen(plans, pair(), SPECULATION_MODE_TREE) == DO_NOT.best_tree.shape
    assert chosen(plans, pair(), SPECULATION_MODE_OFF) == PLAIN


async def test_a_plan_that_promises_next_to_nothing_is_tried_before_it_is_followed(idle: Idle) -> None:
    draft_curve = LatencyCurve((1, 16), (0.071, 0.071))
    plan = choose(PlanInputs(((0.6, 0.2),), verify_curve=SLOW, draft_curve=draft_curve))
    assert 1.0 < plan.chosen.speedup < LEAST_SPEEDUP
    plans = await idle.plans_with(pair(), plan)
    assert chosen(plans, pair(), SPECULATION_MODE_AUTO) == PLAIN
    assert chosen(plans, pair(), SPECULATION_MODE_TREE) == plan.chosen.shape


async def test_a_tree_named_by_the_request_is_used_as_it_is(idle: Idle) -> None:
    plans = await idle.plans_with(pair(limit=4), SPECULATE)
    assert chosen(plans, pair(), SPECULATION_MODE_TREE, topology=Topology.chain(6)) == Topology.chain(6)


async def test_a_plan_serves_its_own_temperature_and_pair_only(idle: Idle) -> None:
    workers = pair()
    plans = await idle.plans_with(workers, SPECULATE)
    assert plans.find(situation(0.0)) == FoundPlan(SPECULATE, situation(0.0))
    assert plans.find(situation(0.6)) is None
    workers.draft_description = pair(draft="another").draft_description
    assert plans.find(situation(0.0)) is None
    workers.draft_description = None
    assert plans.find(situation(0.0)) is None


async def test_trees_are_cut_to_what_the_workers_take(idle: Idle) -> None:
    small = pair(limit=5)
    plans = await idle.plans_with(small, SPECULATE)
    parents = SPECULATE.chosen.shape.parents
    assert len(parents) > 5
    assert chosen(plans, small, SPECULATION_MODE_AUTO) == Topology(parents[:5])
    assert chosen(plans, small, SPECULATION_MODE_AUTO, temperature=1.0) == Topology(BUILT_IN_TREE.parents[:5])


async def test_another_load_or_distance_takes_the_likest_plan_and_its_own_as_soon_as_there_is_one(idle: Idle) -> None:
    there = replace(situation(0.0), sessions="(2,4]", context="(1024,4096]", round_trip="(0.02,0.05]")
    with EmbeddedRedis() as redis:
        put(redis.url, pair(), situation(0.0), SPECULATE)
        plans = idle.plans(redis.url, pair())
        await plans.refresh()
        assert plans.find(there) == FoundPlan(SPECULATE, situation(0.0))
        put(redis.url, pair(), there, DO_NOT)
        await plans.refresh()
    assert plans.find(there) == FoundPlan(DO_NOT, there)
    assert plans.find(situation(0.0)) == FoundPlan(SPECULATE, situation(0.0))


async def test_a_plan_is_picked_up_when_redis_comes_back_and_outlives_its_next_end(idle: Idle) -> None:
    with EmbeddedRedis() as redis:
        plans = idle.plans(redis.url, pair())
    await plans.refresh()
    assert plans.find(situation(0.0)) is None
    with EmbeddedRedis(redis.port):
        put(redis.url, pair(), situation(0.0), DO_NOT)
        await plans.refresh()
        assert plans.find(situation(0.0)) == FoundPlan(DO_NOT, situation(0.0))
        put(redis.url, pair(), situation(0.0), SPECULATE)
        await plans.refresh()
    await plans.refresh()
    assert plans.find(situation(0.0)) == FoundPlan(SPECULATE, situation(0.0))


class Records(logging.Handler):
    """Tells when a message is logged."""

    def __init__(self, message: str) -> None:
        super().__init__()
        self.seen = asyncio.Event()
        self._message = message

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() == self._message:
            self.seen.set()


@pytest.fixture
def new_plan(caplog: pytest.LogCaptureFixture) -> AsyncIterator[asyncio.Event]:
    caplog.set_level(logging.INFO)
    handler = Records("new tree plan")
    logging.getLogger("coordinator.trees").addHandler(handler)
    yield handler.seen
    logging.getLogger("coordinator.trees").removeHandler(handler)


async def test_plans_of_every_load_are_there_before_it_is(idle: Idle) -> None:
    of_load = {load: DO_NOT if load != "1" else SPECULATE for load in SESSIONS.names}
    with EmbeddedRedis() as redis:
        for load, plan in of_load.items():
            put(redis.url, pair(), replace(situation(0.6), sessions=load), plan)
        plans = idle.plans(redis.url, pair())
        await plans.refresh()
    for load, plan in of_load.items():
        there = replace(situation(0.6), sessions=load)
        assert plans.find(there) == FoundPlan(plan, there)


async def test_what_no_plan_was_looked_for_yet_is_looked_for_at_once(new_plan: asyncio.Event) -> None:
    long = replace(situation(1.0), context="(4096,inf)")
    with EmbeddedRedis() as redis:
        put(redis.url, pair(), long, SPECULATE)
        async with TreePlans(redis.url, pair(), 3600.0, SEQUOIA) as plans, asyncio.timeout(10):
            await asyncio.sleep(0.5)  # the first look is over
            assert plans.find(long) is None
            await new_plan.wait()
            assert plans.find(long) == FoundPlan(SPECULATE, long)


async def test_plans_are_looked_for_in_the_background(new_plan: asyncio.Event) -> None:
    with EmbeddedRedis() as redis:
        async with TreePlans(redis.url, pair(), 0.001, SEQUOIA) as plans, asyncio.timeout(10):
            put(redis.url, pair(), situation(1.0), SPECULATE)
            await new_plan.wait()
            assert plans.find(situation(1.0)) == FoundPlan(SPECULATE, situation(1.0))


async def test_a_plan_that_is_stored_reaches_a_running_coordinator_at_once(new_plan: asyncio.Event) -> None:
    with EmbeddedRedis() as redis:
        async with (
            TreePlans(redis.url, pair(), 3600, SEQUOIA) as plans,
            TreeCache(redis.url) as cache,
            asyncio.timeout(10),
        ):
            governed = RequestSpeculation(Speculator(plans, pair()), request(SPECULATION_MODE_AUTO), has_draft=True)
            assert governed.choose(1, 100).shape == BUILT_IN_TREE
            while not new_plan.is_set():  # until it listens
                key = plan_key(pair().verify_description, pair().draft_description, situation(0.0))
                await cache.put_many({key: StoredPlan(SPECULATE, 0.0)}, ttl_seconds=60)
                await asyncio.sleep(0.01)
            assert governed.choose(2, 100).shape == SPECULATE.chosen.shape


async def test_what_is_wrong_is_logged_once_and_so_is_its_end(idle: Idle, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with EmbeddedRedis() as redis:
        put(redis.url, pair(), situation(0.0), "not a plan")
        plans = idle.plans(redis.url, pair())
        await plans.refresh()
        await plans.refresh()
        put(redis.url, pair(), situation(0.0), SPECULATE)
        await plans.refresh()
        await plans.refresh()
    logged = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert logged == [
        ("WARNING", "tree plans not refreshed"),
        ("INFO", "tree plans refreshed again"),
        ("INFO", "new tree plan"),
    ]
    assert "not a tree plan" in caplog.records[0].__dict__["reason"]


async def test_a_rule_without_a_plan_of_its_own_takes_the_default_rules() -> None:
    async with AsyncExitStack() as stack:
        with EmbeddedRedis() as redis:
            put(redis.url, pair(), situation(0.6), SPECULATE)
            put(redis.url, pair(), situation(0.9, COUPLED), DO_NOT)
            plans = Idle(stack).plans(redis.url, pair())
            await plans.refresh()
        found = [plans.find(situation(each, COUPLED)) for each in (0.6, 0.9, 0.2)]
    assert found == [FoundPlan(SPECULATE, situation(0.6)), FoundPlan(DO_NOT, situation(0.9, COUPLED)), None]


async def test_one_drafted_step_in_many_offers_the_root_ranks_that_the_tree_has_not(idle: Idle) -> None:
    plans = await idle.plans_with(pair(), SPECULATE)
    governed = RequestSpeculation(Speculator(plans, pair()), request(SPECULATION_MODE_AUTO), has_draft=True)
    trees = [governed.choose(1, 100).shape for _ in range(640)]
    tree = SPECULATE.chosen.shape
    explored = [each for each in trees if each != tree]
    assert len(explored) == 10
    assert {len(each.children[0]) for each in explored} == {len(tree.children[0]) + 8}
    assert {each.size for each in explored} == {tree.size + 8}


async def test_a_losing_tree_is_left_and_the_result_says_so(idle: Idle) -> None:
    plans = await idle.plans_with(pair(), SPECULATE)
    speculation = RequestSpeculation(Speculator(plans, pair()), request(SPECULATION_MODE_AUTO), has_draft=True)
    assert speculation.choose(1, 100).shape == SPECULATE.chosen.shape
    assert speculation.state == SPECULATION_STATE_ON
    for _ in range(200):
        choice = speculation.choose(1, 100)
        is_plain = choice.shape == PLAIN
        speculation.observe(choice, 0.1 if is_plain else 1.0, 1 if is_plain else 2, usual=True)
    assert speculation.state == SPECULATION_STATE_OFF
    assert speculation.reason.startswith("measured, in ms a token: on 500.0")
    assert Choice(PLAIN, 64) in [speculation.choose(1, 100) for _ in range(2)]


async def test_one_that_comes_as_four_have_left_is_planned_for_as_one_of_four(
    idle: Idle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.load._LOOK_BACK_SECONDS", 60.0)
    speculator = Speculator(idle.plans("", pair()), pair())
    asked = request(SPECULATION_MODE_AUTO)
    found = []
    for count in (1, 4, 1):
        with ExitStack() as running:
            for _ in range(count):
                running.enter_context(speculator)
            found.append(speculator.situation(asked, 1).sessions)
    assert found == [Situation.of(GREEDY, 0.0, count, 1).sessions for count in (1, 4, 4)]


async def test_without_a_draft_speculation_is_off_and_says_why(idle: Idle) -> None:
    plans = idle.plans("", pair())
    speculation = RequestSpeculation(Speculator(plans, pair()), request(SPECULATION_MODE_AUTO), has_draft=False)
    assert speculation.choose(1, 100).shape == PLAIN
    assert (speculation.state, speculation.reason) == (SPECULATION_STATE_OFF, "there is no draft worker")
