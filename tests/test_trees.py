import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest
from redis import Redis

from coordinator.request import Request
from coordinator.trees import BUILT_IN_TREE, LEAST_SPEEDUP, TreePlans, plan_key
from sequoia.acceptance import PRIOR
from sequoia.cli.redis import EmbeddedRedis
from sequoia.hardware import LatencyCurve
from sequoia.planner import PlanInputs, TreePlan, choose, optimal_tree
from sequoia.rules import COUPLED, GREEDY, SEQUOIA, Rule
from sequoia.sampling import Decoding, Sampling
from sequoia.topology import Topology
from sequoia.tree_cache import temperature_bucket
from sequoia.v1.coordinator_pb2 import (
    SPECULATION_MODE_AUTO,
    SPECULATION_MODE_OFF,
    SPECULATION_MODE_TREE,
    SpeculationMode,
)
from sequoia.v1.worker_pb2 import WorkerDescription

FAST, SLOW = LatencyCurve((1, 16), (0.01, 0.01)), LatencyCurve((1, 16), (0.1, 0.12))
SPECULATE = choose(PlanInputs((0.6, 0.2), verify_curve=SLOW, draft_curve=FAST))
DO_NOT = choose(PlanInputs((0.6, 0.2), verify_curve=SLOW, draft_curve=SLOW))
NOWHERE = "redis://127.0.0.1:1/0"


@dataclass
class Pair:
    verify_description: WorkerDescription
    draft_description: WorkerDescription | None


def pair(draft: str = "draft", limit: int = 64) -> Pair:
    return Pair(
        WorkerDescription(model="target", hardware_key="gpu", max_tree_size=limit),
        WorkerDescription(model=draft, hardware_key="cpu", max_tree_size=limit),
    )


def request(mode: SpeculationMode, temperature: float = 0.0, topology: Topology | None = None) -> Request:
    return Request((1,), 8, (), decoding(temperature), mode, topology)


def decoding(temperature: float) -> Decoding:
    return Decoding(SEQUOIA if temperature else GREEDY, Sampling(temperature=temperature), 1)


def put(url: str, of: Pair, temperature: float, document: TreePlan | str, rule: Rule = SEQUOIA) -> None:
    draft, bucket = of.draft_description or WorkerDescription(), temperature_bucket(temperature)
    key = plan_key(of.verify_description, draft, bucket, rule if temperature else GREEDY)
    with Redis.from_url(url) as redis:
        redis.set(str(key), document if isinstance(document, str) else document.to_json())


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
            put(redis.url, of, 0.0, plan)
            plans = self.plans(redis.url, of)
            await plans.refresh()
        return plans


@pytest.fixture
async def idle() -> AsyncIterator[Idle]:
    async with AsyncExitStack() as stack:
        yield Idle(stack)


def test_the_built_in_tree_is_the_best_of_its_size_for_the_prior() -> None:
    assert optimal_tree(PRIOR, 8, 4) == BUILT_IN_TREE


@pytest.mark.parametrize("url", ["", NOWHERE])
async def test_without_redis_the_built_in_tree_serves(idle: Idle, url: str) -> None:
    plans = idle.plans(url, pair())
    await plans.refresh()
    assert plans.topology(request(SPECULATION_MODE_AUTO)) == BUILT_IN_TREE
    assert plans.topology(request(SPECULATION_MODE_TREE)) == BUILT_IN_TREE
    assert plans.topology(request(SPECULATION_MODE_OFF)) == Topology.root_only()
    assert plans.in_force() == []


async def test_the_plan_decides_in_mode_auto_and_its_best_tree_serves_mode_tree(idle: Idle) -> None:
    plans = await idle.plans_with(pair(), DO_NOT)
    assert plans.in_force() == [DO_NOT]
    assert plans.topology(request(SPECULATION_MODE_AUTO)) == Topology.root_only()
    assert DO_NOT.best_tree is not None
    assert plans.topology(request(SPECULATION_MODE_TREE)) == DO_NOT.best_tree.topology
    assert plans.topology(request(SPECULATION_MODE_OFF)) == Topology.root_only()


