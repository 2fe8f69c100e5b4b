"""Acceptance by depth and rank: what was counted while speculating, and what may be concluded from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Rows = tuple[tuple[float, ...], ...]  # [depth][rank]
Float = NDArray[np.float64]

# Chen et al. 2024 (arXiv 2402.12374), appendix E: Llama3-70B drafted by its 8B on CNN/DailyMail, the first 16 ranks.
PRIOR = (
    *(0.7732, 0.1039, 0.0402, 0.0206, 0.0128, 0.0081, 0.0064, 0.0043),
    *(0.0035, 0.0026, 0.0025, 0.0021, 0.0016, 0.0014, 0.0010, 0.0010),
)
PRIOR_STRENGTH = 4.0  # the offers of every rank that PRIOR counts as
_TAIL_EXPONENT = 2.3  # over its later ranks the same vector falls as (rank + 1) ** -2.3; PRIOR goes on so
_MAX_SUM = 0.999  # below 1: no finite tree is predicted to be accepted for ever

# Chance that noise passes for structure: once for the rises of a row, once for the dependence on depth.
LEVEL = 0.01
# All depths together count as this many offers at each: what makes 0.75 at rank 0 move by about 0.05 between depths.
DEPTH_STRENGTH = 64.0
MIN_DEPTH_OFFERS = 100.0  # at rank 0, at a depth and below it, for the depth to be told apart
_MIN_EXPECTED = 5.0  # acceptances and refusals of a rank, the usual minimum for a chi-square test
_TINY = 1e-300  # instead of 0 in a quotient that is 0 then

# An accepted length varies by about 0.8 of its mean from step to step, a pair's true factor by about 0.1: (0.8 / 0.1)².
FACTOR_STRENGTH_STEPS = 64.0
FACTOR_BOUNDS = (0.5, 1.5)


@dataclass(frozen=True, slots=True)
class AcceptanceCounts:
    """What happened to the children of reached nodes, by the depth of the node (root 0) and the rank of the child.

    `offered[depth][rank]`: how often a child of that rank stood there; `accepted[depth][rank]`: how often it was the
    accepted one. Counts may be fractions: forgotten in part. Missing ends of `accepted` are 0. Raises ValueError unless
    `0 <= accepted <= offered` everywhere, both finite.
    """

    offered: Rows = ()
    accepted: Rows = ()

    def __post_init__(self) -> None:
        if len(self.accepted) > len(self.offered):
            raise ValueError(f"{len(self.accepted)} depths accepted, but {len(self.offered)} offered")
        depths = enumerate(zip_longest(self.offered, self.accepted, fillvalue=()))
        object.__setattr__(self, "accepted", tuple(_checked(depth, *rows) for depth, rows in depths))

    def __add__(self, other: AcceptanceCounts) -> AcceptanceCounts:
        """The counts of both."""
        return AcceptanceCounts(_added(self.offered, other.offered), _added(self.accepted, other.accepted))

    def scaled(self, factor: float) -> AcceptanceCounts:
        """The counts times `factor`, at least 0: less than 1 forgets that much of them."""
        times = (tuple(tuple(factor * each for each in row) for row in rows) for rows in (self.offered, self.accepted))
        return AcceptanceCounts(*times)

    @property
    def num_steps(self) -> float:
        """Steps with a tree: each offers the root one child of rank 0."""
        return self.offered[0][0] if self.offered and self.offered[0] else 0.0

    @property
    def by_rank(self) -> AcceptanceCounts:
        """One row: the counts of all depths together."""
        rows = zip(self.offered, self.accepted, strict=True)
        return sum((AcceptanceCounts((offered,), (accepted,)) for offered, accepted in rows), AcceptanceCounts())

    def estimate(self) -> AcceptanceEstimate:
        """What these counts say about acceptance, PRIOR having counted as PRIOR_STRENGTH offers of every rank.

        Ranks: at least PRIOR's. One never offered has PRIOR's value, or PRIOR's share of what the ranks before it left
        when that is less, and is not above those. A rank above the one before it is taken for noise and pooled with
        it (isotonic regression, weighted by offers) unless a z-test says otherwise, at LEVEL for the whole row.

        Depths: one row, unless a chi-square test finds that a depth differs from all below it, at LEVEL for all depths.
        Then every depth to the last such one has a row, and those below it share the last row; all depths together
        are the prior of each, counting as DEPTH_STRENGTH offers.
        """
        num_ranks = max(len(PRIOR), *map(len, self.offered), 0)
        counts = np.stack([_table(rows, num_ranks) for rows in (self.offered, self.accepted)])
        total = counts.sum(axis=1)
        fits = [_fit(total, _prior(num_ranks), np.full(num_ranks, PRIOR_STRENGTH))]
        if last := _num_depths_apart(counts):
            # All depths together are no surer than their counts.
            strength = np.minimum(DEPTH_STRENGTH, total[0] + PRIOR_STRENGTH)
            by_row = (*counts[:, :last].swapaxes(0, 1), counts[:, last:].sum(axis=1))
            fits = [_fit(each, fits[0][0], strength) for each in by_row]
        return AcceptanceEstimate(*map(tuple, zip(*fits, strict=True)))


@dataclass(frozen=True, slots=True)
class AcceptanceEstimate:
    """`rows[depth][rank]`: P(child of that rank is the accepted one | a node at that depth was reached).

    The last row serves all deeper nodes too; one row means no dependence on depth. Rows are equally long, and each sums
    to less than 1. `errors` are the standard deviations of the posterior, of the same shape.
    """

    rows: Rows
    errors: Rows

    def interval(self, confidence: float = 0.95) -> tuple[Rows, Rows]:
        """(low, high): Wilson score intervals, of as many offers as the errors amount to, p (1 - p) / error² - 1."""
        z = NormalDist().inv_cdf(0.5 + confidence / 2.0)
        p, errors = np.array(self.rows), np.array(self.errors)
        share = z**2 / (p * (1.0 - p) / errors**2 - 1.0)
        middle = (p + share / 2.0) / (1.0 + share)
        half = np.sqrt(p * (1.0 - p) * share + share**2 / 4.0) / (1.0 + share)
        low, high = np.maximum(middle - half, 0.0), np.minimum(middle + half, 1.0)
        return tuple(map(tuple, low.tolist())), tuple(map(tuple, high.tolist()))


def tokens_factor(realised_tokens: float, expected_tokens: float, num_steps: float) -> float:
    """What to correct F by, so that tokens per step = 1 + factor * (F - 1).

    F multiplies acceptance along paths: right for rules that decide at a node by that node alone, roughly right for
    traversal verification. Hence measured: `num_steps` steps committed `realised_tokens`, bonus tokens included, with
    trees whose F add up to `expected_tokens`. The quotient of accepted lengths counts as `num_steps` steps, 1 counts as
    FACTOR_STRENGTH_STEPS; bounded by FACTOR_BOUNDS. Raises ValueError for a figure that is negative or not finite.
    """
    if not all(0.0 <= each < math.inf for each in (realised_tokens, expected_tokens, num_steps)):
        raise ValueError(f"cannot be: {realised_tokens} tokens, {expected_tokens} expected, in {num_steps} steps")
    if expected_tokens <= num_steps:
        return 1.0
    quotient = (realised_tokens - num_steps) / (expected_tokens - num_steps)
    factor = (num_steps * quotient + FACTOR_STRENGTH_STEPS) / (num_steps + FACTOR_STRENGTH_STEPS)
    return min(max(factor, FACTOR_BOUNDS[0]), FACTOR_BOUNDS[1])


def _checked(depth: int, offered: tuple[float, ...], accepted: tuple[float, ...]) -> tuple[float, ...]:
    if len(accepted) > len(offered):
        raise ValueError(f"depth {depth}: {len(accepted)} ranks accepted, but {len(offered)} offered")
    padded = accepted + (0.0,) * (len(offered) - len(accepted))
    for rank, (most, count) in enumerate(zip(offered, padded, strict=True)):
        if not 0.0 <= count <= most < math.inf:
            raise ValueError(f"depth {depth}, rank {rank}: {count} accepted of {most} offered cannot be")
    return padded


def _added(left: Rows, right: Rows) -> Rows:
    rows = zip_longest(left, right, fillvalue=())
    return tuple(tuple(a + b for a, b in zip_longest(*pair, fillvalue=0.0)) for pair in rows)


def _table(rows: Rows, num_ranks: int) -> Float:
    return np.array([[*row, *[0.0] * (num_ranks - len(row))] for row in rows], np.float64).reshape(-1, num_ranks)


def _prior(num_ranks: int) -> tuple[float, ...]:
    end = len(PRIOR)
    return PRIOR + tuple(PRIOR[-1] * (end / (rank + 1)) ** _TAIL_EXPONENT for rank in range(end, num_ranks))


def _fit(counts: Float, prior: Sequence[float], strength: Float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Values and errors of a row, from (2, ranks) counts: offered, accepted. `prior` counts as `strength` offers."""
    weights = counts[0] + strength
    values = np.array(_monotone(_smoothed(counts, prior, strength), weights.tolist(), prior))
    values *= min(1.0, _MAX_SUM / float(values.sum()))
    # Each rank by its own offers: pooled ranks need not be equal, only in order.
    errors = np.sqrt(values * (1.0 - values) / (weights + 1.0))
    return tuple(values.tolist()), tuple(errors.tolist())


