"""A load test's report as one HTML file that needs nothing else: figures, and pictures of them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from jinja2 import Environment
from rich.table import Table

from sequoia.cli.benchmarks.plots import BLUE, GREEN, ORANGE, PURPLE, label, legend_below, panels
from sequoia.cli.load.load_report import LoadReport, tables
from sequoia.errors import InvalidArgument

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLES = (BLUE, ORANGE, GREEN, PURPLE)
_MIB = 2**20


def check_drawing() -> None:
    """Before the minutes that a load test takes. Raises InvalidArgument naming --html."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidArgument("needs matplotlib: pip install sequoia-serving[bench]", "html")


def write_page(report: LoadReport, file: Path) -> None:
    """Draw and write."""
    template = Environment(autoescape=True).from_string(
        files(__package__).joinpath("load_page.html").read_text("utf-8")
    )
    page = template.render(
        system=report.system,
        facts=_facts(report),
        pictures=_pictures(report),
        tables=[_cells(each) for each in tables(report)],
        data=json.dumps(report.to_dict(), indent=1),
    )
    file.write_text(page, "utf-8")


def _facts(report: LoadReport) -> dict[str, str]:
    plan = report.plan
    return {
        "tokens an answer, at most": str(plan.mix.max_tokens),
        "runs an arm and level": str(plan.num_rounds),
        "cancelled": f"{plan.mix.cancel_rate:.0%}",
        "round trip added": f"{report.link_delay_ms:g} ms",
        "categories": ", ".join(plan.mix.shares),
        "seed": str(plan.seed),
    }


def _cells(table: Table) -> dict[str, object]:
    columns = [list(column.cells) for column in table.columns]
    return {"heads": [column.header for column in table.columns], "rows": list(zip(*columns, strict=True))}


def _pictures(report: LoadReport) -> str:
    """An SVG element."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "pictures.svg"
        has_memory = any(each.resident_bytes is not None for each in report.measured.footprints)
        with panels(3 + has_memory, "", file, width=4.5) as (figure, axes):
            _by_level(axes[0], report, lambda level, arm: level.arms[arm].tokens_per_second)
            label(axes[0], "Throughput", "", "tokens/s")
            for at, name in ((1, "ttft"), (2, "tpot")):
                _latency(axes[at], report, name)
                label(axes[at], f"{name.upper()}: percentiles", "", "ms")
            if has_memory:
                _memory(axes[3], report)
            legend_below(figure, axes[0])
        svg = file.read_text("utf-8")
    return svg[svg.index("<svg") :]


def _by_level(axes: Axes, report: LoadReport, value: Callable[..., float]) -> None:
    levels = report.measured.levels
    width = 0.8 / len(report.plan.arms)
    for index, name in enumerate(report.plan.arms):
        places = [at - 0.4 + (index + 0.5) * width for at in range(len(levels))]
        colour, _ = _STYLES[index]
        axes.bar(places, [value(level, index) for level in levels], width, color=colour, label=name)
        for place, level in zip(places, levels, strict=True):
            rates = [sum(t.num_tokens for t in run.timelines) / run.seconds for run in level.arms[index].runs]
            axes.plot([place] * len(rates), rates, ".", color="#222222", markersize=4)
    axes.set_xticks(range(len(levels)), [level.name.replace(" ", "\n") for level in levels])


def _latency(axes: Axes, report: LoadReport, name: str) -> None:
    """From the lowest percentile to the highest, a mark each."""
    levels = report.measured.levels
    for index in range(len(report.plan.arms)):
        colour, marker = _STYLES[index]
        for at, level in enumerate(levels):
            if found := level.arms[index].latency(name, report.percentiles):
                values = list(found.percentiles.values())
                axes.plot([at + 0.12 * (2 * index - 1)] * len(values), values, f"{marker}-", color=colour, markersize=4)
    axes.set_xticks(range(len(levels)), [level.name.replace(" ", "\n") for level in levels])
    axes.set_yscale("log")


def _memory(axes: Axes, report: LoadReport) -> None:
    found = [each for each in report.measured.footprints if each.resident_bytes is not None]
    axes.plot([each.num_requests_before for each in found], [(each.resident_bytes or 0) / _MIB for each in found], "o-")
    axes.set_ylim(bottom=0)
    label(axes, "Memory of all processes between runs", "requests so far", "MiB")