async def test_a_plan_that_promises_next_to_nothing_is_not_acted_upon_in_mode_auto(idle: Idle) -> None:
    draft_curve = LatencyCurve((1, 16), (0.068, 0.068))
    plan = choose(PlanInputs((0.6, 0.2), verify_curve=SLOW, draft_curve=draft_curve))
    assert 1.0 < plan.speedup < LEAST_SPEEDUP
    plans = await idle.plans_with(pair(), plan)
    assert plans.topology(request(SPECULATION_MODE_AUTO)) == Topology.root_only()
    assert plans.topology(request(SPECULATION_MODE_TREE)) == plan.topology


async def test_a_tree_named_by_the_request_is_used_as_it_is(idle: Idle) -> None:
    plans = await idle.plans_with(pair(limit=4), SPECULATE)
    assert plans.topology(request(SPECULATION_MODE_TREE, topology=Topology.chain(6))) == Topology.chain(6)


async def test_a_plan_serves_its_own_temperature_and_pair_only(idle: Idle) -> None:
    workers = pair()
    plans = await idle.plans_with(workers, SPECULATE)
    assert plans.plan_for(decoding(0.0)) == SPECULATE
    assert plans.plan_for(decoding(0.6)) is None
    workers.draft_description = pair(draft="another").draft_description
    assert plans.plan_for(decoding(0.0)) is None
    workers.draft_description = None
    assert plans.plan_for(decoding(0.0)) is None


async def test_trees_are_cut_to_what_the_workers_take(idle: Idle) -> None:
    plans = await idle.plans_with(pair(limit=5), SPECULATE)
    assert SPECULATE.topology.size > 5
    assert plans.topology(request(SPECULATION_MODE_AUTO)) == Topology(SPECULATE.parents[:5])
    assert plans.topology(request(SPECULATION_MODE_AUTO, temperature=1.0)) == Topology(BUILT_IN_TREE.parents[:5])


async def test_a_plan_is_picked_up_when_redis_comes_back_and_outlives_its_next_end(idle: Idle) -> None:
    with EmbeddedRedis() as redis:
        plans = idle.plans(redis.url, pair())
    await plans.refresh()
    assert plans.plan_for(decoding(0.0)) is None
    with EmbeddedRedis(redis.port):
        put(redis.url, pair(), 0.0, DO_NOT)
        await plans.refresh()
        assert plans.plan_for(decoding(0.0)) == DO_NOT
        put(redis.url, pair(), 0.0, SPECULATE)
        await plans.refresh()
        assert plans.plan_for(decoding(0.0)) == SPECULATE
    await plans.refresh()
    assert plans.plan_for(decoding(0.0)) == SPECULATE


class FirstRecord(logging.Handler):
    """Tells when something is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.set()


async def test_new_plans_are_looked_for_in_the_background(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    handler = FirstRecord()
    logging.getLogger("coordinator.trees").addHandler(handler)
    with EmbeddedRedis() as redis:
        async with (
            TreePlans(redis.url, pair(), refresh_seconds=0.001, default_rule=SEQUOIA) as plans,
            asyncio.timeout(10),
        ):
            put(redis.url, pair(), 1.0, SPECULATE)
            await handler.seen.wait()
            assert plans.plan_for(decoding(1.0)) == SPECULATE
    logging.getLogger("coordinator.trees").removeHandler(handler)


async def test_what_is_wrong_is_logged_once_and_so_is_its_end(idle: Idle, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with EmbeddedRedis() as redis:
        put(redis.url, pair(), 0.0, "not a plan")
        plans = idle.plans(redis.url, pair())
        await plans.refresh()
        await plans.refresh()
        put(redis.url, pair(), 0.0, SPECULATE)
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
            put(redis.url, pair(), 0.6, SPECULATE)
            put(redis.url, pair(), 0.9, DO_NOT, rule=COUPLED)
            plans = Idle(stack).plans(redis.url, pair())
            await plans.refresh()
        coupled = [Decoding(COUPLED, Sampling(temperature=each, seed=1), 1) for each in (0.6, 0.9, 0.2)]
        assert [plans.plan_for(each) for each in coupled] == [SPECULATE, DO_NOT, None]
