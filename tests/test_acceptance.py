import math
import time

import numpy as np
import pytest

from sequoia.acceptance import (
    DEPTH_STRENGTH,
    FACTOR_BOUNDS,
    FACTOR_STRENGTH_STEPS,
    MIN_DEPTH_OFFERS,
    PRIOR,
    PRIOR_STRENGTH,
    AcceptanceCounts,
    Rows,
    tokens_factor,
)

TRUTH = (0.75, 0.1, 0.04, 0.02, 0.012, 0.01, 0.006, 0.004)
DEEP = (0.82, 0.08, 0.03, 0.015, 0.01, 0.008, 0.005, 0.003)
Widths = tuple[tuple[tuple[int, float], ...], ...]
# The measuring tree's widths by depth: (children, share of the reached nodes that have so many).
WIDTHS = (((8, 1.0),), ((4, 0.8), (2, 0.2)), ((4, 0.3), (1, 0.5)), ((3, 0.5), (1, 0.5)), ((2, 1.0),))
# Many nodes with one child, some with four, everywhere.
UNEVEN_WIDTHS = (((1, 0.6), (4, 0.4)),) * 5


def simulated(
    rng: np.random.Generator, num_steps: int, *truths: tuple[float, ...], widths: Widths = WIDTHS
) -> AcceptanceCounts:
    """Steps with trees of `widths`, where each reached node accepts one child or none; the last truth serves deeper."""
    offered, accepted = np.zeros((2, len(widths), len(TRUTH)))
    num_reached = num_steps
    for depth, shares in enumerate(widths):
        truth = truths[min(depth, len(truths) - 1)]
        for width, share in shares:
            offered[depth, :width] += round(num_reached * share)
            outcomes = rng.multinomial(round(num_reached * share), [*truth[:width], 1 - sum(truth[:width])])
            accepted[depth, :width] += outcomes[:-1]
        num_reached = int(accepted[depth].sum())
    return AcceptanceCounts(tuple(map(tuple, offered.tolist())), tuple(map(tuple, accepted.tolist())))


def one_row(offered: float, *accepted: float) -> AcceptanceCounts:
    """Counts of one depth, where each rank was offered equally often."""
    return AcceptanceCounts(((offered,) * len(accepted),), (accepted,))


def sums(rows: Rows) -> list[float]:
    return [math.fsum(row) for row in rows]


def test_without_counts_the_estimate_is_the_prior() -> None:
    estimate = AcceptanceCounts().estimate()
    assert estimate.rows == (pytest.approx(PRIOR),)
    assert estimate.errors[0][0] == pytest.approx(math.sqrt(PRIOR[0] * (1 - PRIOR[0]) / (PRIOR_STRENGTH + 1)))


def test_the_prior_counts_as_a_few_offers() -> None:
    rows = one_row(6, 3).estimate().rows
    assert rows[0][0] == pytest.approx((3 + PRIOR_STRENGTH * PRIOR[0]) / (6 + PRIOR_STRENGTH))


def test_a_rank_that_was_never_offered_has_the_priors_value() -> None:
    rows = one_row(1000, 600).estimate().rows
    assert rows[0][1:] == pytest.approx(PRIOR[1:])


def test_a_rank_that_was_never_offered_shares_what_the_others_left() -> None:
    [row] = one_row(100_000, 95_000).estimate().rows
    assert row[1:] == pytest.approx(np.multiply(PRIOR[1:], 0.05 / (1 - PRIOR[0])), rel=1e-2)


def test_a_rank_that_was_never_offered_is_not_above_those_that_were() -> None:
    [row] = one_row(10_000, 6000, 10).estimate().rows
    assert row[2] == pytest.approx(row[1]) == pytest.approx(1e-3, rel=0.1)


def test_a_rank_seldom_offered_does_not_take_from_one_well_known() -> None:
    [row] = AcceptanceCounts(((10_000.0, 5.0),), ((9000.0, 4.0),)).estimate().rows
    assert row[0] == pytest.approx(0.9, abs=0.005)
    assert row[1] == pytest.approx(0.1, abs=0.005)


def test_a_rank_that_was_never_accepted_is_not_impossible() -> None:
    assert min(one_row(50, 50, 0).estimate().rows[0]) > 0.0


def test_beyond_the_priors_ranks_acceptance_goes_on_falling_as_a_power() -> None:
    [row] = AcceptanceCounts(((1.0,) * 64,)).estimate().rows
    assert len(row) == 64
    assert row[63] / row[31] == pytest.approx(2**-2.3)
    assert row[15] > row[16] > 0.8 * row[15]


@pytest.mark.parametrize(
    "counts",
    [
        one_row(100_000, 100_000),
        one_row(10, 10),
        AcceptanceCounts(((100.0, 40.0), (90.0,)), ((80.0, 40.0), (90.0,))),
        AcceptanceCounts(((1.0,) * 1024,) * 3, ((0.9,),)),
        AcceptanceCounts(((1e15, 1e15), (1e15,), (1e-9,)), ((1e15,), (0.0,), (1e-9,))),
    ],
)
def test_rows_are_probabilities_that_sum_to_less_than_one(counts: AcceptanceCounts) -> None:
    estimate = counts.estimate()
    assert all(0.0 < each < 1.0 for row in (*estimate.rows, *estimate.errors) for each in row)
    assert max(sums(estimate.rows)) <= 0.999 + 1e-12