def _smoothed(counts: Float, prior: Sequence[float], strength: Float) -> list[float]:
    """Means of Beta posteriors, cut to what the ranks before left, which are surer; priors, to their share of that."""
    values: list[float] = []
    left = prior_left = 1.0
    for offered, accepted, expected, offers in zip(*counts.tolist(), prior, strength.tolist(), strict=True):
        share = min(1.0, left / prior_left)
        values.append(min((accepted + offers * share * expected) / (offered + offers), left))
        left, prior_left = max(left - values[-1], 1.0 - _MAX_SUM), prior_left - expected
    return values


class _Block(NamedTuple):
    """Neighbouring ranks that share a value."""

    first: int
    num_ranks: int
    value: float
    weight: float


def _monotone(values: list[float], weights: list[float], prior: Sequence[float]) -> list[float]:
    """Pool adjacent violators, except rises that are significant or that the prior has too."""
    threshold = NormalDist().inv_cdf(1.0 - LEVEL / len(values))
    blocks: list[_Block] = []
    for rank, (value, weight) in enumerate(zip(values, weights, strict=True)):
        blocks.append(_Block(rank, 1, value, weight))
        while len(blocks) > 1 and _is_noise(blocks[-2], blocks[-1], threshold, prior):
            right, left = blocks.pop(), blocks.pop()
            blocks.append(_pool(left, right))
    return [block.value for block in blocks for _ in range(block.num_ranks)]


