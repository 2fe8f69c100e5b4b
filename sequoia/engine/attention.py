"""Attention over a packed batch of ragged sequences, each with its own rows, positions and tree mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from sequoia.engine.kv_cache import KVSlot
from sequoia.engine.transfer import upload
from sequoia.topology import Bool, Int, TokenTree

TREE_ATTENTION = "tree_sdpa"


@dataclass(frozen=True)
class Segment:
    """One session's tokens in a packed forward. They are written to the slot's rows `first_row_written ...`.

    Every token sees the slot's valid rows (`slot.length` of them at the time of building) and, of the rows behind
    those, what `visible` says.
    """

    slot: KVSlot
    token_ids: tuple[int, ...] | Tensor  # (tokens,) int64 on the device: what was chosen there and is not yet read
    positions: Int  # (tokens,)
    prefix_len: int  # rows that every token sees
    first_row_written: int  # within the slot, >= prefix_len
    visible: Bool  # (tokens, rows from prefix_len to the last one written)
    row_positions: Int  # (rows from prefix_len to the last one written,)
    logit_tokens: tuple[int, ...]  # which tokens' logits are wanted
    logits_later: bool = False  # whether the answer is to be `HiddenRows`, from an engine that `can_wait`

    def __post_init__(self) -> None:
        assert self.num_rows <= self.slot.num_rows, "it would write into another session's rows"

    @property
    def num_tokens(self) -> int:
        """Tokens this segment adds to the forward."""
        return len(self.token_ids)

    @property
    def num_rows(self) -> int:
        """Rows of the slot that take part, from its first."""
        return self.prefix_len + self.visible.shape[1]

    def mask(self, window: int | None) -> Bool:
        """(tokens, num_rows) bool: which row each token sees; with `window`, only the last `window` positions."""
        mask = np.concatenate([np.ones((self.num_tokens, self.prefix_len), np.bool_), self.visible], axis=1)
        if window is not None:
            positions = np.concatenate([np.arange(self.prefix_len), self.row_positions])
            mask &= positions[None, :] > self.positions[:, None] - window
        return mask


def chunk_segment(slot: KVSlot, token_ids: Sequence[int], *, logits: bool) -> Segment:
    """A plain run of tokens behind the slot's valid rows; `logits` asks for the last token's."""
    count = len(token_ids)
    positions = np.arange(slot.length, slot.length + count)
    wanted = (count - 1,) if logits else ()
    visible = np.tri(count, dtype=np.bool_)
    return Segment(slot, tuple(token_ids), positions, slot.length, slot.length, visible, positions, wanted)


def tree_segment(slot: KVSlot, pending: Sequence[int], tree: TokenTree, *, logits_later: bool = False) -> Segment:
    """Committed tokens without rows (the root left out), then the whole tree; logits for every node."""
    chain, size = len(pending), tree.topology.size
    visible = np.zeros((chain + size, chain + size), np.bool_)
    visible[:, :chain] = np.tri(chain + size, chain, dtype=np.bool_)
    visible[chain:, chain:] = tree.topology.ancestor_mask
    offsets = (*range(chain), *(chain + depth for depth in tree.topology.depths))
    positions = slot.length + np.array(offsets)
    tokens, wanted = (*pending, *tree.token_ids), tuple(range(chain, chain + size))
    return Segment(slot, tokens, positions, slot.length, slot.length, visible, positions, wanted, logits_later)


def host_token_ids(segment: Segment) -> Int:
    """(tokens,): the ids, and zeros where the host does not know them."""
    ids = segment.token_ids
    return np.zeros(len(ids), np.int64) if isinstance(ids, Tensor) else np.array(ids, np.int64)


class SeenRows(NamedTuple):
    """Which pool rows each token of a batch sees: a run of them, and then its own; all int64."""

    first_rows: Int  # (tokens,) where the run begins
    prefix_lens: Int  # (tokens,) its length
    own_starts: Int  # (tokens + 1,) where each token's own rows begin in `own_rows`
    own_rows: Int  # in the order of their positions


class PackedBatch:
    """Several segments as one forward: what the model and the attention function need, on the device."""

    def __init__(self, segments: Sequence[Segment], device: torch.device, dtype: torch.dtype) -> None:
        self.segments = tuple(segments)
        self._device, self._dtype = device, dtype
        self._masks: dict[tuple[int | None, int], list[Tensor | None]] = {}
        self._visible_rows: dict[int | None, list[Tensor]] = {}

    @property
    def num_tokens(self) -> int:
        """Of all segments."""
        return sum(segment.num_tokens for segment in self.segments)

    @property
    def token_ids(self) -> Tensor:
        """(1, tokens) int64."""
        return self._uploaded[0][None]

    @property
    def positions(self) -> Tensor:
        """(1, tokens) int64."""
        return self._uploaded[1][None]

    @property
    def write_rows(self) -> Tensor:
        """(tokens,) int64: the pool row of every token."""
        return self._uploaded[2]

    @property
    def logit_tokens(self) -> Tensor:
        """(wanted,) int64: which tokens of the batch need logits."""
        return self._uploaded[3]

    @cached_property
    def _uploaded(self) -> list[Tensor]:
        starts = ((s.slot.first_row + s.first_row_written, s.num_tokens) for s in self.segments)
        bounds = zip(self.segments, self.token_starts, strict=True)
        arrays = (
            np.concatenate([host_token_ids(s) for s in self.segments]),
            np.concatenate([s.positions for s in self.segments]),
            np.concatenate([np.arange(start, start + count) for start, count in starts]),
            np.array([start + t for s, start in bounds for t in s.logit_tokens], np.int64),
        )
        uploaded = upload(arrays, self._device)
        for segment, start in zip(self.segments, self.token_starts, strict=True):
            if isinstance(segment.token_ids, Tensor):
                uploaded[0][start : start + segment.num_tokens] = segment.token_ids
        return uploaded

    @cached_property
    def token_starts(self) -> tuple[int, ...]:
        """Index of each segment's first token in the batch."""
        return tuple(int(n) for n in np.cumsum([0, *(s.num_tokens for s in self.segments[:-1])]))

    @cached_property
    def seen_rows(self) -> SeenRows:
        """What `visible_rows` tells, as arrays, and for no window."""
        counts, rows = [], []
        for segment in self.segments:
            _, own = np.nonzero(segment.visible)
            counts.append(segment.visible.sum(axis=1))
            rows.append(own + segment.slot.first_row + segment.prefix_len)
        per_segment = [segment.num_tokens for segment in self.segments]
        return SeenRows(
            np.repeat([segment.slot.first_row for segment in self.segments], per_segment),
            np.repeat([segment.prefix_len for segment in self.segments], per_segment),
            np.concatenate([[0], np.cumsum(np.concatenate(counts))]),
            np.concatenate(rows),
        )

    def masks(self, window: int | None, groups: int) -> list[Tensor | None]:
        """For each segment (groups * tokens, num_rows) additive, or None where nothing is hidden; built once."""
        if (key := (window, groups)) not in self._masks:
            self._masks[key] = [self._additive(s.mask(window), groups) for s in self.segments]
        return self._masks[key]

    def visible_rows(self, window: int | None) -> list[Tensor]:
        """For each token of the batch the pool rows it sees, in the order of their positions; built once."""
        if window not in self._visible_rows:
            rows = (s.slot.first_row + each for s in self.segments for each in map(np.flatnonzero, s.mask(window)))
            self._visible_rows[window] = [torch.from_numpy(each).to(self._device) for each in rows]
        return self._visible_rows[window]

    def _additive(self, mask: Bool, groups: int) -> Tensor | None:
        if mask.all():
            return None
        [hidden] = upload((~mask,), self._device)
        additive = torch.zeros(mask.shape, dtype=self._dtype, device=self._device)
        return additive.masked_fill_(hidden, float("-inf")).repeat(groups, 1)


