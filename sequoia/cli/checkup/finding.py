"""What `sequoia doctor` found, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table

from sequoia.cli.figures import new_table

Grade = Literal["good", "note", "bad"]
_COLOURS: dict[Grade, str] = {"good": "green", "note": "yellow", "bad": "red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `remedy` is empty where there is nothing to do."""

    subject: str
    grade: Grade  # note: it works, and could be better; bad: it does not work
    what: str
    remedy: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def findings_table(findings: Sequence[Finding]) -> Table:
    """One row a finding, its remedy below it."""
    table = new_table("", "", "")
    for each in findings:
        remedy = f"\n→ {each.remedy}" if each.remedy else ""
        colour = _COLOURS[each.grade]
        table.add_row(f"[{colour}]{each.grade}[/]", each.subject, _escaped(each.what + remedy))
    return table


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
