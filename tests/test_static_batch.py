"""Batches filled up to a bucket: what each token sees, written out; what padding does to others: nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sequoia.engine.attention import Segment, chunk_segment, tree_segment
from sequoia.engine.kv_cache import KVCache, KVSlot
from sequoia.engine.static_batch import (
    MOST_OWN_ROWS,
    MOST_TOKENS,
    Bucket,
    StaticAttention,
    StaticTensors,
    bucket_for,
    flat_tokens,
    static_arrays,
)
from sequoia.engine.transfer import upload
from sequoia.topology import TokenTree, Topology

SLOT_ROWS, HEADS, KV_HEADS, SIZE = 300, 4, 2, 8
SHAPE = Topology((-1, 0, 0, 0, 1, 1, 2, 4, 7, 8))


def cache() -> KVCache:
    pool = KVCache(1, num_slots=4, slot_rows=SLOT_ROWS)
    pool.allocate(KV_HEADS, SIZE, torch.float32, torch.device("cpu"))
    return pool


def segments(pool: KVCache) -> list[Segment]:
    """A tree behind 30 rows with two committed tokens before it, a chunk from the beginning, a token."""
    slots = [KVSlot(pool, pool.memory.take(SLOT_ROWS)) for _ in range(3)]
    slots[0].keep(range(30))
    slots[2].keep(range(299))
    tree = TokenTree(SHAPE, tuple(range(SHAPE.size)))
    chunk = chunk_segment(slots[1], range(5), logits=True)
    return [tree_segment(slots[0], (1, 2), tree), chunk, chunk_segment(slots[2], [9], logits=True)]


def test_buckets_are_powers_of_two_and_never_longer_than_a_slot() -> None:
    assert bucket_for(segments(cache()), SLOT_ROWS) == Bucket(4, 16, SLOT_ROWS)
    assert bucket_for(segments(cache())[:1], 4096) == Bucket(1, 16, 256)
    assert bucket_for(segments(cache())[2:], 4096) == Bucket(1, 1, 512)


def test_what_is_too_wide_for_a_graph_has_no_bucket() -> None:
    pool = cache()
    slot = KVSlot(pool, pool.memory.take(SLOT_ROWS))
    assert bucket_for([chunk_segment(slot, range(MOST_TOKENS + 1), logits=True)], SLOT_ROWS) is None
    far = chunk_segment(slot, [1], logits=True)
    visible = np.ones((1, MOST_OWN_ROWS + 1), np.bool_)
    far = Segment(slot, (1,), far.positions, 0, 0, visible, np.arange(MOST_OWN_ROWS + 1), (0,))
    assert bucket_for([far], SLOT_ROWS) is None


def test_only_real_tokens_are_written_to_a_slot() -> None:
    pool = cache()
    batch = segments(pool)
    arrays = static_arrays(batch, Bucket(4, 16, SLOT_ROWS), pool.scratch_row)
    real = [
        segment.slot.first_row + segment.first_row_written + t for segment in batch for t in range(segment.num_tokens)
    ]
    written = arrays.write_rows.flatten().tolist()
    assert sorted(row for row in written if row != pool.scratch_row) == sorted(real)
    assert pool.scratch_row >= pool.num_slots * pool.slot_rows
    assert flat_tokens(batch, Bucket(4, 16, SLOT_ROWS)).tolist() == [*range(2, 12), 20, 32]


def expected(query: Tensor, keys: Tensor, values: Tensor, segment: Segment, token: int, window: int | None) -> Tensor:
    """One token, one head after the other, over the rows it sees: (heads, head size)."""
    heads = []
    [rows] = np.nonzero(segment.mask(window)[token])
    rows += segment.slot.first_row
    for head in range(HEADS):
        own = head // (HEADS // KV_HEADS)
        weights = (keys[own, rows] @ query[head] * 0.3).softmax(0)
        heads.append(weights @ values[own, rows])
    return torch.stack(heads)


@pytest.mark.parametrize("window", [None, 3, 16])
def test_every_token_attends_to_the_rows_it_sees(window: int | None) -> None:
    """Rows that nobody may see hold NaN: one look at them would spoil the result."""
    pool, bucket = cache(), Bucket(4, 16, SLOT_ROWS)
    batch = segments(pool)
    keys, values = pool.rows[0]
    generator = torch.Generator().manual_seed(0)
    for rows in (keys, values):
        rows[:, : pool.scratch_row + 1] = math.nan
        for segment in batch:
            own = slice(segment.slot.first_row, segment.slot.first_row + segment.num_rows)
            rows[:, own] = torch.randn(rows[:, own].shape, generator=generator)
    inputs = StaticTensors(*upload(static_arrays(batch, bucket, pool.scratch_row), torch.device("cpu")))
    query = torch.randn(4 * 16, HEADS, SIZE, generator=generator)
    found = StaticAttention(inputs, bucket, pool, torch.float32, 0.3)(query, keys, values, window)
    assert found.isfinite().all(), "padding is not finite"
    for session, segment in enumerate(batch):
        for token in range(segment.num_tokens):
            flat = session * 16 + token
            wanted = expected(query[flat], keys, values, segment, token, window)
            torch.testing.assert_close(found[flat], wanted, rtol=1e-5, atol=1e-6)
