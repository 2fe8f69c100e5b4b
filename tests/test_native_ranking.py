"""One row ranked by the C engine: against a full sort, and against numpy's rankings, which say the same at length."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from engines import CACHE_DIR, needs_native

from sequoia.engine.children import DRAFT_WIDTH, coupled_children, draft_distributions, draw_children
from sequoia.engine.kv_cache import KVCache
from sequoia.engine.native.growth import ranker_for
from sequoia.engine.native.library import library
from sequoia.engine.whole_tree import WholeTree
from sequoia.sampling import Sampling
from sequoia.topology import Topology

SAMPLINGS = [
    Sampling(1.0, seed=4),
    Sampling(0.02, seed=5),
    Sampling(0.9, top_p=0.8, seed=6),
    Sampling(1.1, top_p=0.95, top_k=40, seed=7),
    Sampling(0.7, top_p=0.6, min_p=0.01, seed=8),
    Sampling(100.0, min_p=0.999, seed=9),
    Sampling(1.0, top_k=1, seed=10),
]


pytestmark = needs_native


class Ranked(NamedTuple):
    token_ids: list[int]
    q_ids: np.ndarray
    q_weights: np.ndarray


def rank(
    logits: np.ndarray,
    kind: str,
    width: int,
    sampling: Sampling | None = None,
    *,
    position: int = 0,
    exponentials: np.ndarray | None = None,
) -> Ranked:
    """By the C engine."""
    slot = KVCache(1, 1, 1).slot()
    with slot as unused:
        wanted = WholeTree(
            unused, Topology.root_only(), torch.empty(0), kind, sampling or Sampling(), len(logits), width
        )
    token_ids, num_tokens = np.full(width, -1, np.int64), np.zeros(1, np.int64)
    q_ids, q_weights = np.empty(DRAFT_WIDTH, np.uint32), np.empty(DRAFT_WIDTH, np.float32)
    arrays = (token_ids, num_tokens, q_ids, q_weights)
    library(CACHE_DIR).sequoia_rank(
        ctypes.byref(ranker_for(wanted, len(logits))),
        ctypes.c_void_p(logits.ctypes.data),
        ctypes.c_int64(position),
        ctypes.c_void_p(None if exponentials is None else exponentials.ctypes.data),
        ctypes.byref((ctypes.c_void_p * 4)(*(array.ctypes.data for array in arrays))),
    )
    assert (token_ids[num_tokens[0] :] == -1).all()
    return Ranked(token_ids[: num_tokens[0]].tolist(), q_ids, q_weights)


def rows_of_all_kinds() -> Iterator[np.ndarray]:
    generator = np.random.default_rng(2)
    for size in (1, 2, 15, 16, 17, 63, 64, 65, 257, 1300, 5000, 40000):
        normal = generator.standard_normal(size).astype(np.float32)
        yield from (normal, np.sort(normal), np.sort(normal)[::-1].copy(), np.zeros(size, np.float32))
        yield generator.integers(-3, 3, size).astype(np.float32)
        yield np.where(generator.random(size) < 0.5, np.float32(-0.0), np.float32(0.0))
        yield (normal * np.float32(1e-42)).astype(np.float32)
        for broken in (-np.inf, np.inf, np.nan):
            for share in (0.02, 0.9, 1.0):
                yield np.where(generator.random(size) < share, np.float32(broken), normal)


def rows_of_a_vocabulary() -> Iterator[np.ndarray]:
    generator = np.random.default_rng(8)
    for size, spread in ((40, 2.0), (5000, 0.1), (5000, 3.0), (5000, 30.0), (151936, 2.5)):
        normal = (generator.standard_normal(size) * spread).astype(np.float32)
        yield from (normal, np.round(normal), np.where(generator.random(size) < 0.9, np.float32(-np.inf), normal))
        yield np.where(np.arange(size) == size // 2, np.float32(np.nan), normal)
        yield np.where(np.arange(size) == size // 2, np.float32(np.inf), normal)
        yield np.full(size, -np.inf, np.float32)


@pytest.mark.parametrize("count", [1, 2, 11, 32, 256, 1000, 6000])
def test_the_largest_are_those_of_a_full_sort(count: int) -> None:
    for values in rows_of_all_kinds():
        wanted = [index for index in np.argsort(-values, kind="stable").tolist() if values[index] > -np.inf]
        assert rank(values, "top", count).token_ids == wanted[:count]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("position", [0, 77, 2**31])
def test_the_race_is_the_verifiers(sampling: Sampling, position: int) -> None:
    for row in rows_of_a_vocabulary():
        [wanted] = coupled_children(torch.from_numpy(row)[None], sampling, position, [300])
        assert tuple(rank(row, "coupled", 300, sampling, position=position).token_ids) == wanted
        assert tuple(rank(row, "coupled", 5, sampling, position=position).token_ids) == wanted[:5]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_q_and_its_draws_are_numpys(sampling: Sampling) -> None:
    for seed, row in enumerate(rows_of_a_vocabulary()):
        exponentials = np.random.default_rng(seed).standard_exponential(DRAFT_WIDTH)
        found = rank(row, "drawn", 9, sampling, exponentials=exponentials)
        q = draft_distributions(torch.from_numpy(row)[None], sampling)
        assert tuple(found.token_ids) == draw_children(q, 0, 9, np.random.default_rng(seed))
        used = q.weights[0] > 0
        np.testing.assert_array_equal(found.q_ids[found.q_weights > 0], q.token_ids[0][used])
        np.testing.assert_array_equal(found.q_weights[found.q_weights > 0], q.weights[0][used])


def test_weights_between_two_numbers_of_bfloat16_are_rounded_to_the_even_one() -> None:
    logs = -np.random.default_rng(3).random(400_000).astype(np.float32)
    weights = np.exp(logs.astype(np.float64)).astype(np.float32)
    ties = logs[(weights.view(np.uint32) & 0xFFFF) == 0x8000]
    assert (
        len({int(bits >> 16) & 1 for bits in np.exp(ties.astype(np.float64)).astype(np.float32).view(np.uint32)}) == 2
    )
    for tie in ties:
        found = rank(np.array([0.0, tie], np.float32), "drawn", 2, exponentials=np.ones(DRAFT_WIDTH))
        exact = torch.tensor(float(tie), dtype=torch.float64).exp().float().bfloat16().float()
        assert found.q_weights[1] == exact


def test_equal_clocks_go_by_the_order_of_q() -> None:
    row = np.zeros(50, np.float32)
    assert rank(row, "drawn", 6, exponentials=np.ones(DRAFT_WIDTH)).token_ids == [0, 1, 2, 3, 4, 5]
