"""Distributions and draws against independent definitions."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from reference import coupled, probabilities

from sequoia.engine.children import coupled_children, draft_distributions, draw_children, top_children
from sequoia.engine.sampling import RandomChoices, argmax, coupled_token, target_distribution
from sequoia.errors import Internal, InvalidArgument
from sequoia.sampling import Sampling
from sequoia.topology import DraftDistributions, TokenTree, Topology
from sequoia.wire import tree_from_wire, tree_to_wire


def reference_p(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """By a full sort on (logit descending, id ascending): slow and obvious."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    kept = order[: sampling.top_k or None]
    weights = np.zeros(len(logits))
    weights[kept] = np.exp((logits[kept] - logits.max()) / sampling.temperature)
    weights /= weights.sum()
    mass, nucleus = 0.0, []
    for token in kept:
        nucleus.append(token)
        mass += weights[token]
        if mass >= sampling.top_p:
            break
    p = np.zeros(len(logits))
    p[nucleus] = weights[nucleus]
    return p / p.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.3),
        Sampling(1.1, 0.7),
        Sampling(0.8, 1.0, 5),
        Sampling(1.0, 0.9, 40),
        Sampling(2.0, 0.999),
    ],
)
def test_target_distribution_equals_the_definition(sampling: Sampling) -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        logits = generator.normal(0, 3, 700).round(1)  # rounding makes ties
        p = target_distribution(torch.tensor(logits, dtype=torch.float64), sampling).numpy()
        np.testing.assert_allclose(p, reference_p(logits, sampling), atol=1e-12)


def test_ties_at_a_cut_go_to_the_smaller_ids() -> None:
    p = target_distribution(torch.tensor([1.0, 2.0, 2.0, 2.0]).double(), Sampling(top_k=2))
    assert p.tolist() == [0.0, 0.5, 0.5, 0.0]
    assert top_children(torch.tensor([1.0, 2.0, 0.0, 2.0, 2.0]), 2) == (1, 3)


def test_nan_logits_are_an_error_and_never_a_token() -> None:
    with pytest.raises(Internal, match="largest logit is nan"):
        target_distribution(torch.tensor([0.0, float("nan")]), Sampling())
    with pytest.raises(Internal, match="largest logit is nan"):
        argmax(torch.tensor([0.0, float("nan")]))


def test_an_index_of_weight_zero_is_never_drawn() -> None:
    choices = RandomChoices(np.random.default_rng(0))
    weights = torch.tensor([0.0, 1.0, 0.0, 1e-9, 0.0], dtype=torch.float64)
    assert {choices.draw(weights) for _ in range(2000)} <= {1, 3}


def test_races_have_the_law_of_their_rows_with_fresh_numbers_for_every_row_and_call() -> None:
    """Chi-square of 2 x 10,000 draws over 4 tokens each: 3 degrees of freedom, 1e-4 quantile 21.1."""
    p = torch.tensor([[0.5, 0.0, 0.3, 0.2], [1e-3, 0.4, 0.5, 0.099]], dtype=torch.float64)
    choices, draws = RandomChoices(np.random.default_rng(0)), 10_000
    found = torch.stack([choices.race(p.log()) for _ in range(draws)])
    for row in range(2):
        counts = torch.bincount(found[:, row], minlength=4).double()
        assert counts[p[row] == 0.0].sum() == 0
        expected = draws * p[row][p[row] > 0.0]
        assert ((counts[p[row] > 0.0] - expected).square() / expected).sum() < 21.1
    both = torch.stack([choices.race(p[:1].log().expand(2, -1)) for _ in range(1000)])
    assert 0.33 < (both[:, 0] == both[:, 1]).double().mean() < 0.43, "rows share their numbers"  # 0.38 by chance


def test_children_are_drawn_without_replacement_from_q() -> None:
    """Chi-square over the 6 ordered pairs of 3 tokens, 20,000 draws: 5 degrees of freedom, 1e-4 quantile 25.7."""
    weights = np.array([5, 3, 2])
    q = DraftDistributions(np.array([[10, 11, 12]], dtype=np.uint32), weights[None].astype(np.float32))
    generator, draws = np.random.default_rng(1), 20_000
    pairs = [draw_children(q, 0, 2, generator) for _ in range(draws)]
    statistic = 0.0
    for first, second in permutations(range(3), 2):
        expected = draws * weights[first] / 10 * weights[second] / (10 - weights[first])
        statistic += (pairs.count((10 + first, 10 + second)) - expected) ** 2 / expected
    assert statistic < 25.7


