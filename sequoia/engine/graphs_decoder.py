"""A decoder whose forwards are few CUDA graphs: one launch where the lean decoder has some hundred."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sequoia.engine.attention import PackedBatch
from sequoia.engine.graphs import Graphs, Work
from sequoia.engine.kv_cache import KVCache
from sequoia.engine.lean_decoder import LeanDecoder
from sequoia.engine.static_batch import (
    Bucket,
    StaticArrays,
    StaticAttention,
    StaticTensors,
    bucket_for,
    flat_tokens,
    static_arrays,
)
from sequoia.engine.transfer import staged, unpacked, upload

# Each holds a buffer of inputs and its launches, a megabyte or two. Buckets that come after these run without a graph.
_MOST_GRAPHS = 128


class _Captured(NamedTuple):
    buffer: Tensor  # the bytes of the inputs
    inputs: StaticTensors  # views of it
    replay: Work  # -> (all tokens of the bucket, hidden)


class GraphsDecoder:
    """The lean decoder's layers over static shapes, captured when a bucket is first met; the same logits.

    On the CPU the same code runs without a capture. Forwards too wide for the buckets, of prompt chunks above all, are
    the lean decoder's own. The head stays outside the graphs: it then runs for the wanted tokens only, and no graph
    holds logits, which are as wide as the vocabulary.
    """

    name = "graphs"
    grow = None
    make_target = None
    hidden_rows = None
    logits = None
    rows_are_independent = False

    def __init__(self, lean: LeanDecoder, device: torch.device) -> None:
        self._lean, self._device = lean, device
        self._graphs = Graphs(device)
        self._captured: dict[Bucket, _Captured] = {}

    def attach(self, cache: KVCache) -> None:
        """Allocate the cache's rows, which the graphs read and write from now on."""
        self._captured.clear()
        self._lean.attach(cache)

    def forward(self, batch: PackedBatch, cache: KVCache) -> Tensor:
        """Write the batch's rows. Returns the logits asked for, (wanted tokens, padded vocabulary)."""
        bucket = bucket_for(batch.segments, cache.slot_rows)
        if bucket is None or (bucket not in self._captured and len(self._captured) == _MOST_GRAPHS):
            return self._lean.forward(batch, cache)
        arrays = static_arrays(batch.segments, bucket, cache.scratch_row)
        captured = self._captured.get(bucket) or self._capture(bucket, arrays, cache)
        captured.buffer.copy_(staged(arrays, self._device), non_blocking=True)
        for session, segment in enumerate(batch.segments):
            if isinstance(segment.token_ids, Tensor):
                captured.inputs.token_ids[session, : segment.num_tokens] = segment.token_ids
        hidden = captured.replay()
        [wanted] = upload((flat_tokens(batch.segments, bucket),), self._device)
        return self._lean.logits(hidden.index_select(0, wanted))

    def _capture(self, bucket: Bucket, arrays: StaticArrays, cache: KVCache) -> _Captured:
        buffer = staged(arrays, self._device).to(self._device, non_blocking=True)
        inputs = StaticTensors(*unpacked(buffer, arrays))
        lean = self._lean

        def work() -> Tensor:
            attention = StaticAttention(inputs, bucket, cache, lean.dtype, lean.shape.attention_scale)
            return lean.hidden(inputs.tokens, cache, attention)

        self._captured[bucket] = _Captured(buffer, inputs, self._graphs.capture(work))
        return self._captured[bucket]
