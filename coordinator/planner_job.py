"""The planner job: measure a running pair, choose its trees, put them where the coordinator finds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from coordinator.trees import max_tree_size, plan_key
from sequoia.acceptance import AcceptanceCounts
from sequoia.client import AsyncClient, SpeculationFigures
from sequoia.errors import FailedPrecondition, InvalidArgument, Unavailable
from sequoia.hardware import LatencyCurve
from sequoia.planner import MAX_LEVELS, PlanInputs, TreePlan, choose, draft_seconds
from sequoia.rules import ParameterError, Rule, choose_rule
from sequoia.topology import Topology
from sequoia.tree_cache import TreeCache, temperature_bucket
from sequoia.v1.coordinator_pb2 import DescribePairResponse
from sequoia.v1.worker_pb2 import WorkerDescription
from sequoia.wire import rule_from_wire

PROMPTS = (
    "The harbour was quiet that morning. Old Marta untied her boat and",
    "def is_prime(number: int) -> bool:\n    ",
    "Question: Why do leaves change colour in autumn?\nAnswer:",
    "Shopping list for a vegetable soup:\n- 2 onions\n- 3 carrots\n-",
    "Dear Ms Okafor,\n\nThank you for your letter of 3 May. We are pleased to",
    "The theorem follows by induction. For n = 1 the claim holds, since",
)
# 22 nodes, 5 levels: eight ranks under the root, and fewer below it, where text that is easy to guess leads.
MEASURING_TREE = Topology((-1, *[0] * 8, *[1] * 4, *[2] * 2, *[9] * 4, *[15] * 3))
TTL_SECONDS = 7 * 24 * 3600

Progress = Callable[[int, int], None]


async def plan_pair(
    address: str,
    redis_url: str,
    *,
    temperatures: Sequence[float] = (0.0,),
    rule_name: str = "",
    prompts: Sequence[str] = PROMPTS,
    max_tokens: int = 48,
    max_levels: int = MAX_LEVELS,
    ttl_seconds: int = TTL_SECONDS,
    on_progress: Progress = lambda done, total: None,
) -> list[TreePlan]:
    """One plan per temperature, in that order, measured on the coordinator at `address` and stored in Redis.

    Above temperature 0 a plan is for the rule of that name, by default the coordinator's own.

    Acceptance is counted while the pair generates `max_tokens` tokens from each prompt; the latency curves are those
    that the workers measured, scaled to what the same forwards took in the loop. `on_progress` is called with (prompts
    done, prompts in all). Raises InvalidArgument for two temperatures of one bucket, FailedPrecondition for a pair that
    cannot be planned for (no draft worker, say), Unavailable when a part cannot be reached.
    """
    _check_buckets(temperatures)
    total = len(temperatures) * len(prompts)
    plans: list[TreePlan] = []
    async with AsyncClient(address) as client, TreeCache(redis_url) as cache:
        pair = await client.describe_pair()
        if not pair.HasField("draft"):
            raise FailedPrecondition("there is no draft worker at present; start one and plan again", "draft")
        for temperature in temperatures:
            rule = _rule(rule_name, temperature, pair)
            plain = await client.generate(
                prompts[0], max_tokens=(max_tokens + 1) // 2, temperature=temperature, speculation="off"
            )
            figures: list[SpeculationFigures] = []
            for prompt in prompts:
                on_progress(len(plans) * len(prompts) + len(figures), total)
                figures.append(await _speculate(client, pair, prompt, temperature, rule, max_tokens))
            limit = max_tree_size(pair.verify, pair.draft)
            inputs = plan_inputs(pair, plain.speculation, figures)
            plans.append(choose(inputs, max_size=limit, max_levels=max_levels))
            key = plan_key(pair.verify, pair.draft, temperature_bucket(temperature), rule)
            await cache.put(key, plans[-1], ttl_seconds)
        on_progress(total, total)
    return plans


def plan_inputs(
    pair: DescribePairResponse, plain: SpeculationFigures, drafted: Sequence[SpeculationFigures]
) -> PlanInputs:
    """What a plan for this pair follows from: its workers' measurements, and what plain and drafted steps took.

    Raises Unavailable when no step was drafted, FailedPrecondition when a worker's measurements are of no use.
    """
    counts = sum(
        (AcceptanceCounts(each.offered_by_rank, each.accepted_by_rank) for each in drafted), AcceptanceCounts()
    )
    if not counts.offered:
        raise Unavailable(f"no step was drafted: {next((each.fallback_reason for each in drafted), 'no prompts')}")
    try:
        return PlanInputs(
            acceptance=counts.vector(),
            verify_curve=_verify_curve(pair, plain, drafted),
            draft_curve=_draft_curve(pair, drafted),
            draft_rtt_seconds=pair.draft_rtt_seconds,
            verify_rtt_seconds=pair.verify_rtt_seconds,
            host_seconds=sum(each.stage_seconds.host for each in drafted) / sum(each.num_steps for each in drafted),
        )
    except ValueError as error:
        raise FailedPrecondition(f"the workers' measurements are of no use: {error}") from error


def _verify_curve(
    pair: DescribePairResponse, plain: SpeculationFigures, drafted: Sequence[SpeculationFigures]
) -> LatencyCurve:
    """t(1) as plain decoding took it, t(n) scaled to what the measuring tree took: beside a draft both are longer."""
    curve, size = _curve(pair.verify), _measuring_tree(pair).size
    plain_seconds = plain.stage_seconds.verify / plain.num_steps if plain.num_steps else curve.at(1)
    num_drafted = sum(each.num_drafted_steps for each in drafted)
    num_plain = sum(each.num_steps for each in drafted) - num_drafted
    tree_seconds = (sum(each.stage_seconds.verify for each in drafted) - num_plain * plain_seconds) / num_drafted
    wider = curve.scaled(tree_seconds / curve.at(size)).seconds[1:]
    return LatencyCurve(curve.num_tokens, (plain_seconds, *wider))


def _draft_curve(pair: DescribePairResponse, drafted: Sequence[SpeculationFigures]) -> LatencyCurve:
    """The worker's curve, scaled to what growing the measuring tree took."""
    curve = _curve(pair.draft)
    measured = sum(each.stage_seconds.draft for each in drafted) / sum(each.num_drafted_steps for each in drafted)
    return curve.scaled(measured / draft_seconds(_measuring_tree(pair), curve))


