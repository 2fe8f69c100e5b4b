"""A load test's figures as tables for people, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from sequoia.cli.figures import new_table
from sequoia.cli.load.levels import LoadPlan, Measured
from sequoia.cli.load.load_figures import LATENCIES, ArmLoad, LevelFigures, arm_to_dict

_MIB = 2**20


@dataclass(frozen=True)
class LoadReport:
    """What was asked of what, and what it came to."""

    system: Mapping[str, Any]  # where it is and what it serves
    plan: LoadPlan
    percentiles: tuple[float, ...]
    bounds_ms: Mapping[str, float]  # of goodput
    measured: Measured
    link_delay_ms: float

    def to_dict(self, *, with_requests: bool = False) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "system": self.system,
            "link_delay_ms": self.link_delay_ms,
            "max_tokens": self.plan.mix.max_tokens,
            "cancel_rate": self.plan.mix.cancel_rate,
            "rounds": self.plan.num_rounds,
            "burstiness": self.plan.burstiness,
            "seed": self.plan.seed,
            "goodput_bounds_ms": dict(self.bounds_ms),
            "levels": [self._level_to_dict(each, with_requests) for each in self.measured.levels],
            "footprints": [each.to_dict() for each in self.measured.footprints],
        }

    def _level_to_dict(self, level: LevelFigures, with_requests: bool) -> dict[str, Any]:
        arms = [arm_to_dict(level, each, self.percentiles, self.bounds_ms) for each in level.arms]
        if with_requests:
            for told, arm in zip(arms, level.arms, strict=True):
                told["requests"] = [[each.to_dict() for each in run.timelines] for run in arm.runs]
        return {"level": level.name, "arms": arms}


def tables(report: LoadReport) -> list[Table]:
    """Throughput, latencies, how requests ended, and what the system held."""
    found = [_throughput(report), _latencies(report), _outcomes(report)]
    if any(each.resident_bytes is not None for each in report.measured.footprints):
        found.append(_footprints(report))
    return found


def _throughput(report: LoadReport) -> Table:
    goodput = ("goodput",) if report.bounds_ms else ()
    table = new_table("load", "arm", "tokens/s", "vs off", "tokens/step", "requests/s", *goodput)
    for level, arm in _rows(report):
        cells = [
            f"{arm.tokens_per_second:.1f}",
            _ratio(level, arm),
            "" if arm.tokens_per_step is None else f"{arm.tokens_per_step:.2f}",
            f"{len(arm.finished) / arm.seconds:.2f}",
        ]
        if goodput:
            cells.append(f"{arm.goodput(report.bounds_ms):.2f}")
        table.add_row(level.name, arm.arm, *cells)
    table.caption = "vs off: tokens/s by plain decoding's, the median of pairs of runs (quartiles)"
    return table


def _latencies(report: LoadReport) -> Table:
    table = new_table("load", "arm", *(name.upper() for name in LATENCIES))
    for level, arm in _rows(report):
        found = [arm.latency(name, report.percentiles) for name in LATENCIES]
        shown = [" / ".join(f"{value:.0f}" for value in each.percentiles.values()) if each else "" for each in found]
        table.add_row(level.name, arm.arm, *shown)
    names = " / ".join(f"p{each:g}" for each in report.percentiles)
    table.caption = f"ms, {names}; ITL is the time between pieces, each with the tokens of a step"
    return table


def _outcomes(report: LoadReport) -> Table:
    table = new_table("load", "arm", "done", "cancelled", "failed", "other text than off")
    for level, arm in _rows(report):
        counts = (str(arm.num(each)) for each in ("done", "cancelled", "failed"))
        table.add_row(level.name, arm.arm, *counts, _number(level.num_other_texts(arm)))
    errors = {error for _, arm in _rows(report) for error in arm.errors}
    table.caption = "\n".join(sorted(errors)) or None
    return table


def _footprints(report: LoadReport) -> Table:
    table = new_table("after requests", "memory MiB", "sessions left", "KV tokens left")
    for each in report.measured.footprints:
        memory = "" if each.resident_bytes is None else f"{each.resident_bytes / _MIB:.0f}"
        table.add_row(str(each.num_requests_before), memory, _number(each.num_slots_used), _number(each.kv_tokens_used))
    return table


def _rows(report: LoadReport) -> Sequence[tuple[LevelFigures, ArmLoad]]:
    return [(level, arm) for level in report.measured.levels for arm in level.arms]


def _ratio(level: LevelFigures, arm: ArmLoad) -> str:
    ratio = level.against_off(arm)
    return "" if ratio is None else f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _number(value: int | None) -> str:
    return "" if value is None else str(value)
