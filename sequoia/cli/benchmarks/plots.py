"""The look that all plots share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart; a marker each for print.
BLUE, GREEN, PURPLE, ORANGE = ("#0072B2", "o"), ("#009E73", "s"), ("#CC79A7", "^"), ("#D55E00", "D")


@contextmanager
def panels(count: int, title: str, file: Path, *, width: float = 5.5) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with that many panels side by side, `width` inches each, written into an SVG or PNG file at the end."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(1, count, figsize=(width * count, 5), layout="constrained", squeeze=False)
    figure.suptitle(title)
    yield figure, list(grid[0])
    figure.savefig(file, dpi=150)
    plt.close(figure)


def label(axes: Axes, title: str, x: str, y: str) -> None:
    """Titles and a faint grid, no box."""
    axes.set_title(title, fontsize="medium")
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def legend_below(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, that of `axes`."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