def _measuring_tree(pair: DescribePairResponse) -> Topology:
    return Topology(MEASURING_TREE.parents[: max_tree_size(pair.verify, pair.draft)])


def _rule(name: str, temperature: float, pair: DescribePairResponse) -> Rule:
    """Raises InvalidArgument naming `rule`."""
    default = rule_from_wire(pair.default_rule, "default_rule")
    try:
        return choose_rule("" if temperature == 0.0 else name, greedy=temperature == 0.0, seeded=False, default=default)
    except ParameterError as error:
        raise InvalidArgument(error.message, error.field) from error


async def _speculate(
    client: AsyncClient, pair: DescribePairResponse, prompt: str, temperature: float, rule: Rule, max_tokens: int
) -> SpeculationFigures:
    generation = await client.generate(
        prompt, max_tokens=max_tokens, temperature=temperature, rule=rule.name, speculation=_measuring_tree(pair)
    )
    return generation.speculation


def _check_buckets(temperatures: Sequence[float]) -> None:
    buckets = [temperature_bucket(each) for each in temperatures]
    for bucket in set(buckets):
        if buckets.count(bucket) > 1:
            raise InvalidArgument(f"two of {tuple(temperatures)} share the plan for {bucket}; name one", "temperature")


def _curve(worker: WorkerDescription) -> LatencyCurve:
    return LatencyCurve(tuple(worker.latency.num_tokens), tuple(worker.latency.seconds))