def tree_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, tokens, head size)
    key: Tensor,  # (kv heads, pool rows, head size)
    value: Tensor,  # (kv heads, pool rows, value size)
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packed_batch: PackedBatch,
    sliding_window: int | None = None,
    **_: object,  # what the registry's callers add for other implementations
) -> tuple[Tensor, None]:
    """Attention function of the `transformers` registry. Returns (1, tokens, heads, value size).

    The query heads of a KV head are folded into the query axis, so keys and values are read once and never repeated.
    """
    assert attention_mask is None, "the model built a mask of its own"
    kv_heads = key.shape[0]
    groups = query.shape[1] // kv_heads
    masks = packed_batch.masks(sliding_window, groups)
    output = query.new_empty((1, query.shape[2], query.shape[1], value.shape[2]))
    for segment, start, mask in zip(packed_batch.segments, packed_batch.token_starts, masks, strict=True):
        tokens = slice(start, start + segment.num_tokens)
        rows = slice(segment.slot.first_row, segment.slot.first_row + segment.num_rows)
        folded = query[0, :, tokens].reshape(1, kv_heads, groups * segment.num_tokens, -1)
        attended = scaled_dot_product_attention(folded, key[None, :, rows], value[None, :, rows], mask, scale=scaling)
        unfolded = attended.view(query.shape[1], segment.num_tokens, -1)
        output[0, tokens] = unfolded.transpose(0, 1)
    return output, None


def register() -> None:
    """Make `attn_implementation="tree_sdpa"` known. No mask function of that name exists, so models build no mask."""
    AttentionInterface.register(TREE_ATTENTION, tree_attention)
