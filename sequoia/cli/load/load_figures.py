"""What runs come to: throughput, latencies by percentile, goodput; and arms against plain decoding in pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sequoia.cli.benchmarks.arm_figures import Spread, spread
from sequoia.cli.load.running import Run
from sequoia.cli.load.timeline import Timeline

OFF = "off"
LATENCIES = ("ttft", "tpot", "itl", "e2el")
_MS = 1e3


@dataclass(frozen=True, slots=True)
class Latency:
    """Of many requests, in milliseconds; percentiles by number."""

    mean: float
    percentiles: Mapping[float, float]


@dataclass(frozen=True)
class ArmLoad:
    """An arm's runs at one level, taken together."""

    arm: str
    runs: tuple[Run, ...]

    @cached_property
    def timelines(self) -> tuple[Timeline, ...]:
        """Of all runs."""
        return tuple(each for run in self.runs for each in run.timelines)

    @cached_property
    def finished(self) -> tuple[Timeline, ...]:
        """Those that were answered to the end."""
        return tuple(each for each in self.timelines if each.outcome == "done")

    @property
    def seconds(self) -> float:
        """Of all runs."""
        return sum(each.seconds for each in self.runs)

    @property
    def tokens_per_second(self) -> float:
        """That clients received, those of cancelled requests included."""
        return sum(each.num_tokens for each in self.timelines) / self.seconds

    @property
    def tokens_per_step(self) -> float | None:
        """Of finished answers; None where the server does not tell."""
        told = [each.ending for each in self.finished if each.ending and each.ending.num_steps]
        num_steps = sum(each.num_steps or 0 for each in told)
        return 1.0 + sum(each.num_accepted_tokens or 0 for each in told) / num_steps if num_steps else None

    @property
    def errors(self) -> dict[str, int]:
        """How often each was met, the most frequent first."""
        return dict(Counter(each.error for each in self.timelines if each.outcome == "failed").most_common())

    def latency(self, name: str, percentiles: Sequence[float]) -> Latency | None:
        """One of LATENCIES, of finished answers; None where none has it."""
        values = [value * _MS for each in self.finished for value in _values(each, name)]
        if not values:
            return None
        found = np.percentile(values, percentiles)
        return Latency(float(np.mean(values)), dict(zip(percentiles, map(float, found), strict=True)))

    def goodput(self, bounds_ms: Mapping[str, float]) -> float:
        """Requests a second that were answered within all bounds."""
        return sum(_is_within(each, bounds_ms) for each in self.finished) / self.seconds

    def num(self, outcome: str) -> int:
        """Of requests that ended so."""
        return sum(each.outcome == outcome for each in self.timelines)


@dataclass(frozen=True)
class LevelFigures:
    """All arms at one level; run i of each was asked the same requests."""

    name: str  # "4 sessions", "2 requests/s"
    arms: tuple[ArmLoad, ...]

    def against_off(self, arm: ArmLoad) -> Spread | None:
        """Tokens per second by plain decoding's, over pairs of runs; None without plain decoding."""
        off = self._off
        if off is None or off is arm:
            return None
        pairs = zip(arm.runs, off.runs, strict=True)
        return spread(_rate(ours) / _rate(theirs) for ours, theirs in pairs if _rate(theirs))

    def num_other_texts(self, arm: ArmLoad) -> int | None:
        """Finished answers whose text is not plain decoding's to the same request; None as above."""
        off = self._off
        if off is None or off is arm:
            return None
        pairs = zip(arm.timelines, off.timelines, strict=True)
        return sum(a.text != b.text for a, b in pairs if a.outcome == b.outcome == "done")

    @property
    def _off(self) -> ArmLoad | None:
        return next((each for each in self.arms if each.arm == OFF), None)


def arm_to_dict(
    level: LevelFigures, arm: ArmLoad, percentiles: Sequence[float], bounds_ms: Mapping[str, float]
) -> dict[str, Any]:
    """Ready for JSON, by the names that `vllm bench serve` has where it has them."""
    ratio = level.against_off(arm)
    found: dict[str, Any] = {
        "arm": arm.arm,
        "duration": arm.seconds,
        "completed": arm.num("done"),
        "cancelled": arm.num("cancelled"),
        "failed": arm.num("failed"),
        "errors": arm.errors,
        "total_output_tokens": sum(each.num_tokens for each in arm.timelines),
        "request_throughput": len(arm.finished) / arm.seconds,
        "request_goodput": arm.goodput(bounds_ms) if bounds_ms else None,
        "output_throughput": arm.tokens_per_second,
        "output_throughput_by_run": [_rate(each) for each in arm.runs],
        "tokens_per_step": arm.tokens_per_step,
        "against_off": ratio._asdict() if ratio else None,
        "other_texts_than_off": level.num_other_texts(arm),
    }
    for name in LATENCIES:
        if latency := arm.latency(name, percentiles):
            found[f"mean_{name}_ms"] = latency.mean
            found |= {f"p{percent:g}_{name}_ms": value for percent, value in latency.percentiles.items()}
    return found


@dataclass(frozen=True, slots=True)
class Footprint:
    """What the system holds at a moment at which nobody asks it anything."""

    num_requests_before: int  # that it had been asked since the test began
    resident_bytes: int | None  # of all its processes; None where they are not ours
    num_slots_used: int | None  # of both workers
    kv_tokens_used: int | None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def _rate(run: Run) -> float:
    return sum(each.num_tokens for each in run.timelines) / run.seconds


def _values(timeline: Timeline, name: str) -> Iterable[float]:
    if name == "itl":
        return timeline.between_pieces_seconds
    found = {
        "ttft": timeline.first_token_seconds,
        "tpot": timeline.seconds_per_token,
        "e2el": timeline.total_seconds,
    }[name]
    return () if found is None else (found,)


def _is_within(timeline: Timeline, bounds_ms: Mapping[str, float]) -> bool:
    return all(
        value * _MS <= bound for name, bound in bounds_ms.items() for value in _values(timeline, name) if name != "itl"
    )
