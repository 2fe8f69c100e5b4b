"""The target's p in C, against torch's: what a rule asks of a node, and what it draws there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from engines import CACHE_DIR, needs_native
from test_native_ranking import SAMPLINGS, rows_of_a_vocabulary

from sequoia.engine.native.library import library
from sequoia.engine.native.targets import NativeRows, native_rows
from sequoia.engine.sampling import RandomChoices, target_distribution
from sequoia.engine.verification import TargetRows
from sequoia.errors import Internal
from sequoia.rules import COUPLED, SAMPLE_AND_WALK, SEQUOIA, Rule
from sequoia.sampling import Decoding, Sampling
from sequoia.topology import TokenTree

# Also such as leave more tokens than C looks at.
ALL_SAMPLINGS = [
    *SAMPLINGS,
    Sampling(1.0, top_k=300, seed=11),
    Sampling(1.0, top_k=300, top_p=0.7, seed=12),
    Sampling(30.0, top_p=0.99, seed=13),
    Sampling(30.0, min_p=0.05, top_p=0.3, seed=14),
    Sampling(1.0, top_k=256, seed=15),
]
ROWS = [row for row in rows_of_a_vocabulary() if np.isfinite(row.max())]

pytestmark = needs_native


class Shares(RandomChoices):
    """Says which share comes next."""

    share = 0.0

    def uniform(self) -> float:
        return self.share


def both(
    row: np.ndarray, sampling: Sampling, rule: Rule = SEQUOIA, num_prompt_tokens: int = 1
) -> tuple[NativeRows, TargetRows, Shares]:
    logits, tree = torch.from_numpy(row)[None], TokenTree.root_only(0)
    choices = Shares(np.random.default_rng(0))
    decoding = Decoding(rule, sampling, num_prompt_tokens)
    arguments = (tree, logits, decoding, (0,) * num_prompt_tokens, choices)
    return native_rows(library(CACHE_DIR))(*arguments), TargetRows(*arguments), choices


def some_ids(row: np.ndarray, seed: int) -> np.ndarray:
    """The likeliest tokens, as q has them, and some at random."""
    likely = np.argsort(-row, kind="stable")[: 16 + seed % 16]
    return np.unique(np.append(likely, np.random.default_rng(seed).choice(len(row), 16, replace=False)))


@pytest.mark.parametrize("sampling", ALL_SAMPLINGS, ids=str)
def test_p_at_candidates_and_outside_them(sampling: Sampling) -> None:
    for seed, row in enumerate(ROWS):
        before = row.copy()
        ids = some_ids(row, seed)
        ours, theirs, _ = both(row, replace(sampling, seed=None))
        values, outside = ours.target(0).at(ids)
        wanted, wanted_outside = theirs.target(0).at(ids)
        np.testing.assert_allclose(values, wanted, rtol=1e-11, atol=1e-15)
        assert outside == pytest.approx(wanted_outside, rel=1e-11, abs=1e-15)
        np.testing.assert_array_equal(row, before)


def test_without_candidates_all_of_p_is_outside() -> None:
    ours, _, _ = both(ROWS[0], Sampling(0.7))
    values, outside = ours.target(0).at(np.empty(0, np.int64))
    assert len(values) == 0
    assert outside == 1.0


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(2.0, 0.8), Sampling(1.5, top_k=9)], ids=str)
def test_draws_outside_candidates_have_ps_law_there(sampling: Sampling) -> None:
    """Shares on an even grid: the number that falls to a token is its p by the size of the grid, give or take one."""
    row = np.random.default_rng(1).standard_normal(700).astype(np.float32) * 2
    ids, grid = np.argsort(-row)[[1, 3, 4, 30, 400]], 20000
    ours, _, choices = both(row, sampling)
    target = ours.target(0)
    target.at(ids)
    tokens = []
    for choices.share in (np.arange(grid) + 0.5) / grid:
        tokens.append(target.draw(ids, np.zeros(len(ids)), 1.0, choices))
    expected = target_distribution(torch.from_numpy(row).double(), sampling).numpy()
    expected[ids] = 0.0
    expected /= expected.sum()
    assert np.abs(np.bincount(tokens, minlength=len(row)) - expected * grid).max() <= 1.0
    assert not set(tokens) & set(ids.tolist())


def test_draw_is_the_first_token_beyond_its_share() -> None:
    for row in ROWS:
        ours, _, choices = both(row, Sampling(1.3), SAMPLE_AND_WALK)
        p = target_distribution(torch.from_numpy(row).double(), Sampling(1.3)).numpy()
        for choices.share in (0.0, 0.1, 0.5, 0.999, 1.0 - 2.0**-53):
            token = ours.token(0)
            assert p[token] > 0.0
            assert p[:token].sum() <= choices.share * (1.0 + 1e-12) + 1e-12
            assert p[: token + 1].sum() >= choices.share * (1.0 - 1e-12) - 1e-12


@pytest.mark.parametrize("sampling", ALL_SAMPLINGS, ids=str)
def test_coupled_tokens_are_torchs(sampling: Sampling) -> None:
    for row in ROWS:
        for num_prompt_tokens in range(1, 12):
            ours, theirs, _ = both(row, sampling, COUPLED, num_prompt_tokens)
            assert ours.token(0) == theirs.token(0)


def test_tokens_beyond_those_that_race_alone_win_as_often_as_they_should() -> None:
    """On a flat row: 1 - 256 / 5000 of the time, give or take 4 standard deviations."""
    row = np.random.default_rng(2).standard_normal(5000).astype(np.float32) * np.float32(1e-3)
    likely = set(np.argsort(-row)[:256].tolist())
    found = []
    for num_prompt_tokens in range(1, 1001):
        ours, theirs, _ = both(row, Sampling(1.0, seed=3), COUPLED, num_prompt_tokens)
        found.append(ours.token(0))
        assert found[-1] == theirs.token(0)
    share = np.mean([token not in likely for token in found])
    assert abs(share - (1 - 256 / 5000)) < 4 * np.sqrt(0.0512 * 0.9488 / 1000)
    assert len(set(found)) > 850


@pytest.mark.parametrize("rule", [SEQUOIA, COUPLED, SAMPLE_AND_WALK], ids=lambda rule: rule.name)
@pytest.mark.parametrize("broken", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("sampling", [Sampling(1.0, seed=1), Sampling(1.0, top_p=0.9, seed=1)], ids=str)
def test_broken_logits_are_an_error(rule: Rule, broken: float, sampling: Sampling) -> None:
    for place in (0, 333, 699):
        row = np.zeros(700, np.float32)
        row[place] = broken
        ours, _, _ = both(row, sampling, rule)
        with pytest.raises(Internal, match=f"largest logit is {broken}"):
            ours.target(0).at(np.array([5])) if rule is SEQUOIA else ours.token(0)


def test_logits_that_are_adjusted_are_torchs() -> None:
    sampling = Sampling(1.0, logit_bias=((3, 50.0),), seed=1)
    ours, _, choices = both(np.zeros(700, np.float32), sampling, COUPLED)
    assert ours.token(0) == 3
    ours, _, choices = both(np.zeros(700, np.float32), replace(sampling, seed=None), SAMPLE_AND_WALK)
    choices.share = 0.5
    assert ours.token(0) == 3
    ours, _, _ = both(np.zeros(700, np.float32), replace(sampling, seed=None))
    values, _ = ours.target(0).at(np.array([3]))
    assert values[0] > 0.999
