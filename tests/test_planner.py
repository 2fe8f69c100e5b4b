import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from sequoia.acceptance import PRIOR
from sequoia.hardware import LatencyCurve, LatencyProfile, SharedCurve
from sequoia.optimal_tree import best_first, depth_limited
from sequoia.planner import PlanInputs, TreePlan, choose, expected_tokens, optimal_tree, price, without_dynamic
from sequoia.pricing import MeasuredTree, planned_like
from sequoia.topology import DynamicShape, Topology

CASES = json.loads(Path(__file__).with_name("data").joinpath("dp_cases.json").read_text())["cases"]
OPTIMA = [
    pytest.param(
        tuple(case["acceptance"]),
        8 if limit == "unlimited" else int(limit.removeprefix("levels<=")),
        int(size),
        optimum,
    )
    for case in CASES.values()
    for limit, optima in case["optimum"].items()
    for size, optimum in optima.items()
]
FLAT = LatencyCurve((1, 32), (0.1, 0.1))
FREE = LatencyCurve((1, 32), (1e-9, 1e-9))


@pytest.mark.parametrize(("acceptance", "levels", "size", "optimum"), OPTIMA)
def test_optimal_trees_equal_the_brute_force_optima(
    acceptance: tuple[float, ...], levels: int, size: int, optimum: float | None
) -> None:
    [*_, frontier] = depth_limited(acceptance, 8, levels)
    if optimum is None:
        assert frontier.tokens[size] == -math.inf
        with pytest.raises(ValueError, match="no tree"):
            optimal_tree(acceptance, size, levels)
        return
    tree = optimal_tree(acceptance, size, levels)
    assert (tree.size, tree.levels <= levels) == (size, True)
    assert expected_tokens(tree, acceptance) == pytest.approx(optimum)
    assert expected_tokens(frontier.tree(size), acceptance) == pytest.approx(optimum)
    assert frontier.tokens[size] == pytest.approx(optimum)


def test_best_first_and_dynamic_programming_agree_where_both_apply() -> None:
    by_levels = depth_limited(PRIOR, 80, 7)
    for levels, exact in enumerate(by_levels, start=1):
        greedy = best_first(PRIOR, 80, levels)
        assert greedy.tokens.tolist() == pytest.approx(exact.tokens.tolist())


@pytest.mark.parametrize("acceptance", [PRIOR, (0.3, 0.1, 0.5)])
def test_internal_nodes_are_counted_by_depth(acceptance: tuple[float, ...]) -> None:
    for frontier in (depth_limited(acceptance, 30, 5)[-1], best_first(acceptance, 30, 5)):
        tree = frontier.tree(30)
        depths = [tree.depths[node] for node in tree.internal_nodes]
        assert frontier.internal[30].tolist() == [depths.count(depth) for depth in range(5)]


def test_dynamic_programming_beats_best_first_on_noisy_vectors() -> None:
    noisy = (0.3, 0.1, 0.5)
    assert expected_tokens(optimal_tree(noisy, 7, 7), noisy) == pytest.approx(2.35)
    assert best_first(noisy, 7, 7).tokens[7] == pytest.approx(2.19)


def test_the_paper_vectors_give_the_published_expectations() -> None:
    assert expected_tokens(optimal_tree(PRIOR, 8, 8), PRIOR) == pytest.approx(3.846, abs=5e-4)


def outcomes(topology: Topology, acceptance: tuple[float, ...], node: int = 0) -> Iterator[tuple[float, int]]:
    """Every way a step can go from `node` on: its probability and the tokens it commits."""
    stays = 1.0
    for child, probability in zip(topology.children[node], acceptance, strict=False):
        stays -= probability
        for below, tokens in outcomes(topology, acceptance, child):
            yield probability * below, tokens + 1
    yield stays, 1


def test_expected_tokens_is_the_mean_over_all_outcomes() -> None:
    acceptance = (0.5, 0.25, 0.125)
    tree = Topology((-1, 0, 0, 0, 1, 1, 3, 4))
    assert sum(probability for probability, _ in outcomes(tree, acceptance)) == pytest.approx(1.0)
    mean = sum(probability * tokens for probability, tokens in outcomes(tree, acceptance))
    assert expected_tokens(tree, acceptance) == pytest.approx(mean)


