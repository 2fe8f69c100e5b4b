"""The planner job against a real Redis and a gRPC server whose figures are known beforehand."""

from collections.abc import AsyncIterator, Iterator

import pytest

from coordinator.planner_job import MEASURING_TREE, plan_pair
from coordinator.trees import plan_key
from sequoia.cli.redis import EmbeddedRedis
from sequoia.errors import FailedPrecondition, InvalidArgument, Unavailable
from sequoia.rpc import Context, Server
from sequoia.rules import SEQUOIA
from sequoia.tree_cache import TreeCache
from sequoia.v1 import coordinator_pb2 as pb
from sequoia.v1 import coordinator_pb2_grpc
from sequoia.v1.sampling_pb2 import RULE_SEQUOIA
from sequoia.v1.worker_pb2 import LatencyCurve, WorkerDescription


class KnownCoordinator(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """Describes a pair and answers every request with the same figures."""

    def __init__(self) -> None:
        self.pair = pb.DescribePairResponse(
            verify=WorkerDescription(model="target", max_tree_size=64, latency=curve(0.100, 0.110)),
            draft=WorkerDescription(model="draft", max_tree_size=16, latency=curve(0.001, 0.001)),
            default_rule=RULE_SEQUOIA,
            verify_rtt_seconds=0.002,
            draft_rtt_seconds=0.001,
        )
        self.report = pb.SpeculationReport(
            num_steps=1000,
            num_drafted_steps=1000,
            num_offered_by_rank=[20_000, 20_000],
            num_accepted_by_rank=[12_000, 4_000],
            # The measuring tree of 16 nodes took twice what the curve says, and its 3 draft forwards three times.
            stages=pb.StageSeconds(host=3.0, verify=1000 * 2 * (0.100 + 0.010 * 15 / 63), draft=1000 * 3 * 0.003),
        )
        self.plain_report = pb.SpeculationReport(num_steps=10, stages=pb.StageSeconds(verify=1.5))
        self.requests: list[pb.GenerateRequest] = []

    async def DescribePair(self, request: pb.DescribePairRequest, context: Context) -> pb.DescribePairResponse:
        return self.pair

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        is_off = request.speculation.mode == pb.SPECULATION_MODE_OFF
        report = self.plain_report if is_off else self.report
        yield pb.GenerateResponse(finish=pb.Finish(reason=pb.FINISH_REASON_LENGTH, speculation=report))


def curve(first: float, last: float) -> LatencyCurve:
    return LatencyCurve(num_tokens=[1, 64], seconds=[first, last])


@pytest.fixture(scope="module")
def redis() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as redis:
        yield redis


@pytest.fixture
def coordinator() -> KnownCoordinator:
    return KnownCoordinator()


@pytest.fixture
async def address(coordinator: KnownCoordinator) -> AsyncIterator[str]:
    server = Server("127.0.0.1:0")
    coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(coordinator, server.grpc_server)
    yield await server.start(["sequoia.v1.CoordinatorService"])
    await server.stop(0)


async def test_the_plan_follows_from_what_was_measured_and_lands_in_redis(
    coordinator: KnownCoordinator, address: str, redis: EmbeddedRedis
) -> None:
    [plan] = await plan_pair(address, redis.url, temperatures=[0.6], prompts=["a", "b"])
    assert plan.inputs.acceptance[:2] == pytest.approx((0.6, 0.2), abs=1e-3)
    assert plan.inputs.verify_curve.at(1) == pytest.approx(0.15)
    assert plan.inputs.verify_curve.at(64) == pytest.approx(0.22)
    assert plan.inputs.draft_curve.at(1) == pytest.approx(0.003)
    assert (plan.inputs.verify_rtt_seconds, plan.inputs.draft_rtt_seconds) == (0.002, 0.001)
    assert plan.inputs.host_seconds == pytest.approx(0.003)
    assert (plan.kind, plan.topology.size <= 16) == ("tree", True)
    key = plan_key(coordinator.pair.verify, coordinator.pair.draft, "(0.4,0.8]", SEQUOIA)
    async with TreeCache(redis.url) as cache:
        assert await cache.get_many([key]) == ({key: plan}, {})


async def test_acceptance_is_measured_with_a_wide_tree_that_both_workers_take(
    coordinator: KnownCoordinator, address: str, redis: EmbeddedRedis
) -> None:
    seen: list[tuple[int, int]] = []
    await plan_pair(
        address, redis.url, prompts=["a", "b"], max_tokens=9, on_progress=lambda done, total: seen.append((done, total))
    )
    [_, first, _] = coordinator.requests
    assert (first.text, first.max_tokens, first.sampling.temperature) == ("a", 9, 0.0)
    assert tuple(first.speculation.topology.parents) == MEASURING_TREE.parents[:16]
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
    coordinator.report = pb.SpeculationReport(num_steps=8, num_fallback_steps=8, fallback_reason="the draft is late")
    with pytest.raises(Unavailable, match="no step was drafted: the draft is late"):
        await plan_pair(address, redis.url)


async def test_a_worker_without_a_latency_curve_is_not_planned_for(
    coordinator: KnownCoordinator, address: str, redis: EmbeddedRedis
) -> None:
    coordinator.pair.draft.ClearField("latency")
    with pytest.raises(FailedPrecondition, match="of no use: a latency curve"):
        await plan_pair(address, redis.url)


async def test_two_temperatures_of_one_bucket_are_refused(redis: EmbeddedRedis) -> None:
    with pytest.raises(InvalidArgument, match=r"share the plan for \(0.4,0.8\]"):
        await plan_pair("127.0.0.1:1", redis.url, temperatures=[0.5, 0.7])
