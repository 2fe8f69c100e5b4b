"""What a load test asks: requests by category, when they come, and which of them go away before their answer ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np

from sequoia.cli.benchmarks.prompt_set import BenchPrompt


@dataclass(frozen=True, slots=True)
class Form:
    """What all requests of a test have in common."""

    temperature: float
    is_raw: bool  # prompts are text to continue, no chat template
    ignore_eos: bool


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One request; it is cancelled after so many of its tokens were received (0: right after it was sent)."""

    prompt: BenchPrompt
    max_tokens: int
    seed: int
    cancel_after: int | None = None  # None: it stays to the end


@dataclass(frozen=True, slots=True)
class Mix:
    """What requests are made of."""

    prompts: tuple[BenchPrompt, ...]
    shares: Mapping[str, float]  # of the categories; those that are left out get none
    max_tokens: int
    cancel_rate: float  # share of requests that go away

    def requests(self, count: int, seed: int) -> list[LoadRequest]:
        """So many of them; the same for the same seed."""
        rng = np.random.default_rng(seed)
        names = list(self.shares)
        weights = np.array([self.shares[name] for name in names])
        turns = {name: cycle(self._of(name, rng)) for name in names}
        drawn = rng.choice(len(names), size=count, p=weights / weights.sum())
        cancelled = rng.random(count) < self.cancel_rate
        after = rng.integers(0, self.max_tokens, size=count)
        return [
            LoadRequest(next(turns[names[which]]), self.max_tokens, seed + i, int(after[i]) if cancelled[i] else None)
            for i, which in enumerate(drawn)
        ]

    def _of(self, category: str, rng: np.random.Generator) -> Sequence[BenchPrompt]:
        """In an order that has nothing to do with that of other categories."""
        found = [each for each in self.prompts if each.category == category]
        return [found[i] for i in rng.permutation(len(found))]


def arrival_seconds(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """When requests come, counted from the first: intervals of a gamma distribution with the mean 1 / rate.

    A burstiness of 1 makes them a Poisson process; below it they come in bursts, above it evenly. All at once for an
    infinite rate.
    """
    if not np.isfinite(rate):
        return [0.0] * count
    intervals = np.random.default_rng(seed).gamma(burstiness, 1.0 / (rate * burstiness), size=count)
    return [float(each) for each in np.cumsum(intervals) - intervals[:1]]
