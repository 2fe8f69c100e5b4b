"""A batch in one of few shapes, as a captured graph needs it: its numbers, and attention over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sequoia.engine.attention import Segment, host_token_ids
from sequoia.engine.kv_cache import KVCache
from sequoia.engine.lean_decoder import PlacedTokens

# Wider forwards are worth their launches, one by one.
MOST_TOKENS = 128
# Rows of a session behind its prefix: a tree, the committed tokens before it, and trees drafted ahead.
MOST_OWN_ROWS = 256
_FEWEST_ROWS = 256


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sizes that a batch is filled up to."""

    num_sessions: int
    num_tokens: int  # of each session
    num_rows: int  # of each session, from its slot's first


def bucket_for(segments: Sequence[Segment], slot_rows: int) -> Bucket | None:
    """Powers of two, rows as far as the slot has them. None where a segment is too wide for a graph."""
    num_tokens = max(segment.num_tokens for segment in segments)
    if num_tokens > MOST_TOKENS or max(segment.visible.shape[1] for segment in segments) > MOST_OWN_ROWS:
        return None
    num_rows = max(_FEWEST_ROWS, *(_power_of_two(segment.num_rows) for segment in segments))
    return Bucket(_power_of_two(len(segments)), _power_of_two(num_tokens), min(num_rows, slot_rows))


def flat_tokens(segments: Sequence[Segment], bucket: Bucket) -> NDArray[np.int64]:
    """(wanted,): where the tokens whose logits are wanted stand among all of the bucket's."""
    wanted = [session * bucket.num_tokens + t for session, each in enumerate(segments) for t in each.logit_tokens]
    return np.array(wanted, np.int64)


class StaticArrays(NamedTuple):
    """The numbers of a batch, filled up. Padding is written to the scratch row, and is like a real token otherwise.

    So no token sees nothing, and none is computed that is not finite where the real ones are.
    """

    token_ids: NDArray[np.int64]  # (sessions, tokens); 0 for padding
    positions: NDArray[np.int64]  # (sessions, tokens)
    write_rows: NDArray[np.int64]  # (sessions, tokens): rows of the pool
    first_rows: NDArray[np.int64]  # (sessions, 1): of the slots
    prefix_lens: NDArray[np.int64]  # (sessions, 1): rows that every token of a session sees
    own_lens: NDArray[np.int64]  # (sessions, 1): rows behind those
    visible: NDArray[np.bool_]  # (sessions, tokens, MOST_OWN_ROWS): which of its own rows a token sees
    row_positions: NDArray[np.int64]  # (sessions, MOST_OWN_ROWS)


def static_arrays(segments: Sequence[Segment], bucket: Bucket, scratch_row: int) -> StaticArrays:
    """The batch's numbers in the bucket's sizes; missing sessions are like the last one."""
    shape = (bucket.num_sessions, bucket.num_tokens)
    sources = [segments[min(session, len(segments) - 1)] for session in range(bucket.num_sessions)]
    arrays = StaticArrays(
        token_ids=np.zeros(shape, np.int64),
        positions=np.stack([_filled(each.positions, bucket.num_tokens) for each in sources]),
        write_rows=np.full(shape, scratch_row, np.int64),
        first_rows=np.array([[each.slot.first_row] for each in sources]),
        prefix_lens=np.array([[each.prefix_len] for each in sources]),
        own_lens=np.array([[each.visible.shape[1]] for each in sources]),
        visible=np.zeros((*shape, MOST_OWN_ROWS), np.bool_),
        row_positions=np.zeros((bucket.num_sessions, MOST_OWN_ROWS), np.int64),
    )
    for session, source in enumerate(sources):
        own = source.visible.shape[1]
        arrays.visible[session, :, :own] = _filled(source.visible, bucket.num_tokens)
        arrays.row_positions[session, :own] = source.row_positions
    for session, segment in enumerate(segments):
        first = segment.slot.first_row + segment.first_row_written
        arrays.token_ids[session, : segment.num_tokens] = host_token_ids(segment)
        arrays.write_rows[session, : segment.num_tokens] = np.arange(first, first + segment.num_tokens)
    return arrays


