"""The roofline: the least time that a forward can take by what it must read and compute, and how far one is from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np


@dataclass(frozen=True, slots=True)
class ForwardCost:
    """What a forward of one session must read and compute, whoever computes it.

    Its own rows are left out of the attention: which of them a token sees is the tree's affair.
    """

    linear_parameters: int  # weights of the linear layers, the head included
    weight_bytes: int  # the same as they are stored; read once, however many tokens there are
    kv_bytes: int  # keys and values of the context
    attention_flops: int  # of each token, over the context's rows

    @property
    def bytes_read(self) -> int:
        """By the whole forward."""
        return self.weight_bytes + self.kv_bytes

    def flops(self, num_tokens: int) -> int:
        """Floating-point operations of a forward of that many tokens; a multiplication and its addition are two."""
        return num_tokens * (2 * self.linear_parameters + self.attention_flops)


class Floor(NamedTuple):
    """The least seconds of a forward, and what it would be waiting for."""

    seconds: float
    bound: Literal["memory", "compute"]


@dataclass(frozen=True, slots=True)
class Roof:
    """What a machine reaches at best."""

    bytes_per_second: float
    flops_per_second: float

    def floor(self, cost: ForwardCost, num_tokens: int) -> Floor:
        """The longer of reading and computing, as if the two overlapped perfectly."""
        reading = cost.bytes_read / self.bytes_per_second
        computing = cost.flops(num_tokens) / self.flops_per_second
        return Floor(computing, "compute") if computing > reading else Floor(reading, "memory")

    def compute_bound_from(self, cost: ForwardCost) -> int:
        """The fewest tokens with which computing takes longer than reading."""
        reading = cost.bytes_read / self.bytes_per_second
        return math.floor(reading * self.flops_per_second / cost.flops(1)) + 1


class Sample(NamedTuple):
    """One forward, and what the machine reached right before it."""

    num_tokens: int
    roof: Roof
    seconds: float


class Quartiles(NamedTuple):
    """The middle half of some numbers, and their median."""

    low: float
    median: float
    high: float


class Forwards(NamedTuple):
    """All forwards of that many tokens. `ratio` is of each one's seconds to the floor of its own moment."""

    num_tokens: int
    floor: Floor  # under the median roof
    seconds: Quartiles
    ratio: Quartiles


@dataclass(frozen=True, slots=True)
class Roofline:
    """A model's forwards beside their floor. Both roofs are over all samples."""

    cost: ForwardCost
    median_roof: Roof
    best_roof: Roof
    forwards: tuple[Forwards, ...]

    @property
    def compute_bound_from(self) -> int:
        """The fewest tokens with which computing takes longer than reading, under the median roof."""
        return self.median_roof.compute_bound_from(self.cost)


def summarise(cost: ForwardCost, samples: Sequence[Sample]) -> Roofline:
    """What the samples say together. Raises ValueError without any."""
    if not samples:
        raise ValueError("there are no samples")
    speeds = np.array([(each.roof.bytes_per_second, each.roof.flops_per_second) for each in samples])
    median_roof, best_roof = Roof(*np.median(speeds, axis=0).tolist()), Roof(*speeds.max(axis=0).tolist())
    widths = sorted({each.num_tokens for each in samples})
    forwards = (_forwards(cost, median_roof, [each for each in samples if each.num_tokens == n]) for n in widths)
    return Roofline(cost, median_roof, best_roof, tuple(forwards))


def _forwards(cost: ForwardCost, median_roof: Roof, samples: Sequence[Sample]) -> Forwards:
    num_tokens = samples[0].num_tokens
    ratios = (each.seconds / each.roof.floor(cost, num_tokens).seconds for each in samples)
    floor = median_roof.floor(cost, num_tokens)
    return Forwards(num_tokens, floor, _quartiles(each.seconds for each in samples), _quartiles(ratios))


def _quartiles(numbers: Iterable[float]) -> Quartiles:
    return Quartiles(*np.percentile(list(numbers), (25, 50, 75)).tolist())