def test_a_known_vector_is_recovered() -> None:
    rows = simulated(np.random.default_rng(1), 100_000, TRUTH).estimate().rows
    assert rows[0][:8] == pytest.approx(TRUTH, abs=0.003)


def test_known_vectors_by_depth_are_recovered() -> None:
    rows = simulated(np.random.default_rng(2), 100_000, TRUTH, DEEP).estimate().rows
    assert len(rows) == 2
    assert rows[0][:8] == pytest.approx(TRUTH, abs=0.004)
    assert rows[1][:4] == pytest.approx(DEEP[:4], abs=0.004)


@pytest.mark.parametrize("num_steps", [30, 100, 300, 1000, 10_000])
def test_intervals_hold_the_truth_as_often_as_they_say(num_steps: int) -> None:
    rng = np.random.default_rng(num_steps)
    outcomes = rng.multinomial(num_steps, [*TRUTH, 1 - sum(TRUTH)], size=500)[:, :-1]
    bounds = np.array([one_row(num_steps, *each).estimate().interval() for each in outcomes])
    low, high = bounds[:, 0, 0, : len(TRUTH)], bounds[:, 1, 0, : len(TRUTH)]
    coverage = ((low <= TRUTH) & (high >= TRUTH)).mean(axis=0)
    assert coverage.min() > 0.91
    assert coverage.mean() > 0.945


def test_intervals_widen_with_confidence_and_stay_probabilities() -> None:
    estimate = one_row(20, 20, 0).estimate()
    (low, high), (lower, higher) = estimate.interval(0.5), estimate.interval(0.99)
    assert 0.0 <= lower[0][0] < low[0][0] < estimate.rows[0][0] < high[0][0] < higher[0][0] <= 1.0
    assert 0.0 <= lower[0][1] <= estimate.rows[0][1] < higher[0][1]


@pytest.mark.parametrize("num_steps", [50, 200, 1000])
def test_noise_never_leaves_a_rise(num_steps: int) -> None:
    rng = np.random.default_rng(num_steps)
    outcomes = rng.multinomial(num_steps, [*TRUTH, 1 - sum(TRUTH)], size=300)[:, :-1]
    rows = np.array([one_row(num_steps, *each).estimate().rows[0] for each in outcomes])
    assert (np.diff(rows).max(axis=1) > 0.0).mean() <= 0.01
    # What is pooled: a good part of the samples are not monotone by themselves.
    assert (np.diff(outcomes).max(axis=1) > 0).mean() > 0.3


def test_pooled_ranks_share_the_mean_of_their_counts() -> None:
    [row] = one_row(400, 300, 6, 10, 5).estimate().rows
    assert row[1] == row[2] == pytest.approx(8 / 400, rel=0.05)
    assert row[3] < row[2]


def test_a_significant_rise_is_kept() -> None:
    [row] = one_row(5000, 3500, 500, 100, 200, 50).estimate().rows
    assert row[2] == pytest.approx(0.02, rel=0.01)
    assert row[3] == pytest.approx(0.04, rel=0.01)


def test_a_significant_rise_is_kept_at_every_depth() -> None:
    offered = ((20_000.0,) * 4, (200.0,) * 4)
    accepted = ((12_000.0, 2000.0, 400.0, 1000.0), (160.0, 12.0, 4.0, 6.0))
    rows = AcceptanceCounts(offered, accepted).estimate().rows
    assert len(rows) == 2
    assert all(row[3] > row[2] for row in rows)


def test_few_counts_give_one_row() -> None:
    below = MIN_DEPTH_OFFERS - 1
    counts = AcceptanceCounts(((below,), (below,)), ((0.3 * below,), (0.9 * below,)))
    assert len(counts.estimate().rows) == 1


@pytest.mark.parametrize("widths", [WIDTHS, UNEVEN_WIDTHS])
def test_depths_that_are_alike_give_one_row(widths: Widths) -> None:
    rng = np.random.default_rng(4)
    counts = (simulated(rng, num_steps, TRUTH, widths=widths) for num_steps in [300, 1000, 5000] * 400)
    num_false = sum(len(each.estimate().rows) > 1 for each in counts)
    # 1 % of 1200, and three standard errors.
    assert num_false <= 12 + 3 * math.sqrt(12)


def test_depths_that_differ_give_rows_with_enough_counts() -> None:
    rng = np.random.default_rng(5)
    num_rows = [len(simulated(rng, 5000, TRUTH, DEEP).estimate().rows) for _ in range(50)]
    assert np.mean(np.equal(num_rows, 2)) > 0.9