def test_fewer_children_come_back_when_q_runs_out() -> None:
    q = DraftDistributions(np.array([[4, 7, 9]], dtype=np.uint32), np.array([[1, 0, 2]], dtype=np.float32))
    assert set(draw_children(q, 0, 3, np.random.default_rng(0))) == {4, 9}


def test_draft_distributions_apply_temperature_and_cuts() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    q = draft_distributions(logits, Sampling(1.0, 0.7))
    assert q.token_ids[0, :2].tolist() == [0, 1]
    assert q.token_ids.shape == q.weights.shape == (1, 2)
    assert q.weights[0, 0] / q.weights[0, 1] == pytest.approx(5 / 3, rel=2**-8)


def test_a_draft_with_nan_logits_yields_no_children() -> None:
    q = draft_distributions(torch.full((1, 8), float("nan")), Sampling())
    assert draw_children(q, 0, 3, np.random.default_rng(0)) == ()


def test_the_coldest_draft_still_has_its_children_in_order() -> None:
    """Ranks must not collapse as the temperature goes to 0: sampled rules then propose what the greedy one does."""
    logits = torch.tensor([[1.0, 4.0, 3.0, 2.0, -8.0]])
    sampling, generator = Sampling(temperature=1e-3, seed=2), np.random.default_rng(0)
    q = draft_distributions(logits, sampling)
    drawn = [draw_children(q, 0, 4, generator) for _ in range(200)]
    assert drawn.count((1, 2, 3, 0)) >= 195
    assert coupled_children(logits, sampling, 7, [4]) == ((1, 2, 3, 0),)


def test_weights_are_bfloat16_numbers_and_survive_the_wire() -> None:
    generator = torch.Generator().manual_seed(0)
    for temperature in (1e-3, 0.3, 1.0, 3.0):
        q = draft_distributions(torch.randn((4, 100), generator=generator) * 5, Sampling(temperature))
        tree = TokenTree(Topology((-1, 0, 1, 2, 3)), (0, *(int(row[0]) for row in q.token_ids)), q)
        found = tree_from_wire(tree_to_wire(tree), 64, 100)
        assert found.q is not None
        assert (found.q.weights == q.weights).all()
        assert (found.q.token_ids == q.token_ids).all()


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -0.5, 2.0])
def test_a_weight_that_is_no_probability_is_refused(weight: float) -> None:
    q = DraftDistributions(np.array([[3, 4]], dtype=np.uint32), np.array([[1.0, weight]], dtype=np.float32))
    with pytest.raises(InvalidArgument, match=r"tree\.q\.weights"):
        tree_from_wire(tree_to_wire(TokenTree(Topology((-1, 0)), (0, 3), q)), 64, 100)


@pytest.mark.parametrize("width", [1, 3, 40])
def test_the_tokens_of_many_seeds_have_the_law_of_p_however_many_race_alone(width: int) -> None:
    """Chi-square of 20,000 seeds over 40 tokens, 39 degrees of freedom: above 85 once in 30,000."""
    logits = torch.from_numpy(np.random.default_rng(5).normal(0, 1.5, 40))
    p = logits.softmax(0).numpy()
    tokens = [coupled_token(logits, Sampling(seed=seed), 9, width) for seed in range(20_000)]
    expected = 20_000 * p
    assert ((np.bincount(tokens, minlength=40) - expected) ** 2 / expected).sum() < 85


def test_a_seeds_token_is_that_of_the_definition_with_and_without_a_crowd_of_others() -> None:
    logits = np.random.default_rng(6).normal(0, 1.0, 60)
    for sampling in (Sampling(), Sampling(2.0), Sampling(0.5, 0.9), Sampling(1.0, 1.0, 20)):
        p = probabilities(logits.tolist(), sampling)
        for seed in range(100):
            seeded = Sampling(sampling.temperature, sampling.top_p, sampling.top_k, seed=seed)
            found = coupled_token(torch.from_numpy(logits), seeded, 4, 8)
            assert found == coupled(p, seed, 4, 8)[0]