def _is_noise(left: _Block, right: _Block, threshold: float, prior: Sequence[float]) -> bool:
    """Whether the rise from `left` to `right` is less than `threshold` standard errors."""
    if right.value <= left.value or prior[right.first] > prior[right.first - 1]:
        return False
    # Siblings exclude each other: their difference varies by p, not by p (1 - p).
    variance = _pool(left, right).value * (1.0 / left.weight + 1.0 / right.weight)
    return right.value - left.value < threshold * math.sqrt(variance)


def _pool(left: _Block, right: _Block) -> _Block:
    weight = left.weight + right.weight
    value = (left.value * left.weight + right.value * right.weight) / weight
    return _Block(left.first, left.num_ranks + right.num_ranks, value, weight)


def _num_depths_apart(counts: Float) -> int:
    """Depths that get a row of their own, from (2, depths, ranks) counts: to the last that differs from all below."""
    splits = (np.stack([counts[:, d], counts[:, d + 1 :].sum(axis=1)], axis=1) for d in range(counts.shape[1] - 1))
    tested = [(depth, pair) for depth, pair in enumerate(splits) if pair[0, :, 0].min() >= MIN_DEPTH_OFFERS]
    return max((depth + 1 for depth, pair in tested if _differ(pair, LEVEL / len(tested))), default=0)


def _differ(counts: Float, level: float) -> bool:
    """Whether two depths differ in acceptance, from (2, 2 depths, ranks) counts.

    Compares continuation ratios, P(rank accepted | none before it was), which vary independently of each other; the sum
    of their squared z is a chi-square. Ranks with fewer than 5 expected acceptances or refusals are left out.
    """
    offered, accepted = counts
    rates = accepted / np.maximum(offered, _TINY)
    undecided = np.maximum(offered * (1.0 - rates.cumsum(axis=1) + rates), np.maximum(accepted, _TINY))
    ratio = accepted.sum(axis=0) / undecided.sum(axis=0)
    usable = undecided.min(axis=0) * np.minimum(ratio, 1.0 - ratio) >= _MIN_EXPECTED
    difference = accepted[0] / undecided[0] - accepted[1] / undecided[1]
    # The rate's 1 - p is more than the ratio's: right also where nodes have unequally many children.
    rate = accepted.sum(axis=0) / np.maximum(offered.sum(axis=0), _TINY)
    variance = ratio * (1.0 - rate) * (1.0 / undecided).sum(axis=0)
    chi_square = float((difference[usable] ** 2 / variance[usable]).sum())
    return chi_square > _chi_square_quantile(1.0 - level, int(usable.sum()))


def _chi_square_quantile(probability: float, degrees: int) -> float:
    """Wilson and Hilferty 1931: the cube root of a chi-square is nearly normal."""
    spread = 2.0 / (9.0 * max(degrees, 1))
    return degrees * (1.0 - spread + NormalDist().inv_cdf(probability) * math.sqrt(spread)) ** 3
