"""The planner job against a real Redis and a gRPC server whose figures are known beforehand."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from itertools import count

import pytest
from redis import Redis

from coordinator.measuring import MEASURING_TREE, Calibration, ahead_hit_rate, calibrate, dynamic_shapes
from coordinator.planner_job import plan_pair
from coordinator.planner_watch import WatchEvent, watch_pair
from coordinator.trees import plan_key
from sequoia.acceptance import AcceptanceCounts
from sequoia.acceptance_counts import CountsKey, LiveAcceptance, LiveCounts
from sequoia.border import Context
from sequoia.cli.redis import EmbeddedRedis
from sequoia.errors import FailedPrecondition, InvalidArgument, Unavailable
from sequoia.planner import TreePlan
from sequoia.pricing import MeasuredTree
from sequoia.rules import GREEDY, SEQUOIA, TRAVERSAL, Rule
from sequoia.situation import Situation
from sequoia.topology import DynamicShape, Topology, TreeShape
from sequoia.tree_cache import PlanKey, StoredPlan, TreeCache
from sequoia.v1 import coordinator_pb2 as pb
from sequoia.v1 import coordinator_pb2_grpc
from sequoia.v1.sampling_pb2 import RULE_SEQUOIA
from sequoia.v1.worker_pb2 import LatencyCurve, WorkerDescription
from sequoia.wire import shape_from_wire, shape_to_wire

VERIFY_SECONDS, DRAFT_SECONDS = 0.100, 0.001
STEPS = 1000


def curve(first: float, last: float, num_sessions: int = 1, context: int = 64) -> LatencyCurve:
    """A straight line, measured at the width of dynamic trees too."""
    between = first + (last - first) * 3 / 63
    return LatencyCurve(
        num_tokens=[1, 4, 64], seconds=[first, between, last], num_sessions=num_sessions, num_context_tokens=context
    )


def worker(model: str, limit: int, *curves: LatencyCurve) -> WorkerDescription:
    return WorkerDescription(
        model=model, max_tree_size=limit, latencies=curves, num_slots=2, context_length=2048, device_id=model
    )


class KnownCoordinator(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """Describes a pair, and answers every request as if it had run for long with the tree that was asked for.

    In the loop a forward of the target takes twice what its curve says, plain decoding 1.5 times, one of the draft
    three times; a step takes 5 ms besides, 3 of them in round trips. Six children of rank 0 in ten are accepted, and
    two in ten of rank 1.
    """

    def __init__(self) -> None:
        self.pair = pb.DescribePairResponse(
            verify=worker("target", 64, curve(VERIFY_SECONDS, 0.163)),
            draft=worker("draft", 16, curve(DRAFT_SECONDS, DRAFT_SECONDS)),
            default_rule=RULE_SEQUOIA,
            verify_rtt_seconds=0.002,
            draft_rtt_seconds=0.001,
        )
        self.requests: list[pb.GenerateRequest] = []
        self.fails = False
        self.tokens_per_step = self.dynamic_tokens_per_step = 2.5
        self.num_ahead_hits = self.num_ahead_misses = 0

    async def DescribePair(self, request: pb.DescribePairRequest, context: Context) -> pb.DescribePairResponse:
        return self.pair

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        is_off = request.speculation.mode == pb.SPECULATION_MODE_OFF
        tree = Topology((-1,)) if is_off else shape_from_wire(request.speculation, GREEDY, 64)
        finish = pb.Finish(reason=pb.FINISH_REASON_LENGTH, speculation=self._report(tree))
        yield pb.GenerateResponse(finish=finish)

    def _report(self, tree: TreeShape) -> pb.SpeculationReport:
        if self.fails:
            return pb.SpeculationReport(num_steps=8, num_fallback_steps=8, fallback_reason="the draft is late")
        if tree.size == 1:
            stages = pb.StageSeconds(verify=STEPS * VERIFY_SECONDS * 1.5)
            return pb.SpeculationReport(trees=[pb.TreeUsage(**shape_to_wire(tree), num_steps=STEPS, stages=stages)])
        seconds = VERIFY_SECONDS + 0.001 * (tree.size - 1)
        num_grown = STEPS - self.num_ahead_hits
        stages = pb.StageSeconds(
            verify=STEPS * 2 * seconds,
            draft=num_grown * 3 * DRAFT_SECONDS * (tree.levels - 1) + self.num_ahead_hits * 0.0001,
            host=STEPS * 0.001,
            network=STEPS * 0.004,
        )
        per_step = self.dynamic_tokens_per_step if isinstance(tree, DynamicShape) else self.tokens_per_step
        num_tokens = int(STEPS * per_step)
        usage = pb.TreeUsage(
            **shape_to_wire(tree),
            num_steps=STEPS,
            num_tokens=num_tokens,
            num_nodes=STEPS * 8,
            num_levels=STEPS * 5,
            stages=stages,
            num_ahead_hits=self.num_ahead_hits,
            num_ahead_misses=self.num_ahead_misses,
            hit_draft_seconds=self.num_ahead_hits * 0.0001,
        )
        counts = pb.RankCounts(num_offered=[20_000, 20_000], num_accepted=[12_000, 4_000])
        by_depth = [] if isinstance(tree, DynamicShape) else [counts]
        return pb.SpeculationReport(num_steps=STEPS, num_drafted_steps=STEPS, trees=[usage], counts_by_depth=by_depth)


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as redis:
        yield redis


@pytest.fixture
def redis(server: EmbeddedRedis) -> EmbeddedRedis:
    with Redis.from_url(server.url) as connection:
        connection.flushall()
    return server


@pytest.fixture
def coordinator() -> KnownCoordinator:
    return KnownCoordinator()


def key(coordinator: KnownCoordinator, rule: Rule = GREEDY, temperature: float = 0.0, **at: float) -> PlanKey:
    situation = Situation.of(rule, temperature, **at)  # type: ignore[arg-type]
    return plan_key(coordinator.pair.verify, coordinator.pair.draft, situation)


async def stored(redis: EmbeddedRedis, *keys: PlanKey) -> dict[PlanKey, TreePlan]:
    async with TreeCache(redis.url) as cache:
        plans, rejected = await cache.get_many(keys)
    assert not rejected
    return {key: each.plan for key, each in plans.items()}


async def test_the_plan_follows_from_what_was_measured_and_lands_in_redis(
    coordinator: KnownCoordinator, address: str, redis: EmbeddedRedis
) -> None:
    [plan] = await plan_pair(address, redis.url, temperatures=[0.6], prompts=["a", "b", "c"])
    assert plan.inputs.acceptance[0][:2] == pytest.approx((0.6, 0.2), abs=1e-3)
    assert max(plan.inputs.errors[0][:2]) < 0.01
    assert plan.inputs.verify_curve.at(1) == pytest.approx(0.15)
    assert plan.inputs.verify_curve.at(64) == pytest.approx(0.326)
    assert plan.inputs.draft_curve.at(1) == pytest.approx(0.003)
    assert (plan.inputs.verify_rtt_seconds, plan.inputs.draft_rtt_seconds) == (0.002, 0.001)
    assert plan.inputs.host_seconds == pytest.approx(0.002)
    assert (plan.inputs.tokens_factor, plan.inputs.shares_device) == (1.0, False)
    assert (plan.chosen.kind, plan.chosen.shape.size <= 16) == ("tree", True)
    own = key(coordinator, SEQUOIA, 0.6)
    assert await stored(redis, own) == {own: plan}


async def test_there_is_a_plan_for_every_load_that_the_workers_take(
    coordinator: KnownCoordinator, address: str, redis: EmbeddedRedis
) -> None:
    await plan_pair(address, redis.url, prompts=["a", "b", "c"])
    loads = [(sessions, context) for sessions in (1, 2, 4) for context in (0, 2000, 6000)]
    keys = {load: key(coordinator, num_sessions=load[0], num_context_tokens=load[1]) for load in loads}
    plans = await stored(redis, *keys.values())
    assert {load for load in loads if keys[load] in plans} == {(1, 0), (1, 2000), (2, 0), (2, 2000)}
    host_seconds = [plans[keys[sessions, 0]].inputs.host_seconds for sessions in (1, 2)]
    assert host_seconds == pytest.approx([0.002, 0.004]), "sessions share forwards, and nothing else"
    sizes = [plans[keys[sessions, 0]].chosen.shape.size for sessions in (1, 2)]
    assert sizes[1] <= sizes[0]


@pytest.mark.parametrize(("has_chat_template", "num_conversations"), [(False, 0), (True, 5)])
async def test_the_pair_writes_what_users_ask_for(
    coordinator: KnownCoordinator, address: str, redis: EmbeddedRedis, has_chat_template: bool, num_conversations: int
) -> None:
    coordinator.pair.has_chat_template = has_chat_template
    await plan_pair(address, redis.url)
    asked = {each.text or each.chat.messages[0].content: bool(each.chat.messages) for each in coordinator.requests}
    assert len(asked) == 6
    assert sum(asked.values()) == num_conversations


async def test_acceptance_is_measured_with_a_wide_tree_that_both_workers_take(
    coordinator: KnownCoordinator, address: str, redis: EmbeddedRedis
) -> None:
    seen: list[tuple[int, int]] = []
    await plan_pair(
        address, redis.url, prompts=["a", "b"], max_tokens=9, on_progress=lambda done, total: seen.append((done, total))
    )
    first, dynamic, wide, plain, *_ = coordinator.requests
    assert (first.text, first.max_tokens, first.sampling.temperature) == ("a", 9, 0.0)
    assert tuple(first.speculation.topology.parents) == MEASURING_TREE.parents[:16]
    assert (dynamic.text, dynamic.max_tokens, wide.text, wide.max_tokens) == ("a", 9 + 9, "a", 9 + 5)
    # What a token takes 1.6 times as fast is 0.0625; a node takes the target 0.001 and a level the draft 0.001.
    for request, levels, width in ((dynamic, 9, 2), (wide, 5, 4)):
        shape = shape_from_wire(request.speculation, GREEDY, 16)
        assert isinstance(shape, DynamicShape)
        assert (shape.size, shape.levels, shape.width) == (16, levels, width)
        assert (shape.least_chance, shape.least_gain) == pytest.approx((0.016, 0.016))
    assert (plain.text, plain.max_tokens, plain.speculation.mode) == ("a", 5, pb.SPECULATION_MODE_OFF)
    assert seen == [(0, 2), (1, 2), (2, 2)]


async def test_a_pair_without_a_draft_is_not_planned_for(
    coordinator: KnownCoordinator, address: str, redis: EmbeddedRedis
) -> None:
    coordinator.pair.ClearField("draft")
    with pytest.raises(FailedPrecondition, match="no draft worker"):
        await plan_pair(address, redis.url)


async def test_steps_that_were_never_drafted_are_no_measurement(
    coordinator: KnownCoordinator, address: str, redis: EmbeddedRedis
) -> None:
    coordinator.fails = True
    with pytest.raises(Unavailable, match="no step was drafted: the draft is late"):
        await plan_pair(address, redis.url)


async def test_a_worker_without_a_latency_curve_is_not_planned_for(
    coordinator: KnownCoordinator, address: str, redis: EmbeddedRedis
) -> None:
    coordinator.pair.draft.ClearField("latencies")
    with pytest.raises(FailedPrecondition, match="of no use: a worker without a latency curve"):
        await plan_pair(address, redis.url)


async def test_two_temperatures_of_one_bucket_are_refused(redis: EmbeddedRedis) -> None:
    with pytest.raises(InvalidArgument, match=r"share the plan for \(0.4,0.8\]"):
        await plan_pair("127.0.0.1:1", redis.url, temperatures=[0.5, 0.7])


async def test_traversal_gets_its_own_measured_correction(
    coordinator: KnownCoordinator, address: str, redis: EmbeddedRedis
) -> None:
    coordinator.tokens_per_step = 4.0
    [plan] = await plan_pair(address, redis.url, temperatures=[0.6], rule_name=TRAVERSAL.name, prompts=["a", "b", "c"])
    assert plan.inputs.tokens_factor > 1.1


async def test_dynamic_trees_are_tried_where_the_rule_is_exact_with_them(
    coordinator: KnownCoordinator, address: str, redis: EmbeddedRedis
) -> None:
    coordinator.dynamic_tokens_per_step = 4.0
    [greedy] = await plan_pair(address, redis.url, prompts=["a", "b", "c"])
    [drawn] = await plan_pair(address, redis.url, temperatures=[0.6], prompts=["a", "b", "c"])
    error = 0.8 * 4.0 / (3 * STEPS) ** 0.5
    expected = tuple(MeasuredTree(shape, 4.0, error, 8.0, 5.0) for shape in dynamic_shapes(coordinator.pair))
    assert greedy.inputs.dynamic == expected
    assert greedy.inputs.acceptance[0][:2] == pytest.approx((0.6, 0.2), abs=1e-3)
    assert (greedy.chosen.kind, drawn.chosen.kind, drawn.inputs.dynamic) == ("dynamic", "tree", ())
    assert not any(each.speculation.HasField("dynamic") for each in coordinator.requests if each.sampling.temperature)


async def test_what_coordinators_counted_lately_counts_too(
    coordinator: KnownCoordinator, address: str, redis: EmbeddedRedis
) -> None:
    await count_live(coordinator, redis, accepted=9_000)
    [plan] = await plan_pair(address, redis.url, prompts=["a"])
    # At the root 20,000 measured at 0.6 and 10,000 live ones at 0.9; deeper live ones only.
    assert plan.inputs.acceptance[0][0] == pytest.approx(0.7, abs=0.01)
    assert plan.inputs.acceptance[-1][0] == pytest.approx(0.9, abs=0.01)


async def test_the_plan_knows_how_often_drafting_ahead_is_right_and_what_it_does_not_hide(
    coordinator: KnownCoordinator, address: str, redis: EmbeddedRedis
) -> None:
    """Steps with a hit say nothing about what growing a tree takes."""
    coordinator.num_ahead_hits, coordinator.num_ahead_misses = 600, 400
    [plan] = await plan_pair(address, redis.url, prompts=["a", "b", "c"])
    assert plan.inputs.draft_ahead_hit_rate == pytest.approx(0.6)
    assert plan.inputs.draft_curve.at(1) == pytest.approx(0.003)


@pytest.mark.parametrize(("num_hits", "num_misses", "num_steps"), [(0, 0, 0), (40, 23, 63), (200, 100, 601)])
def test_drafting_ahead_is_not_planned_with_while_little_is_known_of_it_or_it_is_mostly_off(
    num_hits: int, num_misses: int, num_steps: int
) -> None:
    assert ahead_hit_rate(num_hits, num_hits + num_misses, num_steps) is None
    assert ahead_hit_rate(num_hits + 1, num_hits + num_misses + 64, num_steps) is not None


async def count_live(coordinator: KnownCoordinator, redis: EmbeddedRedis, accepted: int) -> None:
    from time import time

    from coordinator.trees import pair_name

    counts = AcceptanceCounts(((10_000.0,),) * 4, ((float(accepted),),) * 4)
    pair = pair_name(coordinator.pair.verify, coordinator.pair.draft)
    async with LiveCounts(redis.url) as live:
        learnt = LiveAcceptance(counts, num_steps=10_000, num_ahead_hits=6_000, num_ahead_misses=2_000)
        await live.add(CountsKey(pair, "greedy", "0"), learnt, now=time())


async def test_only_one_planner_measures_a_pair_at_a_time(
    coordinator: KnownCoordinator, address: str, redis: EmbeddedRedis
) -> None:
    async with TreeCache(redis.url) as cache, cache.single_flight(key(coordinator)) as is_ours:
        assert is_ours
        with pytest.raises(FailedPrecondition, match="another planner"):
            await plan_pair(address, redis.url)
    await plan_pair(address, redis.url, prompts=["a"])


def test_calibration_of_a_single_tree_scales_without_a_constant() -> None:
    coordinator = KnownCoordinator()
    from sequoia.generation import Answer

    answer = Answer()
    report = coordinator._report(MEASURING_TREE)
    answer.add(pb.GenerateResponse(finish=pb.Finish(speculation=report)))
    calibration = calibrate(coordinator.pair, [answer.finished().speculation])
    assert calibration == Calibration(*map(pytest.approx, (2.0, 2.0, 3.0, 0.0, 0.002)))


class Watched:
    """The events of a watch, one after the other."""

    def __init__(self, events: AsyncIterator[WatchEvent]) -> None:
        self._events = events

    async def next(self) -> WatchEvent:
        async with asyncio.timeout(20):
            return await anext(self._events)


@pytest.fixture
async def watched(address: str, redis: EmbeddedRedis) -> AsyncIterator[Watched]:
    events = watch_pair(address, redis.url, prompts=["a", "b", "c"], interval_seconds=0.01)
    async with aclosing(events):  # type: ignore[type-var]
        yield Watched(events)


async def test_a_watch_measures_once_and_keeps_the_plan_while_nothing_changes(
    coordinator: KnownCoordinator, watched: Watched
) -> None:
    assert (await watched.next()).kind == "measured"
    num_requests = len(coordinator.requests)
    assert [(await watched.next()).kind for _ in range(3)] == ["kept"] * 3
    assert len(coordinator.requests) == num_requests


async def test_a_watch_plans_again_without_measuring_when_acceptance_or_distance_change(
    coordinator: KnownCoordinator, watched: Watched, redis: EmbeddedRedis
) -> None:
    first = (await watched.next()).plan
    num_requests = len(coordinator.requests)
    await count_live(coordinator, redis, accepted=9_900)
    event = await watched.next()
    assert (event.kind, event.reason) == ("replanned", "acceptance or distance changed")
    assert first is not None
    assert event.plan is not None
    assert event.plan.chosen.shape.levels > first.chosen.shape.levels
    assert (first.inputs.draft_ahead_hit_rate, event.plan.inputs.draft_ahead_hit_rate) == (None, 0.75)
    coordinator.pair.draft_rtt_seconds = 0.03
    event = await watched.next()
    assert (event.kind, event.reason) == ("replanned", "another distance")
    far = key(coordinator, round_trip_seconds=0.032)
    assert await stored(redis, far) == {far: event.plan}
    assert len(coordinator.requests) == num_requests


async def test_an_old_plan_is_measured_again_and_serves_until_then(
    coordinator: KnownCoordinator, watched: Watched, redis: EmbeddedRedis
) -> None:
    own = key(coordinator)
    plan = (await watched.next()).plan
    assert plan is not None
    async with TreeCache(redis.url) as cache:
        await cache.put_many({own: StoredPlan(plan, 0.0)}, ttl_seconds=60)
        with Redis.from_url(redis.url) as connection:
            others = [name for name in connection.keys("sequoia:plan:*") if name != str(own).encode()]
            connection.delete(*others)
        async with cache.single_flight(own):
            event = await watched.next()
            assert (event.kind, event.plan) == ("waiting", plan)
    event = await watched.next()
    assert (event.kind, event.reason.startswith("the plan was")) == ("measured", True)


async def test_a_watch_survives_whatever_is_down(
    coordinator: KnownCoordinator, watched: Watched, redis: EmbeddedRedis
) -> None:
    coordinator.pair.ClearField("draft")
    assert (await watched.next()).kind == "failed"
    coordinator.pair.draft.CopyFrom(KnownCoordinator().pair.draft)
    assert (await watched.next()).kind == "measured"


class Crash(Exception):
    """The planner dies here."""


@pytest.mark.parametrize("dies_at", range(12))
async def test_a_planner_that_dies_at_any_point_leaves_valid_plans(
    coordinator: KnownCoordinator,
    address: str,
    redis: EmbeddedRedis,
    monkeypatch: pytest.MonkeyPatch,
    dies_at: int,
) -> None:
    """At each of its calls to the coordinator or to Redis."""
    [before] = await plan_pair(address, redis.url, prompts=["a", "b"])
    calls = count()

    def dies(function: object) -> object:
        async def call(*args: object, **kwargs: object) -> object:
            if next(calls) == dies_at:
                raise Crash
            return await function(*args, **kwargs)  # type: ignore[operator]

        return call

    from redis.asyncio import connection

    from sequoia.client import AsyncClient

    for owner, name in (
        (AsyncClient, "generate"),
        (AsyncClient, "describe_pair"),
        (connection.Connection, "send_packed_command"),
    ):
        monkeypatch.setattr(owner, name, dies(getattr(owner, name)))
    with pytest.raises(Crash):
        await plan_pair(address, redis.url, prompts=["a", "b"])
    monkeypatch.undo()
    own = key(coordinator)
    [after] = (await stored(redis, own)).values()
    assert after.chosen == before.chosen
