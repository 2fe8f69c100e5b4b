"""Children ranked for whole rows, without a look at them, against those chosen row by row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sequoia.engine.children import DRAFT_WIDTH, coupled_children, draft_distributions, draw_children, top_children
from sequoia.engine.rankings import coupled_ranking, draft_weights, drawn_ranking, top_ranking
from sequoia.sampling import Sampling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 5, 60, 90])
def test_top_tokens_of_rows_are_those_of_each_row_ties_included(count: int, dtype: torch.dtype) -> None:
    rows = torch.randn(20, 60, generator=torch.Generator().manual_seed(count)).mul(3).round().to(dtype)
    found, counts = top_ranking(rows, count)
    assert counts.tolist() == [min(count, 60)] * 20
    assert found.tolist() == [list(top_children(row, count)) for row in rows]
    assert found.shape == (20, min(count, 60))


def test_the_order_of_logits_is_kept_from_the_smallest_to_the_largest() -> None:
    logits = torch.tensor([[0.0, -0.0, 1e-45, -1e-45, math.inf, -math.inf, 3e38, -3e38, 1.0, -1.0]])
    assert top_ranking(logits, 10)[0].tolist() == [[4, 6, 8, 2, 0, 1, 3, 9, 7, 5]]


@pytest.mark.parametrize(
    "sampling", [Sampling(0.9), Sampling(0.7, 0.8), Sampling(1.0, top_k=3), Sampling(1.5, min_p=0.1)]
)
def test_draws_of_rows_are_those_of_each_row_with_the_same_numbers(sampling: Sampling) -> None:
    logits = torch.randn(12, 100, generator=torch.Generator().manual_seed(0)) * 4
    q = draft_distributions(logits, sampling)
    ids, weights = draft_weights(logits, sampling)
    exponentials = torch.from_numpy(np.random.default_rng(5).standard_exponential((12, DRAFT_WIDTH)))
    ranked, counts = drawn_ranking(ids, weights, exponentials)
    generator = np.random.default_rng(5)
    for row in range(12):
        assert tuple(ranked[row, : counts[row]].tolist()) == draw_children(q, row, DRAFT_WIDTH, generator)


def test_the_coupled_race_of_rows_is_that_of_each_row() -> None:
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(0)) * 4
    for sampling in (Sampling(0.8, seed=3), Sampling(0.8, top_k=4, seed=3)):
        ranked, counts = coupled_ranking(logits, sampling, 9)
        expected = coupled_children(logits, sampling, 9, [5] * 6)
        rows = zip(ranked.tolist(), counts.tolist(), strict=True)
        assert tuple(tuple(row[: min(5, count)]) for row, count in rows) == expected
