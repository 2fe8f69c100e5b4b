"""The result of `sequoia bench`, and how it is shown: one JSON object, tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from sequoia.cli.benchmarks.arm_figures import ArmFigures, GroupFigures, Spread
from sequoia.cli.benchmarks.arm_measuring import Sample
from sequoia.cli.figures import new_table
from sequoia.optimal_tree import Rows

SCHEMA = "sequoia.bench.v1"
_GIB = 2**30
_UNKNOWN = "-"
_NUM_RANKS = 6


@dataclass(frozen=True, slots=True)
class ArmDescription:
    """What an arm ran on."""

    engine: str
    settings: str
    precision: str
    peak_bytes: int | None  # of its processes; ours are shared by all our arms


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was measured, and what it depends on."""

    pair: dict[str, Any]
    workload: dict[str, Any]
    planned_acceptance: Rows | None  # by depth and rank, of the plan in force; None: there was none
    figures: tuple[ArmFigures, ...]
    descriptions: dict[str, ArmDescription]
    unavailable: dict[str, str]
    samples: tuple[Sample, ...]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "schema": SCHEMA,
            **self.pair,
            "workload": self.workload,
            "planned_acceptance": self.planned_acceptance,
            "arms": [{**each.to_dict(), **_described(self.descriptions[each.name])} for each in self.figures],
            "unavailable": self.unavailable,
            "answers": [each.to_dict() for each in self.samples],
        }


def tables(report: Report) -> list[Table]:
    """Speed, speed by category, steps, what ran, and what did not."""
    found = [_speed_table(report.figures), _category_table(report.figures), _step_table(report)]
    found.append(_arm_table(report))
    return found + ([_unavailable_table(report.unavailable)] if report.unavailable else [])


def _described(description: ArmDescription) -> dict[str, Any]:
    return {
        "engine": description.engine,
        "settings": description.settings,
        "precision": description.precision,
        "peak_memory_bytes": description.peak_bytes,
    }


def _speed_table(figures: Sequence[ArmFigures]) -> Table:
    table = new_table("arm", "ms/token", "tokens/s", "vs off", "worst category", "differs")
    for each in figures:
        group, worst = each.overall, each.worst_category
        table.add_row(
            each.name,
            _shown(group.seconds_per_token, 1e3, 1),
            _shown(group.tokens_per_second, 1.0, 1),
            _shown(group.ratio_to_off, 1.0, 2),
            f"{worst.ratio_to_off:.2f} {worst.category}" if worst else _UNKNOWN,
            _difference(each),
        )
    table.caption = (
        "medians (quartiles) over answers; ms/token after the first token, tokens/s from end to end; vs off: the "
        "median of pairs that answer one prompt; differs: answers whose tokens are not off's, and the first such token"
    )
    return table


def _category_table(figures: Sequence[ArmFigures]) -> Table:
    categories = list(figures[0].by_category)
    table = new_table("arm", *categories)
    for each in figures:
        table.add_row(each.name, *(_cell(each.by_category[name]) for name in categories))
    table.caption = "ms/token after the first token, and vs off"
    return table


def _step_table(report: Report) -> Table:
    table = new_table("arm", "tokens/step", "first token, ms", "share of a step")
    for each in report.figures:
        group = each.overall
        shares = group.stage_shares or {}
        table.add_row(
            each.name,
            f"{group.tokens_per_step:.2f}" if group.tokens_per_step else _UNKNOWN,
            _shown(group.first_token_seconds, 1e3, 0),
            ", ".join(f"{name} {share:.0%}" for name, share in shares.items()) or _UNKNOWN,
        )
    if report.planned_acceptance:
        ranks = " ".join(f"{each:.3f}" for each in report.planned_acceptance[0][:_NUM_RANKS])
        table.caption = f"acceptance by rank at the first level, as planned with: {ranks}"
    return table


def _arm_table(report: Report) -> Table:
    table = new_table("arm", "precision", "settings", "engine", "peak memory")
    for each in report.figures:
        arm = report.descriptions[each.name]
        peak = f"{arm.peak_bytes / _GIB:.1f} GiB" if arm.peak_bytes else _UNKNOWN
        table.add_row(each.name, arm.precision, arm.settings, arm.engine, peak)
    table.caption = "peak memory: of all processes that the arm needs; weights that several map count for each"
    return table


def _unavailable_table(unavailable: dict[str, str]) -> Table:
    table = new_table("unavailable", "because")
    for name, reason in unavailable.items():
        table.add_row(name, reason)
    return table


def _shown(spread: Spread | None, scale: float, digits: int) -> str:
    if spread is None:
        return _UNKNOWN
    low, median, high = (f"{each * scale:.{digits}f}" for each in spread)
    return f"{median} ({low} to {high})"


def _cell(group: GroupFigures) -> str:
    if group.seconds_per_token is None:
        return _UNKNOWN
    ratio = f", {group.ratio_to_off.median:.2f}" if group.ratio_to_off else ""
    return f"{group.seconds_per_token.median * 1e3:.1f}{ratio}"


def _difference(figures: ArmFigures) -> str:
    if not figures.differences:
        return "no"
    prompts = {each.key[:2] for each in figures.samples}
    return f"{len(figures.differences)} of {len(prompts)}, from {min(each.position for each in figures.differences)}"