def test_ranks_without_a_measurement_add_nothing() -> None:
    assert expected_tokens(Topology((-1, 0, 0)), (0.5,)) == 1.5


def test_off_wins_when_the_draft_is_as_slow_as_the_target() -> None:
    plan = choose(PlanInputs((0.6, 0.2), verify_curve=FLAT, draft_curve=FLAT))
    chosen = plan.chosen
    assert (chosen.kind, chosen.shape.parents, chosen.speedup, chosen.seconds_per_token) == ("off", (-1,), 1.0, 0.1)
    assert plan.best_tree is not None
    assert plan.best_tree.speedup < 1.0
    assert plan.best_tree.shape.size > 1


def test_a_tree_as_large_as_can_be_wins_when_draft_and_width_cost_nothing() -> None:
    plan = choose(PlanInputs((0.6, 0.2), verify_curve=FLAT, draft_curve=FREE))
    assert (plan.chosen.kind, plan.chosen.shape.size) == ("tree", 32)
    assert plan.chosen.speedup == pytest.approx(plan.chosen.tokens_per_step, rel=1e-6)
    assert plan.best_tree is not None
    assert plan.best_tree.shape.parents == plan.chosen.shape.parents


def test_a_chain_wins_when_siblings_are_never_accepted() -> None:
    steep = LatencyCurve((1, 4, 8), (0.1, 0.12, 10.0))
    assert choose(PlanInputs((0.8, 0.0), verify_curve=steep, draft_curve=FREE)).chosen.kind == "chain"


def test_of_trees_with_as_many_tokens_the_one_that_drafts_fewer_rows_wins() -> None:
    only_five = LatencyCurve((1, 2, 4, 5), (1.0, 100.0, 100.0, 1.0))
    only_one_row = LatencyCurve((1, 2, 5), (0.01, 100.0, 100.0))
    plan = choose(PlanInputs((0.5, 0.4), verify_curve=only_five, draft_curve=only_one_row))
    assert plan.chosen.shape.parents == (-1, 0, 0, 1, 1)


def test_longer_round_trips_make_larger_trees_and_then_none() -> None:
    curve = LatencyCurve((1, 64), (0.01, 0.04))
    near = PlanInputs(PRIOR, verify_curve=curve, draft_curve=FREE)
    sizes = [choose(replace(near, draft_rtt_seconds=rtt)).chosen.shape.size for rtt in (0.0, 0.005, 0.02, 1.0)]
    assert sizes[0] < sizes[1] < sizes[2]
    assert sizes[3] == 1


def test_the_price_counts_every_forward_and_every_round_trip() -> None:
    inputs = PlanInputs(
        (0.5, 0.25), LatencyCurve((1, 9), (1.0, 9.0)), LatencyCurve((1, 2), (0.1, 0.3)), 0.5, 0.25, 0.125
    )
    priced = price(Topology((-1, 0, 0, 1, 2)), inputs)
    assert priced.tokens_per_step == 1 + 0.75 + 0.5 * 0.5 + 0.25 * 0.5
    assert priced.seconds_per_token == pytest.approx((5.0 + 0.1 + 0.3 + 0.875) / 2.125)
    assert priced.speedup == pytest.approx(1.0 / priced.seconds_per_token)