def test_rows_reach_to_the_last_depth_that_differs_and_the_last_row_pools_the_rest() -> None:
    offered = ((4000.0,), (3000.0,), (2000.0,), (1000.0,), (600.0,))
    accepted = ((3000.0,), (2250.0,), (900.0,), (820.0,), (460.0,))
    rows = AcceptanceCounts(offered, accepted).estimate().rows
    assert [row[0] for row in rows] == pytest.approx([0.75, 0.75, 0.45, 0.8], abs=0.01)


def test_a_depth_is_drawn_towards_all_depths_together() -> None:
    counts = AcceptanceCounts(((9000.0,), (1000.0,)), ((8100.0,), (200.0,)))
    rows = counts.estimate().rows
    together = counts.by_rank.estimate().rows[0][0]
    assert rows[1][0] == pytest.approx((200 + DEPTH_STRENGTH * together) / (1000 + DEPTH_STRENGTH))


def test_an_estimate_takes_milliseconds() -> None:
    offered = tuple((1000.0 - 20 * depth,) * 32 for depth in range(16))
    accepted = tuple(tuple((600.0 - 25 * depth) * 0.3**rank for rank in range(32)) for depth in range(16))
    counts = AcceptanceCounts(offered, accepted)
    start = time.process_time()
    num_rows = [len(counts.estimate().rows) for _ in range(20)]
    assert num_rows[0] > 5
    assert time.process_time() - start < 20 * 0.005


def test_counts_add_up_by_depth_and_rank() -> None:
    total = AcceptanceCounts(((5, 4), (3,)), ((3, 1), (2,))) + AcceptanceCounts(((2,),), ((2,),))
    assert total == AcceptanceCounts(((7, 4), (3,)), ((5, 1), (2,)))
    assert total.num_steps == 7
    assert total.by_rank == AcceptanceCounts(((10, 4),), ((7, 1),))


def test_no_counts_are_no_steps() -> None:
    assert AcceptanceCounts().num_steps == AcceptanceCounts(((),)).num_steps == 0.0
    assert AcceptanceCounts().by_rank == AcceptanceCounts()


def test_forgetting_keeps_the_shares_and_widens_the_errors() -> None:
    counts = one_row(10_000, 6000, 2000)
    forgotten = counts.scaled(0.01)
    assert forgotten == one_row(100, 60, 20)
    before, after = counts.estimate(), forgotten.estimate()
    assert after.rows[0][0] == pytest.approx(before.rows[0][0], abs=0.01)
    assert after.errors[0][0] == pytest.approx(10 * before.errors[0][0], rel=0.1)


def test_new_counts_outweigh_forgotten_ones() -> None:
    row = (one_row(10_000, 9000).scaled(0.01) + one_row(1000, 500)).estimate().rows[0]
    assert row[0] == pytest.approx(590 / 1100, abs=0.005)


@pytest.mark.parametrize(
    ("offered", "accepted", "complaint"),
    [
        (((1,),), ((2,),), "depth 0, rank 0: 2 accepted of 1 offered"),
        (((1,), (1, 1)), ((1,), (1, -1)), "depth 1, rank 1: -1 accepted"),
        (((1,),), ((1, 0),), "depth 0: 2 ranks accepted, but 1 offered"),
        (((1,),), ((1,), (1,)), "2 depths accepted, but 1 offered"),
        (((-1,),), ((-1,),), "depth 0, rank 0"),
        (((math.inf,),), ((1,),), "inf offered"),
        (((math.nan,),), ((0,),), "nan offered"),
        (((1,),), ((math.nan,),), "nan accepted"),
    ],
)
def test_counts_that_cannot_be_are_refused(offered: Rows, accepted: Rows, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        AcceptanceCounts(offered, accepted)


def test_counts_cannot_be_scaled_below_nothing() -> None:
    with pytest.raises(ValueError, match="rank 0"):
        one_row(1, 1).scaled(-1.0)


def test_missing_ends_of_accepted_are_zero() -> None:
    assert AcceptanceCounts(((3, 2), (1,)), ((1,),)).accepted == ((1, 0), (0,))


def test_many_steps_give_the_measured_factor() -> None:
    assert tokens_factor(3.2e6, 3e6, 1e6) == pytest.approx(1.1, abs=1e-4)


def test_few_steps_hardly_move_the_factor() -> None:
    assert tokens_factor(0.0, 0.0, 0.0) == 1.0
    strength = FACTOR_STRENGTH_STEPS
    assert tokens_factor(7.0, 3.0, 1.0) == pytest.approx((3.0 + strength) / (1.0 + strength))


def test_the_factor_is_bounded_and_needs_an_expectation() -> None:
    assert (tokens_factor(1e6, 2e6, 1e6), tokens_factor(9e6, 2e6, 1e6)) == FACTOR_BOUNDS
    assert tokens_factor(5e6, 1e6, 1e6) == 1.0


@pytest.mark.parametrize("figures", [(-1.0, 1.0, 1.0), (1.0, math.inf, 1.0), (1.0, 1.0, math.nan)])
def test_figures_that_cannot_be_give_no_factor(figures: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="cannot be"):
        tokens_factor(*figures)
