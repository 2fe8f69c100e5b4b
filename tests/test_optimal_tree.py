import json
import math
import random
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from sequoia.cli.benchmarks.planner import DEMO
from sequoia.hardware import LatencyCurve
from sequoia.optimal_tree import (
    Frontier,
    Rows,
    best_first,
    depth_limited,
    derivatives,
    expected_tokens,
    frontiers,
    optimal_tree,
    rows_of,
)
from sequoia.planner import PlanInputs, price
from sequoia.topology import Topology

# Chen et al. 2024 (arXiv 2402.12374), appendix E: Llama3-70B drafted by its 8B on CNN/DailyMail.
APPENDIX_E = (
    *(0.7732, 0.1039, 0.0402, 0.0206, 0.0128, 0.0081, 0.0064, 0.0043, 0.0035, 0.0026, 0.0025, 0.0021, 0.0016, 0.0014),
    *(0.001, 0.001, 0.001, 0.0007, 0.0007, 0.0006, 0.0007, 0.0006, 0.0004, 0.0004, 0.0005, 0.0006, 0.0004, 0.0003),
    *(0.0002, 0.0004, 0.0001),
)
# The demo of the authors' optimiser, in milliseconds.
VERIFY, DRAFT = {1: 10.0, 2: 10.0, 4: 10.0, 8: 12.0, 16: 14.0, 32: 18.0}, 0.3
CASES = json.loads(Path(__file__).with_name("data").joinpath("dp_cases.json").read_text())["cases"].values()
# An ordered tree as the tuple of its children, which are ordered trees.
Tree = tuple["Tree", ...]


@cache
def forests(size: int) -> tuple[Tree, ...]:
    """All sequences of ordered trees with `size` nodes together: the trees of `size` + 1 nodes."""
    splits = ((first, rest) for m in range(1, size + 1) for first, rest in product(forests(m - 1), forests(size - m)))
    return tuple((first, *rest) for first, rest in splits) if size else ((),)


def levels_of(tree: Tree) -> int:
    return 1 + max(map(levels_of, tree), default=0)


def value(tree: Tree, rows: Rows, depth: int = 0) -> float:
    """Expected tokens from the root of `tree` on, -inf when a row is too short for it."""
    row = rows[min(depth, len(rows) - 1)]
    below = [value(child, rows, depth + 1) for child in tree]
    fits = len(tree) <= len(row) and min(below, default=1.0) > 0.0
    return 1.0 + math.fsum(map(float.__mul__, row, below)) if fits else -math.inf


def brute_force(rows: Rows, size: int, levels: int) -> float:
    return max((value(tree, rows) for tree in forests(size - 1) if levels_of(tree) <= levels), default=-math.inf)


@cache
def unpruned(rows: Rows, size: int, levels: int, depth: int = 0, rank: int = 0) -> float:
    """The most expected tokens of `size` nodes in the subtrees of one node's children from `rank` on."""
    row = rows[min(depth, len(rows) - 1)]
    if not size:
        return 0.0
    if rank == len(row) or levels < 2:
        return -math.inf
    gains = ((m, 1.0 + unpruned(rows, m - 1, levels - 1, depth + 1)) for m in range(1, size + 1))
    feasible = [(m, gain) for m, gain in gains if gain > 0.0]
    return max(row[rank] * gain + unpruned(rows, size - m, levels, depth, rank + 1) for m, gain in feasible)


def nested(topology: Topology, node: int = 0) -> Tree:
    return tuple(nested(topology, child) for child in topology.children[node])


def random_row(generator: random.Random, kind: str) -> tuple[float, ...]:
    weights = [generator.random() ** 2 for _ in range(generator.randint(1, 6))]
    falling = sorted((0.95 * weight / sum(weights) for weight in weights), reverse=True)
    dyadic = [0.5, 0.25, 0.125, 0.0625, 0.0625]
    return {
        "falling": tuple(falling),
        "noisy": tuple(generator.sample(falling, len(falling))),
        "zeros": tuple(each * generator.choice((0.0, 1.0)) for each in generator.sample(falling, len(falling))),
        "equal": (generator.choice((0.25, 0.2, 0.0)),) * generator.randint(1, 4),
        "sum of 1": tuple(generator.sample(dyadic, 5)),
        "certain": generator.choice(((1.0,), (1.0, 0.0), (0.0, 1.0, 0.0))),
    }[kind]


def random_rows(seed: int, kind: str, num_rows: int) -> Rows:
    generator = random.Random(f"{seed} {kind} {num_rows}")
    return tuple(random_row(generator, kind) for _ in range(num_rows))