def ordered_trees(size: int) -> Iterator[Topology]:
    """Every ordered tree of that many nodes, by all ways to hand parents out in level order."""

    def grow(parents: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if len(parents) == size:
            yield parents
            return
        for parent in range(parents[-1] if len(parents) > 1 else 0, len(parents)):
            yield from grow((*parents, parent))

    for parents in grow((-1,)):
        yield Topology(parents)


ALL_TREES = [tree for size in range(1, 8) for tree in ordered_trees(size)]
DRAFT_CURVES = {
    "flat": LatencyCurve((1, 7), (0.01, 0.01)),
    "rising": LatencyCurve((1, 2, 4, 7), (0.01, 0.018, 0.03, 0.05)),
    "a cliff": LatencyCurve((1, 2, 3, 7), (0.01, 0.01, 0.04, 0.04)),
    "one row": LatencyCurve((1,), (0.01,)),
    "two rows": LatencyCurve((1, 2), (0.01, 0.012)),
}


def random_acceptance(generator: random.Random, ranks: int) -> tuple[float, ...]:
    weights = sorted((generator.random() for _ in range(ranks)), reverse=True)
    return tuple(generator.uniform(0.7, 1.0) * weight / sum(weights) for weight in weights)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("draft_curve", DRAFT_CURVES.values(), ids=DRAFT_CURVES)
def test_no_tree_at_all_is_cheaper_than_the_choice(draft_curve: LatencyCurve, seed: int) -> None:
    generator = random.Random(seed)
    acceptance = random_acceptance(generator, 4)
    inputs = PlanInputs(acceptance, LatencyCurve((1, 7), (0.1, generator.uniform(0.1, 0.14))), draft_curve)
    seconds = [price(tree, inputs).seconds_per_token for tree in ALL_TREES if fits(tree, draft_curve)]
    assert choose(inputs).chosen.seconds_per_token == pytest.approx(min(seconds), rel=2e-3)


def fits(tree: Topology, draft_curve: LatencyCurve) -> bool:
    depths = [tree.depths[node] for node in tree.internal_nodes]
    return all(depths.count(depth) <= draft_curve.max_tokens for depth in depths)


@pytest.mark.parametrize("acceptance", [(0.6, 0.2, 0.1), (0.3, 0.1, 0.4)])
def test_no_tree_of_most_tokens_is_cheaper_than_the_choice(acceptance: tuple[float, ...]) -> None:
    inputs = PlanInputs(acceptance, LatencyCurve((1, 6), (0.1, 0.14)), LatencyCurve((1, 6), (0.01, 0.02)), 0.01, 0.01)
    optima = [optimal_tree(acceptance, n, d) for n, d in product(range(2, 7), range(2, 7)) if n <= 1 + 3 * (d - 1)]
    cheapest = min(price(tree, inputs).seconds_per_token for tree in optima)
    assert choose(inputs).chosen.seconds_per_token <= cheapest * (1 + 1e-12)


def test_the_reduced_tree_has_at_most_half_the_drafted_nodes() -> None:
    plan = choose(PlanInputs((0.6, 0.2), verify_curve=FLAT, draft_curve=FREE))
    assert plan.reduced is not None
    assert plan.best_tree is not None
    assert plan.reduced.shape.size - 1 <= (plan.best_tree.shape.size - 1) / 2


def test_drafting_ahead_hides_the_drafts_forwards_on_devices_of_their_own_and_no_round_trip() -> None:
    tree = Topology((-1, 0, 0, 1))
    inputs = PlanInputs((0.5, 0.25), LatencyCurve((1, 9), (1.0, 1.0)), LatencyCurve((1, 2), (0.2, 0.2)), 0.1, 0.05)
    plain = price(tree, inputs)
    ahead = price(tree, replace(inputs, draft_ahead_hit_rate=0.75))
    saved = 0.75 * 0.4 - 0.25 * 0.2 / 2
    step_seconds = plain.seconds_per_token * plain.tokens_per_step
    assert ahead.seconds_per_token == pytest.approx((step_seconds - saved) / plain.tokens_per_step)
    assert price(tree, replace(inputs, draft_ahead_hit_rate=0.75, shares_device=True)) == plain


def test_the_correction_scales_what_comes_beyond_the_first_token() -> None:
    inputs = PlanInputs((0.5, 0.25), FLAT, FREE, tokens_factor=1.2)
    assert price(Topology((-1, 0, 0)), inputs).tokens_per_step == pytest.approx(1 + 1.2 * 0.75)


def test_the_standard_error_of_tokens_follows_from_that_of_the_acceptance() -> None:
    inputs = PlanInputs(((0.5, 0.25),), FLAT, FREE, errors=((0.03, 0.04),))
    assert price(Topology((-1, 0, 0)), inputs).tokens_error == pytest.approx(0.05)


def test_sessions_that_share_the_verifier_get_smaller_trees() -> None:
    curve = LatencyCurve((1, 8, 64), (0.1, 0.11, 0.4))
    profile = LatencyProfile(SharedCurve(1, 64, curve))
    sizes = [
        choose(PlanInputs(PRIOR, profile.curve(sessions), LatencyCurve((1, 16), (0.003, 0.003)))).chosen.shape.size
        for sessions in (1, 4, 16)
    ]
    assert sizes[0] > sizes[1] > sizes[2]


def test_trees_stay_within_the_given_limits_and_the_measured_widths() -> None:
    inputs = PlanInputs((0.4, 0.3, 0.2), verify_curve=FLAT, draft_curve=LatencyCurve((1, 2), (1e-9, 1e-9)))
    plan = choose(inputs, max_size=20, max_levels=3)
    internal_depths = [plan.chosen.shape.depths[node] for node in plan.chosen.shape.internal_nodes]
    assert plan.chosen.shape.levels <= 3
    assert plan.chosen.shape.size <= 20
    assert max(internal_depths.count(depth) for depth in range(3)) <= 2


DYNAMIC_INPUTS = PlanInputs(
    (0.6, 0.2, 0.1), LatencyCurve((1, 16), (0.1, 0.12)), LatencyCurve((1, 2, 4, 16), (0.001, 0.002, 0.004, 0.016))
)


MEASURED = MeasuredTree(DynamicShape(12, 6, 2, 0.05, 0.5), 3.5, 0.1, num_nodes=7.4, num_levels=4.5)


def test_a_dynamic_tree_brings_what_was_measured_and_costs_its_forwards() -> None:
    inputs = replace(DYNAMIC_INPUTS, dynamic=(MEASURED,))
    priced = price(MEASURED.shape, inputs)
    assert (priced.kind, priced.tokens_per_step, priced.tokens_error) == ("dynamic", 3.5, 0.1)
    seconds = inputs.verify_curve.at(8) + 0.001 + 2.5 * 0.002
    assert priced.seconds_per_token == pytest.approx(seconds / 3.5)


def test_a_dynamic_tree_that_often_was_its_root_alone_costs_less_than_a_forward() -> None:
    rare = replace(MEASURED, tokens_per_step=1.2, num_nodes=1.6, num_levels=1.5)
    priced = price(rare.shape, replace(DYNAMIC_INPUTS, dynamic=(rare,)))
    assert priced.seconds_per_token == pytest.approx((DYNAMIC_INPUTS.verify_curve.at(2) + 0.0005) / 1.2)


@pytest.mark.parametrize("dynamic", [(), (replace(MEASURED, tokens_per_step=1.5),)])
def test_dynamic_trees_are_left_out_unless_they_were_measured_to_pay(dynamic: tuple[MeasuredTree, ...]) -> None:
    plan = choose(replace(DYNAMIC_INPUTS, dynamic=dynamic))
    assert plan.chosen == choose(DYNAMIC_INPUTS).chosen
    assert plan.chosen.kind == "tree"


def test_a_dynamic_tree_is_chosen_when_what_it_brings_pays_for_its_forwards() -> None:
    plan = choose(replace(DYNAMIC_INPUTS, dynamic=(MEASURED, replace(MEASURED, shape=DynamicShape(12, 6, 4)))))
    assert plan.chosen == price(MEASURED.shape, plan.inputs)
    assert plan.chosen.seconds_per_token < choose(DYNAMIC_INPUTS).chosen.seconds_per_token
    dear = replace(plan.inputs, draft_curve=LatencyCurve((1, 2, 4, 16), (0.001, 0.1, 0.2, 0.8)))
    assert choose(dear).chosen.kind == "tree"


def test_a_dynamic_tree_of_more_nodes_than_a_worker_takes_is_not_chosen() -> None:
    inputs = replace(DYNAMIC_INPUTS, dynamic=(MEASURED,))
    assert choose(inputs, max_size=11).chosen == choose(DYNAMIC_INPUTS, max_size=11).chosen


def test_a_rule_that_needs_planned_trees_gets_the_best_of_about_the_same_size() -> None:
    plan = choose(replace(DYNAMIC_INPUTS, dynamic=(MEASURED,)))
    planned = without_dynamic(plan)
    assert plan.chosen.kind == "dynamic"
    assert isinstance(planned.chosen.shape, Topology)
    assert (planned.chosen.shape.size, planned.chosen.shape.levels, planned.inputs.dynamic) == (7, 4, ())
    assert planned.chosen == price(planned.chosen.shape, DYNAMIC_INPUTS)
    assert without_dynamic(planned) is planned


def test_where_too_few_ranks_are_known_it_gets_a_chain() -> None:
    inputs = replace(DYNAMIC_INPUTS, acceptance=((0.8,),), dynamic=(replace(MEASURED, num_nodes=9.0),))
    assert planned_like(MEASURED.shape, inputs) == Topology.chain(4)


def test_a_plan_of_dynamic_trees_survives_json_and_nobody_can_change_them() -> None:
    plan = choose(replace(DYNAMIC_INPUTS, dynamic=(MEASURED,)))
    document = plan.to_dict()
    assert TreePlan.from_json(plan.to_json()) == plan
    for change in ({"width": 0}, {"width": 3}, {"width": 1.5}, {"levels": 99}, {"least_gain": 0.6}, {"least_gain": 2}):
        with pytest.raises(ValueError, match="not a tree plan"):
            TreePlan.from_dict({**document, **change})
    with pytest.raises(ValueError, match="was not measured"):
        TreePlan.from_dict({**document, "inputs": {**document["inputs"], "dynamic": []}})


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens_per_step": 0.9},
        {"tokens_per_step": 4.6},  # more than levels
        {"tokens_error": -0.1},
        {"num_nodes": 13.0},
        {"num_nodes": 4.0},  # fewer than levels
        {"num_levels": 7.0},
        {"num_levels": math.nan},
    ],
)
def test_what_no_dynamic_tree_can_have_brought_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="12x6 dynamic"):
        replace(MEASURED, **wrong)


