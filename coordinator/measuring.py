"""A running pair measured in its own loop: acceptance on text that it writes, and what steps of some trees take."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from coordinator.trees import max_tree_size
from sequoia.acceptance import AcceptanceCounts
from sequoia.client import AsyncClient, Prompt, Speculation, SpeculationFigures
from sequoia.errors import FailedPrecondition, Unavailable
from sequoia.hardware import LatencyProfile
from sequoia.optimal_tree import expected_tokens
from sequoia.planner import PlanInputs, draft_seconds
from sequoia.pricing import MeasuredTree
from sequoia.rules import Rule
from sequoia.speculation_figures import TreeUsage
from sequoia.topology import DynamicShape, Topology, TreeShape
from sequoia.v1.coordinator_pb2 import DescribePairResponse
from sequoia.wire import profile_from_wire

PLAIN = Topology.root_only()
# 22 nodes, 5 levels: eight ranks under the root, and fewer below it, where text that is easy to guess leads.
MEASURING_TREE = Topology((-1, *[0] * 8, *[1] * 4, *[2] * 2, *[9] * 4, *[15] * 3))
# Beside it, where the rule is exact with any shape: shapes of each step's own, of at most so many nodes and levels.
_DYNAMIC_SIZE, _DYNAMIC_LEVELS, _DYNAMIC_WIDTHS = 48, 24, (2, 4)
# What the dynamic ones are limited by is worth what it costs at about this speedup.
_HOPED_SPEEDUP = 1.6
_LARGEST_LIMIT = 0.8
# Of the tokens of a step, by their mean.
_USUAL_DEVIATION = 0.8
# And, in turns, for what a step of another size takes.
_OTHERS = (PLAIN, Topology.chain(3), Topology((-1, 0, 0, 1, 1, 2, 3, 5)))
# Fewer steps with one tree in an answer are those at its end.
_LEAST_STEPS = 3
# Attempts at drafting ahead of which the share of hits is taken for known, to about 0.06.
_LEAST_ATTEMPTS = 64.0


@dataclass(frozen=True, slots=True)
class Calibration:
    """What forwards take in the loop by what they took at start-up, and what a drafted step takes beside them."""

    plain_factor: float  # of the target's forward over one token, without a draft that runs in between
    tree_factor: float  # of its wider ones
    draft_factor: float
    plain_host_seconds: float  # of a plain step, round trips included
    host_seconds: float  # of a drafted step, without them


async def measure(
    client: AsyncClient,
    pair: DescribePairResponse,
    temperature: float,
    rule: Rule,
    prompts: Sequence[Prompt],
    max_tokens: int,
    on_prompt: Callable[[], None],
) -> list[SpeculationFigures]:
    """Every prompt continued with the measuring trees and, by half as many tokens, in one of the other ways.

    With dynamic trees by more: towards the end of an answer they are not what they were asked to be.
    """
    limit = max_tree_size(pair.verify, pair.draft)
    dynamic = dynamic_shapes(pair) if rule.takes_any_shape else []

    async def generate(prompt: Prompt, tree: TreeShape, num_tokens: int) -> SpeculationFigures:
        how: Speculation = "off" if tree == PLAIN else tree.cut_to(limit)
        generation = await client.generate(
            prompt, max_tokens=num_tokens, temperature=temperature, rule=rule.name, speculation=how
        )
        return generation.speculation

    figures: list[SpeculationFigures] = []
    for index, prompt in enumerate(prompts):
        figures.append(await generate(prompt, MEASURING_TREE, max_tokens))
        figures += [await generate(prompt, shape, max_tokens + shape.levels) for shape in dynamic]
        figures.append(await generate(prompt, _OTHERS[index % len(_OTHERS)], (max_tokens + 1) // 2))
        on_prompt()
    return figures


def counts_of(figures: Iterable[SpeculationFigures]) -> AcceptanceCounts:
    """What was offered and accepted in all. Raises Unavailable when no step was drafted."""
    seen = list(figures)
    counts = sum((AcceptanceCounts(each.offered, each.accepted) for each in seen), AcceptanceCounts())
    if not counts.num_steps:
        raise Unavailable(f"no step was drafted: {next((each.fallback_reason for each in seen), 'no prompts')}")
    return counts


def expected_in(
    figures: Iterable[SpeculationFigures], acceptance: Sequence[Sequence[float]]
) -> tuple[float, float, int]:
    """Of steps with planned trees: the tokens committed, those expected from the acceptance, and how many they were."""
    drafted = [(usage, tree) for usage, tree in _planned(figures) if tree != PLAIN]
    expected = sum(usage.num_steps * expected_tokens(tree, acceptance) for usage, tree in drafted)
    return sum(usage.num_tokens for usage, _ in drafted), expected, sum(usage.num_steps for usage, _ in drafted)


def dynamic_shapes(pair: DescribePairResponse) -> list[DynamicShape]:
    """The dynamic trees to try: a level must gain what a draft forward costs, a node what it costs the target.

    None where the workers take too small trees. Raises FailedPrecondition when their measurements are of no use.
    """
    verify, draft = (profile.curve() for profile in profiles(pair))
    limit = min(max_tree_size(pair.verify, pair.draft), verify.max_tokens)
    size = min(limit, _DYNAMIC_SIZE)
    if size < 2:
        return []
    # Seconds of a token, as they will be; what a node takes the target.
    token, node = verify.at(1) / _HOPED_SPEEDUP, (verify.at(size) - verify.at(1)) / (size - 1)
    shapes = []
    for width in (each for each in _DYNAMIC_WIDTHS if each < size and each <= draft.max_tokens):
        # Every node that is forwarded takes a row.
        levels = min(size, _DYNAMIC_LEVELS, 2 + (limit - 2) // width)
        limits = (min(_LARGEST_LIMIT, max(0.0, cost / token)) for cost in (node, draft.at(width)))
        shapes.append(DynamicShape(size, levels, width, *limits))
    return shapes


def measured_dynamic(figures: Sequence[SpeculationFigures], shapes: Iterable[DynamicShape]) -> tuple[MeasuredTree, ...]:
    """What those of the dynamic trees that were used brought, and how large they became."""
    found = []
    for shape in shapes:
        usages = [usage for each in figures for usage in each.trees if usage.shape == shape]
        if not usages:
            continue
        names = ("num_steps", "num_tokens", "num_nodes", "num_levels")
        num_steps, num_tokens, num_nodes, num_levels = (sum(getattr(each, name) for each in usages) for name in names)
        per_step = num_tokens / num_steps
        error = _USUAL_DEVIATION * per_step / math.sqrt(num_steps)
        found.append(MeasuredTree(shape, per_step, error, num_nodes / num_steps, num_levels / num_steps))
    return tuple(found)


def ahead_hit_rate(num_hits: float, num_attempts: float, num_steps: float) -> float | None:
    """The share of hits among attempts at drafting ahead; None, as if it never were done, while that is not known.

    Neither is it known where most of the steps saw no attempt: then the drafter has found that it does not pay.
    """
    if num_attempts < max(_LEAST_ATTEMPTS, num_steps / 2.0):
        return None
    return num_hits / num_attempts


def profiles(pair: DescribePairResponse) -> tuple[LatencyProfile, LatencyProfile]:
    """The verify worker's and the draft worker's. Raises FailedPrecondition when they are of no use."""
    try:
        return profile_from_wire(pair.verify.latencies), profile_from_wire(pair.draft.latencies)
    except ValueError as error:
        raise FailedPrecondition(f"the workers' measurements are of no use: {error}") from error


def calibrate(pair: DescribePairResponse, figures: Iterable[SpeculationFigures]) -> Calibration:
    """The medians over the answers of what a step took.

    Dynamic trees are left out: how wide their forwards were is not known.
    """
    verify, draft = (profile.curve() for profile in profiles(pair))
    by_tree: dict[Topology, list[TreeUsage]] = defaultdict(list)
    for usage, tree in _planned(figures):
        by_tree[tree].append(usage)
    plain = by_tree.pop(PLAIN, [])
    drafted = {tree: usages for tree, usages in by_tree.items() if tree.size <= verify.max_tokens}
    # One factor for all trees: apart, they would be of too few answers each.
    ratios = [_per_step([usage], "verify") / verify.at(tree.size) for tree, each in drafted.items() for usage in each]
    tree_factor = median(ratios) if ratios else 1.0
    plain_factor = _per_step(plain, "verify") / verify.at(1) if plain else tree_factor
    plain_host_seconds = _per_step(plain, "network", "host") if plain else 0.0
    draft_factor, per_step = _line(
        [(draft_seconds(tree, draft), each) for tree, usages in drafted.items() if (each := _draft_per_step(usages))]
    )
    round_trips = pair.verify_rtt_seconds + pair.draft_rtt_seconds
    beside = [_per_step(usages, "host", "network") - round_trips for usages in drafted.values()]
    host_seconds = per_step + (max(0.0, median(beside)) if beside else 0.0)
    return Calibration(plain_factor, tree_factor, draft_factor, plain_host_seconds, host_seconds)


def inputs_for(
    pair: DescribePairResponse,
    calibration: Calibration,
    num_sessions: int,
    num_context_tokens: int,
    acceptance: Sequence[Sequence[float]],
    errors: Sequence[Sequence[float]],
    factor: float,
    dynamic: tuple[MeasuredTree, ...],
    draft_ahead_hit_rate: float | None,
) -> PlanInputs:
    """What a plan for so many sessions behind such a context follows from.

    Forwards are shared by the sessions, what the hosts do is not: it counts for each of them. Raises ValueError when
    the workers never measured a forward of that many sessions.
    """
    verify, draft = (profile.curve(num_sessions, num_context_tokens) for profile in profiles(pair))
    plain_factor = calibration.plain_factor + num_sessions * calibration.plain_host_seconds / verify.at(1)
    return PlanInputs(
        acceptance=tuple(map(tuple, acceptance)),
        errors=tuple(map(tuple, errors)),
        verify_curve=verify.scaled((1, plain_factor), (2, calibration.tree_factor)),
        draft_curve=draft.scaled((1, calibration.draft_factor)),
        draft_rtt_seconds=pair.draft_rtt_seconds,
        verify_rtt_seconds=pair.verify_rtt_seconds,
        host_seconds=num_sessions * calibration.host_seconds,
        tokens_factor=factor,
        dynamic=dynamic,
        draft_ahead_hit_rate=draft_ahead_hit_rate,
        shares_device=pair.verify.device_id == pair.draft.device_id,
    )


def _planned(figures: Iterable[SpeculationFigures]) -> list[tuple[TreeUsage, Topology]]:
    """The usages of trees that were planned, root-only ones included."""
    return [(usage, usage.shape) for usage in _usages(figures) if isinstance(usage.shape, Topology)]


def _usages(figures: Iterable[SpeculationFigures]) -> Iterable[TreeUsage]:
    """Of steps enough to tell what one takes."""
    return (usage for each in figures for usage in each.trees if usage.num_steps >= _LEAST_STEPS)


def _per_step(usages: Sequence[TreeUsage], *stages: str) -> float:
    return median(sum(getattr(each.stage_seconds, stage) for stage in stages) / each.num_steps for each in usages)


def _draft_per_step(usages: Sequence[TreeUsage]) -> float:
    """Of steps whose tree was grown from its root; 0 when there was none."""
    grown = [(each, each.num_steps - each.num_ahead_hits) for each in usages]
    seconds = [(each.stage_seconds.draft - each.hit_draft_seconds) / count for each, count in grown if count]
    return median(seconds) if seconds else 0.0


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Slope and constant, neither negative, of what was measured over what the curve says: least squares of ratios."""
    if not points:
        return 1.0, 0.0
    rows = np.array([(curve / measured, 1.0 / measured) for curve, measured in points])
    slope, constant = np.linalg.lstsq(rows, np.ones(len(points)), rcond=None)[0] if len(points) > 1 else (0.0, -1.0)
    if slope > 0.0 and constant >= 0.0:
        return float(slope), float(constant)
    return float(rows[:, 0].sum() / (rows[:, 0] ** 2).sum()), 0.0
