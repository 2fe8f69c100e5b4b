"""The picture of `sequoia bench steps`: a panel a mode, a bar a tree, stacked by where a step's time goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sequoia.cli.benchmarks.plots import BLUE, GREEN, ORANGE, PURPLE, label, legend_below, panels
from sequoia.cli.benchmarks.step_figures import PARTS, StepFigures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GREY = "#999999"
# Forwards, then the work behind them; hatched for those who print.
_LOOKS = {
    "draft_forwards": (ORANGE[0], ""),
    "verify_forwards": (BLUE[0], ""),
    "draft_work": (PURPLE[0], "//"),
    "verify_work": (GREEN[0], "//"),
    "overhead": (_GREY, ".."),
}


def plot(found: Sequence[StepFigures], title: str, file: Path) -> None:
    """Milliseconds of a step into an SVG or PNG file: medians of the parts, quartiles of the whole."""
    modes = list(dict.fromkeys(each.mode for each in found))
    with panels(len(modes), f"What a step consists of: {title}", file, width=4.5) as (figure, grid):
        for axes, mode in zip(grid, modes, strict=True):
            if known := [each for each in found if each.mode == mode and each.usages]:
                _bars(axes, known)
            label(axes, mode.name, "", "milliseconds of a step")
        legend_below(figure, grid[0])


def _bars(axes: Axes, found: Sequence[StepFigures]) -> None:
    names = [each.shape for each in found]
    heights = [0.0] * len(found)
    for part, (colour, hatch) in _LOOKS.items():
        values = [spread.median * 1e3 for each in found if (spread := each.parts[part])]
        axes.bar(names, values, bottom=heights, color=colour, hatch=hatch, edgecolor="white", lw=0, label=PARTS[part])
        heights = [height + value for height, value in zip(heights, values, strict=True)]
    totals = [each.total for each in found if each.total]
    low, middle, high = ([seconds * 1e3 for seconds in each] for each in zip(*totals, strict=True))
    whiskers = [[m - e for m, e in zip(middle, low, strict=True)], [e - m for m, e in zip(middle, high, strict=True)]]
    axes.errorbar(names, middle, whiskers, color="#222222", ls="", marker="_", lw=0.8, capsize=3, label="whole step")