def random_inputs(generator: random.Random) -> PlanInputs:
    weights = [generator.random() for _ in range(5)]
    acceptance = tuple(0.9 * weight / sum(weights) for weight in weights)
    return PlanInputs(acceptance, LatencyCurve((1, 16), (0.1, generator.uniform(0.1, 0.3))), FREE, 0.001, 0.002, 0.003)


@pytest.mark.parametrize("seed", range(5))
def test_a_plan_survives_json(seed: int) -> None:
    plan = choose(random_inputs(random.Random(seed)))
    assert TreePlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schema", "sequoia.tree_plan.v2"),
        ("parents", [-1, 0, 7]),
        ("parents", [-1, 0, 0.5]),
        ("kind", "magic"),
        ("speedup", 100.0),
        ("tokens_per_step", float("nan")),
        ("best_tree", 3),
        ("inputs", {}),
        ("note", "one key too many"),
    ],
)
def test_a_document_that_was_tampered_with_is_refused(key: str, value: object) -> None:
    document = choose(PlanInputs((0.6, 0.2), FLAT, FREE)).to_dict()
    with pytest.raises(ValueError, match="not a tree plan"):
        TreePlan.from_json(json.dumps({**document, key: value}))


@pytest.mark.parametrize("document", ["", "7", "[]", "{}", "{", b"\xff\x00", "[" * 100_000])
def test_a_document_that_is_no_plan_is_refused(document: str | bytes) -> None:
    with pytest.raises(ValueError, match="not a tree plan"):
        TreePlan.from_json(document)