KINDS = ("falling", "noisy", "zeros", "equal", "sum of 1", "certain")
ANY = [random_rows(seed, kind, num_rows) for seed, kind, num_rows in product(range(3), KINDS, (1, 2, 4))]
EMPTY = [((),), ((), (0.5,)), ((0.5, 0.2), ()), ((0.2, 0.5), ())]
FALLING = [
    tuple(tuple(sorted(row, reverse=True)) for row in random_rows(seed, kind, num_rows))
    for seed, kind, num_rows in product(range(2), KINDS, (1, 3))
]


def check(frontier: Frontier, optima: list[float], rows: Rows, levels: int) -> None:
    """`optima` by size from 1: the frontier has those, and trees and widths that go with them."""
    assert frontier.tokens[1:].tolist() == pytest.approx(optima)
    for size in (1 + index for index, optimum in enumerate(optima) if optimum > 0.0):
        tree = frontier.tree(size)
        assert (tree.size, tree.levels <= levels) == (size, True)
        assert value(nested(tree), rows) == pytest.approx(optima[size - 1])
        assert list(tree.parents) == sorted(tree.parents)
        depths = [tree.depths[node] for node in tree.internal_nodes]
        assert frontier.internal[size].tolist() == [depths.count(depth) for depth in range(frontier.internal.shape[1])]


@pytest.mark.parametrize("rows", [*ANY, *EMPTY])
def test_dynamic_programming_finds_the_best_of_all_small_trees(rows: Rows) -> None:
    for levels, frontier in enumerate(depth_limited(rows, 7, 8), start=1):
        check(frontier, [brute_force(rows, size, levels) for size in range(1, 8)], rows, levels)


@pytest.mark.parametrize("rows", FALLING)
def test_best_first_finds_the_best_of_all_small_trees_where_no_row_rises(rows: Rows) -> None:
    for levels, frontier in enumerate(frontiers(rows, 7, 8), start=1):
        optima = [brute_force(rows, size, levels) for size in range(1, 8)]
        check(frontier, optima, rows, levels)
        check(best_first(rows, 7, levels), optima, rows, levels)


@pytest.mark.parametrize("rows", ANY[:18])
def test_larger_trees_are_as_good_as_dynamic_programming_without_a_shortcut(rows: Rows) -> None:
    for levels, frontier in enumerate(frontiers(rows, 40, 5), start=1):
        check(frontier, [1.0 + unpruned(rows, size - 1, levels) for size in range(1, 41)], rows, levels)


@pytest.mark.parametrize("rows", FALLING)
def test_best_first_and_dynamic_programming_agree_where_no_row_rises(rows: Rows) -> None:
    pairs = zip(depth_limited(rows, 120, 9), frontiers(rows, 120, 9), strict=True)
    for levels, (exact, shared) in enumerate(pairs, start=1):
        alone = best_first(rows, 120, levels)
        assert shared.tokens.tolist() == pytest.approx(exact.tokens.tolist())
        assert alone.tokens.tolist() == shared.tokens.tolist()
        assert alone.tree(largest := int(np.isfinite(shared.tokens).sum())) == shared.tree(largest)


@pytest.mark.parametrize("case", CASES)
def test_optima_equal_those_computed_elsewhere(case: dict) -> None:
    rows = rows_of(case["acceptance"])
    for limit, optima in case["optimum"].items():
        levels = 8 if limit == "unlimited" else int(limit.removeprefix("levels<="))
        known = [-math.inf if optimum is None else optimum for optimum in optima.values()]
        check(depth_limited(rows, 8, levels)[-1], known, rows, levels)
        check(frontiers(rows * 2, 8, levels)[-1], known, rows, levels)


VECTORS = [((), 2, 5), ((0.5,), 4, 3), ((0.5, 0.2), 8, 3), ((0.2, 0.5), 8, 3), ((0.5,), 0, 3), ((0.5,), 1, 0)]
ROWS = [(((0.5, 0.2), (0.5,)), 6, 3), (((0.2, 0.5), (0.5,)), 6, 3), (((0.5,), ()), 3, 9), (((0.1, 0.2), ()), 4, 9)]


@pytest.mark.parametrize(("acceptance", "size", "levels"), [*VECTORS, *ROWS])
def test_a_size_that_no_tree_has_is_refused(acceptance: tuple[float, ...], size: int, levels: int) -> None:
    with pytest.raises(ValueError, match=f"no tree of {size} nodes within {levels} levels"):
        optimal_tree(acceptance, size, levels)


def test_a_row_that_serves_no_node_changes_nothing() -> None:
    rows = ((0.2, 0.5), (0.6, 0.1), (0.3, 0.4), (0.9,))
    assert optimal_tree(rows, 12, 4) == optimal_tree(rows[:3], 12, 4)
    assert optimal_tree((*rows, rows[-1]), 30, 9) == optimal_tree(rows, 30, 9)


