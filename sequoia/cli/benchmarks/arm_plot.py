"""The picture of `sequoia bench`: bars by arm, grouped by category, with the quartiles of the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sequoia.cli.benchmarks.arm_figures import ArmFigures, GroupFigures, Spread
from sequoia.cli.benchmarks.plots import label, legend_below, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's, which colour-blind readers tell apart; then again, hatched. Plain decoding is grey.
_COLOURS = ("#999999", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#E69F00")
_HATCHES = ("", "//", "..")
_ALL = "all"
_GROUP_WIDTH = 0.85


def plot(figures: Sequence[ArmFigures], title: str, file: Path) -> None:
    """Into an SVG or PNG file: tokens per second after the first one, and the ratio to plain decoding."""
    with panels(2, title, file, width=9.0) as (figure, (speed, ratio)):
        _bars(speed, figures, _rate)
        label(speed, "Speed after the first token: median and quartiles", "", "tokens per second")
        _bars(ratio, figures, lambda group: group.ratio_to_off)
        label(ratio, "Against plain decoding: median of pairs, and quartiles", "", "times off")
        ratio.axhline(1.0, color="#222222", linewidth=0.8, linestyle="dashed")
        legend_below(figure, speed)


def _rate(group: GroupFigures) -> Spread | None:
    times = group.seconds_per_token
    return Spread(1.0 / times.high, 1.0 / times.median, 1.0 / times.low) if times else None


def _bars(axes: Axes, figures: Sequence[ArmFigures], figure_of: Callable[[GroupFigures], Spread | None]) -> None:
    groups = [_ALL, *figures[0].by_category]
    width = _GROUP_WIDTH / len(figures)
    for index, each in enumerate(figures):
        spreads = [figure_of(group) for group in (each.overall, *each.by_category.values())]
        known = [(at, spread) for at, spread in enumerate(spreads) if spread]
        middles = [spread.median for _, spread in known]
        axes.bar(
            [at - _GROUP_WIDTH / 2 + (index + 0.5) * width for at, _ in known],
            middles,
            width,
            yerr=_whiskers([spread for _, spread in known]),
            error_kw={"elinewidth": 0.8, "ecolor": "#222222"},
            color=_COLOURS[index % len(_COLOURS)],
            hatch=_HATCHES[index // len(_COLOURS) % len(_HATCHES)],
            label=each.name,
        )
    # A word a line: the groups are narrow.
    axes.set_xticks(range(len(groups)), [group.replace(" ", "\n") for group in groups])


def _whiskers(spreads: Sequence[Spread]) -> list[list[float]]:
    return [[each.median - each.low for each in spreads], [each.high - each.median for each in spreads]]