class StaticTensors(NamedTuple):
    """`StaticArrays` on the device."""

    token_ids: Tensor
    positions: Tensor
    write_rows: Tensor
    first_rows: Tensor
    prefix_lens: Tensor
    own_lens: Tensor
    visible: Tensor
    row_positions: Tensor

    @property
    def tokens(self) -> PlacedTokens:
        """All of the bucket's, session by session."""
        return PlacedTokens(self.token_ids.flatten(), self.positions.flatten(), self.write_rows.flatten())


class StaticAttention:
    """Attention of a bucket's tokens, each session to the rows of its slot, gathered from the pool.

    Rows that no token of the session sees are never read, whatever an earlier session left there: the zero row stands
    for them.
    """

    def __init__(self, inputs: StaticTensors, bucket: Bucket, cache: KVCache, dtype: torch.dtype, scale: float) -> None:
        self._inputs, self._bucket, self._dtype, self._scale = inputs, bucket, dtype, scale
        self._rows = torch.arange(bucket.num_rows, device=inputs.positions.device)
        own = self._rows - inputs.prefix_lens  # (sessions, rows)
        self._is_prefix, is_used = own < 0, own < inputs.own_lens
        self._columns = own.clamp(0, MOST_OWN_ROWS - 1)
        pool_rows = torch.where(is_used, inputs.first_rows + self._rows, cache.zero_row)
        self._pool_rows = pool_rows.flatten()
        columns = self._columns[:, None].expand(-1, bucket.num_tokens, -1)
        is_own = inputs.visible.gather(2, columns) & is_used[:, None]
        self._seen = is_own | self._is_prefix[:, None]  # (sessions, tokens, rows)
        self._masks: dict[Any, Tensor] = {}

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """Query (all tokens, heads, head size) over pools (kv heads, pool rows, head size). Returns the query's shape.

        The query heads of a KV head are folded into the query axis, so keys and values are never repeated.
        """
        sessions, tokens = self._bucket.num_sessions, self._bucket.num_tokens
        kv_heads, groups = keys.shape[0], query.shape[1] // keys.shape[0]
        split = query.reshape(sessions, tokens, kv_heads, groups, -1)
        folded = split.permute(0, 2, 3, 1, 4).reshape(sessions, kv_heads, groups * tokens, -1)
        attended = scaled_dot_product_attention(
            folded, self._gathered(keys), self._gathered(values), self._mask(window, groups), scale=self._scale
        )
        unfolded = attended.reshape(sessions, kv_heads, groups, tokens, -1).permute(0, 3, 1, 2, 4)
        return unfolded.reshape(query.shape)

    def _gathered(self, pool: Tensor) -> Tensor:
        """(sessions, kv heads, rows, head size)."""
        rows = pool.index_select(1, self._pool_rows)
        return rows.view(pool.shape[0], self._bucket.num_sessions, self._bucket.num_rows, -1).transpose(0, 1)

    def _mask(self, window: int | None, groups: int) -> Tensor:
        """(sessions, 1, groups * tokens, rows) additive; built once."""
        if (window, groups) not in self._masks:
            seen = self._seen if window is None else self._seen & self._within(window)
            additive = torch.zeros(seen.shape, dtype=self._dtype, device=seen.device)
            additive = additive.masked_fill(~seen, float("-inf"))
            self._masks[window, groups] = additive.repeat(1, groups, 1)[:, None]
        return self._masks[window, groups]

    def _within(self, window: int) -> Tensor:
        """(sessions, tokens, rows): rows of the last `window` positions."""
        own = self._inputs.row_positions.gather(1, self._columns)
        positions = torch.where(self._is_prefix, self._rows, own)
        return positions[:, None] > self._inputs.positions[:, :, None] - window


def _filled(values: NDArray[Any], count: int) -> NDArray[Any]:
    """The last one repeated until there are so many."""
    return values[np.minimum(np.arange(count), len(values) - 1)]


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
