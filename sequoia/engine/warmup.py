"""Measured speed of a model on this machine: seconds of one forward by the number of tokens in it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from sequoia.engine.attention import chunk_segment
from sequoia.engine.executor import Engine
from sequoia.engine.kv_cache import KVSlot
from sequoia.hardware import LatencyCurve

_CONTEXT_TOKENS = 64
_ROUNDS = 2


def measure_latency(engine: Engine, widths: Sequence[int]) -> LatencyCurve:
    """The least of some interleaved rounds (noise only adds) behind a short context, after a forward that allocates."""
    with engine.cache.slot() as slot:
        engine.forward([chunk_segment(slot, [0] * _CONTEXT_TOKENS, logits=True)])
        slot.keep(range(_CONTEXT_TOKENS))
        rounds = [[_seconds(engine, slot, width) for width in widths] for _ in range(_ROUNDS)]
    return LatencyCurve(tuple(widths), tuple(min(column) for column in zip(*rounds, strict=True)))


def _seconds(engine: Engine, slot: KVSlot, width: int) -> float:
    started = time.perf_counter()
    [logits] = engine.forward([chunk_segment(slot, [0] * width, logits=True)])
    float(logits[0, 0])  # waits for the device
    return time.perf_counter() - started
