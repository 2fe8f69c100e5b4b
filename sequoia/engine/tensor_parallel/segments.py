"""Segments of a forward as numbers, from the rank that has sessions to those that have none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from sequoia.engine.attention import Segment
from sequoia.engine.kv_cache import KVCache, KVSlot
from sequoia.engine.kv_memory import Run
from sequoia.topology import Bool, Int

# The slot's first row and rows, prefix_len, first_row_written, then tokens, visible rows, and tokens with logits.
_NUM_SIZES = 7
_BITS = 64


def to_numbers(segments: Sequence[Segment]) -> Int:
    """(numbers,) int64, for `from_numbers`."""
    return np.concatenate([part for each in segments for part in _parts(each)])


def from_numbers(numbers: Int, cache: KVCache) -> list[Segment]:
    """What `to_numbers` was given, in slots of this cache."""
    return list(_segments(numbers, cache))


def _parts(segment: Segment) -> list[Int]:
    assert isinstance(segment.token_ids, tuple), "the first rank knows its tokens"
    slot, seen = segment.slot, segment.visible.shape[1]
    where = (slot.first_row, slot.num_rows, segment.prefix_len, segment.first_row_written)
    sizes = (segment.num_tokens, seen, len(segment.logit_tokens))
    lists = (segment.token_ids, segment.positions, segment.row_positions, segment.logit_tokens)
    return [np.array((*where, *sizes)), *(np.asarray(each, np.int64) for each in lists), _packed(segment.visible)]


def _segments(numbers: Int, cache: KVCache) -> Iterator[Segment]:
    while len(numbers):
        first_row, num_rows, prefix_len, first_row_written, tokens, seen, wanted = numbers[:_NUM_SIZES].tolist()
        sizes = (tokens, tokens, seen, wanted, _num_words(tokens * seen))
        ends = np.cumsum([_NUM_SIZES, *sizes])
        _, token_ids, positions, row_positions, logit_tokens, words, numbers = np.split(numbers, ends)
        yield Segment(
            KVSlot(cache, Run(first_row, num_rows)),
            tuple(token_ids.tolist()),
            positions,
            prefix_len,
            first_row_written,
            _unpacked(words, (tokens, seen)),
            row_positions,
            tuple(logit_tokens.tolist()),
        )


def _packed(mask: Bool) -> Int:
    words = np.zeros(_num_words(mask.size) * 8, np.uint8)
    bits = np.packbits(mask)
    words[: len(bits)] = bits
    return words.view(np.int64)


def _unpacked(words: Int, shape: tuple[int, int]) -> Bool:
    return np.unpackbits(words.view(np.uint8), count=shape[0] * shape[1]).reshape(shape).astype(np.bool_)


def _num_words(num_bits: int) -> int:
    return -(-num_bits // _BITS)
