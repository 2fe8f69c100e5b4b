"""Measured speed of a model on this machine: seconds of a forward by tokens, sessions and context."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import accumulate, pairwise

from sequoia.engine.attention import chunk_segment, tree_segment
from sequoia.engine.forwards import Engine
from sequoia.engine.kv_cache import KVSlot
from sequoia.engine.tree_logits import MOST_AT_ONCE, HiddenRows, TreeLogits
from sequoia.hardware import LatencyCurve, LatencyProfile, SharedCurve
from sequoia.topology import TokenTree, Topology

_CONTEXT_TOKENS = 64
# Where other numbers of sessions and longer contexts are measured, as far as the worker takes them.
_NUM_SESSIONS = (2, 4, 8)
_LONG_CONTEXTS = (2048, 6144)
_SPARSE_WIDTHS = (1, 16)
# Two quick rounds that agree so well confirm each other; a single quick one may be luck, a slow one a neighbour.
_AGREEMENT = 1.08
_MOST_ROUNDS = 6
# A width between two measured ones is kept apart when a straight line through them misses it by this much.
_CLIFF = 0.1
# Looking for cliffs ends then: starting up must not take long. The powers of two are always measured.
_CLIFF_SECONDS = 4.0

Measure = Callable[[int], float]


def measure_profile(
    engine: Engine, max_tokens: int, context_length: int, *, verifies: bool = False, is_streamed: bool = False
) -> LatencyProfile:
    """One session's curve up to `max_tokens` with its cliffs, and sparser ones of more sessions and longer contexts.

    `verifies`: of a target, whose forward makes all logits of small trees only, and of larger ones some after it. Of a
    model whose weights are streamed, which takes seconds a forward: one session's, at every other power of two.
    """
    with engine.cache.slot(num_rows=_CONTEXT_TOKENS) as slot:
        engine.forward([chunk_segment(slot, [0] * _CONTEXT_TOKENS, logits=True)])
    behind = partial(_behind, engine, verifies and engine.can_wait)
    if is_streamed:
        rough = _rough(behind(1, _CONTEXT_TOKENS), max_tokens)
        return LatencyProfile(SharedCurve(1, _CONTEXT_TOKENS, rough), ())
    base = _curve_with_cliffs(behind(1, _CONTEXT_TOKENS), _powers_of_two(max_tokens))
    others = [
        SharedCurve(count, _CONTEXT_TOKENS, _sparse(behind(count, _CONTEXT_TOKENS), max_tokens // count))
        for count in _NUM_SESSIONS
        if count <= min(engine.cache.num_slots, max_tokens)
    ]
    others += [
        SharedCurve(1, length, _sparse(behind(1, length), max_tokens))
        for length in _LONG_CONTEXTS
        if length <= context_length
    ]
    return LatencyProfile(SharedCurve(1, _CONTEXT_TOKENS, base), tuple(others))


def _rough(measure: Measure, most: int) -> LatencyCurve:
    seconds = {width: measure(width) for width in _powers_of_two(most)[::-2]}
    if 1 not in seconds:
        seconds[1] = measure(1)
    _repeat_disturbed(seconds, measure)
    return LatencyCurve(*zip(*sorted(seconds.items()), strict=True))


def confirmed(measure: Callable[[], float]) -> float:
    """A duration that was seen twice: the mean of the two quickest of the first rounds in which these two agree."""
    rounds = sorted(measure() for _ in range(2))
    while rounds[1] > _AGREEMENT * rounds[0] and len(rounds) < _MOST_ROUNDS:
        rounds = sorted([*rounds, measure()])
    return (rounds[0] + rounds[1]) / 2


def _powers_of_two(most: int) -> list[int]:
    return [*(2**exponent for exponent in range(most.bit_length()) if 2**exponent < most), most]


def _sparse(measure: Measure, most: int) -> LatencyCurve:
    widths = [width for width in _SPARSE_WIDTHS if width <= most]
    return LatencyCurve(tuple(widths), tuple(map(measure, widths)))


def _curve_with_cliffs(measure: Measure, widths: Sequence[int]) -> LatencyCurve:
    """The curve through `widths`, halved again wherever it turned out not to be a straight line."""
    seconds = {width: measure(width) for width in widths}
    _repeat_disturbed(seconds, measure)
    deadline = time.perf_counter() + _CLIFF_SECONDS
    gaps = list(pairwise(widths))
    while gaps and time.perf_counter() < deadline:
        low, high = gaps.pop(0)
        middle = (low + high) // 2
        if middle == low:
            continue
        expected = seconds[low] + (seconds[high] - seconds[low]) * (middle - low) / (high - low)
        seconds[middle] = measure(middle)
        if abs(seconds[middle] - expected) > _CLIFF * expected:
            gaps += [(low, middle), (middle, high)]
    _repeat_disturbed(seconds, measure)
    return LatencyCurve(*zip(*sorted(seconds.items()), strict=True))


def _repeat_disturbed(seconds: dict[int, float], measure: Measure) -> None:
    """Measure again what took longer than a wider forward: for some seconds something else was using the machine."""
    for _ in range(_MOST_ROUNDS):
        ascending = sorted(seconds)
        quickest = list(accumulate((seconds[width] for width in reversed(ascending)), min))[::-1]
        disturbed = [
            width for width, least in zip(ascending, quickest, strict=True) if seconds[width] > _AGREEMENT * least
        ]
        for width in disturbed:
            seconds[width] = min(seconds[width], measure(width))
        if not disturbed:
            return


def _behind(engine: Engine, can_wait: bool, num_sessions: int, num_context_tokens: int) -> Measure:
    """Seconds of a forward by the tokens of each of that many sessions, each behind a context."""

    def measure(width: int) -> float:
        with ExitStack() as stack:
            num_rows = num_context_tokens + width
            slots = [stack.enter_context(engine.cache.slot(num_rows=num_rows)) for _ in range(num_sessions)]
            for slot in slots:
                slot.pretend(num_context_tokens)
            return confirmed(lambda: _seconds(engine, slots, width, logits_later=can_wait and width > MOST_AT_ONCE))

    return measure


def _seconds(engine: Engine, slots: Iterable[KVSlot], width: int, *, logits_later: bool) -> float:
    """Of one forward, and of what comes later: the logits that a walk down a tree of that size looks at first."""
    chain = TokenTree(Topology.chain(width), (0,) * width)
    segments = [tree_segment(slot, (), chain, logits_later=logits_later) for slot in slots]
    started = time.perf_counter()
    for answer in engine.forward_some(segments):
        logits = TreeLogits(chain.topology, answer, 1) if isinstance(answer, HiddenRows) else answer
        float(logits[0][0])  # waits for the device
    return time.perf_counter() - started