@pytest.mark.parametrize(
    "change",
    [
        {"acceptance": (0.7, 0.7)},
        {"acceptance": (-0.1,)},
        {"acceptance": (math.nan,)},
        {"draft_rtt_seconds": -1.0},
        {"host_seconds": math.inf},
        {"verify_curve": LatencyCurve((2, 4), (0.1, 0.1))},
    ],
)
def test_inputs_that_cannot_be_right_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        replace(PlanInputs((0.6,), FLAT, FREE), **change)


def test_a_curve_is_linear_between_its_widths_and_ends_with_them() -> None:
    curve = LatencyCurve.from_dict({"8": 0.8, "2": 0.2})
    assert curve.at(5) == pytest.approx(0.5)
    assert LatencyCurve.from_dict(curve.to_dict()) == curve
    for outside in (1, 9):
        with pytest.raises(ValueError, match="measured from 2 to 8 only"):
            curve.at(outside)


@pytest.mark.parametrize(
    ("widths", "seconds"),
    [((), ()), ((1,), ()), ((0,), (1.0,)), ((2, 1), (1.0, 1.0)), ((1,), (0.0,)), ((1,), (math.nan,))],
)
def test_a_curve_that_cannot_be_measured_is_refused(widths: tuple[int, ...], seconds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="latency curve"):
        LatencyCurve(widths, seconds)
