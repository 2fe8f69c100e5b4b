"""The largest entries of a row against a full sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sequoia.engine.largest import largest as largest_of_host
from sequoia.engine.largest import on_host


def largest(row: torch.Tensor, count: int) -> np.ndarray:
    return largest_of_host(on_host(row), count)


def by_sorting(values: list[float], count: int) -> list[int]:
    allowed = [index for index, value in enumerate(values) if value > -np.inf]
    return sorted(allowed, key=lambda index: (-values[index], index))[:count]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 2, 7, 255, 256, 257, 3000])
@pytest.mark.parametrize("count", [1, 2, 6, 34, 256])
def test_entries_and_their_order_are_those_of_a_full_sort(dtype: torch.dtype, length: int, count: int) -> None:
    generator = torch.Generator().manual_seed(length * 1000 + count)
    for scale in (0.3, 3.0, 100.0):  # the first makes many ties
        row = (torch.randn(length, generator=generator) * scale).round(decimals=1).to(dtype)
        assert largest(row, count).tolist() == by_sorting(row.tolist(), count)


def test_equal_entries_stand_in_the_order_of_their_indices() -> None:
    assert largest(torch.zeros(2000), 5).tolist() == [0, 1, 2, 3, 4]


def test_cut_entries_are_never_among_the_largest() -> None:
    row = torch.full((1000,), -torch.inf)
    row[[900, 3]] = torch.tensor([1.0, 2.0])
    assert largest(row, 10).tolist() == [3, 900]
    assert largest(torch.full((10,), -torch.inf), 3).tolist() == []


def test_nan_is_never_among_the_largest_and_hides_no_other_entry() -> None:
    row = torch.arange(1000.0)
    row[[5, 998]] = torch.nan
    assert largest(row, 3).tolist() == [999, 997, 996]
    assert largest(torch.full((600,), torch.nan), 3).tolist() == []


def test_infinity_is_larger_than_all_else() -> None:
    row = torch.arange(1000.0)
    row[7] = torch.inf
    assert largest(row, 2).tolist() == [7, 999]
