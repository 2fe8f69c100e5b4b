"""A load test from its first request to its last: levels one after the other, arms in turn on the same requests."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sequoia.cli.load.live_view import LiveView
from sequoia.cli.load.load_figures import ArmLoad, Footprint, LevelFigures
from sequoia.cli.load.probe import Probe
from sequoia.cli.load.running import Arrivals, Run, run_load
from sequoia.cli.load.timeline import Driver
from sequoia.cli.load.workload import LoadRequest, Mix, arrival_seconds

# Warm-up requests are others than those that count.
_WARM_UP_SEED = 1 << 32


@dataclass(frozen=True, slots=True)
class Level:
    """How much is asked at a time: so many sessions, or so many requests a second."""

    max_concurrency: int | None
    rate: float  # infinite: the next as soon as one ends
    num_requests: int  # of one run

    @property
    def name(self) -> str:
        """For people."""
        if math.isfinite(self.rate):
            return f"{self.rate:g} requests/s"
        if self.max_concurrency is None:
            return "all at once"
        return f"{self.max_concurrency} session{'s' * (self.max_concurrency > 1)}"


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What a load test does."""

    mix: Mix
    levels: tuple[Level, ...]
    arms: tuple[str, ...]
    num_rounds: int
    num_warmups: int
    burstiness: float
    seed: int

    def arrivals(self, level: Level, count: int, seed: int) -> Arrivals:
        """Of the requests of one run."""
        return Arrivals(arrival_seconds(count, level.rate, self.burstiness, seed), level.max_concurrency)

    def turns(self) -> Iterator[tuple[int, str]]:
        """The runs of a level: every round begins with the next arm."""
        for number in range(self.num_rounds):
            start = number % len(self.arms)
            for arm in self.arms[start:] + self.arms[:start]:
                yield number, arm


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured, level by level, and what the system held after the warm-up and after every run."""

    levels: tuple[LevelFigures, ...]
    footprints: tuple[Footprint, ...]


async def run_levels(plan: LoadPlan, driver: Driver, probe: Probe, view: LiveView) -> Measured:
    """All of it."""
    session = _Session(plan, driver, probe, view)
    levels = [await session.measure(level) for level in plan.levels]
    return Measured(tuple(levels), tuple(session.footprints))


class _Session:
    """A load test that goes on."""

    def __init__(self, plan: LoadPlan, driver: Driver, probe: Probe, view: LiveView) -> None:
        self._plan, self._driver, self._probe, self._view = plan, driver, probe, view
        self._num_requests = 0
        self.footprints: list[Footprint] = []

    async def measure(self, level: Level) -> LevelFigures:
        """Warm up, then every arm in every round."""
        plan = self._plan
        runs: dict[str, list[Run]] = {arm: [] for arm in plan.arms}
        if plan.num_warmups:
            requests = plan.mix.requests(plan.num_warmups, plan.seed + _WARM_UP_SEED)
            for arm in plan.arms:
                await self._run(level, arm, requests, 0, f"{level.name}, {arm}, warm-up")
        self.footprints.append(await self._probe.footprint(self._num_requests))
        for number, arm in plan.turns():
            requests = plan.mix.requests(level.num_requests, plan.seed + number)
            doing = f"{level.name}, {arm}, run {number + 1} of {plan.num_rounds}"
            runs[arm].append(await self._run(level, arm, requests, number, doing))
            self.footprints.append(await self._probe.footprint(self._num_requests))
        return LevelFigures(level.name, tuple(ArmLoad(arm, tuple(each)) for arm, each in runs.items()))

    async def _run(self, level: Level, arm: str, requests: Sequence[LoadRequest], number: int, doing: str) -> Run:
        arrivals = self._plan.arrivals(level, len(requests), self._plan.seed + number)
        with self._view.run(doing, len(requests)) as on_change:
            run = await run_load(self._driver, arm, requests, arrivals, on_change)
        self._num_requests += len(requests)
        return run