def test_vectors_rows_and_arrays_are_taken() -> None:
    assert rows_of((0.5, 0.25)) == rows_of([[0.5, 0.25]]) == rows_of(np.array([0.5, 0.25])) == ((0.5, 0.25),)
    assert rows_of(np.eye(2)) == ((1.0, 0.0), (0.0, 1.0))
    assert (rows_of(()), rows_of(np.array([])), rows_of(((), (0.5,)))) == (((),), ((),), ((), (0.5,)))


def outcomes(topology: Topology, rows: Rows, node: int = 0) -> Iterator[tuple[float, int]]:
    """Every way a step can go from `node` on: its probability and the tokens it commits."""
    row = rows[min(topology.depths[node], len(rows) - 1)]
    stays = 1.0
    for child, probability in zip(topology.children[node], row, strict=False):
        stays -= probability
        yield from ((probability * below, tokens + 1) for below, tokens in outcomes(topology, rows, child))
    yield stays, 1


TREE = Topology((-1, 0, 0, 0, 1, 1, 3, 4, 4, 7))
RAGGED = ((0.5, 0.25, 0.125), (0.4,), (0.3, 0.6, 0.05))


@pytest.mark.parametrize("rows", [RAGGED, RAGGED[:2], RAGGED[:1], ((),)])
def test_expected_tokens_is_the_mean_over_all_outcomes(rows: Rows) -> None:
    assert math.fsum(probability for probability, _ in outcomes(TREE, rows)) == pytest.approx(1.0)
    mean = math.fsum(probability * tokens for probability, tokens in outcomes(TREE, rows))
    assert expected_tokens(TREE, rows) == pytest.approx(mean)


@pytest.mark.parametrize("rows", [RAGGED, RAGGED[:2], RAGGED[:1], ((0.0, 0.0), (1.0,)), ((),)])
def test_derivatives_are_finite_differences(rows: Rows) -> None:
    slopes = derivatives(TREE, rows)
    differences = np.zeros((len(rows), max(map(len, rows))))
    for row, rank in [(row, rank) for row, entries in enumerate(rows) for rank in range(len(entries))]:
        up, down = (expected_tokens(TREE, changed(rows, row, rank, by)) for by in (1e-5, -1e-5))
        differences[row, rank] = (up - down) / 2e-5
    assert slopes.shape == differences.shape
    assert slopes == pytest.approx(differences, abs=1e-8)


def changed(rows: Rows, row: int, rank: int, by: float) -> Rows:
    table = [list(each) for each in rows]
    table[row][rank] += by
    return rows_of(table)


def test_the_papers_vector_gives_the_known_tokens() -> None:
    found = [frontier.tokens for frontier in depth_limited(APPENDIX_E, 768, 40)]
    known = {8: 3.846, 16: 4.538, 32: 5.22, 64: 5.917, 128: 6.607, 256: 7.289, 512: 7.968, 768: 8.366}
    assert found[-1][list(known)] == pytest.approx(list(known.values()), abs=5e-4)
    assert (found[17][768], found[9][768]) == pytest.approx((8.337, 7.548), abs=5e-4)


@pytest.mark.parametrize(("size", "levels", "tokens"), [(32, 8, 3.489566), (128, 10, 4.192108)])
def test_the_authors_demo_vector_gives_the_known_tokens(size: int, levels: int, tokens: float) -> None:
    assert expected_tokens(optimal_tree(DEMO, size, levels), DEMO) == pytest.approx(tokens, abs=5e-7)


def test_the_authors_optimiser_is_reproduced_when_every_level_pays_a_draft_forward() -> None:
    tokens = [frontier.tokens for frontier in frontiers(DEMO, 32, 10)]
    shapes = [each for each in product(VERIFY, range(2, 11)) if math.isfinite(tokens[each[1] - 1][each[0]])]
    costs = {(size, levels): (VERIFY[size] + DRAFT * levels) / tokens[levels - 1][size] for size, levels in shapes}
    best = min(costs, key=costs.__getitem__)
    assert best == (4, 4)
    assert costs[best] == pytest.approx(4.8878, abs=5e-5)
    assert VERIFY[1] / costs[best] == pytest.approx(2.0459, abs=5e-5)


@pytest.mark.parametrize(("extra", "milliseconds", "speedup"), [(0.0, 4.7569, 2.1022), (DRAFT, 4.8878, 2.0459)])
def test_the_authors_tree_costs_one_draft_forward_less(extra: float, milliseconds: float, speedup: float) -> None:
    verify = LatencyCurve(tuple(VERIFY), tuple(each / 1e3 for each in VERIFY.values()))
    inputs = PlanInputs((DEMO,), verify, LatencyCurve((1,), (DRAFT / 1e3,)), host_seconds=extra / 1e3)
    priced = price(optimal_tree(DEMO, 4, 4), inputs)
    assert priced.kind == "chain"
    assert priced.seconds_per_token * 1e3 == pytest.approx(milliseconds, abs=5e-5)
    assert priced.speedup == pytest.approx(speedup, abs=5e-5)
